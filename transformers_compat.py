"""
What differs between releases of transformers, and of PyTorch, and nothing else.

The other modules are written for today's transformers and import from here what an older release lacks or calls
differently. Every entry is chosen by feature, never by version number, and names the releases that need it ("up to
4.52" is of transformers): raising the floor is deleting lines.

Optional packages are imported by `importlib`: transformers refuses remote code with import statements, even inside
functions, of packages that are not installed.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import importlib
import importlib.util
import inspect
import re

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import modeling_outputs
from transformers.utils import logging

try:
    from transformers import masking_utils
except ImportError:  # up to 4.52
    masking_utils = None

logger = logging.get_logger("transformers.models.qwen.transformers_compat")

# --- Releases ----------------------------------------------------------------------------------------------------

# The oldest and the newest release that the tests have passed with.
TESTED = ("4.32.0", "5.24.0")


def _numbers(version: str) -> list:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


# What a release yet to come changes, no feature can tell: it is the only thing asked of the version.
IS_NEWER = _numbers(transformers.__version__) > _numbers(TESTED[1])


def _release() -> str:
    return f"This is transformers {transformers.__version__}; tested are {TESTED[0]} to {TESTED[1]}."


# --- PyTorch -----------------------------------------------------------------------------------------------------

# PyTorch 1.12 has none that can be entered.
FunctionMode = getattr(torch.overrides, "TorchFunctionMode", None)
if not hasattr(FunctionMode, "__enter__"):
    FunctionMode = None

# torch up to 1.13 has no fused attention, 2.0 one without a scale
HAS_SDPA = "scale=None" in (getattr(getattr(F, "scaled_dot_product_attention", None), "__doc__", None) or "")


def _rms_norm(x, normalized_shape, weight, eps):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


rms_norm = getattr(F, "rms_norm", _rms_norm)  # torch up to 2.3 has none

try:
    torch.addcmul(*(torch.ones(1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)))
    addcmul = torch.addcmul
except RuntimeError:  # torch 1.12 wants one data type

    def addcmul(x, factor1, factor2, value=1):
        return torch.addcmul(x, factor1.to(x.dtype), factor2, value=value)


def _int8_rows() -> dict[torch.dtype, int]:
    """
    The rows up to which `torch._weight_int8pack_mm`, which old releases of torch do not have, is faster than a copy of
    the weight, by the data type of the rows. Nothing without AVX2, where it is slower in bfloat16 or was not measured.
    """
    capability = getattr(getattr(torch.backends, "cpu", None), "get_cpu_capability", lambda: "unknown")()
    found = {}
    for dtype, rows in ((torch.bfloat16, 4), (torch.float32, 2)) if capability in ("AVX2", "AVX512") else ():
        try:
            x, weight, scale = (
                torch.ones(shape, dtype=kind, device="cpu")
                for shape, kind in (((2, 64), dtype), ((5, 64), torch.int8), (5, dtype))
            )
            torch._weight_int8pack_mm(x, weight, scale)
            found[dtype] = rows
        except (AttributeError, RuntimeError):  # it is private: it may want other things than it does today
            pass
    return found


INT8_ROWS = _int8_rows()


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (rows, in), weight int8 (out, in): their product (rows, out) in x's dtype, where `INT8_ROWS` has that dtype."""
    ones = x.new_ones(weight.shape[0])  # scales would be rounded to x's dtype
    return torch._weight_int8pack_mm(x.contiguous(), weight.contiguous(), ones)


def cpu_supports_bf16() -> bool:
    """
    Whether this CPU has instructions for bfloat16, as x86 without AVX-512 has not: PyTorch's products of many rows take
    several times as long as those of float32 then. torch up to 1.13 can't tell, and has no fast code for it.
    """
    return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()


def cpu_supports_fp16() -> bool:
    """Whether this CPU has instructions for float16; torch up to 2.1 can't tell, and has no fast code for it."""
    return getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)()


def gpu_supports_bf16() -> bool:
    """Whether the current GPU has instructions for bfloat16; torch up to 2.3 does not count an emulation anyway."""
    if "including_emulation" in inspect.signature(torch.cuda.is_bf16_supported).parameters:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cuda.is_bf16_supported()


def has_mps() -> bool:
    """Whether there is a GPU of Apple's; torch up to 1.11 has no such device."""
    return hasattr(torch.backends, "mps") and torch.backends.mps.is_available()


try:
    from torch.nn.attention.varlen import varlen_attn as _varlen
except ImportError:  # up to torch 2.9
    _varlen = None
_VARLEN_ARGUMENTS = () if _varlen is None else tuple(inspect.signature(_varlen).parameters)


def has_varlen_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `varlen_attention` computes heads of this kind: PyTorch has it from 2.10 on, for GPUs like an A100."""
    return (
        _varlen is not None
        and device.type == "cuda"
        and torch.version.cuda is not None
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def varlen_attention(query, key, value, starts, longest: int, scaling: float, key_starts=None, longest_key=None):
    """
    Causal attention of sequences that follow each other: query, key, value: (N, nh, hd), `starts`: int32
    (sequences + 1,), where each begins, and N; `longest`: the length of the longest. Returns (N, nh, hd).

    With `key_starts` and `longest_key` a sequence has keys and values, (M, nh, hd), before its queries, too.
    """
    if key_starts is None:
        key_starts, longest_key = starts, longest
    arguments: dict = {"window_size": (-1, 0)} if "window_size" in _VARLEN_ARGUMENTS else {"is_causal": True}
    if "scale" in _VARLEN_ARGUMENTS:
        arguments["scale"] = scaling
    else:  # torch 2.10
        query = query * (scaling * query.shape[-1] ** 0.5)
    return _varlen(query, key, value, starts, key_starts, longest, longest_key, **arguments)


def is_compiling() -> bool:
    """`torch.compiler.is_compiling`, which torch up to 2.0 lacks."""
    return hasattr(torch, "compiler") and torch.compiler.is_compiling()


def is_differentiating_forward() -> bool:
    """Whether derivatives are taken in forward mode (`torch.func.jvp`), or a function transform is at work."""
    functorch = getattr(torch._C, "_functorch", None)  # torch up to 1.13 has it elsewhere
    if functorch is not None and functorch.maybe_current_level() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0


def forget_workspaces() -> None:
    """PyTorch gives cuBLAS memory for each thread and stream, and keeps it: the next product asks for other memory."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:  # torch 1 lacks it, whose compiler makes no graphs that would free the memory
        clear()


@contextlib.contextmanager
def random_state_apart(device: torch.device):
    """
    Meanwhile another state gives the random numbers of a GPU: the capture of a graph claims the one that it finds as it
    begins, and until it ends other threads, which may draw tokens or train, can't draw from that.
    """
    generator = torch.cuda.default_generators[device.index]
    if not hasattr(generator, "graphsafe_set_state"):  # torch up to 2.4
        yield
        return
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


# --- Configuration -----------------------------------------------------------------------------------------------

if hasattr(transformers.PretrainedConfig(), "_attn_implementation"):
    PretrainedConfig = transformers.PretrainedConfig
else:  # up to 4.35: attention kernels are no concern of the configuration

    class PretrainedConfig(transformers.PretrainedConfig):
        _attn_implementation = "sdpa" if HAS_SDPA else "eager"

        def __init__(self, attn_implementation=None, **kwargs):
            super().__init__(**kwargs)
            if attn_implementation is not None:
                self._attn_implementation = attn_implementation

        def to_dict(self):
            config = super().to_dict()
            config.pop("_attn_implementation", None)
            return config


# --- Caches and masks --------------------------------------------------------------------------------------------

# What transformers calls the cache of a model, as an argument and in outputs: `past_key_values` up to 5.23. The modules
# of this repository call it `past_key_values`.
CACHE = "cache" if "cache" in modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def take_cache(kwargs: dict):
    """Take the cache out of keyword arguments, under either name; None if there is none, ValueError for two."""
    old, new = kwargs.pop("past_key_values", None), kwargs.pop("cache", None)
    if old is not None and new is not None and old is not new:
        raise ValueError("Pass the cache once: past_key_values and cache are two names of one argument.")
    return new if old is None else old


