"""
A decoding step on a GPU as one CUDA graph.

The graph computes up to 16 new tokens of a row behind a filled `QWenCache` or `QWenQuantizedCache` from the network's
weights, floats, GPTQ's or int8, by the kernels of triton_kernels.py, and by the library of products where there are
many rows. It reads lengths, positions, NTK scales and the addresses of keys and values from tensors: one graph serves
every length, every cache of so many rows, and storage that grows. It belongs to one generation at a time, and to the
weights it was captured with: before every step it is compared where the model has them now.

On several GPUs there is a graph on each. With `device_map` each has consecutive blocks, and hidden states go from one
to the next. With `tp_plan` each process has a share of every matrix, and the sums over the processes are in its graph.

In the shapes below B is the batch, T the new tokens, nh the heads (of this process) and hd the width of one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import sys
import threading
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .qwen_cache import QWenCache
from .qwen_ops import GPU_HEAD_SIZES, quantized_sizes
from .qwen_plain import has_no_hooks, is_as_made, is_untouched
from .qwen_quantization import Int8Linear, QuantizedLinear
from .transformers_compat import (
    forget_workspaces,
    is_compiling,
    local_tensor,
    parallel_style,
    random_state_apart,
    symmetric_memory,
)

logger = logging.get_logger("transformers.models.qwen.qwen_cuda_graph")

DEVICES = ("cuda",)  # the tests add the CPU, where nothing is captured and the kernels run in Triton's interpreter
MAX_ROWS = 512  # new tokens of all rows together; more are a prompt
MAX_TOKENS = 16  # new ones of a row, drafts that are checked; more are a prompt
KEPT_GRAPHS = 8  # of a model, while nobody uses them


@functools.lru_cache(maxsize=None)
def _kernels():
    """triton_kernels.py, or None without Triton. At the first use: it needs a GPU, or an interpreter chosen before."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .triton_kernels import register  # in this form: transformers to 4.57 copies only what is imported so

    return sys.modules[register.__module__]


# --- Which models and caches -------------------------------------------------------------------------------------


def _linears(model) -> list[nn.Module]:
    """All matrices, in the order of the computation."""
    blocks = model.transformer.h
    return [m for b in blocks for m in (b.attn.c_attn, b.attn.c_proj, b.mlp.w1, b.mlp.w2, b.mlp.c_proj)] + [
        model.lm_head
    ]


def _norms(model) -> list[nn.Module]:
    return [norm for block in model.transformer.h for norm in (block.ln_1, block.ln_2)] + [model.transformer.ln_f]


def _styles(model) -> list[str]:
    """How tensor parallelism splits the embedding and every matrix by the model's own plan."""
    of_block = ["colwise_fused_heads", "rowwise", "colwise", "colwise", "rowwise"]
    return ["embedding_rowwise", *of_block * len(model.transformer.h), "colwise_gather_output"]


def processes(model):
    """
    The group of processes that a model is split over by tensor parallelism, None for a whole model.

    Raises ValueError for a model that is neither: other than by its own plan, or with something else around a matrix.
    """
    modules = [model.transformer.wte, *_linears(model)]
    if all(map(is_untouched, modules)):
        return None
    found = [parallel_style(module) if has_no_hooks(module) else None for module in modules]
    if None in found or [style for style, _ in found] != _styles(model) or len({group for _, group in found}) > 1:
        raise ValueError("The matrices of this model are neither whole nor split by its own plan.")
    return found[0][1]


def stations(model) -> list[nn.Module]:
    """What a step goes through, in its order, each on one device: the embedding, blocks, the last norm, the head."""
    transformer = model.transformer
    return [transformer.wte, *transformer.h, transformer.ln_f, model.lm_head]


def _tensors(station: nn.Module) -> list[torch.Tensor]:
    """The weights that a step reads there, what this process has of them."""
    modules = [station]
    if hasattr(station, "attn"):
        attn, mlp = station.attn, station.mlp
        modules = [station.ln_1, station.ln_2, attn.c_attn, attn.c_proj, mlp.w1, mlp.w2, mlp.c_proj]
    own = (t for module in modules for t in (*module._parameters.values(), *module._buffers.values()))
    return [local_tensor(t) for t in own if t is not None]


