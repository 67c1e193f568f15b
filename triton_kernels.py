"""
The operations on caches and products of few rows for GPUs, in Triton; qwen_ops.py says what they compute and describes
the format.

qwen_ops.py imports this module when the first tensor on a GPU comes. One kernel attends: every program takes one
query and a share of the keys, so that a single sequence fills the card; a second one puts the shares together. It has
two ways to multiply. Element by element it works in float32 throughout. With `DOT` it uses tensor cores: codes are
exact in float16, and a float32 factor, less than 1, is the sum of `TERMS` float16 numbers: two are as exact as float32,
one is as exact as float16. They are columns of one matrix for 8 bits and make a matrix each for 4 bits, where the
columns are the groups of channels that share a step.

In the shapes below N is a block of keys, hd the width of a head, G the groups of channels of int4.
"""

# No `from __future__ import annotations`: the interpreter of Triton up to 3.2 knows no constexpr that is a text.

import functools
import importlib
import math
import os
import threading
from concurrent import futures

import torch

from .qwen_ops import (
    CENTRES,
    GPU_BLOCK_WEIGHTS,
    GPU_HEAD_SIZES,
    STEPS,
    decode_attention_reference,
    gptq_blocks,
    linear_reference,
    quantize_append_reference,
    quantized_decode_attention_reference,
    quantized_sizes,
)

# No import statements: transformers refuses code that imports what is not installed.
triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")

# --- Launches ----------------------------------------------------------------------------------------------------

_THREAD = threading.local()  # `.noted`: the launches that `compile_together` collects in it


class _Kernel:
    """What `triton.jit` makes of a function, launched in its way: `kernel[grid](…)`."""

    def __init__(self, jitted):
        self.jitted = jitted

    def __getitem__(self, grid):
        noted = getattr(_THREAD, "noted", None)
        return self.jitted[grid] if noted is None else functools.partial(self._note, noted)

    def _note(self, noted: dict, *args, **options) -> None:
        kinds = (
            x.dtype if isinstance(x, torch.Tensor) else () if parameter.do_not_specialize else x
            for x, parameter in zip(args, self.jitted.params)
        )
        noted.setdefault((self, *kinds, *options.items()), (self.jitted, args, options))

    def __getattr__(self, name: str):
        return getattr(self.jitted, name)


def _kernel(function=None, **options):
    """`triton.jit`, for functions that are launched."""
    if function is None:
        return lambda function: _kernel(function, **options)
    return _Kernel(triton.jit(function, **options))


def _done_once() -> list:
    """
    What a process does before its first kernel: to make the driver, by a C compiler, and to hash Triton's files.

    Triton keeps the results, but threads that come meanwhile all do it, and each takes longer.
    """
    modules = (importlib.import_module(f"triton.{name}") for name in ("runtime.cache", "compiler.compiler"))
    keys = [module.triton_key for module in modules if hasattr(module, "triton_key")]  # it has moved
    return [lambda: triton.runtime.driver.active, *keys[:1]]


def compile_together(compute, device: torch.device) -> None:
    """
    Makes the kernels that `compute()` launches on this GPU ready, in as many threads as there are cores.

    One after the other they take seconds in a process that finds none in Triton's cache: besides Triton's passes each
    has an assembler and a C compiler to wait for. `compute` is called, with its launches left out. What fails here
    raises what the launch would.
    """
    _THREAD.noted = noted = {}
    try:
        compute()
    finally:
        del _THREAD.noted

    def make_ready(launch) -> None:
        jitted, args, options = launch
        with torch.cuda.device(device):
            jitted.warmup(*args, grid=(1,), **options).run  # noqa: B018 (Triton builds it when it is looked up)

    launches = list(noted.values())
    if not launches or not hasattr(launches[0][0], "_hash_lock"):
        return  # up to Triton 3.3 two threads can't compile: they will be compiled when they are launched
    with futures.ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        list(threads.map(lambda function: function(), _done_once()))
        list(threads.map(make_ready, launches))


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


# Whether kernels may have instructions of NVIDIA's: AMD's cards are of the device type cuda too, and the interpreter is
# no GPU.
PTX = tl.constexpr(torch.version.cuda is not None and isinstance(_round, triton.JITFunction))


@triton.jit
def _exp2(x):
    """2 to the power of x in float32. Triton's own links a library into the kernel, which takes some 60 ms."""
    if PTX:
        asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _rsqrt(x):
    """1 / sqrt(x) in float32; see `_exp2`."""
    if PTX:
        asm: tl.constexpr = "rsqrt.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.rsqrt(x)


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