def accepts_cache(method):
    """For a method with the argument `past_key_values`: it is accepted as `cache` too."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if "cache" in kwargs:
            kwargs["past_key_values"] = take_cache(kwargs)
        return method(self, *args, **kwargs)

    return wrapper


def _with_both_names(output):
    """What `generate` returns, whose cache, if it has one, can be read under both names from now on."""
    other = "past_key_values" if CACHE == "cache" else "cache"
    if hasattr(output, CACHE) and not hasattr(type(output), other):  # which from 5.24 on is there, with a warning
        setattr(output, other, getattr(output, CACHE))
    return output


# Up to 4.57 a cache is told where to write; from 5.0 it counts for itself.
_CACHE_WANTS_POSITIONS = (
    masking_utils is None or "cache_position" in inspect.signature(masking_utils.create_causal_mask).parameters
)

# Up to 4.41 assisted decoding and contrastive search slice the tensors of a cache themselves, and believe, up to 4.35,
# that any cache has the prompt.
DRAFTS_CROP_CACHES = hasattr(getattr(transformers, "DynamicCache", None), "crop")
# From 5.0 its first step gives the model the whole prompt, whatever the cache already has of it.
DRAFTS_READ_PROMPTS_AGAIN = (
    "next_sequence_length" in inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters
)

# Up to 4.36 the forward of an assistant was called, later its `generate` is; then its rows are compared, too.
ASSISTANTS_GENERATE = importlib.util.find_spec("transformers.generation.candidate_generator") is not None

try:
    from transformers import DynamicCache
except ImportError:  # up to 4.35

    class DynamicCache:
        """Keys and values that grow along the sequence, one pair (B, nh, S, hd) a layer."""

        def __init__(self):
            self.layers: list = []

        @classmethod
        def from_legacy_cache(cls, layers):
            cache = cls()
            cache.layers = [tuple(layer) for layer in layers]
            return cache

        def __len__(self):
            return len(self.layers)

        def __getitem__(self, index):  # assisted decoding reads and crops it as a tuple of tuples
            return self.layers[index]

        def get_seq_length(self, layer_idx=0):
            return self.layers[layer_idx][0].shape[-2] if len(self.layers) > layer_idx else 0

        def update(self, key, value, layer_idx, cache_kwargs=None):
            if layer_idx == len(self.layers):
                self.layers.append((key, value))
            else:
                old_key, old_value = self.layers[layer_idx]
                self.layers[layer_idx] = torch.cat((old_key, key), -2), torch.cat((old_value, value), -2)
            return self.layers[layer_idx]

        def crop(self, length):
            """Keep `length` tokens, or drop `-length`."""
            length = length if length >= 0 else max(self.get_seq_length() + length, 0)
            self.layers = [tuple(tensor[..., :length, :] for tensor in layer) for layer in self.layers]

        def reorder_cache(self, beam_idx):
            self.layers = [tuple(t.index_select(0, beam_idx.to(t.device)) for t in layer) for layer in self.layers]


# What `crop(0)` means: up to 5.10 `crop` is told how many tokens to keep, in 5.17 how many to remove.
_CROP_REMOVES = hasattr(DynamicCache, "crop") and "tokens_to_remove" in inspect.signature(DynamicCache.crop).parameters


class LayeredCache(DynamicCache if hasattr(DynamicCache, "crop") else transformers.Cache):
    """
    What any release calls on a cache, for caches whose `layers` are objects with `length` tokens of their own.

    A layer has `crop(length)`, `select(rows)` and a `batch_size` too. It is a DynamicCache because releases up to 4.53
    shorten no other, but not from 4.36 to 4.41, which take a DynamicCache for two lists of tensors. What the model
    noted for every row (`ntk_alpha`) follows the rows.
    """

    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(self):
        super().__init__()
        self.layers: list = []

    @property
    def is_sliding(self) -> list:
        return [False] * len(self.layers)

    def __len__(self):
        return len(self.layers)

    def __iter__(self):
        return (self[i] for i in range(len(self.layers)))

    def to_legacy_cache(self):
        return tuple(self)

    def get_seq_length(self, layer_idx=0):
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    def get_max_length(self, layer_idx=None):  # up to 4.45, and in 5.17; between them the name below
        return None if _CACHE_WANTS_POSITIONS else -1

    get_max_cache_shape = get_max_length

    def get_usable_length(self, new_seq_length, layer_idx=0):  # up to 4.55
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length, layer_idx):
        if torch.is_tensor(query_length):  # their positions, up to 5.1
            query_length = query_length.shape[0]
        return self.get_seq_length(layer_idx) + query_length, 0

    def crop(self, length):
        """Keep the first `length` tokens; a negative number removes as many at the end."""
        length = int(length)  # some releases give a tensor (5.17)
        if length < 0 or (length == 0 and _CROP_REMOVES):
            length += self.get_seq_length()
        for layer in self.layers:
            layer.crop(max(length, 0))

    def reset(self):
        self.layers.clear()

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices):
        rows = self.layers[0].batch_size if self.layers else None
        for layer in self.layers:
            layer.select(indices)
        noted = getattr(self, "ntk_alpha", None)
        if noted is not None and noted.shape[0] == rows:
            self.ntk_alpha = noted[indices.to(noted.device)]

    def batch_repeat_interleave(self, repeats):
        if self.layers:
            self.batch_select_indices(torch.arange(self.layers[0].batch_size).repeat_interleave(repeats))


def as_cache(past_key_values):
    """
    The cache itself, or one made of a tuple of (key, value) pairs, one a layer, which some ways of generating hand over
    up to 4.46. Raises ValueError for what is neither, and for the StaticCache of 4.38 to 4.40.
    """
    if isinstance(past_key_values, (tuple, list)) and hasattr(DynamicCache, "from_legacy_cache"):
        return DynamicCache.from_legacy_cache(past_key_values)
    if past_key_values is not None and not hasattr(past_key_values, "update"):
        raise ValueError(
            f"past_key_values must be a transformers Cache, found {type(past_key_values).__name__}. "
            f"Begin with past_key_values=None or DynamicCache(), and pass on what the model returns."
        )
    if torch.is_tensor(getattr(past_key_values, "key_cache", None)):  # 4.38 to 4.40
        raise ValueError(
            "This release's StaticCache holds a single layer; take a DynamicCache, or transformers 4.41 or newer."
        )
    return past_key_values


def crop_cache(cache, length: int) -> None:
    """Shorten a cache to its first `length` tokens, in place; ValueError for one that can't be shortened."""
    surplus = int(cache.get_seq_length()) - length
    if surplus <= 0:
        return
    if isinstance(cache, DynamicCache) and not hasattr(cache, "crop"):  # 4.36 to 4.41
        for tensors in (cache.key_cache, cache.value_cache):
            tensors[:] = [tensor[..., :length, :] for tensor in tensors]
        for name in ("seen_tokens", "_seen_tokens"):
            if name in vars(cache):
                setattr(cache, name, length)
        return
    # Each layer by what it has too many: after a step that broke off some have more, and newer releases remove as many
    # from all. A number of tokens to remove, since newer releases refuse the length; older ones take both.
    layers = [] if isinstance(cache, LayeredCache) else getattr(cache, "layers", [])
    parts = layers if layers and all(hasattr(layer, "crop") for layer in layers) else [cache]
    try:
        for part in parts:
            surplus = int(part.get_seq_length()) - length
            if surplus > 0:
                part.crop(-surplus)
    except AttributeError:
        name = type(cache).__name__
        raise ValueError(f"A {name} can't be shortened to a common beginning; pass a DynamicCache.") from None


def cache_kwargs(cache_position: torch.Tensor) -> dict:
    """Further keyword arguments of `Cache.update`; `cache_position`: int64 (T,), where to write (up to 4.57)."""
    return {"cache_kwargs": {"cache_position": cache_position}} if _CACHE_WANTS_POSITIONS else {}


