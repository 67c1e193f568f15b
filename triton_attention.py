"""
Attention over caches and appending to them on GPUs, in Triton; qwen_ops.py says what they compute and describes the
format.

One kernel attends: every program takes one query and a share of the keys, so that a single sequence fills the card; a
second one puts the shares together. It has two ways to multiply. Element by element it works in float32 throughout.
With `DOT` it uses tensor cores: codes are exact in float16, and a float32 factor, less than 1, is the sum of `TERMS`
float16 numbers: two are as exact as float32, one is as exact as float16. They are columns of one matrix for 8 bits and
make a matrix each for 4 bits, where the columns are the groups of channels that share a step.

In the shapes below N is a block of keys, hd the width of a head, G the groups of channels of int4.
"""

# No `from __future__ import annotations`: the interpreter of Triton up to 3.2 knows no constexpr that is a text.

import torch

from .qwen_ops import (
    CENTRES,
    GPU_HEAD_SIZES,
    STEPS,
    decode_attention_reference,
    quantize_append_reference,
    quantized_decode_attention_reference,
    quantized_sizes,
)
from .triton_launch import PTX, exp2, kernel, known_options, multiprocessors, tl, triton

# What is launched for a store of so many bits: keys in a block, warps, blocks read ahead, programs for each
# multiprocessor that the keys are shared out to, tensor cores or not (4 bits are made for them, floats not), registers.
# Measured on an H100 with benchmarks/kv_cache.py --tune: for codes small programs of one warp or two, which wait for
# nobody, as many as fit.
TUNING = {
    4: {"N": 32, "num_warps": 1, "STAGES": 3, "programs": 24, "DOT": True, "maxnreg": 168},
    8: {"N": 64, "num_warps": 2, "STAGES": 3, "programs": 8, "DOT": True, "maxnreg": 168},
    16: {"N": 16, "num_warps": 1, "STAGES": 3, "programs": 8, "DOT": False, "maxnreg": None},
    32: {"N": 32, "num_warps": 4, "STAGES": 2, "programs": 16, "DOT": False, "maxnreg": None},
}
MAX_SPLITS = 64