@_kernel(do_not_specialize=["T", "position", "slot"])
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


@_kernel(do_not_specialize=["S", "T", "splits", "blocks", "m_b", "m_h", "m_t", "slot"])
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
        weight = _exp2(score - reference)  # (N)
        shrink = _exp2(largest - reference)
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


@_kernel(do_not_specialize=["T", "splits"])
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
    scale = _exp2(largest - tl.where(reference == -float("inf"), 0.0, reference))
    total = tl.sum(total * scale, 0)
    value = tl.sum(sums * scale[:, None], 0) / tl.where(total == 0, 1.0, total)  # zeros where nothing is seen
    if ROTATED:
        value = tl.reshape(_hadamard(tl.reshape(value, (1, HD)), 1, HD, LOG_HD), (HD,))
    y += ((b * T + t) * nh + h) * HD
    tl.store(y + channels, value.to(y.dtype.element_ty))


@functools.lru_cache(maxsize=None)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.lru_cache(maxsize=None)
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_block_optin", 2**16)


def _options(launch: dict, cuda: bool) -> dict:
    """Without what only NVIDIA's GPUs know."""
    return launch if PTX.value and cuda else {name: x for name, x in launch.items() if name != "maxnreg"}


def _tuning(bits: int, hd: int, cuda: bool, launch=None) -> tuple:
    """Of `TUNING`, or `launch`: arguments of the launch, and programs for each multiprocessor."""
    tuning = dict(_options(launch or TUNING[bits], cuda))
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
    splits = _multiprocessors(q.device) * programs // max(rows, 1)
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


@_kernel
def _norm_kernel(x, weight, y, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of one row of (M, K)."""
    row = tl.program_id(0).to(tl.int64) * K
    channels = tl.arange(0, BLOCK)
    there = channels < K
    value = tl.load(x + row + channels, mask=there, other=0).to(tl.float32)
    value *= _rsqrt(tl.sum(value * value, 0) / K + eps)
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


@_kernel
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
        factor = _rsqrt(tl.sum(squares, 0) / K + eps)
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
        tuning["STAGES"] = max(1, min(tuning["STAGES"], (_shared_memory(x.device) - 2**13) // block))
    _product_kernel[(triton.cdiv(N, tuning["BN"]),)](
        x, x if norm is None else norm, weight, gate_weight, *rest, y, M, N, K, eps,
        ROWS=16 if M > 1 else 1, EVEN=K % tuning["BK"] == 0, CODES=scale is not None,
        NORM=norm is not None, GATE=gate is not None, BIAS=ends[0] is not None, RESIDUAL=ends[2] is not None,
        **tuning,
    )  # fmt: skip
    return y


@_kernel(do_not_specialize=["T", "slot"])
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
    splits = max(1, min(_multiprocessors(q.device) * programs // (B * nh * T), MAX_SPLITS))
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


@_kernel
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
        factor = _rsqrt(tl.sum(squares, 0) / (words * (32 // BITS)) + eps)
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


@_kernel(do_not_specialize=["blocks"])
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


@_kernel
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
        launch = tuning or _launch_of_row(gate is not None, bits, N / _multiprocessors(x.device))
        tuning = _options(launch, x.is_cuda)
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
    tuning["STAGES"] = max(1, min(tuning["STAGES"], (_shared_memory(x.device) - 2**13) // block))
    blocks = triton.cdiv(K, 128)
    splits = max(1, _multiprocessors(x.device) * programs // across)
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


@_kernel
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


@_kernel
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
        factor *= _rsqrt(tl.sum(squares, 0) / (words * 4) + eps)
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


def register(library, device="cuda") -> str:
    """
    Make these the operators' kernels on GPUs; their name.

    Raises RuntimeError, which says why, if Triton can't compile and run one here.
    """
    codes, params, x = (torch.zeros(1, 1, 1, n, device=device) for n in (32, 4, 32))
    try:
        quantize_append(codes.byte(), params.byte(), x, 0)
    except Exception as error:  # whatever a missing compiler, an old card or an old driver cause
        raise RuntimeError(
            f"Triton {triton.__version__} does not work here: {type(error).__name__}: {error}"
        ) from error
    for operation in (
        *(decode_attention, quantize_append, quantized_decode_attention),
        *(linear, gptq_linear, gptq_dequantize),
    ):
        library.impl(operation.__name__, operation, "CUDA")
    return f"Triton {triton.__version__}"