class _LengthsNow:
    """
    A cache whose length stays what it is now, for masks that are evaluated while the cache is being written to.

    Needed by releases from 5.0 on: a static cache hands out its length as a tensor that it counts up in place, and
    flex_attention calls a function of it in every layer, after the first layer has counted.
    """

    def __init__(self, cache):
        self._cache = cache

    def __getattr__(self, name):
        return getattr(self._cache, name)

    def get_seq_length(self, *args):
        length = self._cache.get_seq_length(*args)
        return length.reshape(()).clone() if isinstance(length, torch.Tensor) else length  # (1,) up to 5.10

    get_query_offset = get_seq_length


def causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, cache_position):
    """
    transformers' `create_causal_mask` under its present signature and, for releases up to 4.57, `cache_position`.
    """
    if masking_utils is None:  # up to 4.52
        return _causal_mask(config, inputs_embeds, attention_mask, past_key_values, cache_position)
    if past_key_values is not None and config._attn_implementation == "flex_attention":
        past_key_values = _LengthsNow(past_key_values)
    if not _CACHE_WANTS_POSITIONS:
        return masking_utils.create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
        )
    return masking_utils.create_causal_mask(  # up to 4.57
        config=config,
        input_embeds=inputs_embeds,
        attention_mask=attention_mask,
        cache_position=cache_position,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


def _causal_mask(config, inputs_embeds, attention_mask, past_key_values, cache_position):
    """
    The mask that the attention functions below take (up to 4.52): None for plain causal attention, (B, S) for flash
    attention with padding, else boolean (B or 1, 1, T, S), True where a key is attended to. flex_attention of these
    releases, from 4.48, knows nothing of causality and adds its mask, (B, 1, T, S).
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if config._attn_implementation == "flash_attention_2":
        return None if attention_mask is None or bool(attention_mask.all()) else attention_mask
    B, T, _ = inputs_embeds.shape
    S = T
    if past_key_values is not None:
        S += past_key_values.get_seq_length()
        length_of = getattr(past_key_values, "get_max_cache_shape", getattr(past_key_values, "get_max_length", None))
        longest = length_of() if length_of is not None else None
        S = S if longest is None or longest < 0 else longest  # a static cache hands over all of its storage
    if attention_mask is None and isinstance(S, int) and S == T and config._attn_implementation == "sdpa":
        return None
    mask = (torch.arange(S, device=inputs_embeds.device) <= cache_position[:, None])[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        real = F.pad(attention_mask.bool(), (0, S - attention_mask.shape[1]))  # (B, S)
        mask = mask & real[:, None, None]
        # A query that is padding sees nothing, and the softmax of nothing is not a number: let it see everything.
        mask = mask | ~mask.any(-1, keepdim=True)
    if config._attn_implementation == "flex_attention":
        zeros = torch.zeros((), dtype=inputs_embeds.dtype, device=inputs_embeds.device)
        return torch.where(mask, zeros, torch.finfo(zeros.dtype).min).expand(B, -1, -1, -1)  # (B, 1, T, S)
    return mask  # (B or 1, 1, T, S)


# --- Attention functions -----------------------------------------------------------------------------------------

try:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError:  # up to 4.47

    def _sdpa_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        is_causal = attention_mask is None and query.shape[2] > 1
        y = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal, scale=scaling)
        return y.transpose(1, 2), None  # (B, T, nh, hd)

    def _flash_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        """attention_mask: None, or (B, S) with 0 for padding."""
        flash_attn = importlib.import_module("flash_attn")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, T or S, nh, hd)
        arguments = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True}
        if attention_mask is None:
            return flash_attn.flash_attn_func(q, k, v, **arguments), None
        real = attention_mask.bool()
        real_q = real[:, -q.shape[1] :]
        starts, longest = zip(*(_sequence_starts(mask) for mask in (real_q, real)))
        packed = flash_attn.flash_attn_varlen_func(q[real_q], k[real], v[real], *starts, *longest, **arguments)
        return torch.zeros_like(q).masked_scatter(real_q[:, :, None, None], packed), None

    def _sequence_starts(mask):
        """Where each row begins once the padding is left out, int32 (B + 1,), and the length of the longest."""
        lengths = mask.sum(-1, dtype=torch.int32)
        return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), int(lengths.max())

    ALL_ATTENTION_FUNCTIONS = {"sdpa": _sdpa_attention, "flash_attention_2": _flash_attention}


try:
    from transformers import modeling_flash_attention_utils as _flash
except ImportError:  # up to 4.41
    _flash = None
# 4.54 takes all positions for those of packed rows, and mixes up the rows of a batch.
FLASH_MIXES_ROWS = hasattr(_flash, "_prepare_from_posids") and not hasattr(_flash, "_is_packed_sequence")
# Whether the function of flash attention takes packed rows by the arguments that say where they begin (from 4.55).
FLASH_TAKES_PACKED_ROWS = hasattr(_flash, "_is_packed_sequence")


# Continuous batching (from 4.53) hands over its own cache as `cache`: up to 5.23 the attention function writes to it,
# then the model does.
_MODEL_WRITES_PAGES = hasattr(masking_utils, "PagedAttentionCache")


def _is_paged(cache) -> bool:
    """Whether this is the cache of continuous batching, which is for the attention function, not for the model."""
    return type(cache).__name__ == "PagedAttentionCache"


# Asked once: the compiler of torch 2.4 can't ask a dictionary.
_HAS_GET_INTERFACE = hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface")


def attention_function(name: str | None, default):
    """
    The attention function of this name, as `ALL_ATTENTION_FUNCTIONS.get_interface` gives it, which releases up to 4.57
    lack: `default` for "eager" and None. With continuous batching it first writes keys and values to the cache that it
    is handed, where the release leaves that to the model. Raises KeyError for a name that isn't known.
    """
    if name is None or name == "eager":
        return default
    if _HAS_GET_INTERFACE:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, default)
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    is_sdpa = _varlen is not None and name in ("sdpa", "paged|sdpa")
    return functools.partial(_attend, function, is_sdpa) if _MODEL_WRITES_PAGES or is_sdpa else function


def computes_attention(name: str | None) -> bool:
    """Whether the function of this name is transformers' own, which all give the same, or one that a user wrote."""
    function = attention_function(name, None) if name in (None, "eager", *ALL_ATTENTION_FUNCTIONS.keys()) else None
    if function is None:
        return name in (None, "eager")
    while isinstance(function, functools.partial):
        function = function.args[0] if function.func is _attend else function.func
    return function.__module__.partition(".")[0] == "transformers" or function.__module__ == __name__


def _attend(function, is_sdpa: bool, module, query, key, value, attention_mask, *, scaling, dropout=0.0, **kwargs):
    """`function`, for what continuous batching hands over too. is_sdpa: it is SDPA, and PyTorch has `_varlen`."""
    cache = kwargs.get("cache")
    if cache is not None:
        is_faster = is_sdpa and not dropout and has_varlen_attention(query.device, query.dtype, query.shape[-1])
        if is_faster or _MODEL_WRITES_PAGES:
            del kwargs["cache"]
            if _changes_kwargs(type(cache)):
                key, value = cache.update(key, value, module.layer_idx, kwargs=kwargs)  # which it changes
            else:  # up to 5.17 or so: (M, nh, hd)
                where = {name: kwargs[name] for name in ("read_index", "write_index")}
                key, value = (x.transpose(0, 1)[None] for x in cache.update(key, value, module.layer_idx, **where))
        if is_faster:
            return _attend_to_sequences(query, key, value, scaling, kwargs), None
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


@functools.lru_cache(maxsize=None)
def _changes_kwargs(kind: type) -> bool:
    return "kwargs" in inspect.signature(kind.update).parameters


def _attend_to_sequences(query, key, value, scaling: float, where: dict) -> torch.Tensor:
    """
    What SDPA gives with the mask of continuous batching, (1, N, nh, hd); but it multiplies every query with the keys of
    all sequences. query: (1, nh, N, hd); key, value: (1, nh, M, hd); where: the lengths of the sequences.
    """
    key_starts = where["cu_seq_lens_k"]
    longest, longest_key = (where.get(f"max_length_{x}", where.get(f"max_seqlen_{x}")) for x in "qk")
    if isinstance(key_starts, dict):  # by the kind of a layer's attention, of which there is one
        key_starts, longest_key = (next(iter(of_kinds.values())) for of_kinds in (key_starts, longest_key))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    starts, key_starts = where["cu_seq_lens_q"].int(), key_starts.int()
    return varlen_attention(q, k, v, starts, longest, scaling, key_starts, longest_key)[None]


try:
    from transformers.utils import is_flash_attn_2_available
except ImportError:  # up to 4.33

    def is_flash_attn_2_available() -> bool:
        return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


# --- The loop of `generate` --------------------------------------------------------------------------------------

GenerateDecoderOnlyOutput = getattr(transformers.generation, "GenerateDecoderOnlyOutput", None)  # from 4.36


def _prefill(model, input_ids, generation_config, model_kwargs: dict):
    """The model's outputs for a prompt, as `generate` calls it."""
    first = {"is_first_iteration": not generation_config.is_assistant}
    known = inspect.signature(model._prefill).parameters
    return model._prefill(
        input_ids, generation_config, model_kwargs, **{key: value for key, value in first.items() if key in known}
    )


def _prefill_by_positions(model, input_ids, generation_config, model_kwargs: dict):  # up to 4.57
    model_kwargs = model._get_initial_cache_position(input_ids.shape[1], input_ids.device, dict(model_kwargs))
    return model(**model.prepare_inputs_for_generation(input_ids, **model_kwargs), return_dict=True)


def _choose_prefill():
    mixin = transformers.GenerationMixin
    if hasattr(mixin, "_prefill"):
        return _prefill
    positions = getattr(mixin, "_get_initial_cache_position", None)
    if positions is not None and "device" in inspect.signature(positions).parameters:  # 4.52 to 4.57
        return _prefill_by_positions
    return None  # their loop is left alone


prefill = None if IS_NEWER else _choose_prefill()

# --- Several devices ---------------------------------------------------------------------------------------------


def to_device_of(module: nn.Module, tensors):
    """
    `tensors`, in tuples and dictionaries, on the device where accelerate runs `module` (`device_map`).

    Its hooks move whatever a block is called with, and forget it: masks and angles would cross over again with every
    block of the second device. A model on one device has no hooks.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        return tensors
    return importlib.import_module("accelerate.utils").send_to_device(tensors, device)


def _moves(hook) -> bool:
    """Whether this is a hook of accelerate's that moves to a device what a module takes."""
    return getattr(hook, "execution_device", None) is not None


def input_device(model) -> torch.device:
    """Where a model takes its token ids: where its embedding is computed, which accelerate may have moved elsewhere."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None) or getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else embedding.weight.device


def is_fsdp_unit(module: nn.Module) -> bool:
    """
    Whether FSDP2 (`fully_shard`) was called for this module: its own parameters are in pieces on several processes, and
    its class is a new one before the module's. PyTorch up to 2.5 has that class elsewhere: it is told by its method.
    """
    return hasattr(module, "set_reshard_after_forward")


def is_only_moved(module: nn.Module) -> bool:
    """
    Whether the forward that a module has of its own is that of its class, before which accelerate moves what comes in
    to the module's device (`device_map`). False where the weights are moved too, or something else was put around it.
    """
    hook, forward = vars(module).get("_hf_hook"), vars(module).get("forward")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and type(hook).__module__ == "accelerate.hooks"
        and not hook.offload
        and getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
        and getattr(vars(module).get("_old_forward"), "__func__", None) is type(module).forward
    )


# --- Tensor parallelism ------------------------------------------------------------------------------------------

try:
    from transformers.distributed import tensor_parallel
except ImportError:  # up to 5.10 it is elsewhere, up to 4.49 nowhere
    try:
        from transformers.integrations import tensor_parallel
    except ImportError:
        tensor_parallel = None
_STYLES = getattr(tensor_parallel, "ALL_PARALLEL_STYLES", None)  # up to 4.51 a fixed list
HAS_TENSOR_PARALLEL = hasattr(_STYLES, "register") and "colwise" in _STYLES  # without torch.distributed it is empty


def _check_heads(module: nn.Module, processes: int) -> None:
    if module.num_heads % processes:
        raise ValueError(
            f"The {module.num_heads} attention heads can't be shared out evenly to {processes} processes. Start a "
            f"number of processes that divides {module.num_heads}."
        )


# Releases up to 5.10 know one order of the rows of a layer that is split, which is not that of fused projections.
KEEPS_FUSED_HEADS = hasattr(getattr(tensor_parallel, "PackedColwiseParallel", None), "shard_param")

if KEEPS_FUSED_HEADS:
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    class _FusedHeads(tensor_parallel.PackedColwiseParallel):
        """For a linear layer whose rows are queries, keys and values: a process has its heads of each, biases too."""

        def __init__(self):
            super().__init__(split_factor=3)

        def shard_param(self, module, param, mesh):
            _check_heads(module, mesh.size())
            whole = module._parameters[param]
            shard = distribute_tensor(whole, mesh, [_StridedShard(dim=0, split_factor=3)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(shard, requires_grad=whole.requires_grad)


elif HAS_TENSOR_PARALLEL:
    from torch.distributed.tensor import DTensor, Shard

    class _FusedHeads(tensor_parallel.ColwiseParallel):  # up to 5.10
        def prepare_module_tp(self, module, device_mesh, **kwargs):
            _check_heads(module, device_mesh.size())
            return super().prepare_module_tp(module, device_mesh, **kwargs)

        def shard_tensor(self, param, tensor_idx=None, device=None, dtype=None):  # from 5.0
            self.shard = [Shard(0)]  # 5.0
            return self._rows(param, self.rank, self.device_mesh.size()).to(device=device, dtype=dtype)

        if "rank" in str(inspect.signature(getattr(tensor_parallel.ColwiseParallel, "partition_tensor", _check_heads))):
            # up to 4.57

            def partition_tensor(self, param, empty_param, param_type, dtype, to_contiguous, rank, device_mesh):
                rows = self._rows(param, rank, device_mesh.size()).to(dtype)
                return nn.Parameter(DTensor.from_local(rows, device_mesh, [Shard(0)], run_check=False))

        @staticmethod
        def _rows(param, rank: int, processes: int) -> torch.Tensor:
            """What of `param`, a tensor or a view of a file, belongs to a process, thirds read one by one."""
            third = (param.get_shape() if hasattr(param, "get_shape") else param.shape)[0] // 3
            size = third // processes
            starts = [i * third + rank * size for i in range(3)]
            return torch.cat([param[start : start + size] for start in starts])


def parallel_style(module: nn.Module):
    """
    The style by which tensor parallelism splits a module, and the group of processes; None where its forward is not
    just the class's inside of what the style needs. Up to 5.10, where hooks do that, always None.
    """
    forward = vars(module).get("forward")
    if not KEEPS_FUSED_HEADS or getattr(forward, "__module__", None) != tensor_parallel.__name__:
        return None
    around = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__ or ())))
    name = next((name for name, style in _STYLES.items() if style is around.get("self")), None)
    if name is None or getattr(around.get("original_forward"), "__func__", None) is not type(module).forward:
        return None
    mesh = around["mesh"]
    return name, mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def symmetric_memory():
    """PyTorch's module for memory that the GPUs of a host share; None where it has no sums over it (up to 2.6)."""
    try:
        from torch.distributed import _symmetric_memory
    except ImportError:
        return None
    return _symmetric_memory if hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy") else None


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter that may be split."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def tensor_parallel_plan(plan: dict) -> dict | None:
    """A plan in the styles and the spelling of this release; None where it has no tensor parallelism."""
    if not HAS_TENSOR_PARALLEL:
        return None
    if "colwise_gather_output" not in _STYLES:  # up to 5.0
        plan = {key: style.replace("gather_output", "rep") for key, style in plan.items()}
    if not KEEPS_FUSED_HEADS:  # up to 5.10 an embedding can't be split, or forgets how long it is
        plan = {key: style for key, style in plan.items() if style != "embedding_rowwise"}
    if _PLANS_HIDE_DIGITS:
        plan = {re.sub(r"\d", "*", key): style for key, style in plan.items()}
    return plan


if HAS_TENSOR_PARALLEL:
    _STYLES.register("colwise_fused_heads", _FusedHeads())
    _plan_of = getattr(tensor_parallel, "_get_parameter_tp_plan", None)  # up to 5.10
    # Up to 5.4 or so digits of names become wildcards too.
    _PLANS_HIDE_DIGITS = _plan_of is not None and _plan_of("h.0.w1", {"h.*.w1": "colwise"}) is None


# --- Models ------------------------------------------------------------------------------------------------------

try:
    from transformers.utils import can_return_tuple
except ImportError:  # up to 4.48

    def can_return_tuple(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, return_dict=None, **kwargs):
            output = forward(self, *args, **kwargs)
            wants_dict = self.config.use_return_dict if return_dict is None else return_dict
            return output if wants_dict else output.to_tuple()

        # The Trainer of 4.46 and 4.47 hands over the number of labels to a parameter of this name only.
        signature = inspect.signature(forward)
        rest = [p.replace(name="loss_kwargs") if p.kind is p.VAR_KEYWORD else p for p in signature.parameters.values()]
        wrapper.__signature__ = signature.replace(parameters=rest)
        return wrapper


# What `forward` may get beside its own arguments: it is for the attention function or the loss, or means nothing here.
_PASSED_ON = (
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),  # packed rows
    *("cumulative_seqlens_q", "cumulative_seqlens_k", "max_seqlen_q", "max_seqlen_k"),  # up to 4.57 or so
    *("cache", "block_table", "block_tables", "read_index", "write_index"),  # continuous batching
    *("logits_indices", "logits_processor_args"),  # continuous batching, for itself
    *("num_items_in_batch", "shift_labels"),  # the loss
    "cache_position",  # up to 4.57
    *("tokenizer", "processor"),  # of who wants text, such as transformers serve
    "token_type_ids",  # tokenizers of other models make them, without a meaning here
)


