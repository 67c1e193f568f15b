"""The native kernels against formulas in float64, and what happens where they can't be built."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, python

kernels = importlib.import_module("qwen.qwen_ops")
building = importlib.import_module("qwen.cpp_kernels")
operators = kernels._OPERATORS

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
COMPILER = next((found for found in map(shutil.which, ("c++", "g++", "clang++")) if found), None)
WHAT_IS_NEEDED = "needs a C++ compiler, and torch 2.1"
if building._state.library is None:
    COMPILER = None
needs_compiler = pytest.mark.skipif(COMPILER is None, reason=WHAT_IS_NEEDED)
needs_operators = pytest.mark.skipif(building._state.library is None, reason="needs the operators of torch 2.1")


@pytest.fixture(scope="session")
def native():
    if COMPILER is None:
        pytest.skip(WHAT_IS_NEEDED)
    found = building.kernels_in_use()
    assert found["native"], found["reason"]
    return found["instructions"]


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16", "neon", "neon_bf16"])
def level(native, request):
    """Each instruction set that this CPU has."""
    try:
        building.set_instructions(request.param)
    except RuntimeError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    building.set_instructions(native)


def assert_close(y, expected, dtype, what=""):
    """y in dtype is the float64 `expected` but for float32 sums and one rounding."""
    assert y.dtype == dtype
    assert y.shape == expected.shape
    size = expected.abs().max().item() if expected.numel() else 0
    unit = 2**-8 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(y.double(), expected, rtol=unit, atol=3e-6 * max(size, 1), msg=lambda m: f"{what}: {m}")


# --- Linear ------------------------------------------------------------------------------------------------------


def linear_cases(count):
    pick = random.Random(0)
    for _ in range(count):
        yield {
            "rows": pick.randint(1, 8),
            "inputs": pick.choice([1, 5, 16, 31, 32, 33, 64, 100, 257, 1031]),
            "outputs": pick.choice([1, 2, 3, 8, 17, 70]),
            "dtype": pick.choice([torch.float32, torch.bfloat16]),
            "bias": pick.random() < 0.5,
            "offset": pick.choice([0, 1, 3]),  # elements by which the weight is out of line
            "transposed": pick.random() < 0.3,
        }


def out_of_line(t, offset):
    """A copy whose rows begin `offset` elements into their storage and are longer than they show."""
    storage = torch.zeros(t.shape[0], t.shape[1] + 2 * offset, dtype=t.dtype)
    storage[:, offset : offset + t.shape[1]] = t
    return storage[:, offset : offset + t.shape[1]]


def test_linear(level):
    torch.manual_seed(0)
    for case in linear_cases(60):
        x = torch.randn(case["rows"], case["inputs"], dtype=case["dtype"])
        if case["transposed"]:
            x = x.T.contiguous().T
        weight = out_of_line(torch.randn(case["outputs"], case["inputs"]).bfloat16(), case["offset"])
        bias = torch.randn(case["outputs"]).bfloat16() if case["bias"] else None
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_close(operators.linear(x, weight, bias, None), expected, case["dtype"], case)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [9, 64, 65, 200])
def test_many_rows_of_bfloat16(level, rows, bias, monkeypatch):
    """For a CPU without instructions for bfloat16. The last shape is more than is written out at once."""
    monkeypatch.setattr(kernels, "cpu_supports_bf16", lambda: False)
    torch.manual_seed(0)
    for inputs, outputs in ((64, 5), (130, 300), (2048, 1100)):
        x = torch.randn(3, rows, inputs).bfloat16().transpose(0, 1)[:, 1]
        weight = out_of_line(torch.randn(outputs, inputs).bfloat16(), 3)
        added = torch.randn(outputs).bfloat16() if bias else None
        expected = F.linear(x.double(), weight.double(), added.double() if bias else None)
        for product in (kernels.linear, kernels.linear_without_kernels):
            y = product(x, weight, added)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2e-5 * inputs**0.5)


@pytest.mark.parametrize("groups", [None, 1, 4])
def test_linear_int8(level, groups):
    torch.manual_seed(0)
    for rows, inputs, outputs in ((1, 64, 5), (3, 260, 3), (8, 36, 2), (1, 1028, 9)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, inputs, dtype=dtype)
            weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
            scale = torch.rand(outputs) if groups is None else torch.rand(outputs, groups)
            bias = torch.randn(outputs)
            full = weight.double() * scale.double().view(outputs, -1).repeat_interleave(inputs // (groups or 1), 1)
            expected = F.linear(x.double(), full, bias.double())
            assert_close(kernels.linear(x, weight, bias, scale), expected, dtype)
            reference = kernels.linear_reference(x, weight, bias, scale)
            unit = 2**-7 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(reference.double(), expected, rtol=unit, atol=unit * expected.abs().max())


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("rows", range(1, 9))
def test_bfloat16_times_int8_in_whole_numbers(level, rows, groups):
    """As near to the exact product as float32's, rounded; also with large inputs. A row gets what it gets alone."""
    torch.manual_seed(rows)
    for inputs, outputs, offset in ((384, 5, 0), (1536, 70, 3), (384, 1, 0)):
        x = torch.randn(2 * rows, inputs)[::2]
        x[:, ::100] *= 50
        x = x.bfloat16()
        weight = out_of_line(torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8), offset)
        scale = torch.rand(outputs) if groups is None else torch.rand(outputs, groups)
        bias = torch.randn(outputs)
        full = weight.double() * scale.double().view(outputs, -1).repeat_interleave(inputs // (groups or 1), 1)
        expected = F.linear(x.double(), full, bias.double())
        y = kernels.linear(x, weight, bias, scale)
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=5e-4 * expected.abs().max().item())
        in_floats = kernels.linear(x.float(), weight, bias, scale).bfloat16()
        error, error_in_floats = ((t.double() - expected).norm() for t in (y, in_floats))
        assert error <= 1.01 * error_in_floats + 2e-4 * expected.norm()
        for r in range(rows):
            assert torch.equal(kernels.linear(x[r : r + 1], weight, bias, scale), y[r : r + 1])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_whole_numbers_keep_what_is_not_below_a_128th_of_the_largest(level, rows):
    """The steps of 128 neighbouring inputs are their own."""
    torch.manual_seed(rows)
    x = torch.randn(rows, 512) * torch.tensor([1.0, 1e-20, 1e37, 0.0]).repeat_interleave(128)
    x = x.bfloat16().clamp(-3e38, 3e38)
    y = kernels.linear(x, torch.eye(512).to(torch.int8), None, torch.ones(512))
    largest = x.abs().view(rows, 4, 128).amax(2, keepdim=True).expand(-1, -1, 128).reshape(rows, 512)
    kept = x.abs() >= largest / 128
    assert torch.equal(y[kept], x[kept])
    assert ((y.float() - x.float()).abs() <= largest.float() * 2**-15)[~kept].all()


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_and_numbers_fit_the_sums(level, rows, sign):
    """Of int8: every code and every input the largest there is."""
    x = torch.full((rows, 512), sign * 255 / 128).bfloat16()
    y = kernels.linear(x, torch.full((5, 512), -128, dtype=torch.int8), None, torch.ones(5))
    assert torch.equal(y, torch.full((rows, 5), -sign * 255.0 * 512).bfloat16())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_nan_and_leave_the_others(level, wrong):
    torch.manual_seed(0)
    x, weight, scale = torch.randn(5, 256).bfloat16(), torch.full((3, 256), 7, dtype=torch.int8), torch.rand(3)
    expected = kernels.linear(x, weight, None, scale)
    x[1, 200] = wrong
    y = kernels.linear(x, weight, None, scale)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [None, 1, 4])
