"""
Matrices in 8 and 4 bits: the modules that multiply by them, and what loading does to have them.

Two formats of checkpoints are read and written as they lie in the file, without any package:

    GPTQ   config.json has "quantization_config" with "quant_method": "gptq" and 4 or 8 bits (`QuantizedLinear`)
    int8   config.json has "int8_weights": true, as tools/quantize_weights.py writes it (`Int8Linear`), or
           "int8_lm_head": true for the output layer alone, which loading can make from one in full precision

Loading calls, in this order: `take_quantization` before transformers' `from_pretrained`, which would hand the
checkpoint to another package; `loading_quantized` around it; `replace_matrices` when the model was built, on the meta
device; `leave_out` before its tensors are read, `round_output_layer` when they are; `check_tensors` and
`give_back_quantization` when the model is where it belongs.

Other methods (bitsandbytes, AWQ, ...) and a `quantization_config` that the caller passes are transformers' own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import weakref

import torch
from torch import nn
from transformers.utils import logging

from .qwen_ops import (
    gptq_blocks,
    gptq_dequantize,
    gptq_linear,
    gptq_linear_reference,
    gptq_wants_side_by_side,
    linear,
    linear_reference,
)
from .transformers_compat import (
    REPORTS_MISMATCHES,
    is_compiling,
    is_differentiating_forward,
    keep_offloaded_dtypes,
    keeping_dtypes,
    quantization_methods,
)

SORTED_ON = ("cuda",)  # devices whose kernels want the inputs in the groups' order
SIDE_BY_SIDE_ON = ("cpu",)  # devices whose kernels want the codes of an output side by side in memory
REORDERED_CODES = 1 << 24  # at a time
HELD = "_gptq"  # where a configuration keeps its quantization_config while transformers may not see it


@dataclasses.dataclass(frozen=True)
class GPTQFormat:
    """
    What `quantization_config` says about the tensors of a GPTQ checkpoint.

    bits: 4 or 8. group_size: neighbouring inputs that share a scale, -1: all of them. desc_act: inputs were taken in
    an order of their own, so that g_idx says which group each is in. zero_offset: what is added to a stored zero, 1,
    or 0 in "gptq_v2". lm_head: whether the output layer is quantised too.
    """

    bits: int
    group_size: int
    desc_act: bool
    zero_offset: int
    lm_head: bool


def check_quantization_config(config: dict) -> GPTQFormat | None:
    """
    The format that a checkpoint's `quantization_config` describes, or None for a method that is transformers' own.

    Raises ValueError for what neither reads; the message says what was found and what to do.

    Example:
        >>> check_quantization_config({"quant_method": "gptq", "bits": 4, "group_size": 128})
        GPTQFormat(bits=4, group_size=128, desc_act=False, zero_offset=1, lm_head=False)
    """
    method = config.get("quant_method") or ("bitsandbytes" if is_bitsandbytes(config) else None)
    if method != "gptq":
        if method in quantization_methods():
            return None
        raise ValueError(
            f"config.json has a quantization_config of the method {method!r}, which neither this code nor this release "
            f"of transformers reads. Take the GPTQ checkpoint (Int4, Int8) or the one in full precision, which "
            f"tools/quantize_weights.py makes a GPTQ checkpoint of."
        )
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(
            f"config.json: quantization_config.bits must be 4 or 8, found {bits!r}. Other checkpoints need the package "
            f"gptqmodel: pass quantization_config=GPTQConfig(bits={bits!r}) to from_pretrained."
        )
    if not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
        raise ValueError(f"config.json: quantization_config.group_size must be -1 or positive, found {group_size!r}.")
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"config.json: quantization_config.checkpoint_format must be 'gptq' or 'gptq_v2', found {layout!r}, which "
            f"is a layout for one kernel. Take the checkpoint it was made from, or load it with the package gptqmodel: "
            f"quantization_config=GPTQConfig(bits={bits})."
        )
    for key, plain in (("dynamic", (None, {})), ("pack_dtype", (None, "int32"))):
        if config.get(key) not in plain:
            raise ValueError(
                f"config.json: quantization_config.{key} is {config[key]!r}, which this code does not read. Load the "
                f"checkpoint with the package gptqmodel: quantization_config=GPTQConfig(bits={bits})."
            )
    return GPTQFormat(
        bits=bits,
        group_size=group_size,
        desc_act=bool(config.get("desc_act", False)),
        zero_offset=int(layout == "gptq"),
        lm_head=bool(config.get("lm_head", False)),
    )


def is_bitsandbytes(config: dict) -> bool:
    return bool(config.get("load_in_8bit") or config.get("load_in_4bit"))


# --- Modules -----------------------------------------------------------------------------------------------------


_ADVICE = (
    "Tune the checkpoint in full precision that this one was made from, or merge adapters into that, and quantise the "
    "result with tools/quantize_weights.py. LoRA that stays unmerged can be trained over quantised matrices."
)
_NO_WEIGHT = (
    f"A quantised matrix has codes in place of a weight: its numbers can't be read, changed or learned. {_ADVICE}"
)


class _NoWeight(nn.Parameter):
    """
    What there is to know about the weight of a quantised matrix: shape, data type of its codes, device.

    Everything else that is asked of it raises ValueError: adapters would take codes for the weight's values, and write
    rounded numbers back.
    """

    ANSWERED = {
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "ndim", "dtype", "device", "is_meta", "requires_grad", "grad")
        ),
        *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.data_ptr, torch.Tensor.is_contiguous),
        *(torch.Tensor.element_size, torch.Tensor.stride, torch.Tensor.is_floating_point, torch.Tensor.is_complex),
    }

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.empty_like:  # room that loading (from 5.0) makes for what a checkpoint lacks, see `draw`
            return super().__torch_function__(torch.zeros_like, types, args, kwargs or {}).as_subclass(torch.Tensor)
        if func not in cls.ANSWERED:
            raise ValueError(_NO_WEIGHT)
        return super().__torch_function__(func, types, args, kwargs or {})

    def to(self, device, **kwargs) -> torch.Tensor:
        """The codes on another device, as accelerate moves them; they are not cast."""
        if isinstance(device, torch.dtype):
            raise ValueError(_NO_WEIGHT)
        return super().__torch_function__(torch.Tensor.to, (type(self),), (self, device), kwargs)

    def __repr__(self) -> str:
        return f"no weight, but {self.dtype} codes for {tuple(self.shape)} on {self.device}"


# The weight that each module has given last: saving a model that is offloaded takes two of the same `id` for one.
_OFFLOADED = weakref.WeakKeyDictionary()


class _Quantized(nn.Linear):
    """An `nn.Linear`, which adapters look for, with codes for a weight. Its scales keep their precision in a cast."""

    SCALES = ""  # their name
    HOLDS_CODES = True  # for other modules: transformers may have loaded this one twice, and the class with it

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features

    @property
    def weight(self) -> _NoWeight:
        codes = self.codes.detach()
        if codes.shape != (self.out_features, self.in_features):  # packed
            codes = codes[:1, :1].expand(self.out_features, self.in_features)
        stand_in = codes.as_subclass(_NoWeight)
        if codes.is_meta:
            _OFFLOADED[self] = stand_in
        return stand_in

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name != "weight":
            super().register_parameter(name, param)
        elif not isinstance(param, _NoWeight):  # which adapters put back where they had it from
            raise ValueError(_NO_WEIGHT)

    def _load_from_state_dict(self, state_dict, prefix: str, *args) -> None:
        """As inherited; a weight in the place of codes is an error, with strict=False too."""
        given = state_dict.get(f"{prefix}weight")
        if given is None or (given.dtype == torch.int8 and "weight" in self._parameters):
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            args[-1].append(
                f"{prefix}weight is {given.dtype}, but the model has codes there. Load this state into a model in full "
                f"precision, and quantise what that one saves with tools/quantize_weights.py."
            )

    def _apply(self, fn, *args, **kwargs):
        scales = getattr(self, self.SCALES)

        def keep(tensor):  # integers are moved, not cast
            whole = tensor.detach().view(torch.int16) if tensor is scales else tensor
            moved = fn(whole)
            if moved.dtype != whole.dtype and not whole.is_floating_point():  # `type` casts those, too
                moved = whole.to(moved.device)
            return moved.view(tensor.dtype) if tensor is scales else moved

        return super()._apply(keep, *args, **kwargs)


class QuantizedLinear(_Quantized):
    """
    `nn.Linear` with the tensors of a GPTQ checkpoint in place of its weight (https://arxiv.org/abs/2210.17323).

    With n = 32 / bits codes in an int32, the first in its lowest bits:

        qweight  int32 (in / n, out)        code q of input n r + j in bits `bits * j` of row r
        qzeros   int32 (groups, out / n)    a zero for each group and output, less `zero_offset`, packed alike
        scales   float16 (groups, out)
        g_idx    int32 (in)                 the group of each input
        bias     (out) or None, in the model's precision

        weight[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o])

    The weight is computed by `dequantize`. Gradients go through it to the inputs, never to the codes.

    On a GPU codes of inputs in another order than the groups' (`desc_act`) are sorted, once, so that kernels find the
    inputs of a group side by side: there is no qweight then, `sorted_qweight` has its codes, and input order[i], int64
    (in), belongs to the i-th of them. `arrangement` names that order: matrices with the same take the same inputs. A
    state dict has the codes as the file has them.

    On a CPU the codes of an output lie side by side in memory: qweight is the same matrix, and not contiguous.
    """

    SCALES = "scales"

    def __init__(
        self, in_features: int, out_features: int, format: GPTQFormat, needs_bias: bool = False, device=None, dtype=None
    ):
        """
        needs_bias: a checkpoint without the bias is incomplete; else it has none then. dtype: of the bias.

        Raises ValueError for sizes that can't be packed.
        """
        super().__init__(in_features, out_features)
        n = 32 // format.bits
        if in_features % n or out_features % n:
            raise ValueError(
                f"{format.bits} bits are packed {n} to an integer: a matrix of {in_features} inputs and {out_features} "
                f"outputs can't be quantised by GPTQ."
            )
        self.format, self.needs_bias = format, needs_bias
        self.group_size = in_features if format.group_size == -1 else format.group_size
        self.is_ordered = not format.desc_act  # input i is in group i // group_size
        groups = -(-in_features // self.group_size)

        def parameter(*shape, dtype, requires_grad=False):
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad)

        self.qweight = parameter(in_features // n, out_features, dtype=torch.int32)
        self.qzeros = parameter(groups, out_features // n, dtype=torch.int32)
        self.scales = parameter(groups, out_features, dtype=torch.float16)
        self.g_idx = parameter(in_features, dtype=torch.int32)
        self.bias = parameter(out_features, dtype=dtype, requires_grad=True)
        self.register_parameter("sorted_qweight", None)
        self.arrangement: int | None = None
        self._forget_order()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in), any floating dtype. Returns (..., out) in the same."""
        if torch.is_grad_enabled() and x.requires_grad and not is_compiling() and not is_differentiating_forward():
            y = _FrozenProduct.apply(self.arranged(x), *self.tensors())
            return y if self.bias is None else y + self.bias
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `forward`, with a bias of the caller's, or without."""
        return (gptq_linear_reference if is_compiling() else gptq_linear)(self.arranged(x), *self.tensors(), bias)

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in), its inputs in the order of the codes."""
        return x if self.order is None else x.index_select(-1, self.order)

    def tensors(self) -> tuple:
        """What the operations `gptq_linear` and `gptq_dequantize` take, for inputs that are `arranged`."""
        g_idx = None if self.is_ordered or self.order is not None else self.g_idx
        return (
            *(self.codes, self.qzeros, self.scales, g_idx),
            *(self.format.bits, self.group_size, self.format.zero_offset),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the codes stand for, (out, in)."""
        weight = gptq_dequantize(*self.tensors(), dtype=dtype)
        return (weight if self.order is None else weight[self.order.argsort()]).t()

    def sort_inputs(self) -> None:
        """Sort the codes by the groups of their inputs, if they are not; unless groups are of several sizes."""
        if self.is_ordered or self.order is not None:
            return
        order = self.g_idx.argsort(stable=True)
        if not torch.equal(self.g_idx[order], self._ordered_groups()):
            return
        arrangement, codes = hash(tuple(order.tolist())), _reordered(self.qweight, order, self.format.bits)
        del self.qweight  # peft asks a matrix that has this name for its device
        self.sorted_qweight = nn.Parameter(codes, requires_grad=False)
        self.arrangement = arrangement
        self.register_buffer("order", order, persistent=False)

    def _forget_order(self) -> None:
        self.sorted_qweight = self.arrangement = None
        self.register_buffer("order", None)  # one that is not persistent has to be a tensor for accelerate

    @torch.no_grad()
    def put_side_by_side(self, in_place: bool = False) -> None:
        """
        Have the codes of an output side by side in memory, if kernels want them so; the matrix stays the same.

        in_place: in the memory that they have, which nobody else may be reading.
        """
        codes = self.codes.detach()
        wanted = self.is_ordered and gptq_wants_side_by_side(self.in_features, self.group_size)
        if wanted and codes.is_contiguous():
            turned = codes.t().contiguous()
            place = codes.view(turned.shape).copy_(turned) if in_place else turned
            self.qweight = nn.Parameter(place.t(), requires_grad=False)

    def _codes_as_in_the_file(self) -> torch.Tensor:
        return _reordered(self.sorted_qweight, self.order.argsort(), self.format.bits)

    def _apply(self, fn, *args, **kwargs):
        before = self.codes.device
        super()._apply(fn, *args, **kwargs)
        if self.codes.device.type in SORTED_ON:
            self.sort_inputs()
        if self.codes.device != before and self.order is None:
            if not self.codes.is_contiguous():
                self.qweight = nn.Parameter(self.codes.detach().contiguous(), requires_grad=False)
            if self.codes.device.type in SIDE_BY_SIDE_ON:
                self.put_side_by_side()
        return self

    def __setattr__(self, name: str, value) -> None:
        """As inherited; accelerate sets a hook when it has put the codes away, and may have named them otherwise."""
        super().__setattr__(name, value)
        if name == "_hf_hook" and self.order is not None and self.codes.device.type == "meta":
            for hook in getattr(value, "hooks", (value,)):
                self._find_offloaded(hook)

    def _find_offloaded(self, hook) -> None:
        """See that an accelerate hook finds sorted codes: a state dict has them as a file has, under the other name."""
        kept = getattr(hook, "weights_map", None)
        if kept is None or "sorted_qweight" in kept or "qweight" not in kept:
            return
        self.qweight = nn.Parameter(self.sorted_qweight, requires_grad=False)
        self._forget_order()
        places = hook.original_devices
        places["qweight"], _ = places.pop("sorted_qweight"), places.pop("order", None)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.order is not None:
            del destination[f"{prefix}sorted_qweight"]
            destination[f"{prefix}qweight"] = self._codes_as_in_the_file()

    def _load_from_state_dict(self, state_dict, prefix: str, *args) -> None:
        """As inherited; the groups of the inputs may come in another order, those that there are not are an error."""
        groups = state_dict.get(f"{prefix}g_idx")
        # from_pretrained of some releases fills an empty module one tensor at a time; there `check_tensors` says it.
        is_whole = f"{prefix}qweight" in state_dict or not (self.g_idx is None or self.g_idx.is_meta)
        if groups is not None and not groups.is_meta and is_whole:
            try:
                self._check_groups(groups)
            except ValueError as error:
                args[-1].append(f"{prefix}{error}. The state is damaged, or of another model.")
                return
        was_sorted = self.order is not None
        if was_sorted:
            self.qweight = nn.Parameter(self._codes_as_in_the_file(), requires_grad=False)
            self._forget_order()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was_sorted:
            self.set_order()
            self.sort_inputs()
        elif groups is not None:
            self._see_order()

    def set_order(self) -> None:
        """
        See from g_idx whether the inputs are in the groups' order, whatever the configuration says.

        Raises ValueError for groups that there are not, or scales that are not finite. What is offloaded to a disk is
        not looked at.
        """
        if self.codes.device.type == "meta" or self.order is not None:
            return
        if not bool(torch.isfinite(self.scales).all()):
            raise ValueError("some of its scales are not finite")
        self._check_groups(self.g_idx)
        self._see_order()

    def _check_groups(self, g_idx: torch.Tensor) -> None:
        """Raise ValueError if g_idx names groups that there are not: kernels would read what lies elsewhere."""
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= self.scales.shape[0]:
            raise ValueError(f"g_idx names the groups {low} to {high}, but there are {self.scales.shape[0]}")

    def _see_order(self) -> None:
        if self.g_idx is None or self.codes.is_meta or self.g_idx.is_meta:  # the rest of it is read later
            return
        self.is_ordered = bool((self.g_idx == self._ordered_groups()).all())
        if not self.is_ordered and not self.codes.is_contiguous():  # kernels would copy them at every call
            self.qweight = nn.Parameter(self.codes.detach().contiguous(), requires_grad=False)

    def derive_groups(self) -> None:
        """Fill in a g_idx that the checkpoint left out."""
        self.g_idx = nn.Parameter(self._ordered_groups(), requires_grad=False)

    def _ordered_groups(self) -> torch.Tensor:
        return torch.arange(self.in_features, dtype=torch.int32, device=self.codes.device) // self.group_size

    @property
    def codes(self) -> nn.Parameter:
        return self.qweight if self.order is None else self.sorted_qweight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.format.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