def known_arguments(forward):
    """
    For the `forward` of a model with `past_key_values` and `**kwargs`: the cache is accepted as `cache` too, and what
    `forward` doesn't know, and its attention function doesn't either, is refused instead of left out. Numbers, texts
    and None pass: they choose among outputs and kernels.
    """
    names = (*inspect.signature(forward).parameters, *_PASSED_ON)

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        attention = self.config._attn_implementation
        if "cache" in kwargs and not _is_paged(kwargs["cache"]):
            kwargs["past_key_values"] = take_cache(kwargs)
        for name, value in kwargs.items():
            if name not in names and not isinstance(value, (type(None), bool, int, float, str)):
                _refuse_ignored(self, name, value, attention)
        if IS_NEWER and len(args) > 1:  # whose order may be another
            raise TypeError(f"{type(self).__name__}.forward takes all but input_ids by name here. {_release()}")
        return forward(self, *args, **kwargs)

    return wrapper


def _refuse_ignored(model, name: str, value, attention) -> None:
    """ValueError, unless the attention function of this model has an argument of this name."""
    if is_compiling() and not (torch.is_tensor(value) or hasattr(value, "get_seq_length")):
        return  # signatures can't be read there
    if attention in ALL_ATTENTION_FUNCTIONS and name in _parameters(ALL_ATTENTION_FUNCTIONS[attention]):
        return
    what = f"{type(value).__name__} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
    raise ValueError(
        f"{type(model).__name__}.forward knows no argument {name!r} ({what}), and without it the result might be "
        f"wrong. {_release()}"
    )