def _has_codes(module: nn.Module) -> bool:
    return type(module) in (QuantizedLinear, Int8Linear)


def device_of(station: nn.Module) -> torch.device:
    return next(itertools.chain(station.parameters(), station.buffers())).device


def _is_on_one_gpu(station: nn.Module) -> bool:
    devices = {t.device for t in _tensors(station)}
    return len(devices) == 1 and has_graphs(devices.pop())


def has_graphs(device: torch.device) -> bool:
    return device.type in DEVICES


def _is_captured(model) -> bool:
    """Whether the caller captures what is computed in a graph of their own, which can't have another captured in it."""
    return model.transformer.ln_f.weight.is_cuda and torch.cuda.is_current_stream_capturing()


def is_plain(model) -> bool:
    """
    Whether a step may be computed from the weights alone: matrices of exactly the network's types, in one precision or
    quantised, every block on one GPU, no hooks, adapters, training, compilation or capture by the caller.
    """
    differentiated = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    if model.training or is_compiling() or differentiated or _is_captured(model):
        return False
    network = model.transformer
    if type(model).__module__ != type(network).__module__ or not is_as_made(network):
        return False
    linears = _linears(model)
    if not (
        all(type(module) is nn.Linear or _has_codes(module) for module in linears)
        and type(network.wte) is nn.Embedding
        and network.wte.max_norm is None
        and type(network.rotary_emb).__name__ == "RotaryEmbedding"
        and type(network.rotary_emb).__module__ == type(network).__module__
        and all(map(is_untouched, (model, network, network.rotary_emb)))
    ):
        return False
    try:
        group = processes(model)
    except ValueError:
        return False
    codes = [t for module in linears if _has_codes(module) for t in _weight(module) if torch.is_tensor(t)]
    floats = [m.weight for m in (*linears, *_norms(model), network.wte) if not _has_codes(m)]
    floats += [module.bias for module in linears if module.bias is not None]
    floats = [local_tensor(t) for t in floats]
    first = network.ln_f.weight
    return (
        first.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(type(t) in (nn.Parameter, torch.Tensor) and t.is_contiguous() for t in floats + codes)
        and all(t.dtype == first.dtype for t in floats)
        and all(map(_is_on_one_gpu, stations(model)))
        and (group is None or _is_split_evenly(model, group))
        and _kernels() is not None
        # cudaMallocAsync ends the process when what a capture has allocated is freed later.
        and (not first.is_cuda or torch.cuda.get_allocator_backend() == "native")
        and model.config.kv_channels in GPU_HEAD_SIZES
    )


def _is_split_evenly(model, group) -> bool:
    shares = [local_tensor(module.weight).shape[0] for module in (model.transformer.wte, model.lm_head)]
    return all(share * group.size() == model.config.vocab_size for share in shares)