@torch.no_grad()
def _reordered(qweight: torch.Tensor, order: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed codes, int32 (in / n, out), those of input order[i] in the i-th place; by blocks of outputs."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)[:, None]
    result = torch.empty_like(qweight)
    width = max(1, REORDERED_CODES // len(order))
    for block, to in zip(qweight.split(width, dim=1), result.split(width, dim=1)):
        codes = (block[:, None] >> shifts & 2**bits - 1).flatten(0, 1)[order]  # (in, outputs)
        to.copy_((codes.unflatten(0, (len(block), -1)) << shifts).sum(1, dtype=torch.int32))
    return result


class _FrozenProduct(torch.autograd.Function):
    """x (..., in) times a quantised matrix, whose weight is computed anew for the gradient instead of kept for it."""

    @staticmethod
    def forward(ctx, x, *tensors):
        ctx.tensors = tensors
        return gptq_linear(x, *tensors)

    @staticmethod
    def backward(ctx, grad):
        blocks = gptq_blocks(*ctx.tensors, dtype=grad.dtype)
        return (sum(grad[..., where] @ weight.t() for where, weight in blocks), *[None] * len(ctx.tensors))


class _Codes(nn.Parameter):
    """Whole numbers, which can't learn; asked to, they say what to do."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False):
        return data.detach().as_subclass(cls)

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise ValueError(_NO_WEIGHT)
        return self


def round_to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    weight: (out, in), any floating dtype. Returns int8 (out, in) and scales, float32 (out,); zeros have a scale of 1.

    Raises ValueError for numbers that are not finite.

    Example:
        >>> round_to_int8(torch.tensor([[0.5, -1.27], [0.0, 0.0]]))
        (tensor([[  50, -127],
                [   0,    0]], dtype=torch.int8), tensor([0.0100, 1.0000]))
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("it holds numbers that are not finite")
    scale = torch.where(scale > 0, scale, 1)
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(_Quantized):
    """
    `nn.Linear` with an int8 weight (out, in), constant, which is multiplied by weight_scale, float32 (out,).

    A checkpoint has it under the name `weight`; here it is `codes`.
    """

    SCALES = "weight_scale"

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None, dtype=None):
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(
            torch.zeros(out_features, in_features, dtype=torch.int8, device=device), requires_grad=False
        )
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @property
    def codes(self) -> torch.Tensor:
        return self._parameters["weight"].detach()  # kernels take no subclasses

    @_Quantized.weight.setter
    def weight(self, codes: torch.Tensor) -> None:  # of a copy that DataParallel makes, which has no parameters
        self._parameters["weight"] = codes

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As inherited; codes, int8, may be put in the place of the weight, as loading does."""
        if name != "weight" or param is None or param.dtype != torch.int8 or isinstance(param, _NoWeight):
            super().register_parameter(name, param)
            return
        codes = _Codes(param)
        vars(codes).update(vars(param))  # loading notes there what it has done
        self._parameters.setdefault(name, None)  # PyTorch refuses the name of an attribute that is no parameter
        nn.Linear.register_parameter(self, name, codes)

    def _load_from_state_dict(self, state_dict, prefix: str, *args) -> None:
        """As inherited; room of floats, which 4.53 to 4.57 make for codes that a checkpoint lacks, is one of codes."""
        given = state_dict.get(f"{prefix}weight")
        # They load a tensor at a time, and this module by itself.
        is_room = given is not None and given.is_floating_point() and self.codes.device.type == "meta" and not prefix
        if is_room:
            state_dict = {**state_dict, "weight": torch.zeros_like(given, dtype=torch.int8)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict) -> None:
        """As inherited; what was pickled comes back as a plain parameter."""
        super().__setstate__(state)
        self.register_parameter("weight", self._parameters["weight"])

    @classmethod
    @torch.no_grad()
    def rounded(cls, linear: nn.Linear, dtype: torch.dtype) -> Int8Linear:
        """What the weight of `linear` is in int8, by `round_to_int8`; a bias in `dtype`."""
        where = {"device": linear.weight.device, "dtype": dtype}
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, **where)
        new._round(lambda rows: linear.weight[rows])
        if linear.bias is not None:
            new.bias.copy_(linear.bias)
        return new.train(linear.training)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """Take random weights, normal and rounded, if there are none yet: all codes are 0."""
        if self.codes.device.type == "meta" or bool(self.codes.any()):
            return
        # From 4.53 to 4.57 the scales may be on the meta device yet: those of the checkpoint, which come after this.
        self._round(lambda rows: torch.empty_like(self.codes[rows], dtype=torch.float32).normal_(std=std))

    def _round(self, weight_of) -> None:
        """Take over a weight, (rows, in) of it for each slice of the outputs."""
        height = max(1, REORDERED_CODES // self.in_features)
        for start in range(0, self.out_features, height):
            rows = slice(start, start + height)
            self.codes[rows], self.weight_scale[rows] = round_to_int8(weight_of(rows))

    def tensors(self) -> tuple:
        """Codes, int8 (out, in), and scales, float32 (out)."""
        return self.codes, self.weight_scale

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return (linear_reference if is_compiling() else linear)(x, self.codes, bias, self.weight_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.bias)


def check_state(model, state_dict: dict) -> None:
    """Raise RuntimeError for a state dict that has codes where the model has weights."""
    for name, module in model.named_modules():
        found = [part for part in ("qweight", "weight_scale") if f"{name}.{part}" in state_dict]
        if found and type(module) is nn.Linear:
            raise RuntimeError(
                f"The state dict has codes for {name} ({found[0]}), but the model has a weight there. Load it into a "
                f"model that from_pretrained has made of the quantised checkpoint."
            )


def _has_codes(model) -> bool:
    return any(getattr(module, "HOLDS_CODES", False) for module in model.modules())


def check_learning(model) -> None:
    """Raise ValueError if all of a model's parameters are asked to learn, and codes are among them."""
    if _has_codes(model):
        raise ValueError(_NO_WEIGHT)


def check_training(model) -> None:
    """
    Raise ValueError if a model with quantised matrices is about to be trained whole, all but its matrices that is.

    model: `QWenModel`, or one with a head. Where adapters or chosen layers learn, its embedding or its last norm is
    frozen.
    """
    network = getattr(model, "transformer", model)
    learns = network.wte.weight.requires_grad and network.ln_f.weight.requires_grad
    if learns and _has_codes(model):
        raise ValueError(f"This model has quantised matrices, which can't learn, and nothing is frozen. {_ADVICE}")


# --- Loading -----------------------------------------------------------------------------------------------------


def take_quantization(config, path, kwargs: dict):
    """
    The configuration to load with: transformers must not see a `quantization_config` that is ours to read.

    config: of the checkpoint at `path`; it is not changed. kwargs: of `from_pretrained`; `quantization_config` among
    them leaves everything to transformers, `ignore_mismatched_sizes` may be added, so that `check_tensors` can say
    what is wrong.

    Raises ValueError for a checkpoint that neither this code nor transformers reads, for two formats of the same
    matrices, or in tensor parallelism.
    """
    if kwargs.get("quantization_config") is not None or is_bitsandbytes(kwargs):
        _refuse_int8(config, "the method that the call names")
        return config
    found = getattr(config, "quantization_config", None)
    found = found.to_dict() if hasattr(found, "to_dict") else found
    gptq = bool(found) and check_quantization_config(found) is not None
    if found and not gptq:
        _refuse_int8(config, f"the checkpoint's method {found.get('quant_method')!r}")
    if gptq and getattr(config, "int8_weights", False):
        raise ValueError(
            f"int8_weights is for checkpoints that tools/quantize_weights.py has written in int8, but {path} is a GPTQ "
            f"checkpoint of {found['bits']} bits. Leave int8_weights out, or set it to false in config.json; "
            f"int8_lm_head=True has the output layer in int8."
        )
    if not gptq and not holds_codes(config):
        return config
    if kwargs.get("tp_plan") is not None:
        raise ValueError(
            "Quantised matrices can't be split by tensor parallelism (tp_plan). Place whole blocks on the devices "
            "instead: device_map='auto'."
        )
    if REPORTS_MISMATCHES:
        kwargs.setdefault("ignore_mismatched_sizes", True)
    if gptq:
        if check_quantization_config(found).lm_head:
            _refuse_int8(config, "the checkpoint's own, which has the output layer in it")
        config = copy.copy(config)
        vars(config).pop("quantization_config", None)
        setattr(config, HELD, found)
    return config


def _refuse_int8(config, what: str) -> None:
    if getattr(config, "int8_weights", False):
        raise ValueError(f"int8_weights does not go with {what}: this code alone reads it. Leave one of them out.")
    if getattr(config, "int8_lm_head", False):
        raise ValueError(f"int8_lm_head does not go with {what}. Leave it out, or set it to false in config.json.")


def holds_codes(config) -> bool:
    """Whether the model that is being loaded with this configuration has matrices of this module."""
    return is_quantized(config) or any(getattr(config, name, False) for name in ("int8_weights", "int8_lm_head"))


def is_quantized(config) -> bool:
    """Whether the model that is being loaded with this configuration has matrices of GPTQ."""
    return getattr(config, HELD, None) is not None


def give_back_quantization(model) -> None:
    """Let the configuration of a loaded model say how its matrices are quantised, as it is saved."""
    held = vars(model.config).pop(HELD, None)
    if held is not None:
        model.config.quantization_config = held


def replace_matrices(model) -> None:
    """
    Put quantised modules where the checkpoint has them, in place, as `model.config` says: GPTQ the matrices of the
    blocks, int8 the output layer too, or that alone.

    Weights are not converted: this is for a model that is about to be loaded, or gets random weights. Nothing happens
    for a configuration that asks for nothing, or has `quantization_config` in sight, which is for other software.
    """
    held = getattr(model.config, HELD, None)
    format = None if held is None else check_quantization_config(held)
    int8 = getattr(model.config, "int8_weights", False)
    is_ours = format is not None or getattr(model.config, "quantization_config", None) is None
    int8_head = int8 or (is_ours and getattr(model.config, "int8_lm_head", False))
    with_blocks = int8 or format is not None
    with_head = int8_head or (format is not None and format.lm_head)
    for name, old in list(model.named_modules()):
        is_head = name == "lm_head"
        wanted = with_head if is_head else with_blocks and re.search(r"(^|\.)h\.\d+\.", name)
        if not wanted or not isinstance(old, nn.Linear) or isinstance(old, _Quantized):
            continue
        sizes, has_bias = (old.in_features, old.out_features), old.bias is not None
        where = {"device": old.weight.device, "dtype": old.weight.dtype}
        is_int8 = int8_head if is_head else int8
        new = Int8Linear(*sizes, has_bias, **where) if is_int8 else QuantizedLinear(*sizes, format, has_bias, **where)
        if getattr(old, "into_residual", False):
            new.into_residual = True
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def _other_shapes(source, found: str) -> str:
    return (
        f"Tensors of the checkpoint {source} have other shapes than its config.json says: {found}. Compare "
        f"hidden_size, intermediate_size and, in quantization_config, bits and group_size with the weight files; both "
        f"must come from one checkpoint."
    )


@contextlib.contextmanager
def loading_quantized(config, source, kwargs: dict):
    """A context for transformers' `from_pretrained(source, config=config, **kwargs)` after `take_quantization`."""
    if not holds_codes(config):
        yield
        return
    try:
        with keeping_dtypes(kwargs):
            yield
    except ValueError as error:
        if REPORTS_MISMATCHES or "tensor of shape" not in str(error):
            raise
        raise RuntimeError(_other_shapes(source, str(error))) from None


def leave_out(model, names) -> None:
    """
    Before the tensors are read: remove from quantised matrices what the checkpoint lacks and may lack, so that it isn't
    reported as missing. That is, in GPTQ, the bias where the network has none, and g_idx where `check_tensors` derives
    it; and the int8 output layer where `round_output_layer` makes it.

    names: of all tensors of the checkpoint.
    """
    prefix = f"{model.base_model_prefix}."

    def bare(name: str) -> str:  # the checkpoint of a bare model, or of a model with a head, may be loaded to the other
        return name[len(prefix) :] if name.startswith(prefix) else name

    found = set(map(bare, names))
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear) or f"{bare(name)}.qweight" not in found:
            continue
        if not module.needs_bias and f"{bare(name)}.bias" not in found:
            module.bias = None
        if not module.format.desc_act and f"{bare(name)}.g_idx" not in found:
            module.g_idx = None
    head = getattr(model, "lm_head", None)
    is_wanted = model.config.int8_lm_head and not model.config.int8_weights and isinstance(head, Int8Linear)
    if is_wanted and "lm_head.weight_scale" not in found:
        # GPTQ's checkpoints have it in float16, which another precision would round once more.
        dtype = torch.float16 if is_quantized(model.config) else model.get_input_embeddings().weight.dtype
        where = {"device": head.codes.device, "dtype": dtype}
        model.lm_head = nn.Linear(head.in_features, head.out_features, head.bias is not None, **where)


def round_output_layer(model) -> bool:
    """
    When the tensors are read: round an output layer that `int8_lm_head` wants in int8 and the checkpoint has not.

    Returns whether that is done; it can't be where the layer has no numbers yet, or none in memory. Raises
    RuntimeError for numbers that are not finite.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or not model.config.int8_lm_head or isinstance(head, _Quantized):
        return True
    if head.weight.device.type == "meta":
        return False
    try:
        model.lm_head = Int8Linear.rounded(head, model.get_input_embeddings().weight.dtype)
    except ValueError as error:
        raise RuntimeError(
            f"The output layer (lm_head) can't be rounded to int8, as {head.weight.dtype}: {error}. Load the "
            f"checkpoint without int8_lm_head to see whether it is damaged, or with fp32=True if its numbers are too "
            f"large."
        ) from None
    return True


def _check_int8(model, info: dict, source) -> None:
    """Raise RuntimeError if codes in int8 were read as weights, or weights as codes."""
    missing, left_over = (
        [key for key in info[keys] if key.endswith(".weight_scale")] for keys in ("missing_keys", "unexpected_keys")
    )
    in_blocks = [name for name, module in model.named_modules() if ".h." in f".{name}" and type(module) is Int8Linear]
    if in_blocks and len(missing) >= len(in_blocks):
        raise RuntimeError(
            f"The configuration says int8_weights, but the checkpoint {source} has no matrices in int8 (no "
            f"weight_scale). Leave int8_weights out, or make a checkpoint in int8 of this one: "
            f"tools/quantize_weights.py."
        )
    if getattr(model, "hf_quantizer", None) is not None:  # which may have scales of this name
        return
    if any(".h." in f".{key}" for key in left_over):
        key, what = "int8_weights", "its matrices in int8"
    elif "lm_head.weight_scale" in left_over and model.get_output_embeddings() is not None:
        key, what = "int8_lm_head", "its output layer in int8"
    else:
        return
    raise RuntimeError(
        f"The checkpoint {source} has {what}, but its configuration does not say so. Leave out {key}=False, or write "
        f'"{key}": true into its config.json. Full precision is in the checkpoint that this one was made from.'
    )


def check_tensors(model, info: dict, source, are_given: bool = False) -> None:
    """
    See that the tensors of a checkpoint fit its quantisation, derive a g_idx that it left out, and have codes in the
    order that the device's kernels want.

    info: what `output_loading_info=True` gives. are_given: whether the tensors were the caller's, and stay as they are.

    Raises RuntimeError for tensors of other shapes, for codes where the configuration has weights and the reverse, for
    a g_idx that is missing with desc_act or names groups that there are not, and for scales that are not finite;
    ValueError for an output layer on a disk that is to be rounded.
    """
    _check_int8(model, info, source)
    mismatched = info.get("mismatched_keys") or ()
    if mismatched:  # (name, shape found, shape wanted), in some releases names
        places = dict(model.named_parameters())

        def said(entry) -> str:
            if isinstance(entry, str):
                return f"{entry} is not {tuple(places[entry].shape)}" if entry in places else entry
            return "{} is {} instead of {}".format(entry[0], *map(tuple, entry[1:3]))

        shown = [said(entry) for entry in sorted(mismatched)]
        raise RuntimeError(_other_shapes(source, ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")))
    if not round_output_layer(model):
        raise ValueError(
            "int8_lm_head: the output layer was left on the disk, where it can't be rounded. Give lm_head a device in "
            "device_map, or make a checkpoint of it first: load it on the CPU with int8_lm_head=True, and call "
            "save_pretrained."
        )
    missing = set(info["missing_keys"])
    keep_offloaded_dtypes(model, ("qweight", "qzeros", "scales", "g_idx", "weight_scale"))
    for name, module in model.named_modules():
        if not isinstance(module, Int8Linear) or module.weight_scale.is_meta:
            continue
        is_missing = any(f".{key}".endswith(f".{name}.weight_scale") for key in missing)
        if not is_missing and not bool(torch.isfinite(module.weight_scale).all()):
            raise RuntimeError(
                f"The checkpoint {source} is damaged: {name}: some of its scales are not finite. Copy it again."
            )
    matrices = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    # Sorting codes, or putting them side by side, takes a minute for the largest models.
    for name, module in logging.tqdm(matrices, desc="Preparing codes", leave=False, delay=2, disable=None):
        module.scales.requires_grad_(False)
        lacking = {leaf for leaf in ("g_idx", "scales") for key in missing if f".{key}".endswith(f".{name}.{leaf}")}
        if "g_idx" in lacking and module.format.desc_act:
            raise RuntimeError(
                f"The checkpoint {source} was quantised with desc_act, but lacks {name}.g_idx, which says how its "
                f"inputs are grouped and can't be derived. Copy all weight files again, or quantise without desc_act."
            )
        if module.g_idx is None and module.codes.device.type != "meta":
            module.derive_groups()
        if not lacking:
            try:
                module.set_order()
            except ValueError as error:
                raise RuntimeError(f"The checkpoint {source} is damaged: {name}: {error}. Copy it again.") from None
            if module.codes.device.type in SORTED_ON:
                module.sort_inputs()
            if module.codes.device.type in SIDE_BY_SIDE_ON:
                module.put_side_by_side(in_place=not are_given)