@functools.lru_cache(maxsize=None)
def _parameters(function) -> tuple:
    return tuple(inspect.signature(function).parameters)


class _BothNames:
    """An output whose cache is given as `past_key_values`, and can be read as that and as `cache`."""

    if CACHE == "cache":

        def __init__(self, *args, **fields):
            if "past_key_values" in fields:
                fields[CACHE] = fields.pop("past_key_values")
            super().__init__(*args, **fields)

        @property
        def past_key_values(self):
            return self.cache

    else:  # up to 5.23; no __init__ of our own, of which the compiler of torch 2.4 makes no output

        @property
        def cache(self):
            return self.past_key_values


class BaseModelOutputWithPast(_BothNames, modeling_outputs.BaseModelOutputWithPast):
    __doc__ = modeling_outputs.BaseModelOutputWithPast.__doc__


class CausalLMOutputWithPast(_BothNames, modeling_outputs.CausalLMOutputWithPast):
    __doc__ = modeling_outputs.CausalLMOutputWithPast.__doc__


try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:  # up to 4.51

    class GradientCheckpointingLayer(nn.Module):
        gradient_checkpointing = False

        @staticmethod
        def _gradient_checkpointing_func(*args):  # from 4.35 transformers sets one of its own
            return torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)

        def __call__(self, *args, **kwargs):
            if self.gradient_checkpointing and self.training:
                kwargs["past_key_values"] = None  # would be written a second time in the backward pass
                return self._gradient_checkpointing_func(functools.partial(super().__call__, **kwargs), *args)
            return super().__call__(*args, **kwargs)


if CACHE == "cache":  # from 5.24 the layer takes away a cache of this name only

    class GradientCheckpointingLayer(GradientCheckpointingLayer):
        def __call__(self, *args, **kwargs):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                kwargs["past_key_values"] = None
            return super().__call__(*args, **kwargs)


class PreTrainedModel(transformers.PreTrainedModel):
    """transformers' `PreTrainedModel` with the methods that its older releases expect a model to bring."""

    _supports_flash_attn_2 = True  # `_supports_flash_attn` up to 4.52
    _supports_cache_class = True  # 4.36 to 4.55
    _supports_static_cache = True  # 4.38 to 4.55
    _supports_quantized_cache = True  # 4.42 to 4.55

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """From 4.56: whether the attention function can change; by default names in the source file decide."""
        return True

    if hasattr(transformers.PreTrainedModel, "tp_plan"):  # from 4.54

        @transformers.PreTrainedModel.tp_plan.getter
        def tp_plan(self):
            """
            Of a model that is split with the names by which continuous batching of transformers 5 tells that a process
            has a share of the heads; who plans would take them for modules that there are not.
            """
            plan = super().tp_plan
            styles = filter(None, map(parallel_style, self.modules()))
            if any(style == "colwise_fused_heads" for style, _ in styles):
                plan = {**plan, **{f"layers.*.self_attn.{name}": "colwise" for name in ("k_proj", "v_proj")}}
            return plan

    if HAS_TENSOR_PARALLEL and not KEEPS_FUSED_HEADS:  # 4.52 to 5.10

        def save_pretrained(self, *args, **kwargs):
            if getattr(self, "_device_mesh", None) is not None:
                raise NotImplementedError(
                    "This release of transformers can't put the attention weights of several processes together again. "
                    "Save from a model loaded without tp_plan, or take transformers 5.17 or newer."
                )
            return super().save_pretrained(*args, **kwargs)

    if "safe_serialization: bool = False" in str(inspect.signature(transformers.PreTrainedModel.save_pretrained)):
        # up to 4.34 pickles are the default

        def save_pretrained(self, save_directory, safe_serialization=True, **kwargs):
            return super().save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    if "padding_side" not in inspect.signature(transformers.PreTrainedTokenizer.pad).parameters:
        # up to 4.44 tensors are saved as they lie in memory, which safetensors refuses of codes side by side

        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            if not kwargs.get("keep_vars"):
                state.update({name: tensor.contiguous() for name, tensor in state.items()})
            return state

    if getattr(getattr(transformers.PreTrainedModel, "loss_function", None), "fset", None) is None:
        # up to 4.47; from 4.46 it is guessed from the class's name, with a warning that does not compile

        def loss_function(self, logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
            targets = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1).to(logits.device)
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(logits.float().view(-1, vocab_size), targets, reduction=reduction)
            return loss if num_items_in_batch is None else loss / num_items_in_batch

    if (
        "gradient_checkpointing_kwargs"
        not in inspect.signature(transformers.PreTrainedModel.gradient_checkpointing_enable).parameters
    ):  # up to 4.34

        def _set_gradient_checkpointing(self, module, value=False):
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = value

    if issubclass(transformers.PreTrainedModel, transformers.GenerationMixin):  # up to 4.49

        def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
            """
            As inherited; after `init_stream_support()` of transformers_stream_generator, which replaces `generate` of
            all models, only calls that ask for a stream go there. It reads `do_stream` from the generation
            configuration, which that of a checkpoint has not, and can't count several end tokens.
            """
            own = transformers.GenerationMixin.generate
            settings = copy.copy(self.generation_config if generation_config is None else generation_config)
            if transformers.PreTrainedModel.generate is not own:
                settings.do_stream = kwargs.pop("do_stream", getattr(settings, "do_stream", False))
            if not getattr(settings, "do_stream", False):
                return own(self, inputs, generation_config, logits_processor, *args, **kwargs)
            ends = kwargs.pop("eos_token_id", settings.eos_token_id)
            settings.eos_token_id, *others = ends if isinstance(ends, list) else [ends]
            if others:
                prompt_length = (kwargs["input_ids"] if inputs is None else inputs).shape[1]

                def end(input_ids, scores):
                    last = input_ids[:, -1:] if input_ids.shape[1] > prompt_length else input_ids[:, :0]
                    ended = (last[:, :, None] == torch.tensor(others, device=last.device)).any(-1).any(-1)  # (B,)
                    scores[ended] = -float("inf")
                    scores[ended, settings.eos_token_id] = 0
                    return scores

                logits_processor = [*(logits_processor or []), end]
            return super().generate(inputs, settings, logits_processor, *args, **kwargs)

    if (
        "input_ids" not in inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters
    ):  # up to 4.45

        def prepare_inputs_for_generation(
            self,
            input_ids,
            past_key_values=None,
            attention_mask=None,
            inputs_embeds=None,
            position_ids=None,
            use_cache=None,
            ntk_alpha=None,
            **kwargs,
        ):
            past_key_values = as_cache(past_key_values)
            past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            if past_length:
                # The ids are the whole sequence, or only new tokens behind a mask that covers everything.
                total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
                input_ids = input_ids[:, -max(total - past_length, 1) :]
            inputs = {"input_ids": input_ids}
            if inputs_embeds is not None and not past_length:
                inputs = {"inputs_embeds": inputs_embeds}
            T = next(iter(inputs.values())).shape[1]
            if attention_mask is not None and position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            return {
                **inputs,
                "past_key_values": past_key_values,
                "attention_mask": attention_mask,
                "position_ids": None if position_ids is None else position_ids[:, -T:],
                "use_cache": use_cache,
                "ntk_alpha": ntk_alpha,
            }

        @staticmethod
        def _reorder_cache(past_key_values, beam_idx):
            past_key_values = as_cache(past_key_values)
            past_key_values.reorder_cache(beam_idx)
            return past_key_values


