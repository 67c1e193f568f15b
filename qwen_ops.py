"""
The operations of a decoding step, one function each, with its PyTorch reference beside it.

Which kernel computes one is decided here: the native one of cpp_kernels.cpp on a CPU, Triton's (triton_kernels.py) on
an NVIDIA GPU, and everywhere else the reference, which is always right. `implementation` says which it is.

In the shapes below B is the batch, T the new tokens, S the tokens attended to, nh the heads and hd the width of one.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import threading
import types
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .cpp_kernels import NAMESPACE, is_loaded, library, load
from .cpp_kernels import implementation as cpu_implementation
from .transformers_compat import (
    HAS_SDPA,
    INT8_ROWS,
    FunctionMode,
    addcmul,
    cpu_supports_bf16,
    int8_product,
    is_differentiating_forward,
)
from .transformers_compat import rms_norm as fused_rms_norm

logger = logging.get_logger("transformers.models.qwen.qwen_ops")

MAX_ROWS = 8  # of `linear`; from there on PyTorch's matrix product is faster
GPU_HEAD_SIZES = (32, 64, 128, 256)  # widths of a head that triton_attention.py takes; others run the references

_FLOATS = (torch.float32, torch.bfloat16)


def _floats(x: torch.Tensor) -> tuple:
    """What kernels on this device read."""
    return (*_FLOATS, torch.float16) if x.device.type == "cuda" else _FLOATS


def _differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether derivatives may be wanted, in forward mode too: kernels give none."""
    if is_differentiating_forward():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether these are no subclasses, which have products of their own (quantised, sharded)."""
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)


def _is_slow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's products of many rows take several times as long as in float32 there."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not cpu_supports_bf16()


# --- Linear layers -----------------------------------------------------------------------------------------------


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """
    `F.linear`, at the speed of memory for up to 8 rows of x on a CPU, and for up to 16 on a GPU with an int8 weight.
    More rows are multiplied by blocks of an int8 weight that are written out in x's dtype on the way. On a CPU that has
    no instructions for bfloat16 they are written out in float32, those of bfloat16 weights too.

    x: (..., in). weight: (out, in), or int8 with scale (out,) or (out, groups): the weight is then
    `weight * scale`, each scale for `in / groups` neighbouring inputs. bias: (out,). Returns (..., out) in x's dtype,
    accumulated in float32. For up to 8 rows of bfloat16 the native kernel multiplies int8 as whole numbers, if 128
    divides `in / groups`: an input is off by at most 2^-15 of the largest of 128 neighbours, and not at all from 2^-7
    of it on.

    The native kernel takes float32 and bfloat16 x with bfloat16 weights, and float16 too with int8 ones; everything
    else, training and subclasses of tensors included, is PyTorch's.

    Example:
        >>> linear(torch.ones(1, 2), torch.tensor([[3, 4]], dtype=torch.int8), scale=torch.tensor([0.5]))
        tensor([[3.5000]])
    """
    rows = math.prod(x.shape[:-1])
    if weight.dtype == torch.int8:
        has_kernel = rows > 0 and x.dtype in (*_FLOATS, torch.float16) and x.device.type in ("cpu", "cuda")
    else:
        has_kernel = rows > 0 and x.dtype in _FLOATS and weight.dtype == torch.bfloat16 and x.device.type == "cpu"
        has_kernel = has_kernel and (rows <= MAX_ROWS or _is_slow(x.device, x.dtype))
    if has_kernel and _plain(x, weight) and not _differentiated(x, weight, bias):
        return _OPERATORS.linear(x, weight, bias, scale)
    return linear_reference(x, weight, bias, scale)


def linear_reference(x, weight, bias=None, scale=None):
    if scale is None:
        if weight.dtype == x.dtype:
            return F.linear(x, weight, bias)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if scale.dim() == 2:
        weight = weight.float().view(*scale.shape, -1).mul(scale[..., None]).view_as(weight)
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    if x.dtype == torch.float16:  # which sums of products with codes, unlike those with the weight, may leave
        x, scale = x * 2**-7, scale * 2**7
    y = F.linear(x, weight.to(x.dtype)).float() * scale  # int8 is exact in any dtype
    return (y if bias is None else y + bias).to(x.dtype)


def linear_without_kernels(x, weight, bias=None, scale=None):
    """
    The reference, but on a CPU few rows and int8 weights by PyTorch's own product, which needs no copy of them, and
    many rows of bfloat16 by blocks of the weight in float32 where that is faster.
    """
    rows, is_cpu = math.prod(x.shape[:-1]), x.device.type == "cpu"
    if rows > 32 and x.dtype == weight.dtype and _is_slow(x.device, x.dtype):
        blocks = weight.split(max(1, BLOCK_WEIGHTS // weight.shape[1]))
        y = torch.cat([F.linear(x.float(), block.float()) for block in blocks], -1)  # float32 (..., out)
        return (y if bias is None else y + bias).to(x.dtype)
    is_int8 = weight.dtype == torch.int8 and scale is not None and scale.dim() == 1
    # It reads whole vectors, beyond the end of a row that is not made of them.
    if not is_cpu or not is_int8 or weight.shape[1] % 64 or not 0 < rows <= INT8_ROWS.get(x.dtype, 0):
        return linear_reference(x, weight, bias, scale)
    y = int8_product(x.reshape(rows, -1), weight).float() * scale
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)


class _OwnProducts(FunctionMode or object):
    """Who calls `F.linear` with bfloat16 calls `linear`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and args[1].dim() == 2 and args[0].dtype == torch.bfloat16:
            return linear(*args)
        return function(*args, **(kwargs or {}))


