"""The kernels for GPUs against float64 and the references, on a GPU or in the interpreter of Triton."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from conftest import ROOT, in_large_programs
from conftest import TRITON_DEVICE as DEVICE
from test_cpp_kernels import attention, empty_store, in_storage, kernels, random_mask, restored, store
from test_quantization import SHAPES, random_matrix

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)
if kernels.library() is None:
    pytest.skip("needs torch 2.1", allow_module_level=True)
triton_attention, triton_kernels, triton_launch, triton_products = (
    importlib.import_module(f"qwen.triton_{name}") for name in ("attention", "kernels", "launch", "products")
)
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def few_large_programs(monkeypatch):
    if DEVICE == "cpu":
        in_large_programs(monkeypatch)


HEADS = [(bits, hd) for bits in (8, 4) for hd in triton_attention.GPU_HEAD_SIZES]
# B, nh, T, S, mask: keys shared out unevenly, more queries than keys in a block, padding, rows that see nothing
CASES = [
    (1, 2, 1, 1, None),
    (2, 3, 1, 130, "keys"),
    (1, 1, 5, 67, "all"),
    (2, 1, 3, 300, None),
    (2, 2, 2, 129, "broadcast"),
]


def on_device(*tensors):
    """Views keep their strides: storage moves whole."""
    return [t._base.to(DEVICE)[:, :, : t.shape[2]] if t._is_view() and t.dim() == 4 else t.to(DEVICE) for t in tensors]


def close(y, expected, share):
    """The error is at most this share of the largest number."""
    assert y.shape == expected.shape
    assert not y.isnan().any()
    error = (y.cpu().double() - expected).abs().max().item() if y.numel() else 0
    assert error <= share * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize(("bits", "hd"), HEADS)
def test_codes_are_those_of_the_reference(bits, hd):
    """Bit for bit, also where a row is zero, constant, huge or tiny, and nothing else is written."""
    torch.manual_seed(0)
    x = torch.randn(1, 7, 2, hd).transpose(1, 2)  # (B, nh, T, hd)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2], x[0, 0, 3] = 0, 3.7, x[0, 0, 2] * 1e30, x[0, 0, 3] * 1e-30
    for dtype, T in ((torch.float32, 7), (torch.bfloat16, 1)):
        ours, theirs = empty_store(1, 2, 12, hd, bits), empty_store(1, 2, 12, hd, bits)
        new = x[:, :, :T].to(dtype)
        ours = on_device(*ours)
        triton_attention.quantize_append(*ours, new.to(DEVICE), 4)
        kernels.quantize_append_reference(*theirs, new, 4)
        for a, b in zip(ours, theirs):
            assert torch.equal(a.cpu(), b)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "hd"), HEADS)
def test_quantised_attention(bits, hd):
    torch.manual_seed(0)
    # The interpreter is slow: of the wider heads it has the cases that differ most.
    for B, nh, T, S, kind in CASES if DEVICE == "cuda" or hd <= 64 else CASES[1:3]:
        q, k, v = torch.randn(B, nh, T, hd) * 2, torch.randn(B, nh, S, hd), torch.randn(B, nh, S, hd)
        mask = random_mask({"B": B, "nh": nh, "T": T, "S": S, "mask": kind})
        stored = store(k, bits) + store(v, bits)
        expected = attention(q, restored(stored[:2], hd), restored(stored[2:], hd), mask)
        on_gpu = on_device(*stored)
        mask, causal = kernels._check_mask(mask)
        mask = None if mask is None else mask.to(DEVICE)
        for dtype, share in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
            if dtype == torch.bfloat16 and DEVICE == "cpu" and hd != 64:  # the interpreter is slow
                continue
            query = q.to(dtype)
            y = triton_attention.quantized_decode_attention(query.to(DEVICE), *on_gpu, mask, hd**-0.5, causal)
            assert y.dtype == dtype
            close(y, expected if dtype == torch.float32 else attention_of(query, stored, mask, causal, hd), share)
            if mask is not None:
                assert not y[0].any()


def attention_of(q, stored, mask, causal, hd):
    mask = None if mask is None else mask.cpu()
    if causal and mask is not None:
        mask = mask[:, 0, 0]
    return attention(q, restored(stored[:2], hd), restored(stored[2:], hd), mask)


@pytest.mark.parametrize("hd", triton_attention.GPU_HEAD_SIZES)
def test_attention_over_floats(hd):
    torch.manual_seed(0)
    for B, nh, T, S, kind in CASES:
        q = torch.randn(B, T, nh, hd).transpose(1, 2) * 2
        mask = random_mask({"B": B, "nh": nh, "T": T, "S": S, "mask": kind})
        checked, causal = kernels._check_mask(mask)
        checked = None if checked is None else checked.to(DEVICE)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            k, v = (in_storage(torch.randn(B, nh, S, hd).to(dtype)) for _ in range(2))
            y = triton_attention.decode_attention(q.to(DEVICE), *on_device(k, v), checked, hd**-0.5, causal)
            close(y, attention(q, k, v, mask), 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_long_cache_is_shared_out(bits):
    """Several programs take parts of the keys; one part is padding altogether."""
    torch.manual_seed(0)
    S, hd = (5000, 128) if DEVICE == "cuda" else (900, 32)  # the interpreter is slow
    q, k, v = torch.randn(1, 2, 1, hd) * 2, torch.randn(1, 2, S, hd), torch.randn(1, 2, S, hd)
    stored = store(k, bits) + store(v, bits)
    for mask in (None, torch.arange(S)[None] >= 3 * S // 5, torch.zeros(1, S, dtype=torch.bool)):
        checked, causal = kernels._check_mask(mask)
        checked = None if checked is None else checked.to(DEVICE)
        y = triton_attention.quantized_decode_attention(q.to(DEVICE), *on_device(*stored), checked, hd**-0.5, causal)
        close(y, attention(q, restored(stored[:2], hd), restored(stored[2:], hd), mask), 1e-5)


@pytest.mark.parametrize("bits", [8, 4, 16])
def test_attention_over_nothing(bits):
    k = torch.randn(1, 2, 0, 64, device=DEVICE)
    q = torch.randn(1, 2, 1, 64, device=DEVICE)
    if bits == 16:
        y = triton_attention.decode_attention(q, k, k, None, 1.0, True)
    else:
        stored = on_device(*empty_store(1, 2, 0, 64, bits))
        y = triton_attention.quantized_decode_attention(q, *stored, *stored, None, 1.0, True)
    assert y.shape == (1, 1, 2, 64)
    assert not y.any()
    assert triton_attention.decode_attention(q[:0], k[:0], k[:0], None, 1.0, True).shape == (0, 1, 2, 64)


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 1, 32), 100.0)
    k = torch.linspace(-3, 3, 70)[:, None].expand(70, 32)[None, None].contiguous() * 100
    v = torch.randn(1, 1, 70, 32)
    y = triton_attention.decode_attention(*(t.to(DEVICE) for t in (q, k, v)), None, 32**-0.5, True)
    torch.testing.assert_close(y[0, 0, 0].cpu(), v[0, 0, -1])


def test_heads_of_other_sizes_run_the_reference():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 1, 80), torch.randn(1, 2, 9, 80), torch.randn(1, 2, 9, 80)
    stored = [t.to(DEVICE) for t in empty_store(1, 2, 9, 80, 8) + empty_store(1, 2, 9, 80, 8)]
    triton_attention.quantize_append(*stored[:2], k.to(DEVICE), 0)
    triton_attention.quantize_append(*stored[2:], v.to(DEVICE), 0)
    y = triton_attention.quantized_decode_attention(q.to(DEVICE), *stored, None, 80**-0.5, True)
    expected = attention(q, k, v)
    assert (y.cpu() - expected).norm() < 0.02 * expected.norm()


def test_kernels_that_do_not_run_are_not_taken(monkeypatch):
    """Where Triton can't compile, its error is the reason, and the references stay."""

    class Library:
        def impl(self, *args):
            raise AssertionError("registered")

    def broken(*args, **kwargs):
        raise OSError("no C compiler")

    monkeypatch.setattr(triton_kernels, "quantize_append", broken)
    with pytest.raises(RuntimeError, match="no C compiler"):
        triton_kernels.register(Library(), DEVICE)