_TIES_BY_PAIRS = hasattr(transformers.PreTrainedModel, "get_expanded_tied_weights_keys")


def tied_weights(pairs: dict):
    """`_tied_weights_keys` for {name: name of the weight that it shares if embeddings are tied}: a list up to 4.57."""
    return pairs if _TIES_BY_PAIRS else list(pairs)


def parameter_names(function) -> list:
    """The names of a function's parameters, in order; of a decorated one's, those of the function inside."""
    return list(inspect.signature(function).parameters)


# The arguments of `generate` that can be given by position.
_GENERATE_ARGUMENTS = (
    *("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"),
    *("synced_gpus", "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask"),
)


def arguments_by_name(args: tuple, after: str | None = None) -> dict:
    """What `generate` is given by position, or behind its argument `after`, by name; TypeError for too much."""
    names = _GENERATE_ARGUMENTS[0 if after is None else _GENERATE_ARGUMENTS.index(after) + 1 :]
    if len(args) > len(names):
        raise TypeError(f"Pass what follows {_GENERATE_ARGUMENTS[-1]} by name.")
    return dict(zip(names, args))


def resolved_settings(model, generation_config, use_model_defaults=None):
    """
    What a call of `generate` with this configuration goes by, but for its keywords: what it leaves open is the model's,
    as far as the release takes it from there (the end and padding from 4.42 or so on, all from 4.50 on).
    """
    if generation_config is None:
        return model.generation_config
    prepare = getattr(model, "_prepare_generation_config", None)
    if prepare is None:  # up to 4.39 or so
        return generation_config
    if IS_NEWER:
        _check_release()
    knows_it = "use_model_defaults" in inspect.signature(prepare).parameters  # 4.50 to 4.57
    return prepare(generation_config, **({"use_model_defaults": use_model_defaults} if knows_it else {}))[0]


# What the running call of `generate` has seen of its steps, on a release that is not tested: tokens read with each.
_STEPS = contextvars.ContextVar("steps", default=None)


_GENERATE_BATCH = inspect.signature(getattr(transformers.GenerationMixin, "generate_batch", lambda: None))  # from 4.53