def takes(model, cache, rows: int) -> bool:
    """Whether steps of `rows` new tokens behind this cache, once it is filled, are for a graph of a plain model."""
    dtype, devices = model.transformer.ln_f.weight.dtype, [device_of(block) for block in model.transformer.h]
    hd, c_attn = model.config.kv_channels, model.transformer.h[0].attn.c_attn
    projections = c_attn.out_features if _has_codes(c_attn) else local_tensor(c_attn.weight).shape[0]
    return (
        isinstance(cache, QWenCache)
        and cache.kernel
        and not getattr(cache, "has_no_room_for_graphs", False)
        and all(map(has_graphs, devices))
        and 0 < rows <= MAX_ROWS
        and (cache.device is None or {cache.device} == set(devices))
        # The cache of another model would have kernels read and write where nothing of it is.
        and len(cache.layers) in (0, len(devices))
        and all(
            t.device == device
            and (cache.bits is not None or t.dtype == dtype)
            and t.shape[1::2] == (projections // (3 * hd), width)
            for layer, device in zip(cache.layers, devices)
            for t, width in zip(
                layer.storages(), 2 * ((hd,) if cache.bits is None else quantized_sizes(hd, cache.bits))
            )
        )
    )


class _Places:
    """
    Where a model has its weights: modules by their parents, and the addresses of parameters and buffers. Its signature
    has the settings that a graph is captured with, too.
    """

    def __init__(self, model):
        transformer = model.transformer
        parents = [model, transformer, transformer.h]
        parents += [m for block in transformer.h for m in (block, block.attn, block.mlp)]
        self._links = [
            (parent._modules, name, module) for parent in parents for name, module in parent._modules.items()
        ]
        modules = [*_linears(model), *_norms(model), transformer.wte]
        of_modules = [tensors for m in modules for tensors in (m._parameters, m._buffers)]
        self._tensors = [(tensors, name) for tensors in of_modules for name, t in tensors.items() if t is not None]
        tensors = [local_tensor(tensors[name]) for tensors, name in self._tensors]
        config, rotary = model.config, transformer.rotary_emb
        settings = [config.use_logn_attn, config.seq_length, rotary.dim, rotary.base]
        settings += [norm.eps for norm in _norms(model)] + [block.attn.scaling for block in transformer.h]
        quantised = [m for m in _linears(model) if type(m) is QuantizedLinear]
        settings += [(m.format, m.group_size, m.is_ordered, m.arrangement) for m in quantised]
        self.signature = [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors], settings
        self._addresses = [t.data_ptr() for t in tensors]

    def unchanged(self) -> bool:
        """Whether all of them are where they were; what is written in place needs no attention."""
        return all(modules.get(name) is module for modules, name, module in self._links) and self._addresses == [
            local_tensor(tensors[name]).data_ptr() for tensors, name in self._tensors
        ]


# --- The step ----------------------------------------------------------------------------------------------------


def _weight(linear):
    """As `product`, `gptq_product` or `int8_product` of triton_products.py takes it."""
    return linear.tensors() if _has_codes(linear) else local_tensor(linear.weight)


def _bias(linear):
    return None if linear.bias is None else local_tensor(linear.bias)


def _kernel_of(linear, gate, rows: int):
    """The kernel for products of so many rows with a matrix, and its gate or None; None if there is none."""
    kernels = _kernels()
    if gate is not None and (type(gate) is not type(linear) or (gate.bias is None) != (linear.bias is None)):
        return None
    if type(linear) is not QuantizedLinear:
        kernel = kernels.int8_product if type(linear) is Int8Linear else kernels.product
        return kernel if rows <= kernels.PRODUCT_ROWS else None
    if rows > kernels.GPTQ_MAX_ROWS or not kernels.takes_gptq(*linear.tensors()):
        return None
    if gate is not None and (gate.tensors()[4:] != linear.tensors()[4:] or not kernels.takes_gptq(*gate.tensors())):
        return None
    if gate is not None and gate.arrangement != linear.arrangement:
        return None
    return kernels.gptq_product


def _library_product(x, linear, bias):
    return linear.product(x, bias) if _has_codes(linear) else F.linear(x, _weight(linear), bias)


def parts_of(model) -> list[tuple[torch.device, slice]]:
    """The stations of a model that follow each other on one device, as slices of `stations`, with that device."""
    parts, end = [], 0
    for device, group in itertools.groupby(stations(model), device_of):
        begin, end = end, end + len(list(group))
        parts.append((device, slice(begin, end)))
    return parts


class _Part:
    """
    Stations of a step on one device, and their graph.

    Buffers that it reads: `input`, token ids, int64 (B, T), or the hidden states (B * T, hidden) of the part before;
    `positions` int64 (B, T); `starts` int64 (B), the first key of a row that is not padding; `inverse_frequencies`
    float32 (B, rotated / 2); and a table of lengths and addresses (triton_attention.py).
    """

    def __init__(self, model, device: torch.device, place: slice, B: int, T: int, bits: int):
        config, dtype = model.config, model.transformer.ln_f.weight.dtype
        self._config, self._place, self._bits = config, place, bits
        self._sum = _Sum(processes(model), B * T * max(config.hidden_size, config.vocab_size), dtype, device)
        self._nh = config.num_attention_heads // self._sum.processes
        rotary = model.transformer.rotary_emb
        self._rotary = rotary.dim, rotary.base
        self._slots = 2 if bits >= 16 else 4
        first, end = (min(max(n - 1, 0), config.num_hidden_layers) for n in (place.start, place.stop))  # of its blocks
        self._storages = slice(first * self._slots, end * self._slots)
        self._slots_of_bind: list[int] | None = None
        self.graph = self.output = None
        self._is_ready = False  # whether its kernels are compiled
        self._takes_library = False  # whether PyTorch's library of products multiplies
        self.may_stay = self._sum.outlives_graphs
        self.used = None  # an event behind the last step
        with torch.inference_mode(False):
            self.input = torch.zeros(B, T, dtype=torch.int64, device=device)
            if place.start:
                self.input = torch.zeros(B * T, config.hidden_size, dtype=dtype, device=device)
            self.positions = torch.zeros(B, T, dtype=torch.int64, device=device)
            self.starts = torch.zeros(B, dtype=torch.int64, device=device)
            self.inverse_frequencies = torch.zeros(B, rotary.dim // 2, dtype=torch.float32, device=device)
            size = _kernels().HEADER + self._slots * (end - first)
            self._table = torch.zeros(size, dtype=torch.int64, device=device)
            self._base = torch.zeros(1, dtype=dtype if bits >= 16 else torch.uint8, device=device)

    def bind(self, starts: torch.Tensor | None, alpha: torch.Tensor | None) -> None:
        """As of `GraphedSteps`."""
        if self.used is not None:
            self.used.wait(torch.cuda.current_stream(self.input.device))
        self.starts.zero_() if starts is None else self.starts.copy_(starts)
        dim, base = self._rotary
        exponents = torch.arange(0, dim, 2, device=self.starts.device, dtype=torch.float32) / dim
        if alpha is not None:
            base = base * alpha.to(exponents.device)[:, None] ** (dim / (dim - 2))  # (B or 1, 1)
        self.inverse_frequencies.copy_(1.0 / base**exponents)

    def give_back(self) -> None:
        """Whoever binds it next, on another stream, waits for the steps of this one."""
        if self.input.is_cuda:
            self.used = torch.cuda.Event()
            self.used.record(torch.cuda.current_stream(self.input.device))

    def step(self, model, x: torch.Tensor, positions: torch.Tensor, storages: list, length: int) -> torch.Tensor:
        """
        The output for an input x of another device or this one, in a buffer that the next step overwrites.

        positions: int64 (B, T). storages: of all layers. length: tokens in them after this step.
        """
        storages = storages[self._storages]
        base, size = self._base.data_ptr(), self._base.element_size()
        slots = [t.shape[2] for t in storages[:1]] + [(t.data_ptr() - base) // size for t in storages]
        if slots != self._slots_of_bind:
            self._table[1 : 1 + len(slots)].copy_(torch.tensor(slots, dtype=torch.int64, device="cpu"))
            self._slots_of_bind = slots
        self._table[:1].fill_(length)
        # From another GPU these are copies by the driver, which the streams of both wait for, and the host does not.
        self.input.copy_(x, non_blocking=True)
        self.positions.copy_(positions, non_blocking=True)
        if not self.input.is_cuda:
            self.output = self._compute(model)
        else:
            if self.graph is None:
                self._capture(model)
            self.graph.replay()
        return self.output

    def get_ready(self, model) -> None:
        """Compile what the graph will launch."""
        if self.input.is_cuda and not self._is_ready:
            _kernels().compile_together(lambda: self._compute(model), self.input.device)
            self._is_ready = True

    def _capture(self, model) -> None:
        device = self.input.device
        current, stream = torch.cuda.current_stream(device), _capture_stream(device)
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE, torch.cuda.stream(stream):
            stream.wait_stream(current)
            # Once as it is, so that kernels are loaded. What it writes to the cache the replay writes again.
            self.get_ready(model)
            self._compute(model)
            stream.synchronize()
            # The library's workspace is to be memory of this graph: another one is freed by whoever clears them all, as
            # torch.compile does for graphs of its own.
            if self._takes_library:
                forget_workspaces()
            with DRAWS:
                with random_state_apart(device):
                    graph.capture_begin(capture_error_mode="thread_local")
                try:
                    output = self._compute(model)
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # of a capture that has broken off
                        graph.capture_end()
                    raise
                graph.capture_end()
            if self._takes_library:
                forget_workspaces()
            current.wait_stream(stream)
        self.graph, self.output = graph, output

    @torch.no_grad()
    def _compute(self, model) -> torch.Tensor:
        kernels, config, transformer = _kernels(), self._config, model.transformer
        B, T = self.positions.shape
        # Autocast would have the products of a library in another precision, and copies of matrices that end with it,
        # which a graph would go on reading.
        precise = torch.autocast(self.input.device.type, enabled=False)
        with torch.cuda.device_of(self.input), torch.inference_mode(), precise:
            angles = self.positions[:, :, None].float() * self.inverse_frequencies[:, None]  # (B, T, rotated / 2)
            cos, sin, scale = angles.cos(), angles.sin(), None
            if config.use_logn_attn:
                scale = ((self.positions + 1).float().log() / math.log(config.seq_length)).clamp(min=1)  # (B, T)

            def product(x, linear, norm=None, gate=None, residual=None, bias=True):
                """As `kernels.product`, of modules, for any number of rows; with a bias if the module has one."""
                kernel = _kernel_of(linear, gate, B * T)
                bias = _bias(linear) if bias else None
                is_sorted = type(linear) is QuantizedLinear and linear.order is not None
                if norm is not None and not (kernel and B * T == 1 and not is_sorted):
                    x, norm = kernels.rms_norm(x, norm.weight, norm.eps), None
                if kernel is not None:
                    return kernel(
                        linear.arranged(x) if is_sorted else x,
                        _weight(linear),
                        bias,
                        norm=None if norm is None else norm.weight,
                        eps=0.0 if norm is None else norm.eps,
                        gate=None if gate is None else _weight(gate),
                        gate_bias=None if gate is None else _bias(gate),
                        residual=residual,
                    )
                self._takes_library = True
                y = _library_product(x, linear, bias)
                if gate is not None:
                    y *= F.silu(_library_product(x, gate, _bias(gate)))
                return y if residual is None else y.add_(residual)

            def sum_of_products(x, linear, residual):
                """`residual + linear(x)`, where each process has a share of the inputs and the first adds the rest."""
                is_first = self._sum.rank == 0
                return self._sum(product(x, linear, residual=residual if is_first else None, bias=is_first))

            x, norm, slot = self.input, None, kernels.HEADER
            for station in stations(model)[self._place]:
                if station is transformer.wte:
                    x = self._embed(x.view(-1), local_tensor(station.weight))  # (B * T, hidden)
                elif station is transformer.ln_f:
                    norm = station  # of the product behind it
                elif station is model.lm_head:
                    x, norm = self._gather(product(x, station, norm=norm)), None  # (B * T, vocab)
                else:
                    attn, mlp = station.attn, station.mlp
                    qkv = product(x, attn.c_attn, norm=station.ln_1).view(B, T, -1)  # (B, T, 3 nh hd)
                    table = self._base, self._bits, self._table, slot
                    y = kernels.rotate_and_attend(
                        qkv, cos, sin, scale, *table, self._nh, self.starts, attn.scaling
                    )  # (B, T, nh, hd)
                    x = sum_of_products(y.view(B * T, -1), attn.c_proj, x)
                    y = product(x, mlp.w1, norm=station.ln_2, gate=mlp.w2)
                    x = sum_of_products(y, mlp.c_proj, x)
                    slot += self._slots
            return x if norm is None else kernels.rms_norm(x, norm.weight, norm.eps)

    # Of the embedding and of the vocabulary each process has as many neighbouring rows.

    def _embed(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._sum.processes == 1:
            return F.embedding(ids, weight)
        ids = ids - self._sum.rank * weight.shape[0]
        elsewhere = (ids < 0) | (ids >= weight.shape[0])
        return self._sum(F.embedding(ids.masked_fill(elsewhere, 0), weight).masked_fill_(elsewhere[:, None], 0))

    def _gather(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, vocab) of all shares."""
        share, rank, processes = logits.shape[1], self._sum.rank, self._sum.processes
        return self._sum(F.pad(logits, (rank * share, (processes - rank - 1) * share)))


class _Sum:
    """
    Sums of up to so many numbers over the processes of tensor parallelism, for a graph. Each process reads the memory
    of the others and adds in one order, so that all have the same bits; where GPUs can't do that NCCL adds.
    """

    def __init__(self, group, numel: int, dtype: torch.dtype, device: torch.device):
        """group: of `processes`."""
        self.processes, self.rank = (1, 0) if group is None else (group.size(), group.rank())
        self._group = group
        self._of_peers = None if group is None or device.type != "cuda" else peer_memory(group, numel, dtype, device)
        # NCCL waits for the end of all graphs that it is in before a group of processes can be destroyed.
        self.outlives_graphs = group is None or device.type != "cuda" or self._of_peers is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._group is None:
            return x
        if self._of_peers is not None:
            return self._of_peers(x)
        torch.distributed.all_reduce(x, group=self._group)
        return x


def peer_memory(group, numel: int, dtype: torch.dtype, device: torch.device):
    """
    A function that sums tensors of up to `numel` numbers over a group of processes, by PyTorch's symmetric memory
    (https://docs.pytorch.org/docs/stable/symmetric_memory.html). None where PyTorch, the GPUs or this precision can't.
    To be called by all processes of the group.
    """
    shared, total = symmetric_memory(), None
    try:
        if shared is None:
            raise RuntimeError("PyTorch 2.7 and newer have them.")
        add, name = torch.ops.symm_mem.one_shot_all_reduce_copy, group.group_name

        def total(x: torch.Tensor) -> torch.Tensor:
            return add(buffer[: x.numel()], x.reshape(-1), "sum", name).view_as(x)

        # All of it takes the current device, which in a new thread is the first.
        with torch.cuda.device(device):
            with torch.inference_mode(False):
                buffer = shared.empty(numel, dtype=dtype, device=device)
            shared.rendezvous(buffer, name)
            found = total(torch.full((16,), group.rank() + 1.0, dtype=dtype, device=device))
        works = bool((found == group.size() * (group.size() + 1) / 2).all())
    except RuntimeError as error:
        logger.info(f"Tensor parallelism adds by NCCL, and not over the memory of the other GPUs: {error}")
        works = False
    all_work = torch.tensor(works, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(all_work, torch.distributed.ReduceOp.MIN, group)
    return total if all_work.item() else None


class GraphedSteps:
    """Steps of B rows and up to T tokens behind caches of so many bits (16 or 32: full precision) for one model."""

    def __init__(self, model, B: int, T: int, bits: int):
        self._T = T
        self.parts = [_Part(model, *part, B, T, bits) for part in parts_of(model)]
        self._thread: threading.Thread | None = None

    def begin_to_get_ready(self, model) -> None:
        """
        Compile in a thread of its own what the graphs will launch; the first step waits for it. Not for tensor
        parallelism, whose processes must launch their sums in one order.
        """

        # Behind what fills the buffers: what is in them before is no token.
        streams = [torch.cuda.current_stream(part.input.device) if part.input.is_cuda else None for part in self.parts]

        def get_ready() -> None:
            try:
                for part, stream in zip(self.parts, streams):
                    with torch.cuda.stream(stream):
                        part.get_ready(model)
            except Exception as error:  # noqa: BLE001 (the first step meets it again, and raises it)
                logger.info(f"Kernels of a decoding step could not be compiled beforehand: {error}")

        self._thread = threading.Thread(target=get_ready, name="compiling a decoding step")
        self._thread.start()

    def bind(self, starts: torch.Tensor | None, alpha: torch.Tensor | None) -> None:
        """For a generation: starts int64 (B) or None, no padding; alpha float32 (B or 1), NTK scales, or None."""
        for part in self.parts:
            part.bind(starts, alpha)

    @property
    def may_stay(self) -> bool:
        """Whether the graphs may be kept behind the generation."""
        return all(part.may_stay for part in self.parts)

    def give_back(self) -> None:
        for part in self.parts:
            part.give_back()

    def step(self, model, cache, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """
        Append the tokens `input_ids` (B, T) at `positions` (B, T) to the cache.

        Returns logits (B, T, vocab) on their device, in a buffer that the next step may overwrite.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        B, T = input_ids.shape
        # Fewer tokens than the graph takes are padded behind: they see no padding, and the next step writes over it.
        x = input_ids
        if T < self._T:
            x, positions = (F.pad(t, (0, self._T - T)) for t in (x, positions))
        cache.make_room(self._T)
        storages, length = cache.storages(), cache.get_seq_length() + self._T
        for part in self.parts:
            x = part.step(model, x, positions, storages, length)
        cache.advance(T)
        return x.view(B, self._T, -1)[:, :T].to(input_ids.device)


@functools.lru_cache(maxsize=None)
def _capture_stream(device: torch.device):
    """One for all graphs: for each that it multiplies on cuBLAS has a workspace of 32 MB, which PyTorch keeps."""
    return torch.cuda.Stream(device)


_CAPTURE = threading.Lock()  # two threads must not capture at once
DRAWS = threading.Lock()  # nor draw tokens while another captures
_LOCK = threading.Lock()  # of _FREE
_FREE: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of every model: signature, and free graphs by kind
ENDING: weakref.WeakSet = weakref.WeakSet()  # models whose graphs end with the generation: no use for a step or a few


def _kind(model, cache, B: int, T: int) -> tuple:
    """What a graph is for, and what `GraphedSteps` takes."""
    return B, T, cache.bits or 8 * model.transformer.ln_f.weight.element_size()


def _keep(model, signature, kind: tuple, steps: GraphedSteps) -> None:
    """Among the free graphs, if the weights are still where they were. Under `_LOCK`."""
    now, free = _FREE.get(model, (None, None))
    if now == signature:
        free.append((kind, steps))
        del free[:-KEPT_GRAPHS]


def prepare_steps(model, cache, B: int) -> None:
    """
    Begin to compile what a step of B rows behind this cache will launch, unless a graph for it is free: for a plain
    model whose prompt is about to be computed.
    """
    kind = _kind(model, cache, B, 1)
    with _LOCK:
        is_there = any(other == kind for other, _ in _FREE.get(model, (None, ()))[1])
    if is_there or processes(model) is not None:
        return
    signature = _Places(model).signature
    with contextlib.suppress(torch.cuda.OutOfMemoryError):  # there may be room behind the prompt
        steps = GraphedSteps(model, *kind)
        steps.begin_to_get_ready(model)
        with _LOCK:
            if _FREE.get(model, (None, None))[0] != signature:
                _FREE[model] = signature, []
            _keep(model, signature, kind, steps)


@contextlib.contextmanager
def graphed_steps(model, cache, B: int, T: int):
    """
    Graphs for a generation of its own: gives a function (input_ids, positions, starts, alpha) to logits (B, T, vocab),
    or None where the GPU has no memory for a graph, or the model is no longer what it was.

    Call it with a plain model and a cache that is filled.
    """
    places = _Places(model)
    kind = _kind(model, cache, B, T)
    with _LOCK:
        signature, free = _FREE.get(model, (None, None))
        if signature != places.signature:
            free = []
            _FREE[model] = places.signature, free
        found = next((i for i, (other, _) in enumerate(free) if other == kind), None)
        steps = free.pop(found)[1] if found is not None else None
    bound, broken = None, False

    def step(input_ids, positions, starts=None, alpha=None):
        nonlocal steps, bound, broken
        if broken or not places.unchanged():
            broken = True
            return None
        try:
            if steps is None:
                steps = GraphedSteps(model, *kind)
            if bound is None:
                steps.bind(starts, alpha)
                bound = True
            return steps.step(model, cache, input_ids, positions)
        except torch.cuda.OutOfMemoryError:
            logger.warning_once("The GPU has no memory left for a CUDA graph of decoding; steps are computed without.")
            broken, steps, cache.has_no_room_for_graphs = True, None, True
            return None

    try:
        yield step
    finally:
        if steps is not None and not broken and steps.may_stay:
            steps.give_back()
            with _LOCK:
                _keep(model, places.signature, kind, steps)
        elif steps is not None and not steps.may_stay:
            ENDING.add(model)


class _Checks:
    """The graphs that check the drafts of one generation: of each width the function of `graphed_steps`, and starts."""

    def __init__(self, model, stack: contextlib.ExitStack):
        self.model = model
        self.stack = stack
        self.rows = None
        self.steps = {}


@contextlib.contextmanager
def checking_drafts(model, cache):
    """
    For one generation, which looks once at what its model and the padding of its prompt are: within it `graphed_step`
    keeps the graphs behind this cache, and compares before each step only where the weights are.
    """
    if not isinstance(cache, QWenCache):
        yield
        return
    with contextlib.ExitStack() as stack:
        cache.checks = _Checks(model, stack)
        try:
            yield
        finally:
            cache.checks = None


def _width(T: int) -> int:
    """The tokens of the graph that takes T: one graph for each power of two serves every number of drafts."""
    return 1 << (T - 1).bit_length()


def is_checked(model, cache, input_ids: torch.Tensor) -> bool:
    """Whether `graphed_step` has a graph for such a step of this generation already, and nothing is to be looked at."""
    checks, (B, T) = getattr(cache, "checks", None), input_ids.shape
    return checks is not None and checks.model is model and checks.rows == B and T > 0 and _width(T) in checks.steps


def left_padding(attention_mask: torch.Tensor | None, length: int):
    """Whether a mask (B, length) hides nothing but the beginning of rows, and how much, int64 (B) or None."""
    if attention_mask is None:
        return True, None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != length:
        return False, None
    real = attention_mask.bool()
    starts = length - real.sum(-1)
    if not bool((real == (torch.arange(length, device=real.device) >= starts[:, None])).all()):
        return False, None
    return True, starts if bool(starts.any()) else None


def graphed_step(model, cache, input_ids, position_ids, attention_mask):
    """
    One step on its own, of whoever calls `forward`: logits (B, T, vocab), or None if it is not for a graph, and then
    it is no longer checked.

    input_ids, position_ids: int64 (B, T). attention_mask: None or (B, S), the tokens of this step included. The model
    is plain, which is not looked at here.
    """
    B, T = input_ids.shape
    alpha, checks = getattr(cache, "ntk_alpha", None), getattr(cache, "checks", None)
    if is_checked(model, cache, input_ids):
        step, starts = checks.steps[_width(T)]
        logits = step(input_ids, position_ids.expand(B, T), starts, alpha)
        if logits is None:
            del checks.steps[_width(T)]
        return None if logits is None else logits.clone()
    width, padding = _width(T), (False, None)
    ours = T <= MAX_TOKENS and model not in ENDING and takes(model, cache, B * width) and cache.get_seq_length() > 0
    if ours and (alpha is not None or not model.config.use_dynamic_ntk):
        padding = left_padding(attention_mask, cache.get_seq_length() + T)
    if not padding[0]:
        return None
    with contextlib.ExitStack() as stack:
        stays = checks is not None and checks.model is model
        step = (checks.stack if stays else stack).enter_context(graphed_steps(model, cache, B, width))
        if stays:
            checks.rows, checks.steps[width] = B, (step, padding[1])
        logits = step(input_ids, position_ids.expand(B, T), padding[1], alpha)
        return None if logits is None else logits.clone()