def own_products(device: torch.device, dtype: torch.dtype):
    """
    A context for inference in which layers of this dtype multiply by `linear` without knowing it, if they are on a CPU
    on which PyTorch's own products of it are slow.
    """
    return _OwnProducts() if FunctionMode is not None and _is_slow(device, dtype) else nullcontext()


# --- Matrices in 4 and 8 bits ---------------------------------------------------------------------------------------
#
# The tensors are those of a GPTQ checkpoint, see `QuantizedLinear` in qwen_quantization.py. bits: of a code, 4 or 8.
# g_idx: None where input i is in group i // group_size. zero_offset: added to a stored zero.


def gptq_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    x (..., in) times a quantised matrix: (..., out) in x's dtype.

    At the speed of memory for few rows of x: up to 8 on a CPU, up to 16 on a GPU and without g_idx. They are
    accumulated in float32, or multiplied as whole numbers, on a CPU all of them and on a GPU one row alone: x in half
    precision is then rounded to 16 bits of the largest of 128 neighbours, of 32 on a GPU. More rows are multiplied by
    blocks of the matrix that are dequantised to x's dtype on the way, on a CPU those of float16 to float32.
    """
    if (
        x.device.type in ("cpu", "cuda")
        and x.dtype in (*_FLOATS, torch.float16)
        and _plain(x, qweight)
        and not _differentiated(x, bias)
    ):
        return _OPERATORS.gptq_linear(x, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, bias)
    return gptq_linear_reference(x, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, bias)


def gptq_linear_reference(x, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, bias=None):
    rows = x.float() if _is_slow(x.device, x.dtype) else x
    blocks = gptq_blocks(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype=rows.dtype)
    parts = [rows @ weight for _, weight in blocks]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def gptq_wants_side_by_side(inputs: int, group_size: int) -> bool:
    """
    Whether a CPU multiplies faster with a qweight whose transpose is contiguous, of inputs in the groups' order: the
    codes of an output are read in one piece then, in whole segments of 128 inputs, each in one group or in several.
    """
    part = min(group_size, 128)
    return inputs % 128 == 0 and part >= 32 and 128 % part == 0 and group_size % part == 0


BLOCK_WEIGHTS = 1 << 22  # that are dequantised at a time on a CPU, whose caches are small
GPU_BLOCK_WEIGHTS = 1 << 26  # 128 MB in half precision


def gptq_blocks(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype):
    """Neighbouring outputs, as slices, with their weights (in, outputs) in `dtype`."""
    n, out = 32 // bits, qweight.shape[1]
    most = BLOCK_WEIGHTS if qweight.device.type == "cpu" else GPU_BLOCK_WEIGHTS
    width = max(1, most // (qweight.shape[0] * n) // n) * n
    for first in range(0, out, width):
        where, packed = slice(first, first + width), slice(first // n, (first + width) // n)
        tensors = qweight[:, where], qzeros[:, packed], scales[:, where], g_idx
        yield where, gptq_dequantize(*tensors, bits, group_size, zero_offset, dtype)


def gptq_dequantize(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype) -> torch.Tensor:
    """The weights, `scales * (code - zero)`: (in, out) in `dtype`."""
    if qweight.device.type in ("cpu", "cuda") and _plain(qweight) and dtype in (*_FLOATS, torch.float16):
        return _OPERATORS.gptq_dequantize(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype)
    return gptq_dequantize_reference(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype)


def gptq_dequantize_reference(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype):
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)
    mask = 2**bits - 1
    codes = (qweight[:, None] >> shifts[:, None] & mask).flatten(0, 1)  # (in, out)
    zeros = (qzeros[:, :, None] >> shifts & mask).flatten(1) + zero_offset & mask  # (groups, out)
    if g_idx is None and codes.shape[0] == scales.shape[0] * group_size:
        codes = codes.unflatten(0, (-1, group_size))  # (groups, group_size, out)
        return ((codes - zeros[:, None]) * scales[:, None].to(torch.float32)).flatten(0, 1).to(dtype)
    if g_idx is None:
        g_idx = torch.arange(codes.shape[0], device=codes.device) // group_size
    g_idx = g_idx.long()
    return ((codes - zeros[g_idx]) * scales.to(torch.float32)[g_idx]).to(dtype)


def times(x, weight, bias=None, scale=None, zeros=None, g_idx=None, bits=0, group_size=0, zero_offset=0):
    """
    x (..., in) times any matrix: `linear` with weight, bias and scale, or with bits `gptq_linear`, where weight, scale
    and zeros are qweight, scales and qzeros.
    """
    if bits:
        return gptq_linear(x, weight, zeros, scale, g_idx, bits, group_size, zero_offset, bias)
    return linear(x, weight, bias, scale)


# --- Attention over a cache --------------------------------------------------------------------------------------


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """
    Attention of a few new tokens over a cache; the last T of the S keys are theirs.

    q: (B, nh, T, hd). k, v: (B, nh, S, hd), float32 or bfloat16; views into larger storage are read where they lie,
    as long as a row is contiguous. mask: boolean, True is attended to: None or (B, S), the keys that are real, and
    token t sees its own key and those before it; or (B or 1, nh or 1, T or 1, S), which says everything.
    scaling: of the scores, default `hd ** -0.5`.

    Returns (B, T, nh, hd) in q's dtype; zeros for a token that may see nothing. Raises ValueError for another mask.

    Example:
        >>> q, storage = torch.randn(1, 16, 1, 128), torch.randn(2, 1, 16, 8192, 128, dtype=torch.bfloat16)
        >>> decode_attention(q, *storage[:, :, :, :1000]).shape
        torch.Size([1, 1, 16, 128])
    """
    mask, causal = _check_mask(mask)
    return _decode_attention(q, k, v, mask, q.shape[-1] ** -0.5 if scaling is None else scaling, causal)


def _decode_attention(q, k, v, mask, scaling, causal):
    floats = _floats(q)
    if q.dtype in floats and k.dtype in floats and k.dtype == v.dtype and not _differentiated(q, k, v):
        return _OPERATORS.decode_attention(q, k, v, mask, scaling, causal)
    return decode_attention_reference(q, k, v, mask, scaling, causal)


def _check_mask(mask):
    """The mask in four dimensions, and whether a token sees only what is before it."""
    if mask is not None and (mask.dtype != torch.bool or mask.dim() not in (2, 4)):
        raise ValueError(
            f"mask must be boolean, (B, S) or (B, nh, T, S) with True for what is attended to, "
            f"found {mask.dtype} {tuple(mask.shape)}; mask.bool() makes one of ones and zeros."
        )
    keys_only = mask is None or mask.dim() == 2
    return mask[:, None, None] if keys_only and mask is not None else mask, keys_only


def decode_attention_reference(q, k, v, mask, scaling, causal):
    T, S = q.shape[2], k.shape[2]
    if causal and T > 1:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        mask = seen if mask is None else mask & seen
    dtype, out = torch.promote_types(q.dtype, k.dtype), q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if HAS_SDPA:
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling)  # (B, nh, T, hd)
    else:
        scores = (q @ k.transpose(2, 3)).float() * scaling
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        y = scores.softmax(-1).to(dtype) @ v  # (B, nh, T, hd)
    if mask is not None:  # the softmax of nothing is not a number
        y = y.masked_fill(~mask.any(-1, keepdim=True), 0)
    if S == 0:
        y = torch.zeros_like(q)
    return y.transpose(1, 2).to(out).contiguous()


# --- Quantised keys and values -----------------------------------------------------------------------------------
#
# A head of a token, hd numbers, is rotated by a Walsh-Hadamard transform, which spreads what a few channels have too
# much of over all of them and leaves products of queries and keys as they are (https://arxiv.org/abs/2404.00456).
# Then x is stored as codes, uint8 (B, nh, S, hd * bits / 8), and parameters, uint8 (B, nh, S, parameters):
#
# int8: x = step * code + centre; the code is an int8 (`codes.view(torch.int8)`). The parameters are step and centre,
# bfloat16: 4 bytes. hd 128: 132 bytes.
#
# int4: x = step * (code - 7.5 + centre), with a step and a centre for each of the G = hd / 8 groups of channels
# g, g + G, ..., g + 7 G (side by side these are vectors of groups). Byte i of the codes holds channel i in its low and
# channel i + hd / 2 in its high half. The parameters are the base, bfloat16, then 4 bits a group, even groups in the
# low half of a byte, whose upper two choose step = base * STEPS[.] and whose lower two choose a centre, then a bit a
# group, group 0 in the lowest bit of a byte: centre = CENTRES[4 * bit + two bits]. hd 128: 64 + 2 + 8 + 2 = 76 bytes.
# The base is a 15th of the largest magnitude; of the 32 pairs the one with the smallest squared error is taken. STEPS
# and CENTRES were fitted to normally distributed numbers, which after the rotation everything resembles; being
# equally spaced they are computed on a GPU, not looked up.

GROUP = 8
STEPS = tuple((58 + 19 * i) / 64 for i in range(4))
CENTRES = tuple((i - 3.5) * 46 / 64 for i in range(8))


def quantized_sizes(head_dim: int, bits: int) -> tuple[int, int]:
    """
    Bytes of codes and of parameters that a head of a token takes.

    Raises ValueError for bits other than 8 and 4, and for 4 bits with a `head_dim` that 16 does not divide.

    Example:
        >>> quantized_sizes(128, 8), quantized_sizes(128, 4)
        ((128, 4), (64, 12))
    """
    if bits == 8:
        return head_dim, 4
    if bits != 4:
        raise ValueError(f"keys and values are quantised to 8 or 4 bits, found bits={bits}.")
    if head_dim % 16:
        raise ValueError(f"4 bits need a head of a multiple of 16 channels, found {head_dim}; use 8 bits.")
    groups = head_dim // GROUP
    return head_dim // 2, 2 + groups // 2 + (groups + 7) // 8


def rotate(x: torch.Tensor) -> torch.Tensor:
    """
    Orthonormal Walsh-Hadamard transform of the last dimension, in blocks of the largest power of two that divides it;
    its own inverse. float32 (..., hd) to the same.
    """
    hd = x.shape[-1]
    block = hd & -hd
    half = 1
    while half < block:
        a, b = x.reshape(*x.shape[:-1], -1, 2, half).unbind(-2)  # (..., hd / 2 half, half)
        x = torch.stack((a + b, a - b), -2).flatten(-3)  # (..., hd)
        half *= 2
    return x * block**-0.5


def quantize_append(codes: torch.Tensor, params: torch.Tensor, x: torch.Tensor, position: int) -> None:
    """
    Quantise keys or values and write them into their storage from token `position` on.

    codes: uint8 (B, nh, capacity, code bytes) and params: uint8 (B, nh, capacity, parameter bytes), both changed in
    place; `quantized_sizes` gives the bytes, which say how many bits are meant. x: (B, nh, T, hd).

    Raises ValueError if the sizes fit neither 8 nor 4 bits, or the tokens don't fit into the storage.
    """
    _check_store(codes, params, x.shape[-1])
    if position < 0 or position + x.shape[2] > codes.shape[2]:
        raise ValueError(f"{x.shape[2]} tokens at position {position} don't fit a store of {codes.shape[2]} tokens.")
    if x.dtype not in _floats(x):
        x = x.float()
    _OPERATORS.quantize_append(codes, params, x.detach(), position)


def _check_store(codes, params, hd):
    found = codes.shape[-1], params.shape[-1]
    fitting = [quantized_sizes(hd, 8)] + ([quantized_sizes(hd, 4)] if hd % 16 == 0 else [])
    if found not in fitting:
        raise ValueError(f"codes and parameters of {found} bytes don't fit a head of {hd}: that takes {fitting}.")


def quantize_append_reference(codes, params, x, position):
    quantize = _quantize8 if codes.shape[-1] == x.shape[-1] else _quantize4
    where = slice(position, position + x.shape[2])
    codes[:, :, where], params[:, :, where] = quantize(rotate(x.float()))


def _quantize8(x):
    """x: float32 (..., hd). Returns codes uint8 (..., hd), parameters uint8 (..., 4)."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    centre = (low * 0.5 + high * 0.5).bfloat16()
    step = (torch.maximum(high - centre.float(), centre.float() - low) / 127).bfloat16()
    divisor = torch.where(step > 0, step.float(), 1)
    codes = ((x - centre.float()) / divisor).round().clamp(-128, 127).to(torch.int8)
    return codes.view(torch.uint8), torch.cat((step, centre), -1).view(torch.uint8)