class GenerationMixin(transformers.GenerationMixin):
    """
    transformers' `GenerationMixin`, called with the cache as `past_key_values`.

    On a release newer than those tested it warns once and looks at the second step of every `generate`: what the cache
    holds and the new tokens must be the whole sequence. Raises RuntimeError if they aren't, or if names that this code
    relies on have changed.
    """

    def generate(self, *args, **kwargs):
        kwargs.update(arguments_by_name(args))  # whatever their order has become
        cache = kwargs.pop("past_key_values", None)
        if cache is not None:
            kwargs[CACHE] = cache
        if not IS_NEWER:
            return _with_both_names(super().generate(**kwargs))
        _check_release()
        steps = []
        token = _STEPS.set(steps)
        try:
            output = super().generate(**kwargs)
        finally:
            _STEPS.reset(token)
        if not steps:
            raise RuntimeError(f"generate has prepared no step in a way that could be checked. {_release()}")
        return _with_both_names(output)

    if "warmup" in _GENERATE_BATCH.parameters:

        @functools.wraps(transformers.GenerationMixin.generate_batch)
        def generate_batch(self, inputs, *args, **kwargs):
            # Graphs for all numbers of rows are captured beforehand (`warmup`) only if they stay: it takes longer than
            # to answer some dozens of prompts.
            given = _GENERATE_BATCH.bind_partial(self, inputs, *args, **kwargs).arguments
            if "warmup" not in given:
                kwargs["warmup"] = given.get("persistent_manager", False)
            return super().generate_batch(inputs, *args, **kwargs)

    if hasattr(transformers.GenerationMixin, "init_continuous_batching"):

        @functools.wraps(transformers.GenerationMixin.init_continuous_batching)
        def init_continuous_batching(self, *args, **kwargs):
            # Its loop would only log what fails when a block is elsewhere than the keys and values, and return nothing.
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            devices = {str(torch.device(hook.execution_device)) for hook in hooks if _moves(hook)}
            if len(devices) > 1:
                raise ValueError(
                    f"Continuous batching keeps keys and values on one device, but this model is computed on "
                    f"{' and '.join(sorted(devices))}. Use generate, tp_plan='auto', or a device_map of one device."
                )
            return super().init_continuous_batching(*args, **kwargs)

    if IS_NEWER:

        @functools.wraps(transformers.GenerationMixin.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
            inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
            steps = _STEPS.get()
            if steps is None or len(steps) == 2:
                return inputs
            new = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
            cache = next((value for value in inputs.values() if hasattr(value, "get_seq_length")), None)
            held = 0 if cache is None else int(cache.get_seq_length())
            steps.append(held + new.shape[1])
            if len(steps) == 2 and (steps[1] < input_ids.shape[1] or held > steps[0]):
                raise RuntimeError(
                    f"After a step that read {steps[0]} tokens, generate hands over a cache of {held} and "
                    f"{new.shape[1]} new ones for a sequence of {input_ids.shape[1]}: the answer would be wrong. "
                    f"{_release()}"
                )
            return inputs


@functools.lru_cache(maxsize=None)
def _check_release() -> None:
    """For a release that is not tested: one warning; RuntimeError where it can't be relied on."""
    changed = [name for name, holds in PRIVATE_NAMES.items() if not holds()]
    if changed:
        raise RuntimeError(f"{_release()} It has changed what this code relies on: {', '.join(changed)}.")
    logger.warning(f"{_release()} The second step of every generation is checked; what else is new in it is not known.")


# --- Loading -----------------------------------------------------------------------------------------------------

# What the precision is called, as an argument of `from_pretrained`: `torch_dtype` up to 4.55.
DTYPE = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"


_ON_CPU = {"": torch.device("cpu")}  # by name it is refused with flash attention, though the model may still be moved


def loading_defaults(kwargs: dict) -> None:
    """Up to 4.52 (needed to 4.46): weights are not loaded beside a model that has random ones already."""
    if masking_utils is not None:
        return
    try:
        from transformers.integrations import is_deepspeed_zero3_enabled
    except ImportError:  # up to 4.32
        from transformers.deepspeed import is_deepspeed_zero3_enabled
    if not transformers.utils.is_accelerate_available() or is_deepspeed_zero3_enabled():
        return
    kwargs.setdefault("low_cpu_mem_usage", True)
    quantised = any(kwargs.get(key) for key in ("quantization_config", "load_in_8bit", "load_in_4bit"))
    placed = kwargs.get("device_map") is not None or kwargs.get("tp_plan") is not None
    if kwargs["low_cpu_mem_usage"] and not quantised and not placed:
        # Without a map these releases take all weights on the meta device for one tied weight, none of them missing.
        kwargs["device_map"] = dict(_ON_CPU)


def forget_device_map(model, device_map) -> None:
    """
    Take the device map that `loading_defaults` passed off the model again, unless the caller passed one (`device_map`):
    accelerate refuses to move a model that has a map.
    """
    if masking_utils is None and device_map is None and getattr(model, "hf_device_map", None) == _ON_CPU:
        del model.hf_device_map


def drop_old_arguments(kwargs: dict) -> None:
    """Take out of the arguments of loading what published programs pass and this release refuses."""
    hub = transformers.utils.hub
    taken = inspect.signature(getattr(hub, "cached_files", hub.cached_file)).parameters
    if "resume_download" in kwargs and "resume_download" not in taken:  # from 5.0 every download is resumed
        del kwargs["resume_download"]
        logger.info("resume_download has no effect with this release of transformers: downloads are always resumed.")


@contextlib.contextmanager
def keeping_dtypes(kwargs: dict):
    """
    A context for `from_pretrained(**kwargs)` in which a tensor of a precision of its own keeps it.

    Up to 4.52 (needed to 4.49) every tensor is cast to the precision that is asked for, and then to that of its place:
    the scales of quantised matrices lose bits in between. Without the argument only the second happens.
    """
    dtype = kwargs.get(DTYPE)
    if masking_utils is not None or not isinstance(dtype, torch.dtype):
        yield
        return
    del kwargs[DTYPE]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Up to 4.52 a tensor of another shape stops the loading, whatever `ignore_mismatched_sizes` says.
REPORTS_MISMATCHES = masking_utils is not None


def tensor_names(state_dict: dict | None, source) -> list:
    """
    The names of a checkpoint's tensors, from what `PreTrainedModel._load_pretrained_model` is called with: the tensors,
    or None, and then their names (up to 4.50), later the files.
    """
    if state_dict is not None:
        return list(state_dict)
    if "loaded_keys" in inspect.signature(transformers.PreTrainedModel._load_pretrained_model).parameters:
        return source
    from transformers.modeling_utils import load_state_dict

    return [name for file in source for name in load_state_dict(file, map_location="meta")]


def keep_offloaded_dtypes(model, names: tuple) -> None:
    """Up to 4.52 what is read from a disk is cast, codes too: read the tensors of these last names as they lie."""
    for module in model.modules():
        index = getattr(getattr(getattr(module, "_hf_hook", None), "weights_map", None), "dataset", None)
        for name, entry in (getattr(index, "index", None) or {}).items():
            if name.rpartition(".")[2] in names and "safetensors_file" in entry:
                entry.pop("dtype", None)


def quantization_methods() -> set:
    """The methods of quantised checkpoints that this release knows, as config.json calls them."""
    from transformers.utils.quantization_config import QuantizationMethod

    return {method.value for method in QuantizationMethod}


_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "use_auth_token",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
)


def load_config(config_class, config, path, kwargs: dict):
    """
    What `PreTrainedModel.from_pretrained` does with its configuration, done before it, so that loading
    choices can depend on it: `(config, keyword arguments that are not configuration keys)`.
    """
    if isinstance(config, transformers.PretrainedConfig):
        return config, kwargs
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    # These are arguments of loading too; a configuration has no data type "auto" and keeps its own quantisation.
    dtype = pop_dtype(kwargs := dict(kwargs))
    kwargs = kwargs if dtype is None else {**kwargs, DTYPE: dtype}
    kept = {key: kwargs[key] for key in (DTYPE, "quantization_config") if key in kwargs}
    hidden = [key for key in kept if key == "quantization_config" or dtype == "auto"]
    hidden.append("trust_remote_code")  # of which a configuration's own class warns, and servers pass it to every class
    rest = {key: value for key, value in kwargs.items() if key not in hidden}
    config, unused = config_class.from_pretrained(path if config is None else config, return_unused_kwargs=True, **rest)
    return config, {**hub, **unused, **kept}


def pop_dtype(kwargs: dict):
    """Take `dtype`, or `torch_dtype` (its name up to 4.55), out of `kwargs`; None when neither is given."""
    dtype, torch_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    return named_dtype(torch_dtype if dtype is None else dtype)


