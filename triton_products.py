"""
Products of few rows for GPUs, in Triton, of floats and of codes in 8 and 4 bits; and the norm that goes before them.
"""

# No `from __future__ import annotations`: the interpreter of Triton up to 3.2 knows no constexpr that is a text.

import math

import torch

from .qwen_ops import GPU_BLOCK_WEIGHTS, gptq_blocks, linear_reference
from .triton_launch import PTX, kernel, known_options, multiprocessors, rsqrt, shared_memory, tl, triton

# --- Products of floats ------------------------------------------------------------------------------------------

# How products are launched of one row, with and without a gate, and of several: outputs of a program, inputs at a time,
# warps, blocks read ahead. Measured on an H100 with benchmarks/gpu_kernels.py --tune. One row is multiplied element by
# element, more by tensor cores.
PRODUCT = {
    (False, False): {"BN": 4, "BK": 1024, "num_warps": 2, "STAGES": 1},
    (False, True): {"BN": 2, "BK": 1024, "num_warps": 2, "STAGES": 2},
    (True, False): {"BN": 64, "BK": 128, "num_warps": 4, "STAGES": 6},
    (True, True): {"BN": 16, "BK": 128, "num_warps": 1, "STAGES": 6},
}
PRODUCT_ROWS = 16  # up to so many; more are left to the library of products


@kernel
def _norm_kernel(x, weight, y, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of one row of (M, K)."""
    row = tl.program_id(0).to(tl.int64) * K
    channels = tl.arange(0, BLOCK)
    there = channels < K
    value = tl.load(x + row + channels, mask=there, other=0).to(tl.float32)
    value *= rsqrt(tl.sum(value * value, 0) / K + eps)
    value = value.to(y.dtype.element_ty).to(tl.float32) * tl.load(weight + channels, mask=there, other=0).to(tl.float32)
    tl.store(y + row + channels, value.to(y.dtype.element_ty), mask=there)


def rms_norm(x, weight, eps):
    """x: (M, K). Returns (M, K)."""
    y, (M, K) = torch.empty_like(x), x.shape
    _norm_kernel[(M,)](x, weight, y, eps, K=K, BLOCK=triton.next_power_of_2(K), num_warps=8)
    return y


@triton.jit
def _finish(
    total, gate_total, n, place, there, bias, gate_bias, residual, y, N,
    GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Of sums for outputs n: plus bias, times silu of those of the gate, plus residual; stored at `place`."""
    kind = y.dtype.element_ty
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    total = total.to(kind).to(tl.float32)
    if GATE:
        if BIAS:
            gate_total += tl.load(gate_bias + n, mask=n < N, other=0).to(tl.float32)
        gate_total = gate_total.to(kind).to(tl.float32)
        total *= (gate_total / (1 + tl.exp(-gate_total))).to(kind).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + place, mask=there, other=0).to(tl.float32)
    tl.store(y + place, total.to(kind), mask=there)