def _quantize4(x):
    """x: float32 (..., hd). Returns codes uint8 (..., hd / 2), parameters uint8 (...)."""
    base = (x.abs().amax(-1, keepdim=True) * (1 / 15)).bfloat16()  # (..., 1)
    x = x / torch.where(base > 0, base.float(), 1)
    x = x.unflatten(-1, (GROUP, -1))  # (..., 8, G)
    best = torch.full_like(x[..., 0, :], math.inf)  # (..., G)
    codes, choice, last = torch.zeros_like(x), best.new_zeros(best.shape), best.new_zeros(best.shape)
    for i, step in enumerate(STEPS):
        scaled = x * (1 / step)
        for j, centre in enumerate(CENTRES):
            zero = centre - 7.5
            code = (scaled - zero).round().clamp(0, 15)
            error = (((code + zero) - scaled) * step).square()
            while error.shape[-2] > 1:  # in this order in the native kernel too
                one, other = error.chunk(2, -2)
                error = one + other
            error = error.squeeze(-2)
            better = error < best
            best = torch.where(better, error, best)
            codes = torch.where(better[..., None, :], code, codes)
            choice = torch.where(better, 4 * i + j % 4, choice)
            last = torch.where(better, j // 4, last)
    low, high = codes.to(torch.uint8).flatten(-2).chunk(2, -1)
    even, odd = choice.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    last = F.pad(last, (0, -last.shape[-1] % 8)).unflatten(-1, (-1, 8))
    bits = (last * (2 ** torch.arange(8, device=x.device))).sum(-1).to(torch.uint8)
    return low | high << 4, torch.cat((base.view(torch.uint8), even | odd << 4, bits), -1)


def dequantize(codes: torch.Tensor, params: torch.Tensor, head_dim: int) -> torch.Tensor:
    """What `quantize_append` wrote, still rotated: float32 (..., hd). `rotate` of it is close to what was written."""
    if codes.shape[-1] == head_dim:
        step, centre = params.contiguous().view(torch.bfloat16).float().split(1, -1)
        return codes.view(torch.int8) * step + centre
    G = head_dim // GROUP
    base, choice, bits = params.split((2, G // 2, params.shape[-1] - 2 - G // 2), -1)
    base = base.contiguous().view(torch.bfloat16).float()
    choice = torch.stack((choice & 15, choice >> 4), -1).flatten(-2).long()  # (..., G)
    last = (bits[..., None] >> torch.arange(8, device=bits.device)).flatten(-2)[..., :G].long() & 1
    steps, centres = (torch.tensor(each, dtype=base.dtype, device=base.device) for each in (STEPS, CENTRES))
    step, centre = base * steps[choice >> 2], centres[4 * last + (choice & 3)]
    codes = torch.cat((codes & 15, codes >> 4), -1).unflatten(-1, (GROUP, G))  # (..., 8, G)
    return (step[..., None, :] * (codes - 7.5 + centre[..., None, :])).flatten(-2)


def quantized_decode_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_params: torch.Tensor,
    v_codes: torch.Tensor,
    v_params: torch.Tensor,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """
    `decode_attention` over keys and values that `quantize_append` wrote; pass the first S tokens of the storage.

    q: (B, nh, T, hd). Codes and parameters: uint8 (B, nh, S, bytes). Everything else as in `decode_attention`.

    Example:
        >>> codes, params = (torch.zeros(1, 16, 8192, n, dtype=torch.uint8) for n in quantized_sizes(128, bits=4))
        >>> quantize_append(codes, params, torch.randn(1, 16, 100, 128), position=0)
        >>> stored = codes[:, :, :100], params[:, :, :100]
        >>> quantized_decode_attention(torch.randn(1, 16, 1, 128), *stored, *stored).shape
        torch.Size([1, 1, 16, 128])
    """
    _check_store(k_codes, k_params, q.shape[-1])
    _check_store(v_codes, v_params, q.shape[-1])
    mask, causal = _check_mask(mask)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    return _quantized_decode_attention(q, k_codes, k_params, v_codes, v_params, mask, scaling, causal)


def _quantized_decode_attention(q, *stored_mask_scaling_causal):
    inputs = q if q.dtype in _floats(q) else q.float()
    return _OPERATORS.quantized_decode_attention(inputs.detach(), *stored_mask_scaling_causal).to(q.dtype)


def quantized_decode_attention_reference(q, k_codes, k_params, v_codes, v_params, mask, scaling, causal):
    hd = q.shape[-1]
    k, v = dequantize(k_codes, k_params, hd), dequantize(v_codes, v_params, hd)
    y = decode_attention_reference(rotate(q.float()), k, v, mask, scaling, causal)
    return rotate(y).to(q.dtype)


# --- Norm and rotary embedding -----------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """
    `x / sqrt(mean(x ** 2) + eps)` in float32, rounded to x's dtype, then times weight; PyTorch's may round once only.

    x: (..., dim). weight: (dim,). Returns (..., dim).

    Example:
        >>> rms_norm(torch.tensor([3.0, -3.0]), torch.tensor([1.0, 2.0]), 1e-6)
        tensor([ 1.0000, -2.0000])
    """
    if (
        x.device.type == "cpu"
        and x.dtype in _FLOATS
        and weight.dtype == x.dtype
        and _plain(x, weight)
        and not _differentiated(x, weight)
    ):
        return _OPERATORS.rms_norm(x, weight, eps)
    return fused_rms_norm(x, weight.shape, weight, eps)


def rms_norm_reference(x, weight, eps):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotate the first channels of every head, pairs (x_i, x_{i + d/2}) of the d rotated ones, in float32.

    x: (B, nh, T, hd). cos, sin: float32 (B or 1, 1, T, d / 2). Returns (B, nh, T, hd) in x's dtype, contiguous.
    """
    if x.device.type == "cpu" and x.dtype in _FLOATS and _plain(x) and not _differentiated(x, cos, sin):
        return _OPERATORS.rotary(x, cos, sin)
    return rotary_reference(x, cos, sin)


def rotary_reference(x, cos, sin):
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    y1 = addcmul(x1 * cos, x2, sin, value=-1)
    y2 = addcmul(x2 * cos, x1, sin)
    return torch.cat((y1.to(x.dtype), y2.to(x.dtype), rest), dim=-1)


# --- Blocks ------------------------------------------------------------------------------------------------------


def decode_blocks(
    x: torch.Tensor,
    norms: list[torch.Tensor],
    matrices: list[torch.Tensor | None],
    formats: list[int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_scale: torch.Tensor | None,
    store: list[torch.Tensor],
    position: int,
    mask: torch.Tensor | None,
    eps: float,
    scaling: list[float],
) -> torch.Tensor:
    """
    Blocks of the network, one after the other, for a few new tokens behind a filled cache, without gradients.

    x: (B, T, hidden). The lists hold what belongs to the first block, then to the second, and so on. norms: the weights
    of ln_1 and ln_2. matrices: weight, bias, scale, zeros and g_idx, as `times` takes them, of c_attn, attn.c_proj, w1,
    w2 and mlp.c_proj, 25 a block; formats: bits, group_size and zero_offset of each, 15. store: keys and values
    (B, nh, capacity, hd), or codes and parameters of both as `quantize_append` writes them; the new tokens' are written
    from token `position` on. scaling: of the scores, one a block. cos, sin: as of `rotary`. query_scale: float32
    (B or 1, 1, T, 1) or None. mask: as of `decode_attention`, for S = position + T keys. Returns (B, T, hidden) in x's
    dtype.
    """
    mask, causal = _check_mask(mask)
    blocks = _OPERATORS.decode_blocks if x.device.type == "cpu" and x.dtype in _FLOATS else decode_blocks_reference
    return blocks(x, norms, matrices, formats, cos, sin, query_scale, store, position, mask, eps, scaling, causal)


def decode_blocks_reference(
    x, norms, matrices, formats, cos, sin, query_scale, store, position, mask, eps, scaling, causal
):
    for i, scale in enumerate(scaling):
        own = [
            each[len(each) // len(scaling) * i : len(each) // len(scaling) * (i + 1)]
            for each in (norms, matrices, formats, store)
        ]
        x = _decode_block(x, *own[:3], cos, sin, query_scale, own[3], position, mask, eps, scale, causal)
    return x


def _decode_block(x, norms, matrices, formats, cos, sin, query_scale, store, position, mask, eps, scaling, causal):
    B, T, _ = x.shape
    nh = store[0].shape[1]
    c_attn, attn_proj, w1, w2, mlp_proj = (
        (*matrices[5 * i : 5 * i + 5], *formats[3 * i : 3 * i + 3]) for i in range(5)
    )
    qkv = times(rms_norm(x, norms[0], eps), *c_attn).view(B, T, 3 * nh, -1).transpose(1, 2)  # (B, 3 nh, T, hd)
    q, k = rotary(qkv[:, : 2 * nh], cos, sin).chunk(2, dim=1)  # (B, nh, T, hd) each
    v = qkv[:, 2 * nh :]
    if query_scale is not None:
        q = (q * query_scale).to(v.dtype)
    if len(store) == 2:
        for stored, new in zip(store, (k, v)):
            stored[:, :, position : position + T] = new
    else:
        quantize_append(*store[:2], k, position)
        quantize_append(*store[2:], v, position)
    seen = [tensor[:, :, : position + T] for tensor in store]
    attend = _decode_attention if len(store) == 2 else _quantized_decode_attention
    y = attend(q, *seen, mask, scaling, causal)  # (B, T, nh, hd)
    x = x + times(y.reshape(B, T, -1), *attn_proj)
    h = rms_norm(x, norms[1], eps)
    return x + times(times(h, *w1) * F.silu(times(h, *w2)), *mlp_proj)


# --- Operators ---------------------------------------------------------------------------------------------------

# As in cpp_kernels.py: what copies of this module share.
_state = sys.modules.setdefault(f"{NAMESPACE}_gpu_state", types.ModuleType("state"))
if not hasattr(_state, "lock"):
    _state.lock = threading.RLock()
    _state.cuda = None  # what computes on GPUs, in words; None: not tried yet
    _state.defined = False

# name: schema, reference, what it returns for tensors without data
OPERATIONS = {
    "linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor",
        linear_without_kernels,
        lambda x, weight, *args: x.new_empty(*x.shape[:-1], weight.shape[0]),
    ),
    "gptq_linear": (
        "(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, int bits, int group_size, "
        "int zero_offset, Tensor? bias) -> Tensor",
        gptq_linear_reference,
        lambda x, qweight, *args: x.new_empty(*x.shape[:-1], qweight.shape[1]),
    ),
    "gptq_dequantize": (
        "(Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, int bits, int group_size, int zero_offset, "
        "ScalarType dtype) -> Tensor",
        gptq_dequantize_reference,
        lambda qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype: qweight.new_empty(
            qweight.shape[0] * 32 // bits, qweight.shape[1], dtype=dtype
        ),
    ),
    "decode_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scaling, bool causal) -> Tensor",
        decode_attention_reference,
        lambda q, *args: q.new_empty(q.transpose(1, 2).shape),
    ),
    "quantize_append": (
        "(Tensor(a!) codes, Tensor(b!) params, Tensor x, SymInt position) -> ()",
        quantize_append_reference,
        lambda *args: None,
    ),
    "quantized_decode_attention": (
        "(Tensor q, Tensor k_codes, Tensor k_params, Tensor v_codes, Tensor v_params, Tensor? mask, float scaling, "
        "bool causal) -> Tensor",
        quantized_decode_attention_reference,
        lambda q, *args: q.new_empty(q.transpose(1, 2).shape),
    ),
    "rms_norm": (
        "(Tensor x, Tensor weight, float eps) -> Tensor",
        rms_norm_reference,
        lambda x, *args: x.new_empty(x.shape),
    ),
    "rotary": (
        "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
        rotary_reference,
        lambda x, *args: x.new_empty(x.shape),
    ),
    "decode_blocks": (
        "(Tensor x, Tensor[] norms, Tensor?[] matrices, int[] formats, Tensor cos, Tensor sin, Tensor? query_scale, "
        "Tensor(a!)[] store, int position, Tensor? mask, float eps, float[] scaling, bool causal) -> Tensor",
        decode_blocks_reference,
        lambda x, *args: x.new_empty(x.shape),
    ),
}


def _define(name, schema, reference, empty):
    def kernel(x, *args):
        if _load_for(x.device.type):
            return getattr(_OPERATORS, name)(x, *args)  # native from now on
        return reference(x, *args)

    library().define(name + schema)
    library().impl(name, kernel, "CompositeExplicitAutograd")
    library().impl(name, empty, "Meta")


if library() is None:
    _OPERATORS = types.SimpleNamespace(**{_name: _parts[1] for _name, _parts in OPERATIONS.items()})
else:
    _OPERATORS = getattr(torch.ops, NAMESPACE)

with _state.lock:
    if library() is not None and not _state.defined:
        for _name, _parts in OPERATIONS.items():
            _define(_name, *_parts)
        _state.defined = True


# --- Which kernels -----------------------------------------------------------------------------------------------


def _load_for(device: str) -> bool:
    """Whether kernels for this type of device were loaded just now."""
    if device == "cpu":
        return is_loaded() is None and load()
    if device != "cuda" or _state.cuda is not None:
        return False
    with _state.lock:
        if _state.cuda is not None:
            return False
        try:
            if importlib.util.find_spec("triton") is None:
                raise RuntimeError("They need the package triton: pip install triton.")
            # Not an import statement: that module imports this one, and older releases follow such circles forever.
            _state.cuda = importlib.import_module(f"{__package__}.triton_kernels").register(library())
        except RuntimeError as error:
            _state.cuda = f"PyTorch ({error})"
            logger.warning(f"Kernels for GPUs are not in use; PyTorch computes the same, more slowly. {error}")
            return False
    logger.info(f"Kernels for GPUs are in use: {_state.cuda}")
    return True


def implementation(device) -> str:
    """What computes the operations on this device, in words; nothing is built for the answer."""
    kind = torch.device(device).type
    if kind == "cpu":
        return cpu_implementation()
    if kind == "cuda" and library() is not None:
        return _state.cuda or "Triton, not compiled yet"
    return "PyTorch"


def has_decode_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """
    Whether `decode_attention` over keys of this dtype is worth more than PyTorch's own attention on this device.

    Nothing is built for the answer. On a CPU that can't build the kernels it is still true: the reference is PyTorch's
    attention, over storage that is not copied. On a GPU that takes an NVIDIA one that multiplies bfloat16.
    """
    if device.type == "cpu":
        return dtype in _FLOATS
    if device.type != "cuda" or torch.version.cuda is None or head_dim not in GPU_HEAD_SIZES:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and "Triton" in implementation(device)