def named_dtype(dtype):
    """The torch.dtype of this name, or what names none; ValueError for anything else."""
    if dtype is None or dtype == "auto" or isinstance(dtype, (torch.dtype, dict)):  # dict: of parts of a model
        return dtype
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if named is None or not isinstance(named, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is not a torch data type; pass for example dtype='bfloat16', or bf16=True.")
    return named


_CONFIG_NAMES_ATTENTION = hasattr(transformers.PretrainedConfig(), "_attn_implementation")  # from 4.36


def named_attention(config, kwargs: dict):
    """The attention implementation that the caller of `from_pretrained` named, or None."""
    # The attribute without `_internal` reads "eager" where nothing is chosen, from 4.36 to 4.55.
    return kwargs.get("attn_implementation") or getattr(config, "_attn_implementation_internal", None)


def set_attention(config, kwargs: dict, choice: str | None) -> None:
    """Hand the attention implementation `choice` (None: transformers') to the `from_pretrained` that gets `kwargs`."""
    if FLASH_MIXES_ROWS and str(choice).startswith("flash_attention"):
        raise ImportError(
            "Flash attention of this release of transformers mixes up the rows of a batch. Take another release, or "
            "attn_implementation='sdpa'."
        )
    if _CONFIG_NAMES_ATTENTION:
        if choice is not None:
            kwargs["attn_implementation"] = choice
        return
    # up to 4.35, where `from_pretrained` knows nothing of it
    kwargs.pop("attn_implementation", None)
    choice = choice or PretrainedConfig._attn_implementation
    if choice == "flash_attention_2" and not is_flash_attn_2_available():
        raise ImportError("Flash attention 2 needs a GPU and the package flash-attn (pip install flash-attn).")
    if choice not in ("eager", *ALL_ATTENTION_FUNCTIONS):
        raise ValueError(f"attn_implementation must be eager, sdpa or flash_attention_2 here, found {choice!r}.")
    config._attn_implementation = choice


# --- Tokenizers --------------------------------------------------------------------------------------------------

_template = getattr(transformers.PreTrainedTokenizer, "apply_chat_template", None)
# Up to 4.39 there are no chat templates, or none for a batch.
_RENDERS_TEMPLATES = _template is not None and "BatchEncoding" in str(inspect.signature(_template).return_annotation)


def _as_pair(entry, is_split_into_words: bool):
    """The text and the second text, or None, of one entry of a batch."""
    if not isinstance(entry, (list, tuple)) or not entry or isinstance(entry[0], int):
        return entry, None
    if is_split_into_words and not isinstance(entry[0], (list, tuple)):
        return entry, None
    if len(entry) > 2:
        raise ValueError(
            f"Expected a text or a pair of texts in a batch, found {len(entry)}: {entry!r}. Pass is_split_into_words="
            f"True if these are the words of one text."
        )
    return entry[0], entry[1] if len(entry) == 2 else None


class PreTrainedTokenizer(transformers.PreTrainedTokenizer):
    """
    transformers' `PreTrainedTokenizer`, of any release, for a tokenizer that turns texts into ids at once.

    All of its ways to encode come down to one method, which the tokenizer brings:
    `_encode_pairs(pairs, is_batch, **arguments)`, where `pairs` is a list of (text, second text or None).
    """

    if hasattr(transformers.PreTrainedTokenizer, "_batch_encode_plus"):  # up to 4.57

        def _encode_plus(self, text, text_pair=None, **kwargs):
            return self._encode_pairs([(text, text_pair)], False, **kwargs)

        def _batch_encode_plus(self, batch_text_or_text_pairs, is_split_into_words=False, **kwargs):
            pairs = [_as_pair(entry, is_split_into_words) for entry in batch_text_or_text_pairs]
            return self._encode_pairs(pairs, True, is_split_into_words=is_split_into_words, **kwargs)

    else:  # from 5.0 one method for both

        def _encode_plus(self, text, text_pair=None, is_split_into_words=False, **kwargs):
            kinds = (list, tuple) if is_split_into_words else (str, list, tuple)
            is_batch = isinstance(text, (list, tuple)) and (
                isinstance(text[0], kinds) if text else not is_split_into_words
            )
            if not is_batch:
                pairs = [(text, text_pair)]
            elif text_pair is None:
                pairs = [_as_pair(entry, is_split_into_words) for entry in text]
            elif isinstance(text_pair, (list, tuple)) and len(text_pair) == len(text):
                pairs = list(zip(text, text_pair))
            else:
                raise ValueError(f"text is a batch of {len(text)}; text_pair must be a list of as many.")
            return self._encode_pairs(pairs, is_batch, is_split_into_words=is_split_into_words, **kwargs)

    if "padding_side" not in inspect.signature(transformers.PreTrainedTokenizer.pad).parameters:  # up to 4.44

        def pad(self, *args, padding_side=None, **kwargs):
            if padding_side not in (None, self.padding_side):
                raise ValueError(
                    f"This release of transformers pads on one side only: set tokenizer.padding_side = "
                    f"{padding_side!r} instead of passing it."
                )
            return super().pad(*args, **kwargs)

    @classmethod
    def _from_pretrained(cls, *args, **kwargs):
        try:
            return super()._from_pretrained(*args, **kwargs)
        except (ImportError, OSError) as error:
            # What is wrong with a vocabulary is hidden behind "Unable to load", and from 4.41 to 4.57 behind a request
            # to install protobuf.
            if isinstance(error.__context__, (ValueError, FileNotFoundError)):
                raise error.__context__ from None
            raise

    def _show_as_added(self, special_tokens: dict) -> None:
        """Have `added_tokens_decoder` and `get_added_vocab` (from 4.34) give these tokens, {surface: id}."""
        if hasattr(self, "_added_tokens_decoder"):
            self._added_tokens_encoder = dict(special_tokens)
            self._added_tokens_decoder = {
                index: transformers.AddedToken(token, special=True, normalized=True)
                for token, index in special_tokens.items()
            }

    if not _RENDERS_TEMPLATES:

        def __init__(self, chat_template=None, **kwargs):
            super().__init__(**kwargs)
            self.chat_template = chat_template
            self.init_kwargs["chat_template"] = chat_template  # so that it is saved

        def apply_chat_template(
            self,
            conversation,
            chat_template=None,
            add_generation_prompt=False,
            tokenize=True,
            padding=False,
            truncation=False,
            max_length=None,
            return_tensors=None,
            return_dict=False,
            tokenizer_kwargs=None,
            **kwargs,
        ):
            sandbox = importlib.import_module("jinja2.sandbox")
            template = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
                chat_template or self.chat_template
            )
            one = isinstance(conversation[0], dict)
            texts = [
                template.render(messages=messages, add_generation_prompt=add_generation_prompt, **kwargs)
                for messages in ([conversation] if one else conversation)
            ]
            texts = texts[0] if one else texts
            if not tokenize:
                return texts
            encoded = self(
                [texts] if one and return_tensors else texts,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
                add_special_tokens=False,
                **(tokenizer_kwargs or {}),
            )
            return encoded if return_dict else encoded["input_ids"]


# --- Private names -----------------------------------------------------------------------------------------------


def _takes(owner, name: str, *arguments: str) -> bool:
    """Whether a method exists, with these arguments in front; releases up to 4.52 have not got all of them."""
    method = getattr(owner, name, None)
    if method is None:
        return masking_utils is None
    found = [argument for argument in inspect.signature(method).parameters if argument not in ("self", "cls")]
    return found[: len(arguments)] == list(arguments)


def _has(owner, name: str) -> bool:
    return hasattr(owner, name) or _CACHE_WANTS_POSITIONS  # up to 4.57 some are missing


# All private names of transformers that the modules use, and whether each is what they take it for. Public ones that
# transformers documents for custom models are not in it, nor what a feature test above asks for.
PRIVATE_NAMES = {
    # called before, around and inside of the loop that `qwen_graphed_generation.GraphedGeneration` stands in for
    "_prepare_cache_for_generation": lambda: _takes(
        transformers.GenerationMixin, "_prepare_cache_for_generation", "generation_config", "model_kwargs"
    ),
    "_prepare_generation_config": lambda: _takes(
        transformers.GenerationMixin, "_prepare_generation_config", "generation_config"
    ),
    "_pad_token_tensor": lambda: _has(transformers.GenerationMixin, "_prepare_special_tokens"),  # which makes it
    "_sample": lambda: _takes(transformers.GenerationMixin, "_sample", "input_ids", "logits_processor"),
    "_load_pretrained_model": lambda: _takes(
        transformers.PreTrainedModel, "_load_pretrained_model", "model", "state_dict"
    ),
    "_init_weights": lambda: _takes(transformers.PreTrainedModel, "_init_weights", "module"),
    "_from_config": lambda: _takes(transformers.PreTrainedModel, "_from_config", "config"),
    "_attn_implementation": lambda: _has(transformers.PretrainedConfig(), "_attn_implementation"),
    "_attn_implementation_internal": lambda: _has(transformers.PretrainedConfig(), "_attn_implementation_internal"),
    "_name_or_path": lambda: _has(transformers.PretrainedConfig(), "_name_or_path"),
    # what a model says of itself
    **{
        name: functools.partial(_has, transformers.PreTrainedModel, name)
        for name in (
            *(
                "_auto_class",
                "_no_split_modules",
                "_tied_weights_keys",
                "_skip_keys_device_placement",
                "_tp_plan",
                "_can_compile_fullgraph",
            ),
            *("_keys_to_ignore_on_load_unexpected", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"),
            *("_supports_attention_backend", "_can_set_attn_implementation"),
        )
    },
    "_fsdp_plan": lambda: CACHE != "cache" or hasattr(transformers.PreTrainedModel, "_fsdp_plan"),
    # what a tokenizer brings, or calls
    "_encode_plus": lambda: _takes(transformers.PreTrainedTokenizer, "_encode_plus", "text", "text_pair"),
    "_eventual_warn_about_too_long_sequence": lambda: _takes(
        transformers.PreTrainedTokenizer, "_eventual_warn_about_too_long_sequence", "ids", "max_length", "verbose"
    ),
    "_from_pretrained": lambda: _takes(transformers.PreTrainedTokenizer, "_from_pretrained", "resolved_vocab_files"),
    "_add_tokens": lambda: _takes(transformers.PreTrainedTokenizer, "_add_tokens", "new_tokens", "special_tokens"),
    "_convert_token_to_id": lambda: _takes(transformers.PreTrainedTokenizer, "_convert_token_to_id", "token"),
    "_convert_id_to_token": lambda: _takes(transformers.PreTrainedTokenizer, "_convert_id_to_token", "index"),
    "_decode": lambda: _takes(transformers.PreTrainedTokenizer, "_decode", "token_ids", "skip_special_tokens"),
}