# --- Matrices of GPTQ --------------------------------------------------------------------------------------------

# Several rounds and programs of small matrices; None: as they are launched
ONE_ROW = {"BN": 128, "SLOTS": 4, "num_warps": 1}
ROWS = {"BN": 128, "SHARES": 1, "num_warps": 2, "STAGES": 1, "programs": 2}
# shape, dtype, rows, launch
PRODUCTS = [
    (shape, dtype, *launch)
    for shape in SHAPES
    if shape not in ("groups that fill no integer", "any order", "any order, int8")
    for dtype, *launch in ((torch.float16, 1, ONE_ROW), (torch.float32, 1, None), (torch.float32, 3, ROWS))
]
PRODUCTS += [
    (shape, dtype, rows, None)
    for shape in ("whole tiles", "short groups", "int8")
    for dtype in (torch.float16, torch.bfloat16)
    for rows in ((1, 2, 4, 16) if dtype == torch.float16 else (1, 16))
]


def gptq(shape, seed=0):
    """A matrix as the operations take it, and what it stands for, float64 (in, out)."""
    inputs, outputs, kind = SHAPES[shape]
    parts, weight = random_matrix(inputs, outputs, **kind, seed=seed)
    tensors = [parts[name].to(DEVICE) for name in ("qweight", "qzeros", "scales")]
    g_idx = parts["g_idx"].to(DEVICE) if kind.get("desc_act") else None
    return (*tensors, g_idx, kind["bits"], kind.get("group_size", inputs), int(not kind.get("v2"))), weight.t()