STEP, STEP_BY = map(tl.constexpr, (STEPS[0], STEPS[1] - STEPS[0]))  # both are equally spaced
CENTRE, CENTRE_BY = map(tl.constexpr, (CENTRES[0], CENTRES[1] - CENTRES[0]))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _walsh(x, ROWS: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr):
    """The Walsh-Hadamard transform of (ROWS, N), not scaled, in qwen_ops.rotate's order of additions."""
    for i in tl.static_range(LOG_N):
        pairs = tl.permute(tl.reshape(x, (ROWS * N // (2 << i), 2, 1 << i)), (0, 2, 1))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, N))
    return x


@triton.jit
def _hadamard(x, ROWS: tl.constexpr, HD: tl.constexpr, LOG_HD: tl.constexpr):
    """qwen_ops.rotate of (ROWS, HD)."""
    return _walsh(x, ROWS, HD, LOG_HD) * HD**-0.5


@triton.jit
def _round(x):
    """To the nearest integer, halves to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _bf16_bits(x):
    """x rounded to bfloat16, halves to even, in the low half of an int32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _from_bf16_bits(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


# --- Storage whose address is read by the kernel -----------------------------------------------------------------

# A CUDA graph outlives the storage of a cache, and its length. Kernels of a graph read both from a table, int64:
# the tokens after this step, the capacity, and from HEADER on the address of every storage, in elements behind the
# address that they are called with; `slot` is the index of one.
HEADER = 2


@triton.jit
def _store_at(base, table, slot, nh, stride_t):
    """The address of a storage (B, nh, capacity, stride_t), and its strides of rows and heads."""
    stride_h = tl.load(table + 1) * stride_t
    return base + tl.multiple_of(tl.load(table + slot), 16), nh * stride_h, stride_h


# --- Quantising --------------------------------------------------------------------------------------------------


@triton.jit
def _four_rotated(x, there, first: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, LOG_G: tl.constexpr):
    """Eighths first to first + 3 of the channels, transformed as far as these four determine it; float32 (ROWS, G)."""
    x += first * G + tl.arange(0, G)[None, :]
    a = _walsh(tl.load(x, mask=there, other=0).to(tl.float32), ROWS, G, LOG_G)
    b = _walsh(tl.load(x + G, mask=there, other=0).to(tl.float32), ROWS, G, LOG_G)
    c = _walsh(tl.load(x + 2 * G, mask=there, other=0).to(tl.float32), ROWS, G, LOG_G)
    d = _walsh(tl.load(x + 3 * G, mask=there, other=0).to(tl.float32), ROWS, G, LOG_G)
    a, b, c, d = a + b, a - b, c + d, c - d
    return a + c, b + d, a - c, b - d


@triton.jit
def _largest_of_four(a, b, c, d):
    return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))


@triton.jit
def _divided(a, b, c, d, by):
    return tl.div_rn(a, by), tl.div_rn(b, by), tl.div_rn(c, by), tl.div_rn(d, by)


@triton.jit
def _times(a, b, c, d, by):
    return a * by, b * by, c * by, d * by


@triton.jit
def _code(scaled, zero):
    return tl.minimum(tl.maximum(_round(scaled - zero), 0.0), 15.0)


@triton.jit
def _error(scaled, zero, step):
    error = ((_code(scaled, zero) + zero) - scaled) * step
    return error * error


@triton.jit
def _two_codes(low, high, by, zero):
    low, high = _code(low * by, zero).to(tl.int32), _code(high * by, zero).to(tl.int32)
    return (low | (high << 4)).to(tl.uint8)


@kernel(do_not_specialize=["T", "position", "slot"])
def _append_kernel(
    x, codes, scales, x_b, x_h, x_t, c_b, c_h, c_t, p_b, p_h, p_t, nh, T, position, table, slot, x_2,
    HD: tl.constexpr, LOG_HD: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // nh, head % nh
    if LATE:  # keys, and values x_2 behind them
        slot += 2 * tl.program_id(2)
        x += x_2 * tl.program_id(2)
        codes, c_b, c_h = _store_at(codes, table, slot, nh, c_t)
        scales, p_b, p_h = _store_at(scales, table, slot + 1, nh, p_t)
        position = tl.load(table) - T
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = rows < T
    channels = tl.arange(0, HD)
    x += b * x_b + h * x_h + rows[:, None] * x_t
    codes += b * c_b + h * c_h + (position + rows[:, None]) * c_t
    scales += b * p_b + h * p_h + (position + rows) * p_t
    if BITS == 8:
        value = tl.load(x + channels[None, :], mask=valid[:, None], other=0).to(tl.float32)
        value = _hadamard(value, ROWS, HD, LOG_HD)  # (ROWS, HD)
        low, high = tl.min(value, 1), tl.max(value, 1)
        centre_bits = _bf16_bits(low * 0.5 + high * 0.5)
        centre = _from_bf16_bits(centre_bits)
        step_bits = _bf16_bits(tl.div_rn(tl.maximum(high - centre, centre - low), 127.0))
        step = _from_bf16_bits(step_bits)
        divisor = tl.where(step > 0, step, 1.0)
        code = _round(tl.div_rn(value - centre[:, None], tl.broadcast_to(divisor[:, None], (ROWS, HD))))
        code = tl.minimum(tl.maximum(code, -128.0), 127.0)
        tl.store(codes + channels[None, :], code.to(tl.int8).to(tl.uint8, bitcast=True), mask=valid[:, None])
        for i in tl.static_range(2):
            tl.store(scales + i, (step_bits >> 8 * i).to(tl.uint8), mask=valid)
            tl.store(scales + 2 + i, (centre_bits >> 8 * i).to(tl.uint8), mask=valid)
    else:
        # A group is eight channels, G apart: eight tensors (ROWS, G) hold one of each group, and what is done to a
        # group needs no exchange between threads.
        G: tl.constexpr = HD // 8
        there = tl.broadcast_to(valid[:, None], (ROWS, G))
        v0, v1, v2, v3 = _four_rotated(x, there, 0, ROWS, G, LOG_HD - 3)
        v4, v5, v6, v7 = _four_rotated(x, there, 4, ROWS, G, LOG_HD - 3)
        scale: tl.constexpr = HD**-0.5
        v0, v4 = (v0 + v4) * scale, (v0 - v4) * scale
        v1, v5 = (v1 + v5) * scale, (v1 - v5) * scale
        v2, v6 = (v2 + v6) * scale, (v2 - v6) * scale
        v3, v7 = (v3 + v7) * scale, (v3 - v7) * scale
        largest = tl.maximum(_largest_of_four(v0, v1, v2, v3), _largest_of_four(v4, v5, v6, v7))
        base_bits = _bf16_bits(tl.max(largest, 1) * (1 / 15))
        base = _from_bf16_bits(base_bits)
        divisor = tl.broadcast_to(tl.where(base > 0, base, 1.0)[:, None], (ROWS, G))
        v0, v1, v2, v3 = _divided(v0, v1, v2, v3, divisor)
        v4, v5, v6, v7 = _divided(v4, v5, v6, v7, divisor)
        best = tl.full((ROWS, G), float("inf"), tl.float32)
        choice = tl.zeros((ROWS, G), tl.int32)  # 8 * step + 4 * sign + centre
        for i in tl.static_range(4):
            step = STEP + i * STEP_BY
            s0, s1, s2, s3 = _times(v0, v1, v2, v3, 1 / step)
            s4, s5, s6, s7 = _times(v4, v5, v6, v7, 1 / step)
            for j in tl.range(8):
                zero = CENTRE + j * CENTRE_BY - 7.5
                error = (_error(s0, zero, step) + _error(s4, zero, step)) + (
                    _error(s2, zero, step) + _error(s6, zero, step)
                )
                error += (_error(s1, zero, step) + _error(s5, zero, step)) + (
                    _error(s3, zero, step) + _error(s7, zero, step)
                )
                better = error < best
                best = tl.where(better, error, best)
                choice = tl.where(better, i * 8 + j, choice)
        zero = CENTRE + (choice & 7) * CENTRE_BY - 7.5
        by = tl.where(choice < 8, 1 / STEP, 1 / (STEP + STEP_BY))
        by = tl.where(choice < 16, by, tl.where(choice < 24, 1 / (STEP + 2 * STEP_BY), 1 / (STEP + 3 * STEP_BY)))
        codes += tl.arange(0, G)[None, :]
        tl.store(codes, _two_codes(v0, v4, by, zero), mask=there)
        tl.store(codes + G, _two_codes(v1, v5, by, zero), mask=there)
        tl.store(codes + 2 * G, _two_codes(v2, v6, by, zero), mask=there)
        tl.store(codes + 3 * G, _two_codes(v3, v7, by, zero), mask=there)
        for i in tl.static_range(2):
            tl.store(scales + i, (base_bits >> 8 * i).to(tl.uint8), mask=valid)
        fours = (choice >> 3) * 4 + (choice & 3)
        pairs = tl.reshape(fours, (ROWS, G // 2, 2)) << (4 * tl.arange(0, 2))[None, None, :]
        where = 2 + tl.arange(0, G // 2)
        tl.store(scales[:, None] + where[None, :], tl.sum(pairs, 2).to(tl.uint8), mask=valid[:, None])
        BYTES: tl.constexpr = (G + 7) // 8
        eights = tl.reshape((choice >> 2) & 1, (ROWS, BYTES, G // BYTES)) << tl.arange(0, G // BYTES)[None, None, :]
        where = 2 + G // 2 + tl.arange(0, BYTES)
        tl.store(scales[:, None] + where[None, :], tl.sum(eights, 2).to(tl.uint8), mask=valid[:, None])


def quantize_append(codes, params, x, position):
    B, nh, T, hd = x.shape
    if hd not in GPU_HEAD_SIZES:
        return quantize_append_reference(codes, params, x, position)
    bits = 8 if codes.shape[-1] == hd else 4
    x = x if x.stride(3) == 1 else x.contiguous()
    rows = 1 if T == 1 else 8
    with torch.cuda.device_of(x):
        _append_kernel[(B * nh, triton.cdiv(T, rows))](
            x, codes, params, *x.stride()[:3], *codes.stride()[:3], *params.stride()[:3], nh, T, position, codes, 0, 0,
            HD=hd, LOG_HD=hd.bit_length() - 1, BITS=bits, ROWS=rows, LATE=False, num_warps=1 if T == 1 else 4,
            enable_fp_fusion=False,  # the codes are those of a CPU, bit for bit
        )  # fmt: skip
    return None


# --- Attention ---------------------------------------------------------------------------------------------------


@triton.jit
def _nth_term(x, i: tl.constexpr):
    """The i-th of the float16 numbers whose sum is x."""
    term = x.to(tl.float16)
    for _ in tl.static_range(i):
        x = x - term.to(tl.float32)
        term = x.to(tl.float16)
    return term


@triton.jit
def _terms(x, row, TERMS: tl.constexpr):
    """Row i of the result is the i-th of the TERMS float16 numbers whose sum is x; the others are zero."""
    terms = tl.where(row == 0, _nth_term(x, 0), 0.0).to(tl.float16)
    for i in tl.static_range(1, TERMS):
        terms = tl.where(row == i, _nth_term(x, i), terms)
    return terms


# Codes become float16 without a conversion: they are put into the fraction of 64, or of 1024 for 8 bits, whose last bit
# but four, or last bit, counts one. In assembly four at a time, which the compiler does not do by itself.


def _assembly(codes: str, high: int, less: str = ""):
    """Four bytes, made of those in $2 by `codes`, become the low bytes of float16 in $0 and $1."""
    return tl.constexpr(
        f"{{ .reg .b32 t, z; {codes} prmt.b32 $0, t, {high}, 0x4140; prmt.b32 $1, t, {high}, 0x4342; {less} }}"
    )


LOW = _assembly("shl.b32 t, $2, 4; and.b32 t, t, 0xF0F0F0F0;", 0x54545454)
HIGH = _assembly("and.b32 t, $2, 0xF0F0F0F0;", 0x54545454)
SIGNED = _assembly(
    "xor.b32 t, $2, 0x80808080;", 0x64646464, "mov.b32 z, 0xE480E480; add.f16x2 $0, $0, z; add.f16x2 $1, $1, z;"
)


# `PURE` is false for values: else the compiler turns the bytes, one by one, to where they are multiplied, and converts
# them there; keys lie as they are needed.


@triton.jit
def _half(codes, asm: tl.constexpr, PURE: tl.constexpr):
    return tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=tl.float16, is_pure=PURE, pack=4)


@triton.jit
def _low(codes, PLUS: tl.constexpr, PURE: tl.constexpr):
    """The low 4 bits in float16, plus PLUS."""
    if PTX:
        return (_half(codes, LOW, PURE) - (64.0 - PLUS)).to(tl.float16)
    codes = ((codes & 15).to(tl.int32) << 4 | 0x5400).to(tl.int16).to(tl.float16, bitcast=True)
    return (codes - (64.0 - PLUS)).to(tl.float16)


@triton.jit
def _high(codes, PLUS: tl.constexpr, PURE: tl.constexpr):
    """The high 4 bits in float16, plus PLUS."""
    if PTX:
        return (_half(codes, HIGH, PURE) - (64.0 - PLUS)).to(tl.float16)
    codes = ((codes & 240).to(tl.int32) | 0x5400).to(tl.int16).to(tl.float16, bitcast=True)
    return (codes - (64.0 - PLUS)).to(tl.float16)


@triton.jit
def _signed(codes, PURE: tl.constexpr):
    """All 8 bits, which are those of an int8, in float16."""
    if PTX:
        return _half(codes, SIGNED, PURE)
    codes = ((codes ^ 0x80).to(tl.int32) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    return (codes - 1152.0).to(tl.float16)


@triton.jit
def _add_dot(a, b, total, TERMS: tl.constexpr):
    """Their product added to `total`; of several terms in float32, which tensor cores add less exactly."""
    if TERMS == 1:
        return tl.dot(a, b, total)
    return total + tl.dot(a, b)


@triton.jit
def _rotate_left(x, by):
    """The bits of int32 x moved up by `by`, 0 to 31, those that leave come in below."""
    if PTX:
        asm: tl.constexpr = "shf.l.wrap.b32 $0, $1, $1, $2;"
        x, by = tl.broadcast(x, by)
        return tl.inline_asm_elementwise(asm, "=r,r,r", [x, by], dtype=tl.int32, is_pure=True, pack=1)
    x = x.to(tl.uint32, bitcast=True)
    return (x << by | (x >> 1) >> (31 - by)).to(tl.int32, bitcast=True)


@triton.jit
def _rounded(x, TERMS: tl.constexpr):
    """The sum of the TERMS float16 numbers that x becomes."""
    total = _nth_term(x, 0).to(tl.float32)
    for i in tl.static_range(1, TERMS):
        total += _nth_term(x, i).to(tl.float32)
    return total


@triton.jit
def _float(x, BITS: tl.constexpr):
    """Codes of 8 bits, or floats, in float32."""
    if BITS == 8:
        return x.to(tl.int8, bitcast=True).to(tl.float32)
    return x.to(tl.float32)


@triton.jit
def _largest(x):
    """The largest of x, or 1 if nothing is larger than 0."""
    largest = tl.max(x)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def _scales8(params, n, p_t):
    """Steps and centres of keys n, float32 (N)."""
    words = tl.load((params + n * p_t).to(tl.pointer_type(tl.int32)))
    return _from_bf16_bits(words), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _scales4(params, n, p_t, g, G: tl.constexpr, PLUS: tl.constexpr):
    """
    Of keys n the base, float32 (N); of their groups g the steps relative to it, and an eighth of: the centres less 7.5
    and PLUS; float32 (N, ROWS).
    """
    params += n * p_t
    if G == 16:  # 12 bytes
        words = params.to(tl.pointer_type(tl.int32))
        base = tl.load(words)
        second = tl.load(words + 1)[:, None]
        third = tl.load(words + 2)[:, None]
        choice = tl.where((g // 2 < 2)[None, :], base[:, None], tl.where((g // 2 < 6)[None, :], second, third))
        choice = _rotate_left(choice, ((3 - 4 * g) & 31)[None, :])
        last = _rotate_left(third, ((5 - g) & 31)[None, :])
    else:
        base = tl.load(params).to(tl.int32) | tl.load(params + 1).to(tl.int32) << 8
        there = (g < G)[None, :]
        choice = tl.load(params[:, None] + 2 + (g // 2)[None, :], mask=there, other=0).to(tl.int32)
        choice = choice << (19 - 4 * (g % 2))[None, :]
        last = tl.load(params[:, None] + 2 + G // 2 + (g // 8)[None, :], mask=there, other=0).to(tl.int32)
        last = last << (21 - g % 8)[None, :]
    # Two bits of the step are at 21 now, two of the centre at 19 and one at 21. As floats these are multiples of 2^-128
    # and 2^-130, which saves a conversion.
    step = (choice & 0x600000).to(tl.float32, bitcast=True) * (STEP_BY * 2.0**128) + STEP
    centre = (choice & 0x180000 | last & 0x200000).to(tl.float32, bitcast=True)
    return _from_bf16_bits(base), step, centre * (CENTRE_BY * 2.0**127) + (CENTRE - 7.5 - PLUS) / 8


@triton.jit
def _rotated(x, c, cos, sin, rotated, HALF: tl.constexpr):
    """Channels c of the head at x, the first of them rotated: all 2 HALF that have angles, or none."""
    value = tl.load(x + c).to(tl.float32)
    other = tl.load(x + tl.where(c < HALF, c + HALF, tl.where(c < 2 * HALF, c - HALF, c))).to(tl.float32)
    cos = tl.load(cos, mask=c < rotated, other=1.0)
    sin = tl.load(sin, mask=c < rotated, other=0.0)
    return (value * cos + tl.where(c < HALF, -other, other) * sin).to(x.dtype.element_ty)


@kernel(do_not_specialize=["S", "T", "splits", "blocks", "m_b", "m_h", "m_t", "slot"])
def _attend_kernel(
    q, k, k_params, v, v_params, mask, partial, stats, scaling,
    q_b, q_h, q_t, k_b, k_h, k_t, kp_b, kp_h, kp_t, v_b, v_h, v_t, vp_b, vp_h, vp_t, m_b, m_h, m_t,
    nh, T, S, splits, blocks, table, slot, starts, cos, sin, scale,
    BITS: tl.constexpr, HD: tl.constexpr, LOG_HD: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr, TERMS: tl.constexpr, LATE: tl.constexpr,
    HALF: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """
    One query over `blocks` blocks of N keys. partial: float32 (B * nh * T, splits, HD), the weighted sum of the values;
    stats: float32 (B * nh * T, splits, 2), the largest score in powers of two and the sum of the weights.

    With LATE storages and length are those of `table`, and the keys from starts, int64 (B), on are shared out evenly,
    however many they are.

    With HALF q is what the projections made of one token, as `rotary_append` takes it: queries and keys are rotated
    here, and the last split of a row adds the new key and value, which nobody else reads, to the storages.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b, h, t = row // T // nh, row // T % nh, row % T
    channels = tl.arange(0, HD)
    if HALF:
        q += (b * 3 * nh + h) * HD
        angles = b * HALF + channels % HALF
        query = _rotated(q, channels, cos + angles, sin + angles, 2 * HALF, HALF)
        if SCALED:
            query = (query.to(tl.float32) * tl.load(scale + b)).to(q.dtype.element_ty)
        query = query.to(tl.float32)
    else:
        query = tl.load(q + b * q_b + h * q_h + t * q_t + channels).to(tl.float32)
    if BITS < 16:
        query = tl.reshape(_hadamard(tl.reshape(query, (1, HD)), 1, HD, LOG_HD), (HD,))
    query *= scaling * LOG2_E
    first = 0  # key
    if LATE:
        S = tl.load(table).to(tl.int32)
        first = tl.load(starts + b).to(tl.int32) // N * N
        blocks = tl.cdiv(tl.cdiv(S - first, N), splits)
        k, k_b, k_h = _store_at(k, table, slot, nh, k_t)
        v, v_b, v_h = _store_at(v, table, slot + (2 if BITS < 16 else 1), nh, v_t)
        if BITS < 16:
            k_params, kp_b, kp_h = _store_at(k_params, table, slot + 1, nh, kp_t)
            v_params, vp_b, vp_h = _store_at(v_params, table, slot + 3, nh, vp_t)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    k_params += b * kp_b + h * kp_h
    v_params += b * vp_b + h * vp_h
    mask += b * m_b + h * m_h + t * m_t
    if HALF:
        S -= 1
    end = S - T + t + 1 if CAUSAL else S
    end = tl.minimum(end, first + (split + 1) * blocks * N)

    ROWS: tl.constexpr = HD // 8 if BITS == 4 and HD > 128 else 16  # of a matrix product, 16 at least
    r = tl.arange(0, ROWS)
    query_sum = tl.sum(query, 0)
    if BITS == 4:
        G: tl.constexpr = HD // 8
        PLUS: tl.constexpr = 64 if TERMS == 1 else 0  # taking it off is exact and costs time, leaving it costs digits
        half = tl.arange(0, HD // 2)
        own = half[:, None] % G == r[None, :]  # (HD / 2, ROWS), whether a channel is of the group
        q_low, q_high = tl.split(tl.permute(tl.reshape(query, (2, HD // 2)), (1, 0)))
        unit = _largest(tl.abs(query))
        q_low, q_high = tl.where(own, q_low[:, None] / unit, 0.0), tl.where(own, q_high[:, None] / unit, 0.0)
        group_sum = tl.sum(_rounded(q_low, TERMS) + _rounded(q_high, TERMS), 0)  # (ROWS)
        low = tl.zeros((HD // 2, ROWS), tl.float32)
        high = tl.zeros((HD // 2, ROWS), tl.float32)
        offset = tl.zeros((ROWS,), tl.float32)
    elif DOT:
        unit = _largest(tl.abs(query))
        q_terms = _terms(tl.broadcast_to(query[:, None] / unit, (HD, ROWS)), r[None, :], TERMS)
        acc = tl.zeros((HD, ROWS), tl.float32)
        offset = 0.0
    else:
        acc = tl.zeros((HD,), tl.float32)
        offset = 0.0
    largest = -float("inf")
    total = 0.0
    if HALF:  # noqa: SIM102 (without it what follows must not be compiled)
        if split == splits - 1:
            key = _rotated(q + nh * HD, channels, cos + angles, sin + angles, 2 * HALF, HALF)
            value = tl.load(q + 2 * nh * HD + channels)
            at = S.to(tl.int64) * HD + channels
            tl.store(k + at, key)
            tl.store(v + at, value)
            if tl.load(starts + b) <= S:
                largest = tl.sum(key.to(tl.float32) * query, 0)
                total = 1.0
                acc = value.to(tl.float32)
    unit_v = 1e-30  # what the sums of values are multiples of: the largest step so far, for float16

    for start in tl.range(first + split * blocks * N, end, N, num_stages=STAGES):
        # Keys after the last one are the last one once more, and don't count: addresses are cheaper than masks.
        there = tl.arange(0, N) < end - start
        n = tl.minimum(tl.arange(0, N), end - start - 1)
        at = tl.cast(start, tl.int64)
        # keys
        if BITS == 4:
            bytes = tl.load(k + at * k_t + n[:, None] * k_t + half[None, :])  # (N, HD / 2)
            base, step, zero = _scales4(k_params + at * kp_t, n, kp_t, r, G, PLUS)
            codes_low, codes_high = _low(bytes, PLUS, True), _high(bytes, PLUS, True)
            products = tl.zeros((N, ROWS), tl.float32)
            for i in tl.static_range(TERMS):
                products = tl.dot(codes_low, _nth_term(q_low, i), products)
                products = tl.dot(codes_high, _nth_term(q_high, i), products)
            score = tl.sum(step * (products + zero * (group_sum * 8)[None, :]), 1) * (base * unit)  # (N)
        else:
            codes = tl.load(k + at * k_t + n[:, None] * k_t + channels[None, :])  # (N, HD)
            if DOT:
                score = tl.sum(tl.dot(_signed(codes, True), q_terms), 1) * unit
            else:
                score = tl.sum(_float(codes, BITS) * query[None, :], 1)
            if BITS == 8:
                step, centre = _scales8(k_params + at * kp_t, n, kp_t)
                score = step * score + centre * query_sum
        # softmax
        if MASKED:
            there = there & (tl.load(mask + at + n) != 0)
        if LATE:
            there = there & (start + n >= tl.load(starts + b))
        score = tl.where(there, score, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(score, 0))
        reference = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weight = exp2(score - reference)  # (N)
        shrink = exp2(largest - reference)
        largest = new_largest
        total = total * shrink + tl.sum(weight, 0)
        # values
        if BITS == 4:
            bytes = tl.load(v + at * v_t + n[:, None] * v_t + half[None, :])
            base, step, zero = _scales4(v_params + at * vp_t, n, vp_t, r, G, PLUS)
            new_unit = tl.maximum(unit_v, tl.max(base, 0))
            shrink *= unit_v / new_unit
            unit_v = new_unit
            weight = weight * (base * (1 / unit_v))
            step = step * weight[:, None]  # less than 2
            offset = offset * shrink + tl.sum(_rounded(step, TERMS) * zero, 0) * 8
            if shrink != 1:
                low, high = low * shrink, high * shrink
            codes = tl.trans(_low(bytes, PLUS, False))
            for i in tl.static_range(TERMS):
                low = _add_dot(codes, _nth_term(step, i), low, TERMS)
            codes = tl.trans(_high(bytes, PLUS, False))
            for i in tl.static_range(TERMS):
                high = _add_dot(codes, _nth_term(step, i), high, TERMS)
        else:
            codes = tl.load(v + at * v_t + n[:, None] * v_t + channels[None, :])
            offset = offset * shrink
            if BITS == 8:
                step, centre = _scales8(v_params + at * vp_t, n, vp_t)
                offset += tl.sum(weight * centre, 0)
                weight = weight * step
            if DOT:
                new_unit = tl.maximum(unit_v, tl.max(step, 0))
                weight = weight * (1 / new_unit)
                terms = _terms(tl.broadcast_to(weight[:, None], (N, ROWS)), r[None, :], TERMS)
                shrink *= unit_v / new_unit
                unit_v = new_unit
                if shrink != 1:
                    acc = acc * shrink
                acc += tl.dot(tl.trans(_signed(codes, False)), terms)
            else:
                acc = acc * shrink + tl.sum(_float(codes, BITS) * weight[:, None], 0)

    place = row * splits + split
    partial += place * HD
    if BITS == 4:
        tl.store(partial + half, tl.sum(tl.where(own, low + offset[None, :], 0.0), 1) * unit_v)
        tl.store(partial + HD // 2 + half, tl.sum(tl.where(own, high + offset[None, :], 0.0), 1) * unit_v)
    elif DOT:
        tl.store(partial + channels, tl.sum(acc, 1) * unit_v + offset)
    else:
        tl.store(partial + channels, acc + offset)
    tl.store(stats + place * 2, largest)
    tl.store(stats + place * 2 + 1, total)


@kernel(do_not_specialize=["T", "splits"])
def _merge_kernel(
    partial, stats, y, nh, T, splits,
    ROTATED: tl.constexpr, HD: tl.constexpr, LOG_HD: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """y: (B, T, nh, HD)."""
    row = tl.program_id(0).to(tl.int64)
    b, h, t = row // T // nh, row // T % nh, row % T
    split, channels = tl.arange(0, MAX_SPLITS), tl.arange(0, HD)
    there = split < splits
    place = row * splits + split
    largest = tl.load(stats + place * 2, mask=there, other=-float("inf"))
    total = tl.load(stats + place * 2 + 1, mask=there, other=0.0)
    sums = tl.load(partial + place[:, None] * HD + channels[None, :], mask=there[:, None], other=0.0)
    reference = tl.max(largest, 0)
    scale = exp2(largest - tl.where(reference == -float("inf"), 0.0, reference))
    total = tl.sum(total * scale, 0)
    value = tl.sum(sums * scale[:, None], 0) / tl.where(total == 0, 1.0, total)  # zeros where nothing is seen
    if ROTATED:
        value = tl.reshape(_hadamard(tl.reshape(value, (1, HD)), 1, HD, LOG_HD), (HD,))
    y += ((b * T + t) * nh + h) * HD
    tl.store(y + channels, value.to(y.dtype.element_ty))


def _tuning(bits: int, hd: int, cuda: bool, launch=None) -> tuple:
    """Of `TUNING`, or `launch`: arguments of the launch, and programs for each multiprocessor."""
    tuning = dict(known_options(launch or TUNING[bits], cuda))
    if hd > 128:  # else a block would not fit some cards' shared memory, nor the sums a warp's registers
        tuning["N"] = max(16, tuning["N"] // 2)
        tuning["num_warps"] = 4
    return tuning, tuning.pop("programs")


def _attend(q, k, k_params, v, v_params, bits, mask, scaling, causal):
    B, nh, T, hd = q.shape
    S = k.shape[2]
    tuning, programs = _tuning(bits, hd, q.is_cuda)
    if bits == 8 and k_params.stride(2) % 4:
        raise ValueError(f"the parameters of a token must be 4 bytes side by side, found {k_params.stride()}.")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    rows, blocks = B * nh * T, triton.cdiv(S, tuning["N"])
    splits = multiprocessors(q.device) * programs // max(rows, 1)
    blocks_each = triton.cdiv(blocks, max(1, min(splits, MAX_SPLITS, blocks)))
    splits = max(1, triton.cdiv(blocks, max(1, blocks_each)))
    y = q.new_empty(B, T, nh, hd)
    if rows == 0:
        return y
    partial = torch.empty(rows, splits, hd, dtype=torch.float32, device=q.device)
    stats = torch.empty(rows, splits, 2, dtype=torch.float32, device=q.device)
    seen = q if mask is None else mask.expand(B, nh, T, S)
    if mask is not None and seen.stride(3) != 1:
        seen = mask.contiguous().expand(B, nh, T, S)
    with torch.cuda.device_of(q):
        _attend_kernel[(rows, splits)](
            q, k, k_params, v, v_params, seen.view(torch.uint8) if mask is not None else seen, partial, stats, scaling,
            *q.stride()[:3], *k.stride()[:3], *k_params.stride()[:3], *v.stride()[:3], *v_params.stride()[:3],
            *seen.stride()[:3], nh, T, S, splits, blocks_each, q, 0, q, q, q, q,
            BITS=bits, HD=hd, LOG_HD=hd.bit_length() - 1, CAUSAL=causal and T > 1, MASKED=mask is not None,
            TERMS=1 if bits == 4 and q.dtype != torch.float32 else 2, LATE=False, HALF=0, SCALED=False, **tuning,
        )  # fmt: skip
        _merge_kernel[(rows,)](
            partial, stats, y, nh, T, splits,
            ROTATED=bits < 16, HD=hd, LOG_HD=hd.bit_length() - 1, MAX_SPLITS=MAX_SPLITS, num_warps=4,
        )  # fmt: skip
    return y


def decode_attention(q, k, v, mask, scaling, causal):
    if q.shape[-1] not in GPU_HEAD_SIZES:
        return decode_attention_reference(q, k, v, mask, scaling, causal)
    return _attend(q, k, k, v, v, 8 * k.element_size(), mask, scaling, causal)


def quantized_decode_attention(q, k_codes, k_params, v_codes, v_params, mask, scaling, causal):
    hd = q.shape[-1]
    if hd not in GPU_HEAD_SIZES:
        return quantized_decode_attention_reference(q, k_codes, k_params, v_codes, v_params, mask, scaling, causal)
    bits = 8 if k_codes.shape[-1] == hd else 4
    return _attend(q, k_codes, k_params, v_codes, v_params, bits, mask, scaling, causal)


# --- A decoding step ---------------------------------------------------------------------------------------------


@kernel(do_not_specialize=["T", "slot"])
def _rotary_kernel(
    qkv, cos, sin, scale, q, k, v, table, slot, nh, T,
    HD: tl.constexpr, HALF: tl.constexpr, SCALED: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """
    One head of one token, of queries, keys or values: the first two are rotated, and queries scaled; to where it is
    wanted, (B, T, nh, HD), or into the storages of a table.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // T, row % T
    which, h = head // nh, head % nh
    c = tl.arange(0, HD)
    angles = row * HALF + c % HALF
    rotated = tl.where(which < 2, 2 * HALF, 0)
    value = _rotated(qkv + (row * 3 * nh + head) * HD, c, cos + angles, sin + angles, rotated, HALF)
    place = (row * nh + h) * HD + c
    if which == 0:
        if SCALED:
            value = (value.to(tl.float32) * tl.load(scale + row)).to(q.dtype.element_ty)
        tl.store(q + place, value)
    elif STORED:
        store, s_b, s_h = _store_at(k, table, slot + which - 1, nh, HD)
        tl.store(store + b * s_b + h * s_h + (tl.load(table) - T + t) * HD + c, value)
    elif which == 1:
        tl.store(k + place, value)
    else:
        tl.store(v + place, value)


def rotary_append(qkv, cos, sin, scale, base, bits, table, slot, nh):
    """
    Rotate queries and keys, and store keys and values behind those of earlier tokens. Returns queries (B, nh, T, hd).

    qkv: (B, T, 3 nh hd). cos, sin: float32 (B, T, rotated / 2). scale: float32 (B, T) or None, of the queries.
    base: (1,) in the storage's dtype, that the addresses of `table` count from; slot: of this layer's first storage.
    """
    (B, T), hd = qkv.shape[:2], qkv.shape[2] // (3 * nh)
    stored = bits >= 16
    q = qkv.new_empty(B, T, nh, hd)
    new = (base, base) if stored else qkv.new_empty(2, B, T, nh, hd)
    _rotary_kernel[(B * T, 3 * nh)](
        qkv, cos, sin, cos if scale is None else scale, q, *new, table, slot, nh, T,
        HD=hd, HALF=cos.shape[-1], SCALED=scale is not None, STORED=stored, num_warps=1,
    )  # fmt: skip
    if not stored:
        rows, (codes, params) = 1 if T == 1 else 8, quantized_sizes(hd, bits)
        _append_kernel[(B * nh, triton.cdiv(T, rows), 2)](
            new, base, base, T * nh * hd, hd, nh * hd, 0, 0, codes, 0, 0, params, nh, T, 0, table, slot,
            B * T * nh * hd,
            HD=hd, LOG_HD=hd.bit_length() - 1, BITS=bits, ROWS=rows, LATE=True, num_warps=1 if T == 1 else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return q.transpose(1, 2)


def attend(q, base, bits, table, slot, starts, scaling, launch=None, rotation=None):
    """
    Attention of q (B, nh, T, hd) over the storages of a table; its last T tokens are those of q, causally.

    starts: int64 (B), the first key that a row attends to. Returns (B, T, nh, hd). The launch does not depend on the
    length. base, slot: as of `rotary_append`; launch: as an entry of `TUNING`. rotation: nh, cos, sin and scale; then
    q is qkv, and this does what `rotary_append` does, too, for one token and a cache that is not quantised.
    """
    if rotation is None:
        (B, nh, T, hd), strides, half = q.shape, q.stride()[:3], 0
        cos = sin = scale = None
    else:
        (nh, cos, sin, scale), (B, T), strides = rotation, q.shape[:2], (0, 0, 0)
        hd, half = q.shape[2] // (3 * nh), cos.shape[-1]
    tuning, programs = _tuning(bits, hd, q.is_cuda, launch)
    splits = max(1, min(multiprocessors(q.device) * programs // (B * nh * T), MAX_SPLITS))
    y = q.new_empty(B, T, nh, hd)
    partial = torch.empty(B * nh * T, splits, hd, dtype=torch.float32, device=q.device)
    stats = torch.empty(B * nh * T, splits, 2, dtype=torch.float32, device=q.device)
    codes, params = (hd, 0) if bits >= 16 else quantized_sizes(hd, bits)
    _attend_kernel[(B * nh * T, splits)](
        q, base, base, base, base, q, partial, stats, scaling,
        *strides, 0, 0, codes, 0, 0, params, 0, 0, codes, 0, 0, params, 0, 0, 0,
        nh, T, 0, splits, 0, table, slot, starts, *(q if t is None else t for t in (cos, sin, scale)),
        BITS=bits, HD=hd, LOG_HD=hd.bit_length() - 1, CAUSAL=T > 1, MASKED=False,
        TERMS=1 if bits == 4 and q.dtype != torch.float32 else 2, LATE=True, HALF=half, SCALED=scale is not None,
        **tuning,
    )  # fmt: skip
    _merge_kernel[(B * nh * T,)](
        partial, stats, y, nh, T, splits,
        ROTATED=bits < 16, HD=hd, LOG_HD=hd.bit_length() - 1, MAX_SPLITS=MAX_SPLITS, num_warps=4,
    )  # fmt: skip
    return y


def rotate_and_attend(qkv, cos, sin, scale, base, bits, table, slot, nh, starts, scaling):
    """`attend` for what `rotary_append` takes and stores."""
    if bits >= 16 and qkv.shape[1] == 1:
        return attend(qkv, base, bits, table, slot, starts, scaling, rotation=(nh, cos, sin, scale))
    q = rotary_append(qkv, cos, sin, scale, base, bits, table, slot, nh)
    return attend(q, base, bits, table, slot, starts, scaling)