@kernel
def _product_kernel(
    x, norm, weight, gate, scale, gate_scale, bias, gate_bias, residual, y, M, N, K, eps,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    CODES: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """
    x (M, K) times weight (N, K): BN outputs of every row. Then, as asked for: of one row the norm before (its scale is
    a factor of the sum), plus bias, times silu of the product with `gate`, plus residual (M, N). With CODES the weights
    are int8, times scale (N).
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    m = tl.arange(0, ROWS)
    at = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    weight += at
    gate += at
    DOT: tl.constexpr = ROWS > 1
    total = tl.zeros((BN, ROWS if DOT else BK), tl.float32)
    gate_total = tl.zeros((BN, ROWS if DOT else BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        inside = k < K - start
        if EVEN:
            w = tl.load(weight + start, eviction_policy="evict_first")
        else:
            w = tl.load(weight + start, mask=inside[None, :], other=0, eviction_policy="evict_first")
        if GATE:
            if EVEN:
                g = tl.load(gate + start, eviction_policy="evict_first")
            else:
                g = tl.load(gate + start, mask=inside[None, :], other=0, eviction_policy="evict_first")
        if DOT:
            there = inside[:, None] & (m < M)[None, :]
            value = tl.load(x + (start + k)[:, None] + (m * K)[None, :], mask=there, other=0)  # (BK, ROWS)
            total = tl.dot(w.to(value.dtype), value, total, input_precision="ieee")
            if GATE:
                gate_total = tl.dot(g.to(value.dtype), value, gate_total, input_precision="ieee")
        else:
            value = tl.load(x + start + k, mask=inside, other=0).to(tl.float32)
            if NORM:
                squares += value * value
                value *= tl.load(norm + start + k, mask=inside, other=0).to(tl.float32)
            total += w.to(tl.float32) * value[None, :]
            if GATE:
                gate_total += g.to(tl.float32) * value[None, :]
    if not DOT:
        total, gate_total = tl.sum(total, 1)[:, None], tl.sum(gate_total, 1)[:, None]
    if NORM:
        factor = rsqrt(tl.sum(squares, 0) / K + eps)
        total, gate_total = total * factor, gate_total * factor
    if CODES:
        total *= tl.load(scale + n, mask=n < N, other=0)[:, None]
        if GATE:
            gate_total *= tl.load(gate_scale + n, mask=n < N, other=0)[:, None]
    there = (n < N)[:, None] & (m < M)[None, :]
    place = n[:, None] + (m * N)[None, :]
    _finish(total, gate_total, n[:, None], place, there, bias, gate_bias, residual, y, N, GATE, BIAS, RESIDUAL)


def product(x, weight, bias=None, *, norm=None, eps=0.0, gate=None, gate_bias=None, residual=None, tuning=None):
    """
    `residual + linear(norm(x), weight, bias)`, or `linear(…) * silu(linear(…, gate, gate_bias))`, for few rows.

    x: (M, K), contiguous, M at most `PRODUCT_ROWS`, 1 with `norm` (K,). weight, gate: (N, K), contiguous; both have a
    bias (N,) or neither. Returns (M, N) in x's dtype. tuning: as an entry of `PRODUCT`.
    """
    tuning = tuning or PRODUCT[len(x) > 1, gate is not None]
    gate = None if gate is None else (gate, None)
    return _product(x, (weight, None), gate, (bias, gate_bias, residual), norm, eps, tuning)


def _product(x, matrix, gate, ends, norm, eps, tuning):
    """matrix, gate: weights and their scales or None."""
    (weight, scale), (gate_weight, gate_scale) = matrix, gate or matrix
    rest = [x if t is None else t for t in (scale, gate_scale, *ends)]
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    tuning = dict(tuning)
    if M > 1:  # blocks lie in shared memory
        block = (tuning["BN"] * (1 if gate is None else 2) + 16) * tuning["BK"] * x.element_size()
        tuning["STAGES"] = max(1, min(tuning["STAGES"], (shared_memory(x.device) - 2**13) // block))
    _product_kernel[(triton.cdiv(N, tuning["BN"]),)](
        x, x if norm is None else norm, weight, gate_weight, *rest, y, M, N, K, eps,
        ROWS=16 if M > 1 else 1, EVEN=K % tuning["BK"] == 0, CODES=scale is not None,
        NORM=norm is not None, GATE=gate is not None, BIAS=ends[0] is not None, RESIDUAL=ends[2] is not None,
        **tuning,
    )  # fmt: skip
    return y


# --- Products with GPTQ matrices ---------------------------------------------------------------------------------

# `QuantizedLinear` in qwen_quantization.py describes the tensors. N are outputs, K inputs; a word is an int32 of
# qweight, which is of CODES inputs for one output, and neighbouring words are of neighbouring outputs.
#
# One row in half precision: a slot is 32 inputs of one group for one output, the words of which lie under each other.
# A program goes over all inputs of BN outputs, SLOTS slots at a time, so that the inputs are shared out to its warps.
# It multiplies whole numbers, four at a time: codes are bytes, and so are those of the inputs, which are rounded to 16
# bits of the largest in the slot. Halves of bytes need no move: the upper ones count 16. Sums begin at the bits of
# MAGIC, as which they become floats without a conversion: those of a slot stay below 2^22 (32 * 255 * 255 at most).
# A loop of fewer instructions leaves more of the time to reading.
#
# Else codes and inputs meet in tensor cores, in blocks of 128 inputs: of R words for each output, of which the codes in
# one place are multiplied at a time. Less their zeros codes are exact in half precision; what a block adds up to is
# scaled. In groups of other sizes than whole blocks codes are scaled, and rounded, before.
#
# A program makes BN outputs of all rows. Its warps share the inputs out to SHARES, each of which has columns of codes
# and rows of inputs of its own, for tensor cores have more rows than there are; what a share's rows get from columns of
# another is left out. Tensor cores take operands as they lie in registers, and nothing is turned around between the
# warps: words and inputs are read ahead through shared memory as integers and taken apart by who multiplies them.
#
# If the outputs alone don't fill the card, several programs share the inputs out too; a second kernel adds their sums
# up, in their order.
#
# Launches, the best of those measured on an H100. One row: by bits and whether there is a gate, and by the most outputs
# for a multiprocessor.
GPTQ_ROW = {
    (4, False): {
        16: {"BN": 16, "SLOTS": 64, "num_warps": 4},
        32: {"BN": 16, "SLOTS": 128, "num_warps": 8},
        64: {"BN": 32, "SLOTS": 64, "num_warps": 8},
        128: {"BN": 32, "SLOTS": 64, "num_warps": 4, "maxnreg": 128},
        math.inf: {"BN": 64, "SLOTS": 32, "num_warps": 4, "maxnreg": 128},
    },
    (4, True): {
        64: {"BN": 16, "SLOTS": 64, "num_warps": 4},
        128: {"BN": 32, "SLOTS": 32, "num_warps": 4},
        math.inf: {"BN": 64, "SLOTS": 16, "num_warps": 4},
    },
    (8, False): {
        32: {"BN": 16, "SLOTS": 128, "num_warps": 8},
        math.inf: {"BN": 32, "SLOTS": 32, "num_warps": 4, "maxnreg": 96},
    },
    (8, True): {math.inf: {"BN": 32, "SLOTS": 32, "num_warps": 4, "maxnreg": 96}},
}
# Several: by the most rows they are for, and whether there is a gate. programs: how many of them for each
# multiprocessor the inputs are shared out to, 0: to one.
_FEW = {"BN": 32, "SHARES": 8, "num_warps": 4, "STAGES": 3, "programs": 0}
_MORE = {"BN": 256, "SHARES": 1, "num_warps": 4, "STAGES": 3, "programs": 2}
GPTQ_ROWS = {
    (2, False): _FEW,
    (2, True): _FEW,
    (4, False): _MORE,
    (4, True): {"BN": 64, "SHARES": 4, "num_warps": 4, "STAGES": 3, "programs": 0},
    (16, False): _MORE,
    (16, True): _MORE,
}
_FLOAT32 = {"BN": 32, "SHARES": 1, "num_warps": 4, "STAGES": 3, "programs": 4}  # no tensor cores: little to compile
_KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
GPTQ_MAX_ROWS = 16  # more are multiplied by the library, and the matrix is dequantised for it

# In assembly two numbers of half precision at a time, which the compiler does not do by itself. Of two words the halves
# that $5 names are moved down by $7; codes there are put into the last bits of 128 (bfloat16) or 1024; $3 is less.
_TAKE = "{{ .reg .b32 t, o; prmt.b32 t, $1, $2, $4; shr.b32 t, t, $6; lop3.b32 t, t, 0x000F000F, {}, 0xEA; "
CODES_BF16 = tl.constexpr(_TAKE.format("0x43004300") + "mov.b32 o, 0x3F803F80; fma.rn.bf16x2 $0, t, o, $3; }")
CODES_FP16 = tl.constexpr(_TAKE.format("0x64006400") + "add.f16x2 $0, t, $3; }")
PAIR = tl.constexpr("prmt.b32 $0, $1, $2, $3;")
# The low bytes, and the high ones, of four numbers of 16 bits; products of four bytes, the second ones with a sign.
BYTES = tl.constexpr(
    "{ .reg .b32 t, o; prmt.b32 t, $2, $3, 0x5140; prmt.b32 o, $4, $5, 0x5140; "
    "prmt.b32 $0, t, o, 0x5410; prmt.b32 $1, t, o, 0x7632; }"
)
DOTS = tl.constexpr("dp4a.u32.u32 $0, $2, $3, $5; dp4a.u32.s32 $1, $2, $4, $6;")
# Reads what a program shares. Triton's own loads would decide how tensors lie in the warps; only the codes' should.
_THERE = "{{ .reg .pred p; setp.ne.s32 p, ${}, 0; {} @p {} }}"
READ, READ_FOUR = "ld.global.b32 $0, [$1];", "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
READ_THERE = tl.constexpr(_THERE.format(2, "mov.b32 $0, 0;", READ))
READ_FOUR_THERE = tl.constexpr(_THERE.format(5, " ".join(f"mov.b32 ${i}, 0;" for i in range(4)), READ_FOUR))
READ, READ_FOUR = tl.constexpr(READ), tl.constexpr(READ_FOUR)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23, whose last bit counts one
MAGIC_BITS = tl.constexpr(0x4B400000)
FIXED_LARGEST = tl.constexpr(32767.0)


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr, POLICY: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy=POLICY)
    return tl.load(pointers, mask=mask, other=0, eviction_policy=POLICY)


@triton.jit
def _scale(scales, group, n, mask, N, EVEN: tl.constexpr):
    """float32 (groups, BN)."""
    return _load(scales + group[:, None] * N + n[None, :], mask, EVEN, "").to(tl.float32)


@triton.jit
def _zero(qzeros, group, n, mask, N, BITS: tl.constexpr, OFFSET: tl.constexpr, EVEN: tl.constexpr):
    """float32 (groups, BN)."""
    CODES: tl.constexpr = 32 // BITS
    at = qzeros + group[:, None] * (N // CODES) + (n // CODES)[None, :]
    if PTX:
        words = tl.inline_asm_elementwise(
            READ if EVEN else READ_THERE, "=&r,l,r", [at.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        words = _load(at, mask, EVEN, "")
    zero = ((words >> (n % CODES * BITS)[None, :]) + OFFSET) & ((1 << BITS) - 1)
    return (zero | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # 2^23


@triton.jit
def _four(pointers, step, mask, EVEN: tl.constexpr, POLICY: tl.constexpr):
    return (
        _load(pointers, mask, EVEN, POLICY),
        _load(pointers + step, mask, EVEN, POLICY),
        _load(pointers + 2 * step, mask, EVEN, POLICY),
        _load(pointers + 3 * step, mask, EVEN, POLICY),
    )


@triton.jit
def _eight(pointers, mask, EVEN: tl.constexpr):
    """The four int32 from where each of the pointers, to int64, shows: eight numbers in half precision."""
    if PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            READ_FOUR if EVEN else READ_FOUR_THERE, "=&r,=&r,=&r,=&r,l,r", [pointers.to(tl.int64), mask.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        first, second = _load(pointers, mask, EVEN, ""), _load(pointers + 1, mask, EVEN, "")
        a, b, c, d = first.to(tl.int32), (first >> 32).to(tl.int32), second.to(tl.int32), (second >> 32).to(tl.int32)
    return a, b, c, d


@triton.jit
def _two(halves, like):
    """In float32 the two numbers in half precision, as `like` points to, that are an int32."""
    if like.dtype.element_ty == tl.bfloat16:
        low, high = (halves << 16).to(tl.float32, bitcast=True), (halves & -65536).to(tl.float32, bitcast=True)
    else:
        low = halves.to(tl.int16).to(like.dtype.element_ty, bitcast=True).to(tl.float32)
        high = (halves >> 16).to(tl.int16).to(like.dtype.element_ty, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _inputs(a, b, c, d, fa, fb, fc, fd, x, NORM: tl.constexpr):
    """
    Eight inputs in float32, times the norm's factors; the largest magnitude; the sum of the squares before that.

    a to d, and the factors: int32, of two numbers each in half precision, as `x` points to.
    """
    v0, v1 = _two(a, x)
    v2, v3 = _two(b, x)
    v4, v5 = _two(c, x)
    v6, v7 = _two(d, x)
    squares = (v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3) + (v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7)
    if NORM:
        f0, f1 = _two(fa, x)
        f2, f3 = _two(fb, x)
        f4, f5 = _two(fc, x)
        f6, f7 = _two(fd, x)
        v0, v1, v2, v3, v4, v5, v6, v7 = v0 * f0, v1 * f1, v2 * f2, v3 * f3, v4 * f4, v5 * f5, v6 * f6, v7 * f7
    low = _larger(_larger(tl.abs(v0), tl.abs(v1)), _larger(tl.abs(v2), tl.abs(v3)))
    high = _larger(_larger(tl.abs(v4), tl.abs(v5)), _larger(tl.abs(v6), tl.abs(v7)))
    return v0, v1, v2, v3, v4, v5, v6, v7, _larger(low, high), squares


@triton.jit
def _fixed(x, inverse):
    """x times inverse, within 2^15, to the nearest whole number: in the last 16 bits."""
    return (x * inverse + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def _bytes(a, b, c, d):
    """Of four whole numbers of 16 bits the low bytes, from 0 to 255, in an int32; the high ones, from -128 to 127."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            BYTES, "=&r,=r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        low = a & 255 | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24
        high = a >> 8 & 255 | (b >> 8 & 255) << 8 | (c >> 8 & 255) << 16 | (d >> 8 & 255) << 24
    return low, high


@triton.jit
def _add_bytes(codes, low, high, low_sum, high_sum):
    """Adds to the two sums what four codes, from 0 to 255, make with the low bytes and with the high ones."""
    if PTX:
        low_sum, high_sum = tl.inline_asm_elementwise(
            DOTS, "=&r,=r,r,r,r,r,r", [codes, low, high, low_sum, high_sum],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for i in tl.static_range(4):
            code = codes >> 8 * i & 255
            low_sum += code * (low >> 8 * i & 255)
            high_sum += code * (high << 24 - 8 * i >> 24)
    return low_sum, high_sum


@triton.jit
def _whole(low, high):
    """Of two sums that began at the bits of MAGIC."""
    return (high.to(tl.float32, bitcast=True) - MAGIC) * 256.0 + (low.to(tl.float32, bitcast=True) - MAGIC)


@triton.jit
def _add_codes(s0, s1, s2, s3, word, second, low, high, low2, high2, BITS: tl.constexpr):
    low, high, low2, high2 = low[:, None], high[:, None], low2[:, None], high2[:, None]
    if BITS == 4:
        s0, s1 = _add_bytes(word & 0x0F0F0F0F, low, high, s0, s1)
        s2, s3 = _add_bytes(word & -0x0F0F0F10, low2, high2, s2, s3)  # 0xF0F0F0F0
    else:
        s0, s1 = _add_bytes(word, low, high, s0, s1)
        s0, s1 = _add_bytes(second, low2, high2, s0, s1)
    return s0, s1, s2, s3


@triton.jit
def _add_eight(
    s0, s1, s2, s3, g0, g1, g2, g3, t0, t1, word, second, gate_word, gate_second,
    v0, v1, v2, v3, v4, v5, v6, v7, inverse, BITS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """
    Adds the products of eight inputs with their codes: with 4 bits those of `word`, with 8 of `second`, too.

    s0, s1: sums with the low bytes and the high ones; with 4 bits of the codes in the lower halves of bytes, and s2, s3
    of those in the upper halves, which count 16. g0 to g3: the same of the gate. t0, t1: of the inputs alone. One by
    one, for Triton 3.2 takes no tuples.
    """
    v0, v1, v2, v3 = _fixed(v0, inverse), _fixed(v1, inverse), _fixed(v2, inverse), _fixed(v3, inverse)
    v4, v5, v6, v7 = _fixed(v4, inverse), _fixed(v5, inverse), _fixed(v6, inverse), _fixed(v7, inverse)
    if BITS == 4:
        low, high = _bytes(v0, v2, v4, v6)
        low2, high2 = _bytes(v1, v3, v5, v7)
    else:
        low, high = _bytes(v0, v1, v2, v3)
        low2, high2 = _bytes(v4, v5, v6, v7)
    ones = tl.full(low.shape, 0x01010101, tl.int32)
    t0, t1 = _add_bytes(ones, low, high, t0, t1)
    t0, t1 = _add_bytes(ones, low2, high2, t0, t1)
    s0, s1, s2, s3 = _add_codes(s0, s1, s2, s3, word, second, low, high, low2, high2, BITS)
    if GATE:
        g0, g1, g2, g3 = _add_codes(g0, g1, g2, g3, gate_word, gate_second, low, high, low2, high2, BITS)
    return s0, s1, s2, s3, g0, g1, g2, g3, t0, t1


@triton.jit
def _scaled(s0, s1, s2, s3, of_inputs, scale, zero, step, BITS: tl.constexpr):
    """The products of inputs and codes less zeros, scaled."""
    total = _whole(s0, s1)
    if BITS == 4:
        total += _whole(s2, s3) * 0.0625
    return (total - zero * of_inputs[:, None]) * (scale * step[:, None])


@kernel
def _gptq_row_kernel(
    x, norm, qweight, qzeros, scales, gate_qweight, gate_qzeros, gate_scales, bias, gate_bias, residual, y, words, N,
    eps, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr,
    EVEN: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """As `_product_kernel`, of x (K) in half precision; slots are whole and of one group."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    slots = tl.arange(0, SLOTS)
    inputs, factors = x.to(tl.pointer_type(tl.int64)), norm.to(tl.pointer_type(tl.int64))
    total = tl.zeros((SLOTS, BN), tl.float32)
    gate_total = tl.zeros((SLOTS, BN), tl.float32)
    squares = tl.zeros((SLOTS,), tl.float32)
    for start in tl.range(0, words // BITS, SLOTS, num_stages=1):
        slot = start + slots
        inside = slot < words // BITS
        there = inside[:, None] & (n < N)[None, :]
        group = slot * 32 // GROUP
        scale = _scale(scales, group, n, there, N, EVEN)
        zero = _zero(qzeros, group, n, there, N, BITS, OFFSET, EVEN)
        if GATE:
            gate_scale = _scale(gate_scales, group, n, there, N, EVEN)
            gate_zero = _zero(gate_qzeros, group, n, there, N, BITS, OFFSET, EVEN)
        at = slot[:, None] * (BITS * N) + n[None, :]
        if BITS == 4:
            w0, w1, w2, w3 = _four(qweight + at, N, there, EVEN, "evict_first")
            u0, u1, u2, u3 = w0, w1, w2, w3
        else:
            w0, u0, w1, u1 = _four(qweight + at, N, there, EVEN, "evict_first")
            w2, u2, w3, u3 = _four(qweight + at + 4 * N, N, there, EVEN, "evict_first")
        gw0, gw1, gw2, gw3, gu0, gu1, gu2, gu3 = w0, w1, w2, w3, u0, u1, u2, u3
        if GATE:
            if BITS == 4:
                gw0, gw1, gw2, gw3 = _four(gate_qweight + at, N, there, EVEN, "evict_first")
                gu0, gu1, gu2, gu3 = gw0, gw1, gw2, gw3
            else:
                gw0, gu0, gw1, gu1 = _four(gate_qweight + at, N, there, EVEN, "evict_first")
                gw2, gu2, gw3, gu3 = _four(gate_qweight + at + 4 * N, N, there, EVEN, "evict_first")
        i0, i1, i2, i3 = _eight(inputs + slot * 8, inside, EVEN)
        i4, i5, i6, i7 = _eight(inputs + slot * 8 + 2, inside, EVEN)
        i8, i9, i10, i11 = _eight(inputs + slot * 8 + 4, inside, EVEN)
        i12, i13, i14, i15 = _eight(inputs + slot * 8 + 6, inside, EVEN)
        f0, f1, f2, f3, f4, f5, f6, f7 = i0, i1, i2, i3, i4, i5, i6, i7
        f8, f9, f10, f11, f12, f13, f14, f15 = i8, i9, i10, i11, i12, i13, i14, i15
        if NORM:
            f0, f1, f2, f3 = _eight(factors + slot * 8, inside, EVEN)
            f4, f5, f6, f7 = _eight(factors + slot * 8 + 2, inside, EVEN)
            f8, f9, f10, f11 = _eight(factors + slot * 8 + 4, inside, EVEN)
            f12, f13, f14, f15 = _eight(factors + slot * 8 + 6, inside, EVEN)
        a0, a1, a2, a3, a4, a5, a6, a7, am, asq = _inputs(i0, i1, i2, i3, f0, f1, f2, f3, x, NORM)
        b0, b1, b2, b3, b4, b5, b6, b7, bm, bsq = _inputs(i4, i5, i6, i7, f4, f5, f6, f7, x, NORM)
        c0, c1, c2, c3, c4, c5, c6, c7, cm, csq = _inputs(i8, i9, i10, i11, f8, f9, f10, f11, x, NORM)
        d0, d1, d2, d3, d4, d5, d6, d7, dm, dsq = _inputs(i12, i13, i14, i15, f12, f13, f14, f15, x, NORM)
        squares += (asq + bsq) + (csq + dsq)
        largest = _larger(_larger(am, bm), _larger(cm, dm))
        step = largest / FIXED_LARGEST
        inverse = tl.where(largest < 1e-30, 0.0, FIXED_LARGEST / tl.where(largest < 1e-30, 1.0, largest))
        s0 = tl.full((SLOTS, BN), MAGIC_BITS, tl.int32)
        t0 = tl.full((SLOTS,), MAGIC_BITS, tl.int32)
        s1, s2, s3, g0, g1, g2, g3, t1 = s0, s0, s0, s0, s0, s0, s0, t0
        s0, s1, s2, s3, g0, g1, g2, g3, t0, t1 = _add_eight(
            s0, s1, s2, s3, g0, g1, g2, g3, t0, t1, w0, u0, gw0, gu0,
            a0, a1, a2, a3, a4, a5, a6, a7, inverse, BITS, GATE,
        )  # fmt: skip
        s0, s1, s2, s3, g0, g1, g2, g3, t0, t1 = _add_eight(
            s0, s1, s2, s3, g0, g1, g2, g3, t0, t1, w1, u1, gw1, gu1,
            b0, b1, b2, b3, b4, b5, b6, b7, inverse, BITS, GATE,
        )  # fmt: skip
        s0, s1, s2, s3, g0, g1, g2, g3, t0, t1 = _add_eight(
            s0, s1, s2, s3, g0, g1, g2, g3, t0, t1, w2, u2, gw2, gu2,
            c0, c1, c2, c3, c4, c5, c6, c7, inverse, BITS, GATE,
        )  # fmt: skip
        s0, s1, s2, s3, g0, g1, g2, g3, t0, t1 = _add_eight(
            s0, s1, s2, s3, g0, g1, g2, g3, t0, t1, w3, u3, gw3, gu3,
            d0, d1, d2, d3, d4, d5, d6, d7, inverse, BITS, GATE,
        )  # fmt: skip
        of_inputs = _whole(t0, t1)
        total += _scaled(s0, s1, s2, s3, of_inputs, scale, zero, step, BITS)
        if GATE:
            gate_total += _scaled(g0, g1, g2, g3, of_inputs, gate_scale, gate_zero, step, BITS)
    total, gate_total = tl.sum(total, 0), tl.sum(gate_total, 0)
    if NORM:
        factor = rsqrt(tl.sum(squares, 0) / (words * (32 // BITS)) + eps)
        total, gate_total = total * factor, gate_total * factor
    _finish(total, gate_total, n, n, n < N, bias, gate_bias, residual, y, N, GATE, BIAS, RESIDUAL)


@triton.jit
def _input(four, i: tl.constexpr, like):
    """Element i of the four numbers in half precision, as `like` points to, that are an int64."""
    kind = like.dtype.element_ty
    if PTX:
        two = (four >> (i // 2 * 32)).to(tl.int32)
        halves = tl.full(two.shape, 0x5410 if i % 2 == 0 else 0x7632, tl.int32)
        return tl.inline_asm_elementwise(PAIR, "=r,r,r,r,r", [two, halves], dtype=kind, is_pure=True, pack=2)
    return (four >> 16 * i).to(tl.int16).to(kind, bitcast=True)


@triton.jit
def _less_zero(words, zero, j: tl.constexpr, kind: tl.constexpr, BITS: tl.constexpr):
    """Codes j of words less zeros, of which both are exact; of dtype `kind`."""
    if PTX and (BITS == 4 and kind != tl.float32):
        asm: tl.constexpr = CODES_BF16 if kind == tl.bfloat16 else CODES_FP16
        if kind == tl.bfloat16:  # by name: Triton 3.1 takes no other type for a bitcast
            less = (zero | 0xC300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            less = (zero | 0xE400).to(tl.int16).to(tl.float16, bitcast=True)
        words, less = tl.broadcast(words, less)
        halves = tl.full(words.shape, 0x5410 if j < 4 else 0x7632, tl.int32)
        by = tl.full(words.shape, j % 4 * 4, tl.int32)
        return tl.inline_asm_elementwise(
            asm, "=r,r,r,r,r,r,r,r", [words, less, halves, by], dtype=less.dtype, is_pure=True, pack=2
        )
    # The last bit of 2^23 counts one, which saves a conversion.
    codes = ((words >> BITS * j) & ((1 << BITS) - 1) | 0x4B000000).to(tl.float32, bitcast=True)
    return (codes - (zero | 0x4B000000).to(tl.float32, bitcast=True)).to(kind)


@triton.jit
def _block(
    qweight, qzeros, scales, block, n, words, N,
    BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """
    Of blocks and outputs n (columns): words (R, columns) and, of every word if SCALED, else of all (1, columns), zeros
    and scales in float32.
    """
    CODES: tl.constexpr = 32 // BITS
    R: tl.constexpr = 128 // CODES
    row = block[None, :] * R + tl.arange(0, R)[:, None]
    there = (row < words) & (n < N)[None, :]
    codes = tl.load(qweight + row * N + n[None, :], mask=there, other=0, eviction_policy="evict_first")
    if SCALED:
        group, place, shift = row * CODES // GROUP, n[None, :], (n % CODES * BITS)[None, :]
    else:
        group, place, shift = block * 128 // GROUP, n, n % CODES * BITS
        there = (block * R < words) & (n < N)
    scale = tl.load(scales + group * N + place, mask=there, other=0).to(tl.float32)
    zero = tl.load(qzeros + group * (N // CODES) + place // CODES, mask=there, other=0)
    zero = ((zero >> shift) + OFFSET) & ((1 << BITS) - 1)
    if not SCALED:
        zero, scale = zero[None, :], scale[None, :]
    return codes, zero, scale


@triton.jit
def _add_dot_of_codes(
    part, value, codes, zero, scale, j: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Adds to part (ROWS, columns) inputs (ROWS, R) times the weights of codes j."""
    weight = _less_zero(codes, zero, j, KIND, BITS)
    if SCALED:
        weight = (weight.to(tl.float32) * scale).to(KIND)
    return tl.dot(value.to(KIND), weight, part, input_precision="ieee")


@triton.jit
def _sum_of_shares(total, SHARES: tl.constexpr, EACH: tl.constexpr, BN: tl.constexpr):
    """(EACH, BN), of every share's rows and its columns."""
    if SHARES == 1:
        return total
    row, column = tl.arange(0, SHARES * EACH), tl.arange(0, SHARES * BN)
    total = tl.where((row // EACH)[:, None] == (column // BN)[None, :], total, 0.0)
    total = tl.sum(tl.reshape(total, (SHARES, EACH, SHARES * BN)), 0)
    return tl.sum(tl.reshape(total, (EACH, SHARES, BN)), 1)


@kernel(do_not_specialize=["blocks"])
def _gptq_rows_kernel(
    x, qweight, qzeros, scales, gate_qweight, gate_qzeros, gate_scales, bias, gate_bias, residual, y, partial,
    M, words, N, blocks, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr, STAGES: tl.constexpr,
    HALF: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr,
    GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """
    As `_product_kernel`. A share is `blocks` blocks. HALF: x is in half precision. KIND: of what is multiplied. SCALED:
    the codes are scaled before. SPLIT: the sums of one program's shares are left to `_gptq_sum_kernel`, in partial,
    float32 (splits, M, N), behind which are those of the gate.
    """
    CODES: tl.constexpr = 32 // BITS
    R: tl.constexpr = 128 // CODES
    EACH: tl.constexpr = ROWS // SHARES
    column, row = tl.arange(0, SHARES * BN), tl.arange(0, ROWS)
    n = tl.program_id(0) * BN + column % BN
    m = (row % EACH)[:, None]
    first = (tl.program_id(1) * SHARES + column // BN) * blocks
    first_word = ((tl.program_id(1) * SHARES + row // EACH) * blocks * R)[:, None] + tl.arange(0, R)[None, :]
    total = tl.zeros((ROWS, SHARES * BN), tl.float32)
    gate_total = tl.zeros((ROWS, SHARES * BN), tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):
        codes, zero, scale = _block(qweight, qzeros, scales, first + i, n, words, N, BITS, GROUP, OFFSET, SCALED)
        if GATE:
            gate_codes, gate_zero, gate_scale = _block(
                gate_qweight, gate_qzeros, gate_scales, first + i, n, words, N, BITS, GROUP, OFFSET, SCALED
            )
        word = first_word + i * R
        there = (m < M) & (word < words)
        if HALF:  # four numbers at a time
            at = x.to(tl.pointer_type(tl.int64)) + (m * words + word) * (CODES // 4)
            inputs = tl.load(at, mask=there, other=0)
            last_inputs = inputs
            if CODES == 8:
                last_inputs = tl.load(at + 1, mask=there, other=0)
        part = tl.zeros((ROWS, SHARES * BN), tl.float32)
        gate_part = tl.zeros((ROWS, SHARES * BN), tl.float32)
        for j in tl.static_range(CODES):
            if HALF:
                value = _input(inputs if j < 4 else last_inputs, j % 4, x)
            else:
                value = tl.load(x + (m * words + word) * CODES + j, mask=there, other=0)
            part = _add_dot_of_codes(part, value, codes, zero, scale, j, KIND, BITS, SCALED)
            if GATE:
                gate_part = _add_dot_of_codes(
                    gate_part, value, gate_codes, gate_zero, gate_scale, j, KIND, BITS, SCALED
                )
        total += part if SCALED else part * scale
        if GATE:
            gate_total += gate_part if SCALED else gate_part * gate_scale
    total = _sum_of_shares(total, SHARES, EACH, BN)
    if GATE:
        gate_total = _sum_of_shares(gate_total, SHARES, EACH, BN)
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    m = tl.arange(0, EACH)[:, None]
    there = (m < M) & (n < N)
    if SPLIT:
        at = (tl.program_id(1) * M + m) * N + n
        tl.store(partial + at, total, mask=there)
        if GATE:
            tl.store(partial + tl.num_programs(1) * M * N + at, gate_total, mask=there)
    else:
        _finish(total, gate_total, n, m * N + n, there, bias, gate_bias, residual, y, N, GATE, BIAS, RESIDUAL)


@kernel
def _gptq_sum_kernel(
    partial, bias, gate_bias, residual, y, M, N, splits,
    BLOCK: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What `_gptq_rows_kernel` has left to do, of one row."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    gate_total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        at = (split * M + m) * N + n
        total += tl.load(partial + at, mask=n < N, other=0)
        if GATE:
            gate_total += tl.load(partial + splits * M * N + at, mask=n < N, other=0)
    _finish(total, gate_total, n, m * N + n, n < N, bias, gate_bias, residual, y, N, GATE, BIAS, RESIDUAL)


def takes_gptq(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset) -> bool:
    """Whether `gptq_product` multiplies by such a matrix: inputs in the groups' order, and groups of whole words."""
    return g_idx is None and group_size % (32 // bits) == 0


def _launch_of_row(gated: bool, bits: int, outputs: float) -> dict:
    """outputs: of a multiprocessor."""
    return next(launch for most, launch in GPTQ_ROW[bits, gated].items() if outputs <= most)


def gptq_product(
    x, matrix, bias=None, *, norm=None, eps=0.0, gate=None, gate_bias=None, residual=None, tuning=None
):  # fmt: skip
    """
    `product` with matrices of GPTQ, `QuantizedLinear.tensors()`, that `takes_gptq`, both of one format and contiguous.

    x: (M, K), contiguous, M at most `GPTQ_MAX_ROWS`, 1 with `norm`. tuning: a launch of `GPTQ_ROW`, or `GPTQ_ROWS`.
    """
    bits, group, offset = matrix[4:]
    (M, K), (words, N) = x.shape, matrix[0].shape
    group = min(group, K)
    y = x.new_empty(M, N)
    tensors = *matrix[:3], *(matrix if gate is None else gate)[:3]
    ends = [x if t is None else t for t in (bias, gate_bias, residual)]
    asked = {"GATE": gate is not None, "BIAS": bias is not None, "RESIDUAL": residual is not None}
    format = {"BITS": bits, "GROUP": group, "OFFSET": offset}
    if M == 1 and x.element_size() == 2 and K % 32 == 0 and (group == K or group % 32 == 0):
        x, norm = (t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in (x, norm))
        launch = tuning or _launch_of_row(gate is not None, bits, N / multiprocessors(x.device))
        tuning = known_options(launch, x.is_cuda)
        even = N % tuning["BN"] == 0 and K % (32 * tuning["SLOTS"]) == 0
        _gptq_row_kernel[(triton.cdiv(N, tuning["BN"]),)](
            x, x if norm is None else norm, *tensors, *ends, y, words, N, eps,
            EVEN=even, NORM=norm is not None, **format, **asked, **tuning,
        )  # fmt: skip
        return y
    x = x if norm is None else rms_norm(x, norm, eps)
    if x.data_ptr() % 8:
        x = x.clone()
    most = min(rows for rows, _ in GPTQ_ROWS if rows >= M)
    launch = _FLOAT32 if x.dtype == torch.float32 else GPTQ_ROWS[most, gate is not None]
    tuning = dict(tuning if tuning and M > 1 else launch)
    programs, shares, across = tuning.pop("programs"), tuning["SHARES"], triton.cdiv(N, tuning["BN"])
    rows = max(16, shares * triton.next_power_of_2(M))
    block = shares * tuning["BN"] * 4 * bits * (4 if gate is None else 8) + rows * 256
    tuning["STAGES"] = max(1, min(tuning["STAGES"], (shared_memory(x.device) - 2**13) // block))
    blocks = triton.cdiv(K, 128)
    splits = max(1, multiprocessors(x.device) * programs // across)
    blocks_each = triton.cdiv(blocks, shares * splits)
    splits = triton.cdiv(blocks, shares * blocks_each)
    partial = y
    if splits > 1:
        partial = torch.empty(splits * (1 if gate is None else 2), M, N, dtype=torch.float32, device=x.device)
    half = x.element_size() == 2
    kind = _KINDS[x.dtype if x.is_cuda else torch.float32]  # the interpreter multiplies no bfloat16
    _gptq_rows_kernel[(across, splits)](
        x, *tensors, *ends, y, partial, M, words, N, blocks_each, ROWS=rows, HALF=half, KIND=kind,
        SCALED=group < K and group % 128 != 0, SPLIT=splits > 1,
        **format, **asked, **tuning,
    )  # fmt: skip
    if splits > 1:
        _gptq_sum_kernel[(M, triton.cdiv(N, 256))](partial, *ends, y, M, N, splits, BLOCK=256, num_warps=2, **asked)
    return y


@kernel
def _gptq_dequantize_kernel(
    qweight, qzeros, scales, g_idx, weight, words, N, q_stride, z_stride, s_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    ORDERED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """R words of BN outputs. ORDERED: without g_idx. WHOLE: groups are of whole words, too."""
    CODES: tl.constexpr = 32 // BITS
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = row < words
    there = inside[:, None] & (n < N)[None, :]
    codes = tl.load(qweight + row[:, None] * q_stride + n[None, :], mask=there, other=0)
    for j in tl.static_range(CODES):
        if not WHOLE or j == 0:
            if ORDERED:
                group = (row * CODES + j) // GROUP
            else:
                group = tl.load(g_idx + row * CODES + j, mask=inside, other=0).to(tl.int64)
            scale = tl.load(scales + group[:, None] * s_stride + n[None, :], mask=there, other=0).to(tl.float32)
            zero = tl.load(qzeros + group[:, None] * z_stride + (n // CODES)[None, :], mask=there, other=0)
            zero = ((zero >> (n % CODES * BITS)[None, :]) + OFFSET) & ((1 << BITS) - 1)
        code = (codes >> BITS * j) & ((1 << BITS) - 1)
        value = (code - zero).to(tl.float32) * scale
        place = weight + (row * CODES + j)[:, None] * N + n[None, :]
        tl.store(place, value.to(weight.dtype.element_ty), mask=there)


def gptq_dequantize(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype):
    qweight, qzeros, scales = (t if t.stride(1) == 1 else t.contiguous() for t in (qweight, qzeros, scales))
    words, N = qweight.shape
    codes = 32 // bits
    weight = torch.empty(words * codes, N, dtype=dtype, device=qweight.device)
    if weight.numel() == 0:
        return weight
    with torch.cuda.device_of(qweight):
        _gptq_dequantize_kernel[(triton.cdiv(words, 4), triton.cdiv(N, 256))](
            qweight, qzeros, scales, qweight if g_idx is None else g_idx.contiguous(), weight, words, N,
            qweight.stride(0), qzeros.stride(0), scales.stride(0), BITS=bits, GROUP=group_size, OFFSET=zero_offset,
            R=4, BN=256, ORDERED=g_idx is None, WHOLE=g_idx is None and group_size % codes == 0, num_warps=8,
        )  # fmt: skip
    return weight


def gptq_linear(x, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, bias):
    matrix = qweight, qzeros, scales, g_idx, bits, group_size, zero_offset
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= GPTQ_MAX_ROWS or not takes_gptq(*matrix):
        shape, x, y = x.shape[:-1], x.reshape(rows, x.shape[-1]), x.new_empty(rows, qweight.shape[1])
        for where, weight in gptq_blocks(*matrix, dtype=x.dtype):
            torch.mm(x, weight, out=y[:, where])  # parts that are put together would take gigabytes of a long prompt
            del weight  # before there is another
        if bias is not None:
            y += bias.to(y.dtype)
        return y.view(*shape, y.shape[1])
    matrix = *(t.contiguous() for t in matrix[:3]), *matrix[3:]
    with torch.cuda.device_of(x):
        y = gptq_product(x.reshape(rows, -1).contiguous(), matrix, bias)
    return y.view(*x.shape[:-1], -1)


# --- Products with int8 matrices ---------------------------------------------------------------------------------

# `Int8Linear` in qwen_quantization.py describes the tensors. One row in half precision is multiplied as by GPTQ's
# codes: four inputs are an integer, and bytes, which become 0 to 255, are denormal numbers. Launches, the best of
# those that `benchmarks/gpu_kernels.py --int8 --tune` measured on an H100: by whether there is a gate.
INT8_ROW = {False: {"BN": 8, "BK": 512, "num_warps": 4}, True: {"BN": 8, "BK": 64, "num_warps": 2}}
INT8_ROWS = {
    False: {"BN": 32, "BK": 256, "num_warps": 4, "STAGES": 4},
    True: {"BN": 32, "BK": 128, "num_warps": 2, "STAGES": 4},
}


@triton.jit
def _element(four, i: tl.constexpr, like):
    """In float32 element i of the four numbers in half precision, as `like` points to, that are an int64."""
    return (four >> 16 * i).to(tl.int16).to(like.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def _denormal(words, i: tl.constexpr):
    """Byte i of words, times 2^(8 * (i % 2) - 149), in float32."""
    MASK: tl.constexpr = 255 << (8 * (i % 2))
    return ((words >> (i // 2 * 16)) & MASK).to(tl.float32, bitcast=True)


@triton.jit
def _add_four(
    part, gate_part, total, squares, words, gate_words, inputs, factors, x, NORM: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """
    Adds four inputs times the bytes of the words. part, gate_part: float32 (BK, BN), sums of the products, and of those
    with the gate; total, squares: (BK), of the inputs, and of their squares before they were multiplied by the norm's
    factors.
    """
    for i in tl.static_range(4):
        value = _element(inputs, i, x)
        if NORM:
            squares += value * value
            value *= _element(factors, i, x)
        total += value
        value = (value * 2.0 ** (100 - 8 * (i % 2)))[:, None]
        part += _denormal(words, i) * value
        if GATE:
            gate_part += _denormal(gate_words, i) * value
    return part, gate_part, total, squares


@kernel
def _int8_row_kernel(
    x, norm, codes, gate_codes, scale, gate_scale, bias, gate_bias, residual, y, words, N, eps,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """As `_product_kernel`, of x (4 words) in half precision and codes int32 (N, words)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inputs, factors = x.to(tl.pointer_type(tl.int64)), norm.to(tl.pointer_type(tl.int64))
    total, gate_total = tl.zeros((BK, BN), tl.float32), tl.zeros((BK, BN), tl.float32)
    of_inputs, squares = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    for start in tl.range(0, words, BK, num_stages=1):
        k = start + tl.arange(0, BK)
        inside = k < words
        there = inside[:, None] & (n < N)[None, :]
        at = n.to(tl.int64)[None, :] * words + k[:, None]
        word = _load(codes + at, there, EVEN, "evict_first") ^ -0x7F7F7F80
        gate_word = word
        if GATE:
            gate_word = _load(gate_codes + at, there, EVEN, "evict_first") ^ -0x7F7F7F80
        factor = inside
        if NORM:
            factor = _load(factors + k, inside, EVEN, "")
        four = _load(inputs + k, inside, EVEN, "")
        total, gate_total, of_inputs, squares = _add_four(
            total, gate_total, of_inputs, squares, word, gate_word, four, factor, x, NORM, GATE
        )
    total, gate_total, of_inputs = tl.sum(total, 0), tl.sum(gate_total, 0), tl.sum(of_inputs, 0)
    more = of_inputs * 2.0**-42  # 128 times, of the unit of denormal numbers times 2^100
    factor = 2.0**49
    if NORM:
        factor *= rsqrt(tl.sum(squares, 0) / (words * 4) + eps)
    total = (total - more) * (tl.load(scale + n, mask=n < N, other=0) * factor)
    if GATE:
        gate_total = (gate_total - more) * (tl.load(gate_scale + n, mask=n < N, other=0) * factor)
    _finish(total, gate_total, n, n, n < N, bias, gate_bias, residual, y, N, GATE, BIAS, RESIDUAL)


def int8_product(
    x, matrix, bias=None, *, norm=None, eps=0.0, gate=None, gate_bias=None, residual=None, tuning=None
):  # fmt: skip
    """
    `product` with int8 matrices: (weight int8 (N, K), scale float32 (N)), contiguous, and so the gate.

    tuning: a launch of `INT8_ROW`, or `INT8_ROWS`.
    """
    (weight, scale), (gate_weight, gate_scale), ends = matrix, gate or matrix, (bias, gate_bias, residual)
    (M, K), N, gated = x.shape, weight.shape[0], gate is not None
    norm_or_x = x if norm is None else norm
    if M > 1 or x.element_size() > 2 or K % 4 or any(t.data_ptr() % 8 for t in (x, norm_or_x, weight, gate_weight)):
        tuning = tuning or (INT8_ROWS[gated] if M > 1 else PRODUCT[False, gated])
        return _product(x, matrix, gate, ends, norm, eps, tuning)
    words, tuning = K // 4, tuning or INT8_ROW[gated]
    y = x.new_empty(M, N)
    _int8_row_kernel[(triton.cdiv(N, tuning["BN"]),)](
        x, norm_or_x, weight.view(torch.int32), gate_weight.view(torch.int32), scale, gate_scale,
        *(x if t is None else t for t in ends), y, words, N, eps,
        EVEN=words % tuning["BK"] == 0 and N % tuning["BN"] == 0, NORM=norm is not None, GATE=gated,
        BIAS=bias is not None, RESIDUAL=residual is not None, **tuning,
    )  # fmt: skip
    return y


def linear(x, weight, bias, scale):
    if weight.dtype != torch.int8 or scale is None or scale.dim() > 1:
        return linear_reference(x, weight, bias, scale)
    rows, (N, K), shape = x.numel() // x.shape[-1], weight.shape, x.shape[:-1]
    x = x.reshape(rows, K).contiguous()
    with torch.cuda.device_of(x):
        if 0 < rows <= PRODUCT_ROWS:
            return int8_product(x, (weight.contiguous(), scale.contiguous()), bias).view(*shape, N)
        if x.dtype == torch.float16:  # as in the reference
            x, scale = x * 2**-7, scale * 2**7
        y = x.new_empty(rows, N)
        width = max(1, GPU_BLOCK_WEIGHTS // K)
        for first in range(0, N, width):
            where = slice(first, first + width)
            torch.mm(x, weight[where].to(x.dtype).t(), out=y[:, where])
        y = y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale, out=y)
    return y.view(*shape, N)