def test_which_matrices_have_kernels():
    without = {name for name in SHAPES if not triton_products.takes_gptq(*gptq(name)[0])}
    assert without == {"groups that fill no integer", "any order", "any order, int8"}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype", "rows", "tuning"), PRODUCTS, ids=str)
def test_products_with_matrices_of_gptq(shape, dtype, rows, tuning):
    """With everything that a step asks for, against float64."""
    (matrix, weight), (gate, gate_weight) = gptq(shape), gptq(shape, seed=1)
    (K, N), generator = weight.shape, torch.Generator().manual_seed(0)
    x, residual, bias, gate_bias, norm = (
        torch.randn(size, generator=generator).to(dtype) for size in ((rows, K), (rows, N), (N,), (N,), (K,))
    )
    share = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1.2e-3}[dtype]
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        share *= 3  # the interpreter cuts digits off

    def near(found, expected):
        assert found.dtype == dtype
        assert (found.cpu().double() - expected).norm() <= share * expected.norm()

    def product(*tensors, **settings):
        settings = {name: s.to(DEVICE) if torch.is_tensor(s) else s for name, s in settings.items()}
        return triton_products.gptq_product(
            x.to(DEVICE), matrix, *(t.to(DEVICE) for t in tensors), **settings, tuning=tuning
        )

    exact = x.double() @ weight
    near(product(bias, residual=residual), exact + bias.double() + residual.double())
    gated = torch.nn.functional.silu(x.double() @ gate_weight + gate_bias.double())
    near(product(bias, gate=gate, gate_bias=gate_bias), (exact + bias.double()) * gated)
    if rows == 1:
        normed = x.double() / (x.double().pow(2).mean() + 1e-6).sqrt() * norm.double()
        near(product(norm=norm, eps=1e-6), normed @ weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_row_at_the_ends_of_its_numbers(bits):
    """The largest codes and inputs, whose sums are the largest; zeros; what is not finite; an address in between."""
    K, N, most = 128, 16, 2**bits - 1
    words = torch.full((K * bits // 32, N), -1, dtype=torch.int32)
    zeros = torch.zeros(1, N * bits // 32, dtype=torch.int32)
    scales = torch.full((1, N), 2.0**-10, dtype=torch.float16)
    matrix = (words.to(DEVICE), zeros.to(DEVICE), scales.to(DEVICE), None, bits, K, 0)

    def product(x):
        return triton_products.gptq_product(x[None].to(DEVICE), matrix)[0].cpu()

    for sign in (1, -1):
        x = torch.full((K,), sign * 2.0, dtype=torch.float16)
        assert torch.equal(product(x), torch.full((N,), sign * 2.0 * K * most * 2**-10, dtype=torch.float16))
    # Steps of 2^-7 and a large one: what remains of the others is known.
    x = torch.full((K,), 2.0**-7, dtype=torch.float16)
    x[5] = 127.0
    assert (product(x).double() - (127 + (K - 1) * 2**-7) * most * 2**-10).abs().max() <= 1.5e-3 * 127 * most * 2**-10
    assert torch.equal(product(torch.zeros(K, dtype=torch.float16)), torch.zeros(N, dtype=torch.float16))
    for wrong in (math.nan, math.inf, -math.inf):
        x = torch.ones(K, dtype=torch.bfloat16)
        x[77] = wrong
        assert not product(x).isfinite().any()
    x = torch.randn(K + 1, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)[1:]
    assert x.data_ptr() % 16
    assert torch.equal(product(x), product(x.clone()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantised_matrices_of_gptq(dtype, shape):
    """Equal, also of a block of outputs, which is a view."""
    matrix, _ = gptq(shape)
    found = triton_products.gptq_dequantize(*matrix, dtype)
    expected = kernels.gptq_dequantize_reference(*matrix, dtype)
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts digits off
        assert (found.double() - expected.double()).abs().max() <= 2.0**-7 * expected.abs().max()
        return
    assert torch.equal(found, expected)
    n = 32 // matrix[4]
    some = matrix[0][:, n : 3 * n], matrix[1][:, 1:3], matrix[2][:, n : 3 * n], *matrix[3:]
    assert torch.equal(triton_products.gptq_dequantize(*some, dtype), expected[:, n : 3 * n])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 2, 70])
def test_linear_with_matrices_of_gptq(shape, rows, monkeypatch):
    """Any matrix and any number of rows, by a kernel or by dequantising."""
    monkeypatch.setattr(kernels, "gptq_dequantize", triton_products.gptq_dequantize)
    matrix, weight = gptq(shape)
    x = torch.randn(rows, 2 * weight.shape[0], generator=torch.Generator().manual_seed(0))[:, ::2]
    bias = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1))
    y = triton_products.gptq_linear(x.to(DEVICE)[None], *matrix, bias.to(DEVICE))
    assert y.shape == (1, rows, weight.shape[1])
    if rows:
        close(y[0], x.double() @ weight + bias.double(), 2e-6)


# --- Matrices of int8 --------------------------------------------------------------------------------------------


def int8_matrix(outputs, inputs, seed):
    """All codes are there. Returns codes and scales as the operations take them, and the weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator) + 0.1
    return (codes.to(DEVICE), scale.to(DEVICE)), codes.double() * scale.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("K", "N"), [(2048, 64), (1000, 70), (70, 32)])
def test_products_with_int8(K, N, rows, dtype):
    """With everything that a step asks for, against float64; sizes that no block divides, and no integers make up."""
    if DEVICE == "cpu" and dtype == torch.bfloat16 and rows > 1:
        pytest.skip("Triton's interpreter takes bfloat16 matrices for integers")
    (matrix, weight), (gate, gate_weight) = int8_matrix(N, K, 0), int8_matrix(N, K, 1)
    generator = torch.Generator().manual_seed(0)
    x, residual, bias, gate_bias, norm = (
        (torch.randn(size, generator=generator) / 100).to(dtype) for size in ((rows, K), (rows, N), (N,), (N,), (K,))
    )
    share = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        share *= 3  # the interpreter cuts digits off

    def near(expected, *tensors, **settings):
        settings = {name: s.to(DEVICE) if torch.is_tensor(s) else s for name, s in settings.items()}
        found = triton_products.int8_product(x.to(DEVICE), matrix, *(t.to(DEVICE) for t in tensors), **settings)
        assert found.dtype == dtype
        assert (found.cpu().double() - expected).norm() <= share * expected.norm()

    exact = x.double() @ weight.T
    near(exact + bias.double() + residual.double(), bias, residual=residual)
    gated = torch.nn.functional.silu(x.double() @ gate_weight.T + gate_bias.double())
    near((exact + bias.double()) * gated, bias, gate=gate, gate_bias=gate_bias)
    if rows == 1:
        normed = x.double() / (x.double().pow(2).mean() + 1e-6).sqrt() * norm.double()
        near(normed @ weight.T, norm=norm, eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 2, 70])
def test_linear_with_int8(rows, dtype, monkeypatch):
    """Any number of rows, by a kernel or by blocks of the weight; sums that leave float16 before they are scaled."""
    monkeypatch.setattr(triton_products, "GPU_BLOCK_WEIGHTS", 1000)
    (codes, scale), weight = int8_matrix(70, 96, 0)
    weight, scale = weight * 1e-3, scale * 1e-3
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(0))[:, ::2].to(dtype) * 300
    for bias in (None, torch.randn(70, generator=torch.Generator().manual_seed(1)).to(dtype)):
        on_gpu = None if bias is None else bias.to(DEVICE)
        y = triton_products.linear(x.to(DEVICE)[None], codes, on_gpu, scale)
        assert y.shape == (1, rows, 70)
        assert y.dtype == dtype
        if rows:
            expected = x.double() @ weight.T + (0 if bias is None else bias.double())
            close(y[0], expected, 2e-6 if dtype == torch.float32 else 1e-3)


# --- On a GPU ----------------------------------------------------------------------------------------------------


def gpu_inputs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 64) for n in (2, 40, 40))
    stored = on_device(*store(k, 8), *store(v, 8))
    codes, params = on_device(*empty_store(2, 3, 45, 64, 4))
    q, k, v = (t.to(DEVICE) for t in (q, k, v))
    (matrix, weight), (int8, _) = gptq("whole tiles"), int8_matrix(70, 96, 0)
    return {
        "linear": (torch.randn(2, 3, 96, device=DEVICE), int8[0], None, int8[1]),
        "gptq_linear": (torch.randn(2, 3, weight.shape[0], device=DEVICE), *matrix, None),
        "gptq_dequantize": (*matrix, torch.float16),
        "decode_attention": (q, k, v, torch.rand(2, 1, 2, 40, device=DEVICE) < 0.5, 0.2, False),
        "quantize_append": (codes, params, k, 5),
        "quantized_decode_attention": (q, *stored, None, 0.2, True),
    }


@needs_gpu
@pytest.mark.parametrize(
    "name",
    ["decode_attention", "quantize_append", "quantized_decode_attention", "linear", "gptq_linear", "gptq_dequantize"],
)
def test_opcheck(name):
    arguments = gpu_inputs()[name]
    getattr(kernels._OPERATORS, name)(*arguments)  # registers the kernels
    assert kernels.implementation("cuda").startswith("Triton")
    torch.library.opcheck(getattr(kernels._OPERATORS, name).default, arguments)


@needs_gpu
def test_compiles_without_graph_breaks():
    def step(q, codes, params, x):
        kernels.quantize_append(codes, params, x, 3)
        stored = codes[:, :, :7], params[:, :, :7]
        return kernels.quantized_decode_attention(q, *stored, *stored) + kernels.decode_attention(q, x, x)

    def inputs():
        torch.manual_seed(0)
        q, x = torch.randn(1, 2, 1, 64, device=DEVICE), torch.randn(1, 2, 4, 64, device=DEVICE)
        codes, params = (torch.zeros(1, 2, 9, n, dtype=torch.uint8, device=DEVICE) for n in (64, 4))
        kernels.quantize_append(codes, params, x[:, :, :3], 0)
        return q, codes, params, x

    with torch.no_grad():
        expected = step(*inputs())
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(*inputs()), expected)


class Jitted:
    """Of Triton's functions what `compile_together` takes: what is compiled, loaded and launched is noted."""

    _hash_lock = threading.RLock()
    params = tuple(types.SimpleNamespace(do_not_specialize=name == "slot") for name in ("x", "K", "slot"))

    def __init__(self, meeting=None):
        self.compiled, self.loaded, self.launched, self.meeting = [], [], [], meeting

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((grid, args, options))

    def warmup(self, *args, grid, **options):
        if self.meeting is not None:
            self.meeting.wait(10)  # raises if the others come later
        self.compiled.append((args, options))
        jitted = self

        class Compiled:
            @property
            def run(self):
                jitted.loaded.append(threading.current_thread())

        return Compiled()


@pytest.fixture
def on_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(triton_launch, "_done_once", list)
    monkeypatch.setattr(triton_launch.os, "cpu_count", lambda: 4)


def test_kernels_are_compiled_together_and_not_launched(on_no_gpu):
    meeting = threading.Barrier(4)
    first, second = (triton_launch.Kernel(Jitted(meeting)) for _ in range(2))
    x, half = torch.ones(3), torch.ones(3).half()

    def compute():
        for slot in (6, 8, 10):  # one kernel for all
            first[(1,)](x, 16, slot, BN=8)
        first[(2,)](half, 16, 6, BN=8)
        first[(3,)](x, 17, 6, BN=8)
        second[(4,)](x, 16, 6, BN=8)

    triton_launch.compile_together(compute, "a GPU")
    assert len(first.compiled) == 3
    assert len(second.compiled) == 1
    assert first.launched == second.launched == []
    assert len({*first.loaded, *second.loaded} - {threading.current_thread()}) == 4
    compute()
    assert [grid for grid, _, _ in first.launched] == [(1,), (1,), (1,), (2,), (3,)]
    assert second.launched == [((4,), (x, 16, 6), {"enable_fp_fusion": True, "BN": 8})]
    second[(4,)](x, 16, 6, enable_fp_fusion=False)
    assert second.launched[1] == ((4,), (x, 16, 6), {"enable_fp_fusion": False})


def test_what_every_kernel_needs_is_done_once_before(on_no_gpu, monkeypatch):
    meeting, done = threading.Barrier(2), []

    def once():
        meeting.wait(10)
        done.append(len(kernel.compiled))

    kernel = triton_launch.Kernel(Jitted())
    monkeypatch.setattr(triton_launch, "_done_once", lambda: [once, once])
    triton_launch.compile_together(lambda: [kernel[(1,)](torch.ones(1), K, 6) for K in (16, 17)], "a GPU")
    assert done == [0, 0]
    assert len(kernel.compiled) == 2


def test_the_hash_of_triton_is_found():
    key = triton_launch._done_once()[1]
    assert key().startswith(triton_launch.triton.__version__)
    assert key() is key()  # Triton keeps it


def test_kernels_that_do_not_compile_say_so_and_others_are_launched_again(on_no_gpu, monkeypatch):
    kernel = triton_launch.Kernel(Jitted())
    monkeypatch.setattr(Jitted, "warmup", lambda self, *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        triton_launch.compile_together(lambda: kernel[(1,)](torch.ones(1), 16, 6), "a GPU")
    with pytest.raises(KeyError, match="broken"):
        triton_launch.compile_together(lambda: {}["broken"], "a GPU")
    kernel[(1,)](16)
    assert kernel.launched == [((1,), (16,), {"enable_fp_fusion": True})]


def test_one_thread_compiles_where_triton_takes_no_more(on_no_gpu, monkeypatch):
    monkeypatch.delattr(Jitted, "_hash_lock")
    kernel = triton_launch.Kernel(Jitted())
    triton_launch.compile_together(lambda: kernel[(1,)](torch.ones(1), 16, 6), "a GPU")
    assert kernel.compiled == kernel.launched == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton.backends") is None, reason="needs Triton 3")
def test_the_kernels_of_a_step_compile_for_a_gpu_that_is_not_here():
    program = ROOT / "tests" / "compiled_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), "90", "--rows", "1"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