def test_many_rows_of_int8(level, groups, dtype):
    """The last shape is more than is written out at once."""
    torch.manual_seed(0)
    for rows, inputs, outputs in ((9, 64, 5), (20, 260, 3), (40, 36, 70), (9, 1028, 1), (9, 16384, 200)):
        x = torch.randn(2 * rows, inputs, dtype=dtype)[::2]
        weight = out_of_line(torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8), 3)
        scale = torch.rand(outputs) if groups is None else torch.rand(outputs, groups)
        full = weight.double() * scale.double().view(outputs, -1).repeat_interleave(inputs // (groups or 1), 1)
        for bias in (None, torch.randn(outputs)):
            expected = F.linear(x.double(), full, None if bias is None else bias.double())
            y = kernels.linear(x, weight, bias, scale)
            assert y.dtype == dtype
            unit = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
            torch.testing.assert_close(y.double(), expected, rtol=unit, atol=unit * expected.abs().max().item())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("order", ["group by group", "any"])
def test_a_prompt_is_multiplied_by_every_block(level, bits, order):
    """What ones and zeros take out of a matrix is what it stands for, rounded once, whatever the order of sums."""
    generator = torch.Generator().manual_seed(0)
    n, inputs, outputs = 32 // bits, 16384, 200
    sizes = (inputs // n, outputs), (inputs // 128, outputs // n)
    qweight, qzeros = (torch.randint(-(2**31), 2**31, size, dtype=torch.int32, generator=generator) for size in sizes)
    scales = torch.rand(inputs // 128, outputs, generator=generator).half()
    g_idx = torch.randint(inputs // 128, (inputs,), dtype=torch.int32, generator=generator) if order == "any" else None
    matrix = qweight, qzeros, scales, g_idx, bits, 128, 1
    which = torch.arange(100, inputs, 150)
    x = torch.zeros(len(which), inputs, dtype=torch.bfloat16)
    x[torch.arange(len(which)), which] = 1
    expected = kernels.gptq_dequantize_reference(*matrix, torch.bfloat16)[which]
    assert torch.equal(kernels.gptq_linear(x, *matrix), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", ["group by group", "any"])
def test_every_float16_is_read_as_the_number_it_is(level, bits, order):
    """As scales of codes 1 and zeros 0: subnormal ones, infinite ones and those that are not numbers too."""
    n = 32 // bits
    scales = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[None]
    qweight = torch.full((1, 2**16), 0x11111111 if bits == 4 else 0x01010101, dtype=torch.int32)
    qzeros = torch.zeros(1, 2**16 // n, dtype=torch.int32)
    g_idx = torch.zeros(n, dtype=torch.int32) if order == "any" else None
    matrix = qweight, qzeros, scales, g_idx, bits, n, 0
    for dtype in (torch.float32, torch.bfloat16):
        expected, same = scales[0].to(dtype), {"rtol": 0, "atol": 0, "equal_nan": True}
        weight = operators.gptq_dequantize(*matrix, dtype)
        torch.testing.assert_close(weight, expected.expand(n, -1), **same)
        first = torch.eye(n, dtype=dtype)[:1]
        torch.testing.assert_close(operators.gptq_linear(first, *matrix, None)[0], expected, **same)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_and_digits_fit_the_sums(level, bits, rows, sign):
    """Of outputs side by side: every code the largest, every input of digits that are the largest there are."""
    inputs, outputs = 256, 32
    qweight = torch.full((outputs, inputs * bits // 32), -1, dtype=torch.int32).t()
    qzeros = torch.zeros(2, outputs * bits // 32, dtype=torch.int32)
    matrix = qweight, qzeros, torch.ones(2, outputs).half(), None, bits, 128, 0
    x = torch.full((rows, inputs), sign * (127 * 65536 - 128 * 256 - 128) / (127 * 65536))
    x[:, ::128] = sign
    expected = (x.double().sum(1) * (2**bits - 1))[:, None].expand(-1, outputs)
    torch.testing.assert_close(kernels.gptq_linear(x, *matrix).double(), expected, rtol=1e-6, atol=0)
    half = x.bfloat16()
    expected = (half.double().sum(1) * (2**bits - 1))[:, None].expand(-1, outputs)
    torch.testing.assert_close(kernels.gptq_linear(half, *matrix).double(), expected, rtol=2**-8, atol=0)


def test_large_numbers_times_int8_stay_in_float16(native):
    x, weight, scale = (
        torch.full((20, 64), 100.0).half(),
        torch.full((3, 64), 127, dtype=torch.int8),
        torch.full((3,), 0.01),
    )
    for product in (kernels.linear, kernels.linear_reference, lambda x, *rest: kernels.linear(x[:2], *rest)):
        y = product(x, weight, None, scale)
        torch.testing.assert_close(y, torch.full_like(y, 8128), rtol=2**-10, atol=0)


def block_inputs(dtype=torch.float32, kind="float", bits=16, T=2):
    """Arguments of `decode_blocks` for 2 rows, 3 heads of 32 channels, 40 tokens in the cache and T new ones."""
    torch.manual_seed(0)
    B, nh, hd, hidden, width, S = 2, 3, 32, 80, 72, 40
    matrices, formats = [], []
    for out, inputs in ((3 * nh * hd, hidden), (hidden, nh * hd), (width, hidden), (width, hidden), (hidden, width)):
        weight, bias = torch.randn(out, inputs) * inputs**-0.5, torch.randn(out).to(dtype)
        format = [0, 0, 0]
        if kind == "int8":
            codes, scale = (weight * 40).round().clamp(-128, 127).to(torch.int8), torch.rand(out) / 40
            matrices += [codes, bias, scale, None, None]
        elif kind == "float":
            matrices += [weight.to(dtype), bias if out == hidden else None, None, None, None]
        else:
            format = [int(kind[-1]), 16, 1]
            n, groups = 32 // format[0], -(-inputs // 16)
            sizes = (inputs // n, out), (groups, out // n)
            words = [torch.randint(-(2**31), 2**31, size).int() for size in sizes]
            scale = (torch.rand(groups, out) * 0.3 / 2 ** format[0] / inputs**0.25).half()
            g_idx = (torch.arange(inputs) // 16)[torch.randperm(inputs)].int() if out == width else None
            matrices += [words[0], bias, scale, words[1], g_idx]
        formats += format
    angles = torch.rand(1, 1, T, hd // 2)
    k, v = (torch.randn(B, nh, S, hd).to(dtype) for _ in range(2))
    if bits == 16:
        tensors = [F.pad(x, (0, 0, 0, 9)) for x in (k, v)]
    else:
        tensors = []
        for x in (k, v):
            stored = empty_store(B, nh, S + 9, hd, bits)
            kernels.quantize_append(*stored, x, 0)
            tensors += stored
    mask = torch.rand(B, 1, 1, S + T) < 0.8
    norms = [torch.rand(hidden).to(dtype) + 0.5 for _ in range(2)]
    scale = torch.rand(B, 1, T, 1) + 1
    x = torch.randn(B, T, hidden).to(dtype)
    return x, norms, matrices, formats, angles.cos(), angles.sin(), scale, tensors, S, mask, 1e-6, [hd**-0.5], True


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", ["float", "int8", "GPTQ 4", "GPTQ 8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_equals_its_operations(level, dtype, kind, bits, monkeypatch):
    """In PyTorch and float32, from the same stores; rows for the kernel and rows for the library of products."""
    for T in (1, 4, 6):
        ours, theirs = block_inputs(dtype, kind, bits, T), block_inputs(dtype, kind, bits, T)
        y = operators.decode_blocks(*ours)
        with monkeypatch.context() as patch:  # the references of the operations inside, too
            patch.setattr(
                kernels,
                "_OPERATORS",
                types.SimpleNamespace(**{name: parts[1] for name, parts in kernels.OPERATIONS.items()}),
            )
            expected = kernels.decode_blocks_reference(*theirs)
        assert y.dtype == dtype
        bound = 1e-5 if dtype == torch.float32 else 1.5e-2
        bound = max(bound, 2e-3) if bits < 16 else bound  # a code may fall to the other side
        assert (y.float() - expected.float()).norm() < bound * expected.float().norm()
        for a, b in zip(ours[7], theirs[7]):
            if bits == 16:
                torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-2)
            else:
                assert (a == b).float().mean() > (0.99 if dtype == torch.float32 else 0.9)


def test_blocks_follow_each_other(native):
    """Two blocks with weights and stores of their own."""
    one, other = (block_inputs(T=1) for _ in range(2))
    for norm in other[1]:
        norm.mul_(2)
    other = (*other[:11], [0.3], other[12])
    x = operators.decode_blocks(*one)
    expected = operators.decode_blocks(x, *other[1:])
    fresh = [block_inputs(T=1)[7] for _ in range(2)]
    lists = {i: one[i] + other[i] for i in (1, 2, 3, 11)}
    lists[7] = fresh[0] + fresh[1]
    both = [lists.get(i, each) for i, each in enumerate(one)]
    for blocks in (operators.decode_blocks, kernels.decode_blocks_reference):
        torch.testing.assert_close(blocks(*both), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(lists[7], one[7] + other[7]):
        torch.testing.assert_close(a[:, :, :41], b[:, :, :41], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="are not those of whole blocks"):
        operators.decode_blocks(one[0], one[1] * 2, *one[2:])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_blocks_refuse_a_store_that_does_not_fit(native, bits):
    """Before anything is written: it has room for 49 tokens."""
    args = block_inputs(bits=bits, T=2)
    before = [tensor.clone() for tensor in args[7]]
    wrong = [(*args[:8], 48, None, *args[10:])]
    wrong.append((*args[:7], [tensor[..., ::2] for tensor in args[7]], *args[8:]))
    wrong.append((*args[:7], [tensor[:1] for tensor in args[7]], *args[8:]))
    if bits == 16:
        wrong.append((*args[:7], [tensor.bfloat16() for tensor in args[7]], *args[8:]))
    for each in wrong:
        with pytest.raises(RuntimeError, match=r"2 tokens at position 4\d, in 3 heads of 32 .*, don't fit a store"):
            operators.decode_blocks(*each)
    assert all(map(torch.equal, before, args[7]))
    operators.decode_blocks(*args[:8], 47, None, *args[10:])


def test_linear_keeps_leading_dimensions_and_empty_batches(native):
    weight = torch.randn(6, 10).bfloat16()
    assert kernels.linear(torch.randn(2, 1, 10).bfloat16(), weight).shape == (2, 1, 6)
    assert kernels.linear(torch.randn(10).bfloat16(), weight).shape == (6,)
    assert kernels.linear(torch.randn(0, 10).bfloat16(), weight).shape == (0, 6)
    assert operators.linear(torch.randn(0, 10).bfloat16(), weight, None, None).shape == (0, 6)
    assert kernels.linear(torch.randn(2, 0).bfloat16(), torch.randn(3, 0).bfloat16()).tolist() == [[0.0] * 3] * 2


def test_linear_leaves_the_rest_to_pytorch(native, monkeypatch):
    """Many rows, other dtypes, training and subclasses of tensors never reach the operator."""

    class Operators:
        def __getattr__(self, name):
            raise AssertionError("the operator was called")

    weight = torch.randn(6, 10).bfloat16()
    x = torch.randn(1, 10).bfloat16()
    few = kernels.linear(x, weight)
    monkeypatch.setattr(kernels, "_OPERATORS", Operators())
    monkeypatch.setattr(kernels, "cpu_supports_bf16", lambda: True)
    with pytest.raises(AssertionError):
        kernels.linear(x, weight)
    many = x.expand(9, -1)
    assert torch.equal(kernels.linear(many, weight), F.linear(many, weight))
    assert torch.equal(kernels.linear(x.float(), weight.float()), F.linear(x.float(), weight.float()))

    class Other(torch.Tensor):
        pass

    torch.testing.assert_close(kernels.linear(x, weight.as_subclass(Other)).as_subclass(torch.Tensor), few)
    parameter = torch.nn.Parameter(weight)
    kernels.linear(x, parameter).sum().backward()
    torch.testing.assert_close(parameter.grad, x.expand(6, -1))


# --- Attention ---------------------------------------------------------------------------------------------------


def attention(q, k, v, mask=None):
    """The definition in float64: (B, T, nh, hd)."""
    q, k, v = q.double(), k.double(), v.double()
    B, nh, T, hd = q.shape
    S = k.shape[2]
    seen = torch.ones(B, nh, T, S, dtype=torch.bool)
    if mask is None or mask.dim() == 2:
        seen &= torch.arange(S) <= torch.arange(T)[:, None] + S - T
    if mask is not None:
        seen &= mask[:, None, None] if mask.dim() == 2 else mask
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / hd**0.5
    weights = torch.where(seen, (scores - scores.masked_fill(~seen, -1e9).amax(-1, keepdim=True)).exp(), 0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhts,bhsd->bthd", weights, v)


def attention_cases(count):
    pick = random.Random(1)
    for _ in range(count):
        yield {
            "B": pick.randint(1, 3),
            "nh": pick.randint(1, 4),
            "T": pick.choice([1, 1, 2, 5, 8, 11]),
            "S": pick.choice([11, 12, 63, 64, 65, 200, 700]),
            "hd": pick.choice([32, 40, 64, 80, 128, 256]),
            "mask": pick.choice([None, "keys", "all", "broadcast"]),
            "dtype": pick.choice([torch.float32, torch.bfloat16]),
            "stored": pick.choice([torch.float32, torch.bfloat16]),
        }


def random_mask(case):
    """Some keys are padding; the first row of the batch sees nothing at all."""
    B, nh, T, S = (case[name] for name in ("B", "nh", "T", "S"))
    shape = {"keys": (B, S), "all": (B, nh, T, S), "broadcast": (B, 1, 1, S)}.get(case["mask"])
    if shape is None:
        return None
    mask = torch.rand(shape) < 0.7
    mask[0] = False
    return mask


def in_storage(t):
    """The same keys as a view into a longer storage."""
    storage = torch.full((t.shape[0], t.shape[1], t.shape[2] + 9, t.shape[3]), float("nan"), dtype=t.dtype)
    storage[:, :, : t.shape[2]] = t
    return storage[:, :, : t.shape[2]]


def test_decode_attention(level):
    torch.manual_seed(0)
    for case in attention_cases(40):
        B, nh, T, S, hd = (case[name] for name in ("B", "nh", "T", "S", "hd"))
        q = torch.randn(B, T, nh, hd, dtype=case["dtype"]).transpose(1, 2) * 2
        k, v = (in_storage(torch.randn(B, nh, S, hd, dtype=case["stored"])) for _ in range(2))
        mask = random_mask(case)
        y = kernels.decode_attention(q, k, v, mask)
        assert_close(y, attention(q, k, v, mask), case["dtype"], case)
        if mask is not None:
            assert not y[0].any()


def test_decode_attention_agrees_with_its_reference(native):
    torch.manual_seed(0)
    for S, T in ((1, 1), (5, 5), (3, 8), (0, 1), (5000, 1), (5000, 3)):
        q, k, v = torch.randn(2, 3, T, 64), torch.randn(2, 3, S, 64), torch.randn(2, 3, S, 64)
        mask = torch.rand(2, S) < 0.9
        for m in (None, mask):
            y = kernels.decode_attention(q, k, v, m)
            m, causal = kernels._check_mask(m)
            reference = kernels.decode_attention_reference(q, k, v, m, 64**-0.5, causal)
            assert not y.isnan().any()
            torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_keys_are_split_over_threads(level, threads):
    """Fewer heads than threads: parts of the keys are merged, also where one is padding altogether."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = torch.randn(1, 2, 2, 64) * 3, torch.randn(1, 2, 2000, 64), torch.randn(1, 2, 2000, 64)
        for mask in (None, torch.arange(2000)[None] >= 1500, torch.zeros(1, 2000, dtype=torch.bool)):
            assert_close(kernels.decode_attention(q, k, v, mask), attention(q, k, v, mask), torch.float32)
            for bits in (8, 4):
                stored = store(k, bits) + store(v, bits)
                expected = attention(q, restored(stored[:2], 64), restored(stored[2:], 64), mask)
                assert_close(kernels.quantized_decode_attention(q, *stored, mask), expected, torch.float32)
    finally:
        torch.set_num_threads(before)


def test_large_scores_and_infinities_do_not_overflow(level):
    q = torch.full((1, 1, 1, 32), 100.0)
    k = torch.linspace(-3, 3, 70)[:, None].expand(70, 32)[None, None].contiguous() * 100
    v = torch.randn(1, 1, 70, 32)
    torch.testing.assert_close(kernels.decode_attention(q, k, v)[0, 0, 0], v[0, 0, -1])


@pytest.mark.parametrize("mask", [torch.ones(1, 4), torch.ones(4, dtype=torch.bool), torch.zeros(1, 1, 1, 4)])
def test_other_masks_are_refused(mask):
    q = k = torch.randn(1, 1, 4, 32)
    with pytest.raises(ValueError, match="mask must be boolean"):
        kernels.decode_attention(q[:, :, :1], k, k, mask)


def test_attention_can_be_differentiated():
    q, k = torch.randn(1, 2, 1, 16, requires_grad=True), torch.randn(1, 2, 5, 16)
    kernels.decode_attention(q, k, k).sum().backward()
    assert q.grad.abs().sum() > 0


# --- Quantised keys and values -----------------------------------------------------------------------------------


def empty_store(B, nh, capacity, hd, bits):
    return [torch.full((B, nh, capacity, n), 255, dtype=torch.uint8) for n in kernels.quantized_sizes(hd, bits)]


def store(x, bits, extra=3):
    """x quantised into a longer storage; codes and parameters of its tokens."""
    codes, params = empty_store(*x.shape[:2], x.shape[2] + extra, x.shape[3], bits)
    kernels.quantize_append(codes, params, x, 0)
    return [codes[:, :, : x.shape[2]], params[:, :, : x.shape[2]]]


def restored(stored, hd):
    return kernels.rotate(kernels.dequantize(*stored, hd))


HEADS = [(8, 32), (8, 40), (8, 80), (8, 96), (8, 128), (8, 256), (4, 16), (4, 32), (4, 64), (4, 80), (4, 128), (4, 256)]


def test_rotation_is_the_walsh_hadamard_transform():
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(3, 80)
    expected = (x.view(3, 5, 16) @ matrix / 4).flatten(1)
    torch.testing.assert_close(kernels.rotate(x), expected)
    torch.testing.assert_close(kernels.rotate(kernels.rotate(x)), x)


@pytest.mark.parametrize(("bits", "hd"), HEADS)
def test_codes_are_those_of_the_reference(level, bits, hd):
    """Bit for bit, also where a row is zero, constant, huge or tiny, and nothing else is written."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, hd).transpose(1, 2)  # (B, nh, T, hd)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2], x[0, 0, 3] = 0, 3.7, x[0, 0, 2] * 1e30, x[0, 0, 3] * 1e-30
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = empty_store(2, 3, 12, hd, bits), empty_store(2, 3, 12, hd, bits)
        kernels.quantize_append(*ours, x.to(dtype), 4)
        kernels.quantize_append_reference(*theirs, x.to(dtype), 4)
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)
            assert (a[:, :, :4] == 255).all()
            assert (a[:, :, 11:] == 255).all()
    assert torch.equal(restored(theirs, hd)[0, 0, 4], torch.zeros(hd))


@pytest.mark.parametrize(("bits", "hd"), HEADS)
def test_quantised_attention_agrees_with_its_reference(level, bits, hd):
    torch.manual_seed(0)
    for B, nh, T, S, mask in ((1, 2, 1, 1, None), (2, 3, 1, 130, "keys"), (1, 1, 5, 67, "all"), (2, 1, 3, 70, None)):
        q, k, v = torch.randn(B, nh, T, hd), torch.randn(B, nh, S, hd), torch.randn(B, nh, S, hd)
        mask = random_mask({"B": B, "nh": nh, "T": T, "S": S, "mask": mask})
        stored = store(k, bits) + store(v, bits)
        y = kernels.quantized_decode_attention(q, *stored, mask)
        expected = attention(q, restored(stored[:2], hd), restored(stored[2:], hd), mask)
        assert_close(y, expected, torch.float32)
        mask, causal = kernels._check_mask(mask)
        reference = kernels.quantized_decode_attention_reference(q, *stored, mask, hd**-0.5, causal)
        assert_close(reference, expected, torch.float32)
        half = kernels.quantized_decode_attention(q.bfloat16(), *stored, mask if not causal else None)
        assert half.dtype == torch.bfloat16


def test_quantised_attention_over_nothing(level):
    for bits, S in itertools.product((8, 4), (0, 1)):
        stored = store(torch.randn(1, 2, S, 64), bits) * 2
        y = kernels.quantized_decode_attention(torch.randn(1, 2, 1, 64), *stored, torch.zeros(1, S, dtype=torch.bool))
        assert y.shape == (1, 1, 2, 64)
        assert not y.any()


def test_quantised_attention_over_a_long_cache(native):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 1, 128), torch.randn(1, 2, 5000, 128), torch.randn(1, 2, 5000, 128)
    for bits in (8, 4):
        stored = store(k, bits) + store(v, bits)
        reference = kernels.quantized_decode_attention_reference(q, *stored, None, 128**-0.5, True)
        torch.testing.assert_close(kernels.quantized_decode_attention(q, *stored), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("bits", "memory", "error"), [(8, 0.53, 0.01), (4, 0.30, 0.08)])
def test_memory_and_error_of_quantisation(native, bits, memory, error):
    """Of a token at head size 128 relative to bfloat16; of the output relative to float64 on random data."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 8, 8, 128), torch.randn(1, 8, 1000, 128), torch.randn(1, 8, 1000, 128)
    stored = store(k, bits, extra=0) + store(v, bits, extra=0)
    assert sum(t.nbytes for t in stored) <= memory * 2 * (k.nbytes + v.nbytes) / 4
    expected = attention(q, k, v)
    y = kernels.quantized_decode_attention(q, *stored)
    assert (y.double() - expected).norm() <= error * expected.norm()


def test_a_few_large_channels_do_not_spoil_the_others(native):
    """As the keys of real models have them: what the rotation is for."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 8, 128), torch.randn(1, 4, 500, 128), torch.randn(1, 4, 500, 128)
    k[..., [3, 40, 77]] *= 6
    q[..., [3, 40, 77]] *= 0.3
    expected = attention(q, k, v)
    y = kernels.quantized_decode_attention(q, *store(k, 4), *store(v, 4))
    assert (y.double() - expected).norm() <= 0.1 * expected.norm()


def test_what_does_not_fit_a_store_is_refused():
    codes, params = empty_store(1, 1, 4, 64, 8)
    x = torch.randn(1, 1, 3, 64)
    with pytest.raises(ValueError, match="at position 2 don't fit a store of 4"):
        kernels.quantize_append(codes, params, x, 2)
    with pytest.raises(ValueError, match="don't fit a head of 32"):
        kernels.quantize_append(codes, params, x[..., :32], 0)
    with pytest.raises(ValueError, match="don't fit a head of 64"):
        kernels.quantized_decode_attention(x, codes, params[..., :2], codes, params)
    with pytest.raises(ValueError, match="bits=3"):
        kernels.quantized_sizes(64, 3)
    with pytest.raises(ValueError, match="multiple of 16 channels, found 40"):
        kernels.quantized_sizes(40, 4)


# --- Norm and rotary embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(level, dtype):
    torch.manual_seed(0)
    for shape in ((1, 1, 64), (3, 5, 77), (40, 128), (0, 16), (5,)):
        x, weight = torch.randn(shape, dtype=dtype) * 2e-3, torch.randn(shape[-1], dtype=dtype)  # so that eps counts
        normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = kernels.rms_norm(x, weight, 1e-6)
        unit = 2**-7 if dtype == torch.bfloat16 else 1e-6
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), normed * weight.double(), rtol=unit, atol=1e-30)
        reference = kernels.rms_norm_reference(x, weight, 1e-6)
        torch.testing.assert_close(y, reference, rtol=unit, atol=1e-30)


def test_the_norm_can_be_differentiated():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    expected = torch.autograd.grad(y.square().sum(), (x, weight))
    found = torch.autograd.grad(kernels.rms_norm(x, weight, 1e-6).square().sum(), (x, weight))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [80, 72, 20])
def test_rotary(level, dtype, rotated):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 4, 80, dtype=dtype).transpose(1, 2)
    angles = torch.rand(2, 1, 7, rotated // 2) * 100
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.complex(*x[..., :rotated].double().chunk(2, -1)) * torch.polar(
        torch.ones(()).double(), angles.double()
    )
    expected = torch.cat((pairs.real, pairs.imag, x[..., rotated:].double()), -1)
    assert_close(kernels.rotary(x, cos, sin), expected, dtype)
    assert_close(kernels.rotary_reference(x, cos, sin), expected, dtype)
    one = kernels.rotary(x, cos[:1], sin[:1])  # the same angles for every sequence
    assert torch.equal(one[:1], kernels.rotary(x[:1], cos[:1], sin[:1]))
    assert_close(one, kernels.rotary_reference(x, cos[:1], sin[:1]).double(), dtype)


# --- Threads -----------------------------------------------------------------------------------------------------


def in_pieces():
    """A function for each operation, of sizes that are handed out in several pieces; it returns what was computed."""
    torch.manual_seed(0)
    x = torch.randn(3, 1000).bfloat16()
    weight, bias = torch.randn(2001, 1000).bfloat16(), torch.randn(2001)
    int8, scale = torch.randint(-128, 128, (2001, 1000), dtype=torch.int8), torch.rand(2001)
    packed = [torch.randint(-(2**31), 2**31, size, dtype=torch.int32) for size in ((64, 2048), (4, 256))]
    packed.append(torch.rand(4, 2048).half())
    # Handed out in pieces of 256, 128 or 64 outputs: of 264 by 2, by 3 and by 5 threads.
    narrow = [torch.randint(-(2**31), 2**31, size, dtype=torch.int32) for size in ((256, 264), (16, 33))]
    narrow.append(torch.rand(16, 264).half())
    wide_x, order = torch.randn(3, 2048).bfloat16(), (torch.arange(2048) // 128)[torch.randperm(2048)].int()
    q, k, v = (torch.randn(2, 4, n, 64).bfloat16() for n in (2, 1500, 1500))
    norm, angles = torch.randn(64).bfloat16(), torch.rand(1, 1, 1500, 32)

    def append(bits):
        return torch.cat(store(k, bits), -1)

    functions = {
        "linear": lambda: kernels.linear(x, weight, bias),
        "linear, one row": lambda: kernels.linear(x[:1], weight, bias),
        "linear, int8": lambda: kernels.linear(x, int8, bias, scale),
        "linear, int8 in whole numbers": lambda: kernels.linear(x[:, :896], int8[:, :896], bias, scale),
        "linear, int8 in whole numbers, one row": lambda: kernels.linear(x[:1, :896], int8[:, :896], bias, scale),
        "gptq": lambda: kernels.gptq_linear(x[:, :512], *packed, None, 4, 128, 1),
        "gptq, of few outputs": lambda: kernels.gptq_linear(wide_x, *narrow, None, 4, 128, 1),
        "gptq, of few outputs, one row": lambda: kernels.gptq_linear(wide_x[:1].float(), *narrow, None, 4, 128, 1),
        "gptq, of few outputs, in any order": lambda: kernels.gptq_linear(wide_x, *narrow, order, 4, 128, 1),
        "linear, int8, a prompt": lambda: kernels.linear(torch.eye(1000).bfloat16(), int8, bias, scale),
        "gptq, a prompt": lambda: kernels.gptq_linear(torch.eye(512).bfloat16(), *packed, None, 4, 128, 1),
        "gptq, 20 rows": lambda: kernels.gptq_linear(x.repeat(7, 1)[:20, :512], *packed, None, 4, 128, 1),
        "gptq, dequantised": lambda: kernels.gptq_dequantize(*packed, None, 4, 128, 1, torch.float32),
        "attention": lambda: kernels.decode_attention(q, k, v),
        "norm": lambda: kernels.rms_norm(k, norm, 1e-6),
        "rotary": lambda: kernels.rotary(k, angles.cos(), angles.sin()),
        "block": functools.partial(operators.decode_blocks, *block_inputs(torch.bfloat16, T=3)),
    }
    for bits in (8, 4):
        stored = store(k, bits) + store(v, bits)
        functions[f"append, {bits} bits"] = functools.partial(append, bits)
        functions[f"attention, {bits} bits"] = functools.partial(kernels.quantized_decode_attention, q, *stored)
    return functions


@pytest.fixture
def threads():
    """torch.set_num_threads, for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_are_the_same_bits_whatever_the_number_of_threads(level, threads):
    functions = in_pieces()
    threads(1)
    alone = {name: function() for name, function in functions.items()}
    for number in (2, 3, 5):
        threads(number)
        for name, function in functions.items():
            for _ in range(5):
                assert torch.equal(function(), alone[name]), (name, number)


def test_python_threads_compute_at_once(native, threads):
    """Each has a team of its own; none waits for another forever."""
    functions = in_pieces()
    threads(1)
    alone = {name: function() for name, function in functions.items()}
    wrong = []

    def compute(seed):
        torch.set_num_threads(2)
        names = list(functions) * 10
        random.Random(seed).shuffle(names)
        wrong.extend(name for name in names if not torch.equal(functions[name](), alone[name]))

    at_once = [threading.Thread(target=compute, args=(seed,), daemon=True) for seed in range(4)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join(120)
    assert not any(thread.is_alive() for thread in at_once)
    assert wrong == []


FORK = """
import importlib, os, signal, sys, types
import torch
package = types.ModuleType("qwen")
package.__path__ = [sys.argv[1]]
sys.modules["qwen"] = package
kernels = importlib.import_module("qwen.qwen_ops")
torch.set_num_threads(3)
x, weight = torch.randn(1, 1000).bfloat16(), torch.randn(2000, 1000).bfloat16()
expected = kernels.linear(x, weight)
child = os.fork()
if child == 0:
    signal.alarm(300)  # what hangs is ended
    os._exit(0 if torch.equal(kernels.linear(x, weight), expected) else 1)
failed = os.waitpid(child, 0)[1] != 0
sys.exit(failed or not torch.equal(kernels.linear(x, weight), expected))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(native):
    done = subprocess.run([sys.executable, "-c", FORK, str(ROOT)], timeout=600)
    assert done.returncode == 0


# --- Operators ---------------------------------------------------------------------------------------------------


def operator_inputs():
    q, k, v = (torch.randn(2, 3, n, 32) for n in (2, 40, 40))
    codes, params = empty_store(2, 3, 45, 32, 4)
    stored = store(k, 8) + store(v, 8)
    x = torch.randn(2, 1, 20).bfloat16()
    angles = torch.rand(1, 1, 40, 16)
    packed = [torch.randint(-9, 9, size, dtype=torch.int32) for size in ((4, 8), (2, 1))] + [torch.rand(2, 8).half()]
    return {
        "linear": (x, torch.randn(5, 20).bfloat16(), torch.randn(5), None),
        "decode_attention": (q, k, v, torch.rand(2, 1, 2, 40) < 0.5, 0.2, False),
        "quantize_append": (codes, params, k, 5),
        "quantized_decode_attention": (q, *stored, None, 0.2, True),
        "rms_norm": (x, torch.randn(20).bfloat16(), 1e-6),
        "rotary": (k, angles.cos(), angles.sin()),
        "decode_blocks": block_inputs(torch.bfloat16, bits=8),
        "gptq_linear": (x.repeat(1, 1, 2)[..., :32], *packed, None, 4, 16, 1, None),
        "gptq_dequantize": (*packed, None, 4, 16, 1, torch.float32),
    }


@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="needs torch.library.opcheck, torch 2.4")
@pytest.mark.parametrize("name", list(operator_inputs()) if COMPILER else [])
def test_opcheck(native, name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "decode_blocks" or TORCH >= (2, 6):  # 2.4 functionalises no operator that writes to a list
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(operators, name).default, operator_inputs()[name], test_utils=checks)


def decode_step(x, weight, norm, cos, sin, k, v, stores):
    q = kernels.linear(kernels.rms_norm(x, norm, 1e-6), weight).view(x.shape[0], 1, 2, 32).transpose(1, 2)
    q = kernels.rotary(q, cos, sin)
    kernels.quantize_append(*stores, q, 6)
    y = kernels.decode_attention(q, k, v)
    return y + kernels.quantized_decode_attention(q, *(t[:, :, :7] for t in stores * 2))


def decode_inputs():
    torch.manual_seed(0)
    return (
        torch.randn(2, 1, 64).bfloat16(),
        torch.randn(64, 64).bfloat16(),
        torch.randn(64).bfloat16(),
        *(torch.rand(1, 1, 1, 16) for _ in range(2)),
        *(torch.randn(2, 2, 10, 32).bfloat16() for _ in range(2)),
        [torch.zeros(2, 2, 8, n, dtype=torch.uint8) for n in kernels.quantized_sizes(32, 4)],
    )


def test_compiles_without_graph_breaks(native):
    expected_inputs, inputs = decode_inputs(), decode_inputs()
    with torch.no_grad():
        expected = decode_step(*expected_inputs)
        y = torch.compile(decode_step, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(y, expected)
    for a, b in zip(inputs[-1], expected_inputs[-1]):
        assert torch.equal(a, b)


def test_exports(native, monkeypatch):
    if TORCH < (2, 6):
        pytest.skip("needs torch 2.6: 2.4 exports no operator that only writes")

    class Step(torch.nn.Module):
        def forward(self, *inputs):
            return decode_step(*inputs)

    with torch.no_grad():
        program = torch.export.export(Step(), decode_inputs())
        called = {str(node.target).split(".")[1] for node in program.graph.nodes if "qwen_" in str(node.target)}
        expected = set(operator_inputs()) - {"decode_blocks", "gptq_linear", "gptq_dequantize"}
        if not inspect.signature(torch.export.export).parameters["strict"].default:
            # From torch 2.7 on layers are exported as PyTorch has them. One rounding less, and int4 takes another code.
            expected -= {"linear", "rms_norm", "rotary"}
            for name in ("linear", "rotary"):
                monkeypatch.setattr(kernels, name, getattr(kernels, f"{name}_reference"))
            monkeypatch.setattr(kernels, "rms_norm", lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps))
        assert called == expected
        torch.testing.assert_close(program.module()(*decode_inputs()), decode_step(*decode_inputs()))


# --- Building ----------------------------------------------------------------------------------------------------

# A source that compiles fast and registers no kernel: the references run, `cpu_level` tells which source it is. Stable
# headers of PyTorch take a second to compile, torch/library.h seven; 2.13 is the first that was tried.
SMALL = """
#include <string>
static std::string cpu_level(std::string) { return "WHICH"; }
"""
if TORCH >= (2, 13):
    SMALL += """
#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY_FRAGMENT(QWEN_NAMESPACE, m) { m.def("cpu_level(str name) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(QWEN_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&cpu_level)); }
"""
else:
    SMALL += """
#include <torch/library.h>
TORCH_LIBRARY_FRAGMENT(QWEN_NAMESPACE, m) { m.def("cpu_level(str name) -> str", &cpu_level); }
"""


def write_version(folder, source):
    """cpp_kernels.py as if written for this source, its first part, in a folder with it; a namespace of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    source = f"#if QWEN_PART == 0\n{source}\n#endif\n"
    pin = hashlib.sha256(source.encode()).hexdigest()
    code = (ROOT / "cpp_kernels.py").read_text(encoding="utf-8").replace(building.SOURCE_SHA256, pin)
    (folder / "cpp_kernels.py").write_text(code, encoding="utf-8")
    for name in ("qwen_ops.py", "transformers_compat.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "cpp_kernels.cpp").write_text(source)
    return folder


COMPILING = "Compiling the CPU kernels, once on this machine: half a minute to two minutes."


class Version:
    """Such a module, the operations on top of it, and what it logs."""

    def __init__(self, folder, source):
        package = types.ModuleType(f"kernels_{folder.name}_{folder.parent.name}")
        package.__path__ = [str(write_version(folder, source))]
        sys.modules[package.__name__] = package
        self.module = importlib.import_module(f"{package.__name__}.cpp_kernels")
        self.operations = importlib.import_module(f"{package.__name__}.qwen_ops")
        self.records = []
        handler = logging.Handler()
        handler.emit = self.records.append
        self.module.logger.addHandler(handler)
        self.module.logger.setLevel(logging.INFO)

    def warnings(self, said=""):
        """Warnings with these words; without any, all but the line that says that compiling begins."""
        found = [record.getMessage() for record in self.records if record.levelno >= logging.WARNING]
        return [text for text in found if (said in text if said else COMPILING not in text)]

    def answers_right(self):
        """Two calls, so that something said twice would show."""
        x, weight = torch.randn(2, 8).bfloat16(), torch.randn(3, 8).bfloat16()
        for _ in range(2):
            torch.testing.assert_close(self.operations.linear(x, weight), F.linear(x, weight))
        stored = [torch.zeros(1, 1, 4, n, dtype=torch.uint8) for n in self.operations.quantized_sizes(32, 8)]
        k = torch.randn(1, 1, 4, 32)
        self.operations.quantize_append(*stored, k, 0)
        y = self.operations.quantized_decode_attention(k[:, :, :1], *stored, *stored)
        torch.testing.assert_close(y, self.operations.decode_attention(k[:, :, :1], k, k), rtol=0.05, atol=0.05)
        return True


@pytest.fixture
def make_version(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("QWEN_NATIVE_KERNELS", raising=False)
    numbers = itertools.count()

    def make(source=SMALL):
        number = next(numbers)
        return Version(tmp_path / f"version{number}", f"{source}\n// {tmp_path} {number}\n")

    return make


@pytest.fixture
def quick_compiler(tmp_path, monkeypatch):
    """A compiler that writes a word where the library belongs; for tests that don't load it."""
    script = tmp_path / "quick"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo quick && exit\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done; true\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


@pytest.mark.skipif(os.name != "posix", reason="needs owners and modes of files")
@pytest.mark.parametrize("how", ["file", "folder", "above", "owner of the file", "owner of the folder"])
def test_a_library_that_others_can_change_is_not_taken(make_version, quick_compiler, tmp_path, monkeypatch, how):
    if how.startswith("owner") and os.getuid() != 0:
        pytest.skip("only root can give a file to another user")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    version = make_version()
    own = version.module._library()
    assert own.read_text() == "built\n"
    own.write_text("planted")
    assert version.module._library().read_text() == "planted"  # by the user, who may
    changed = {"file": own, "folder": own.parent, "above": own.parent.parent}.get(how.split()[-1])
    if how.startswith("owner"):
        os.chown(changed, 12345, 12345)
    else:
        changed.chmod(changed.stat().st_mode | 0o002)
    took = version.module._library()
    assert took.read_text() == "built\n"
    if changed == own:  # the folder is ours: a new one takes the place of the other
        assert took == own
        assert version.warnings() == []
    else:
        assert took.parent == tmp_path / "home" / ".cache" / "torch_extensions" / own.parent.name
        (warning,) = version.warnings()
        assert f"Other users can change {changed} (owner {changed.stat().st_uid}, mode" in warning
        assert str(took.parent) in warning
    assert version.module._who_else_writes(took) is None
    assert took.stat().st_uid == os.getuid()

    took.write_text("planted")
    took.chmod(0o777)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    with pytest.raises(version.module._Unavailable, match=r"There is no C\+\+ compiler"):
        version.module._library()


@needs_compiler
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_there_is_one_standard_library_in_a_process(make_version, monkeypatch):
    """Also where the compiler would take a static one: what writes a message has to be what PyTorch writes with."""
    if b"clang" in subprocess.run([COMPILER, "--version"], stdout=subprocess.PIPE).stdout:
        pytest.skip("needs g++")
    monkeypatch.setenv("CXX", f"{COMPILER} -static-libstdc++")
    version = make_version(
        SMALL + "#include <sstream>\nstd::string text(long n) { std::ostringstream s; s << n; return s.str(); }\n"
    )
    symbols = subprocess.run(["nm", "-DC", str(version.module._library())], stdout=subprocess.PIPE, text=True).stdout
    defined = [line for line in symbols.splitlines() if re.search(r" [TDBVui] std::(codecvt|locale|num_put)", line)]
    assert "std::" in symbols
    assert defined == []


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_what_another_user_planted_is_not_run(make_version, tmp_path):
    version = make_version()
    library, mark = version.module._library(), tmp_path / "run"
    source = tmp_path / "planted.cpp"
    source.write_text(f'#include <cstdio>\nstruct A {{ A() {{ std::fclose(std::fopen("{mark}", "w")); }} }} a;\n')
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"], check=True)
    mark.unlink()  # it does run where it is loaded
    library.chmod(0o777)
    assert version.answers_right()
    assert version.module.kernels_in_use()["library"] == library
    assert not mark.exists()


def test_a_link_that_others_can_turn_is_not_followed_twice(make_version, quick_compiler, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "link").symlink_to(tmp_path / "own")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "open" / "link"))
    version = make_version()
    assert version.module._library().parent == tmp_path / "own" / version.module.NAMESPACE
    assert version.warnings() == []


def test_what_is_built_is_for_its_user_alone_whatever_the_umask(make_version, quick_compiler):
    version, old = make_version(), os.umask(0)
    try:
        library = version.module._library()
    finally:
        os.umask(old)
    assert version.module._who_else_writes(library) is None
    assert version.module._library() == library


def test_without_any_private_place(make_version, tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    version = make_version()
    monkeypatch.setenv("HOME", str(tmp_path / "open" / "home"))
    monkeypatch.setattr(version.module.tempfile, "gettempdir", lambda: str(tmp_path / "open"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "open" / "ext"))
    assert version.answers_right()
    (warning,) = version.warnings()
    assert "Set TORCH_EXTENSIONS_DIR to a folder of your own" in warning


def test_a_group_that_is_the_users_own_may_write(make_version, tmp_path):
    version = make_version()
    if not version.module._is_own_group(os.getgid()):
        pytest.skip("this user has no group of its own")
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o775)
    assert version.module._who_else_writes(folder) is None
    folder.chmod(0o777)
    assert "mode 777" in version.module._who_else_writes(folder / "not there")
    folder.chmod(0o1777)
    assert version.module._who_else_writes(folder / "not there") is None
    if os.getuid() == 0:
        folder.chmod(0o775)
        os.chown(folder, 0, 12345)
        assert "mode 775" in version.module._who_else_writes(folder)


def test_the_pin_is_that_of_the_source():
    found = hashlib.sha256((ROOT / "cpp_kernels.cpp").read_bytes()).hexdigest()
    assert found == building.SOURCE_SHA256, "renew it: python tools/build_kernels.py --pin"


def test_importing_does_nothing(make_version, tmp_path):
    version = make_version()
    assert version.module._state.loaded is None
    assert not (tmp_path / "cache").exists()
    assert not version.records


@needs_compiler
def test_builds_once_and_says_so_before(make_version, tmp_path):
    version = make_version(SMALL.replace("WHICH", "first"))
    assert version.answers_right()
    assert version.records[0].getMessage() == COMPILING
    assert version.warnings(said=COMPILING) == [COMPILING]
    assert not version.warnings()
    assert version.module.kernels_in_use()["instructions"] == "first"
    assert version.module.kernels_in_use()["reason"] is None
    built = version.module._library()
    assert [path.suffix for path in sorted(built.parent.iterdir())] == [".lock", ".so"]
    modified = built.stat().st_mtime_ns
    assert version.module._library() == built
    assert built.stat().st_mtime_ns == modified
    assert version.warnings(said=COMPILING) == [COMPILING]


@needs_compiler
def test_a_changed_source_is_built_anew_and_both_live(make_version):
    old = make_version(SMALL.replace("WHICH", "old"))
    assert old.module.kernels_in_use()["instructions"] == "old"
    new = make_version(SMALL.replace("WHICH", "new"))
    assert new.module.kernels_in_use()["instructions"] == "new"
    assert old.module.kernels_in_use()["instructions"] == "old"
    assert new.answers_right()


@needs_compiler
def test_what_was_built_is_used_where_there_is_no_compiler(make_version, monkeypatch):
    version = make_version()
    built = version.module._library()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert version.module._library() == built


@needs_operators
@pytest.mark.parametrize(
    ("says", "is_gnu"),
    [("Apple clang version 17.0.0 (clang-1700.0.13.3)", False), ("g++ (Debian 12.2.0-14) 12.2.0", True)],
)
def test_the_commands(make_version, tmp_path, monkeypatch, says, is_gnu):
    """On macOS g++ is clang too: its OpenMP is not PyTorch's, and it takes fewer options than GNU's compiler does."""
    script, commands = tmp_path / "compiler", tmp_path / "commands"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "{says}" && exit\necho "$@" >> {commands}\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done; true\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: OpenMP")
    version = make_version()
    version.module._library()
    *compiled, linked = (
        [word for word in line.split() if word[0] == "-"] for line in commands.read_text().splitlines()
    )
    parts = [word for words in compiled for word in words if word.startswith("-DQWEN_PART=")]
    assert sorted(parts) == [f"-DQWEN_PART={part}" for part in range(4)]
    both = ["-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w", "-c", "-o"]
    for words in compiled:
        assert ("-fopenmp" in words) == is_gnu
        rest = [word for word in words if word[:2] not in ("-I", "-D") and word != "-fopenmp" and word not in both]
        assert rest in (["-std=c++17"], ["-std=c++20"])
    assert [word for word in linked if word[:2] != "-L"] == ["-shared", "-o", "-ltorch_cpu", "-lc10"]


@needs_operators
def test_without_a_compiler(make_version, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    version = make_version()
    assert version.answers_right()
    (warning,) = version.warnings()
    assert not version.warnings(said=COMPILING)
    assert "no C++ compiler" in warning
    assert "Install g++" in warning
    assert version.module.kernels_in_use()["native"] is False
    assert "no C++ compiler" in version.module.kernels_in_use()["reason"]


@needs_compiler
def test_without_setuptools(make_version, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    version = make_version()
    assert version.answers_right()
    (warning,) = version.warnings()
    assert "pip install setuptools" in warning


@needs_operators
def test_without_a_home(make_version, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    version = make_version()
    monkeypatch.setattr(version.module.Path, "home", home)
    assert version.answers_right()
    (warning,) = version.warnings()
    assert "Set TORCH_EXTENSIONS_DIR" in warning


@needs_compiler
def test_a_library_that_cannot_be_loaded(make_version):
    version = make_version()
    library = version.module._library()
    library.write_bytes(b"not a library")
    assert version.answers_right()
    (warning,) = version.warnings()
    assert f"{library} can't be loaded" in warning
    assert "Delete it" in warning


@needs_operators
def test_a_compiler_that_does_not_answer_is_not_waited_for(make_version, monkeypatch):
    def hangs(command, timeout=600, **pipes):
        assert timeout <= 60
        raise subprocess.TimeoutExpired(command, timeout)

    version = make_version()
    monkeypatch.setenv("CXX", "hangs")
    monkeypatch.setattr(version.module.subprocess, "run", hangs)
    assert version.answers_right()
    (warning,) = version.warnings()
    assert "hangs does not work (Command '['hangs', '--version']' timed out after 60 seconds)" in warning


@needs_operators
@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("no-such-compiler", "no C++ compiler: no-such-compiler does not work ([Errno 2]"),
        ("'my compiler", """CXX is "'my compiler" (No closing quotation)"""),
    ],
)
def test_with_a_compiler_that_is_not_there_or_cannot_be_read(make_version, monkeypatch, named, message):
    monkeypatch.setenv("CXX", named)
    version = make_version()
    assert version.answers_right()
    (warning,) = version.warnings()
    assert message in warning


@needs_compiler
def test_a_compile_error(make_version, tmp_path):
    version = make_version("#error these are not the kernels")
    assert version.answers_right()
    (warning,) = version.warnings()
    assert "these are not the kernels" in warning
    (log,) = tmp_path.glob("cache/*/*.log")
    assert str(log) in warning
    assert log.read_text().count("these are not the kernels") >= 1
    assert not list(tmp_path.glob("cache/*/*.building"))


@needs_compiler
@pytest.mark.parametrize("kind", ["no folder", "read-only"])
def test_a_cache_that_cannot_be_written(make_version, tmp_path, monkeypatch, kind):
    place = tmp_path / "cache"
    if kind == "no folder":
        place.write_text("a file")
    else:
        place.mkdir(mode=0o500)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write everywhere")
    version = make_version()
    assert version.answers_right()
    (warning,) = version.warnings()
    assert str(place) in warning
    assert "TORCH_EXTENSIONS_DIR" in warning


@needs_compiler
def test_the_source_is_found_in_the_checkpoint(make_version, tmp_path, monkeypatch):
    """transformers copies cpp_kernels.py only; the model's loading says where the rest is."""
    version = make_version(SMALL.replace("WHICH", "found"))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    source = next(tmp_path.glob("version*/cpp_kernels.cpp"))
    source.rename(checkpoint / "cpp_kernels.cpp")
    assert version.answers_right()
    (warning,) = version.warnings()
    assert "cpp_kernels.cpp is not in" in warning
    version.module.set_source_folder(tmp_path)  # not there either
    assert version.answers_right()
    assert version.warnings() == [warning]
    monkeypatch.chdir(tmp_path)
    version.module.set_source_folder(checkpoint.name)
    monkeypatch.chdir("/")  # a path stands for the folder that it named
    assert version.module.kernels_in_use()["instructions"] == "found"


@needs_compiler
def test_a_source_that_was_tampered_with_is_not_compiled(make_version, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path)))
    version = make_version()
    source = next(tmp_path.glob("version*/cpp_kernels.cpp"))
    source.write_text(source.read_text() + "// more\n")
    assert version.answers_right()
    (warning,) = version.warnings()
    assert "belongs to another version" in warning
    assert not (tmp_path / "compiled").exists()


@needs_operators
def test_documentation_decides_nothing(make_version, monkeypatch):
    """`python -OO` leaves it out."""
    monkeypatch.setattr(torch.library.Library, "__doc__", None)
    assert make_version().module.library() is not None


def test_an_old_torch_runs_the_references(make_version, monkeypatch):
    class Library:
        def __init__(self, namespace, kind):
            raise ValueError("Unsupported kind: ", kind)

    monkeypatch.setattr(torch.library, "Library", Library)
    version = make_version()
    assert version.module._state.library is None
    assert version.answers_right()
    assert not version.warnings()
    assert "need PyTorch 2.1 or newer" in version.module.kernels_in_use()["reason"]


@needs_operators
def test_switched_off(make_version, monkeypatch):
    monkeypatch.setenv("QWEN_NATIVE_KERNELS", "0")
    version = make_version()
    assert version.answers_right()
    assert not version.warnings()
    assert len(version.records) == 1
    assert "QWEN_NATIVE_KERNELS=0" in version.module.kernels_in_use()["reason"]


def counting_compiler(folder, before=""):
    """A compiler that writes down each time it compiles."""
    script = folder / "compiler"
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo compiling >> {folder}/compiled; {before} ;; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    script.chmod(0o755)
    return script


@pytest.mark.skipif(os.name != "posix", reason="native kernels are for Linux and macOS")
def test_behind_a_compiler_that_is_ended_no_other_is_started(make_version, tmp_path, monkeypatch):
    """Ctrl-C ends those that run; the next would be waited for."""
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path, "kill -TERM $$")))  # a job in the background gets no INT
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    module = make_version().module
    with pytest.raises(module._Unavailable, match="can't compile them"):
        module._library()
    assert (tmp_path / "compiled").read_text() == "compiling\n"


BUILD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("kernels", sys.argv[1] + "/cpp_kernels.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.kernels_in_use())
"""


def build_elsewhere(folder, command=(sys.executable,), **environment):
    """Build in a process of its own, which leads a group of processes."""
    return subprocess.Popen(
        [*command, "-c", textwrap.dedent(BUILD), str(folder)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@needs_compiler
def test_two_processes_build_once(make_version, tmp_path):
    folder = write_version(tmp_path / "version", SMALL + f"// {tmp_path}\n")
    compiler = str(counting_compiler(tmp_path))
    said = []
    for process in [build_elsewhere(folder, python(), CXX=compiler) for _ in range(2)]:
        output, _ = process.communicate(timeout=600)
        assert "'native': True" in output
        assert "not in use" not in output
        said.append(output.count(COMPILING))  # at the default verbosity
    assert sorted(said) == [0, 1]
    assert (tmp_path / "compiled").read_text() == "compiling\n" * building.PARTS


@needs_compiler
def test_a_builder_that_was_killed_does_not_block_the_next(make_version, tmp_path, monkeypatch):
    version = make_version(SMALL.replace("WHICH", "second"))
    folder = next(tmp_path.glob("version*"))
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path, before=f"[ -e {tmp_path}/again ] || sleep 600")))
    process = build_elsewhere(folder)
    deadline = time.monotonic() + 500
    while not (tmp_path / "compiled").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)
    assert len(list(tmp_path.glob("cache/*/*.lock"))) == 1
    assert len(list(tmp_path.glob("cache/*/*.building"))) == 1
    (tmp_path / "again").touch()
    assert version.module.kernels_in_use()["instructions"] == "second"
    assert not version.warnings()
    assert not list(tmp_path.glob("cache/*/*.building"))


# --- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """tools/build_kernels.py, which imports a second copy of the module, as transformers does for every checkpoint."""
    spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "tools" / "build_kernels.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(ROOT / "tools")
    spec.loader.exec_module(module)
    return module


def test_the_command_reports_what_runs(native, command, capsys):
    assert command.report() == 0
    printed = capsys.readouterr().out
    for name in operator_inputs():
        assert f"{name:28} native, {native}" in printed
    assert str(building.kernels_in_use()["library"]) in printed
    copy = command.load_module("cpp_kernels")
    assert copy is not building
    assert copy._state is building._state


def test_the_command_reports_why_not(command, capsys, monkeypatch):
    without = {"native": False, "reason": "There is no C++ compiler."}
    monkeypatch.setattr(command.load_module("cpp_kernels"), "kernels_in_use", lambda: without)
    assert command.report() == 1
    printed = capsys.readouterr().out
    assert printed.count("PyTorch\n") == len(operator_inputs())
    assert "why not native: There is no C++ compiler." in printed


def test_the_command_pins_a_changed_source(command, tmp_path, capsys):
    folder = write_version(tmp_path, SMALL)
    (folder / "cpp_kernels.cpp").write_text(SMALL + "// changed\n")
    found = command.pin(folder)
    assert found == hashlib.sha256((SMALL + "// changed\n").encode()).hexdigest()
    assert (folder / "cpp_kernels.py").read_text().count(f'SOURCE_SHA256 = "{found}"') == 1
