"""
The kernels of a decoding step on an NVIDIA GPU, one by one, beside cuBLAS and beside the bandwidth that was measured.

    python benchmarks/gpu_kernels.py [--sizes 7B 72B] [--rows 1 4 16] [--gptq 4 8] [--int8] [--tune]

--gptq, --int8: products with quantised matrices instead, GPTQ's of so many bits and 128 inputs a group, and int8;
beside cuBLAS on dequantised ones.

Products of few rows with the shapes of the published models, as `GraphedSteps` calls them, then attention behind caches
of several lengths. Microseconds are of one launch inside a CUDA graph of many, over copies of the weights that do not
fit the L2 cache together. --tune tries every launch that is sensible and prints the best three.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import statistics
import time

import torch
from gpu import SIZES, Table
from kv_cache import modeling

triton_attention, triton_products = (
    importlib.import_module(f"{modeling.__name__.rpartition('.')[0]}.triton_{name}")
    for name in ("attention", "products")
)
LAUNCH = ("N", "num_warps", "STAGES", "programs")
POOL = 2**30  # bytes that the copies of a weight take at least


def launches(rows: int):
    """Sensible entries of `triton_products.PRODUCT`."""
    if rows == 1:
        found = [(2, 1024, 1, 2), (2, 1024, 2, 1), (2, 1024, 2, 2), (2, 1024, 2, 3), (4, 1024, 2, 1), (4, 1024, 4, 2)]
        found += [(2, 512, 1, 2), (2, 512, 1, 3), (4, 512, 2, 2), (1, 1024, 1, 3), (2, 2048, 4, 2), (2, 2048, 2, 2)]
    else:
        found = [(64, 128, 4, 6), (64, 128, 4, 3), (32, 128, 2, 3), (32, 128, 2, 4), (32, 512, 2, 3), (32, 256, 2, 4)]
        found += [(32, 128, 1, 6), (32, 256, 1, 4), (16, 256, 1, 6), (16, 128, 1, 6), (64, 256, 4, 4)]
    return [dict(zip(("BN", "BK", "num_warps", "STAGES"), launch)) for launch in found]


def attention_launches(bits: int):
    """Sensible entries of `triton_attention.TUNING`."""
    usual = triton_attention.TUNING[bits]
    for n, warps, stages, programs in itertools.product((16, 32, 64), (1, 2, 4), (1, 2, 3), (8, 16)):
        if 16 <= n // warps <= 64 and (bits == 16 or (stages > 1 and n > 16)):
            yield {**usual, "N": n, "num_warps": warps, "STAGES": stages, "programs": programs}


def microseconds(function, copies: int, repeat: int = 5) -> float:
    """Of function(i) for i in range(copies), inside a graph."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function(0)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(copies):
                function(i)
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second of a sum over 4 GB."""
    x = torch.empty(2**29, dtype=torch.int64, device="cuda").random_()
    return 8 * x.numel() / (microseconds(lambda i: x.sum(), 3) / 1e6)


def shapes(size: str):
    """Name, inputs, outputs, with a norm before it, as a gate, with a bias, with the residual stream."""
    hidden, _, _, intermediate, vocab = SIZES[size]
    return [
        ("c_attn", hidden, 3 * hidden, True, False, True, False),
        ("attn.c_proj", hidden, hidden, False, False, False, True),
        ("w1, w2", hidden, intermediate // 2, True, True, False, False),
        ("mlp.c_proj", intermediate // 2, hidden, False, False, False, True),
        ("lm_head", hidden, vocab, True, False, False, False),
    ]


def product(shape, rows: int, copies: int):
    """A function (index of a copy, launch) for our kernel, one of cuBLAS, and the bytes it reads."""
    _, K, N, normed, gated, biased, residual = shape
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(rows, K, **kind)
    weights = [torch.randn(N, K, **kind) * 0.02 for _ in range(copies * (2 if gated else 1))]
    norm, bias, stream = torch.ones(K, **kind), torch.randn(N, **kind), torch.randn(rows, N, **kind)

    def ours(i, tuning=None):
        y = triton_products.rms_norm(x, norm, 1e-6) if normed and rows > 1 else x
        triton_products.product(
            y,
            weights[i],
            bias if biased else None,
            norm=norm if normed and rows == 1 else None,
            eps=1e-6,
            gate=weights[copies + i] if gated else None,
            residual=stream if residual else None,
            tuning=tuning,
        )

    def cublas(i):
        torch.nn.functional.linear(x, weights[i], bias if biased else None)
        if gated:
            torch.nn.functional.linear(x, weights[copies + i])

    return ours, cublas, 2 * N * K * (2 if gated else 1)


def products(sizes, rows, tune: bool, bandwidth: float) -> None:
    table = Table("product", "size", "rows", "ours µs", "of the bandwidth", "cuBLAS µs", "of the bandwidth", "best")
    cases = [(size, m, shape) for size in sizes for m in rows for shape in shapes(size)]
    for size, m, shape in cases:
        copies = max(2, POOL // (2 * shape[1] * shape[2] * (2 if shape[4] else 1)))
        ours, cublas, size_read = product(shape, m, copies)
        best = []
        for launch in launches(m) if tune else ():
            try:
                best.append((microseconds(functools.partial(ours, tuning=launch), copies, 3), launch))
            except Exception:  # noqa: BLE001
                continue
        best.sort(key=lambda pair: pair[0])
        shares, times = [], []
        for time_ in (microseconds(ours, copies), microseconds(cublas, copies)):
            times.append(time_)
            shares.append(f"{size_read / time_ * 1e6 / bandwidth:.0%}")
        found = "; ".join(f"{t:.1f} {'/'.join(map(str, launch.values()))}" for t, launch in best[:6])
        table.row(shape[0], size, m, times[0], shares[0], times[1], shares[1], found)
        torch.cuda.empty_cache()


def gptq_launches(rows: int):
    """Sensible launches of `triton_products.GPTQ_ROW`, or of `GPTQ_ROWS`."""
    if rows == 1:
        found = []
        for n, slots, warps, registers in itertools.product(
            (8, 16, 32, 64), (16, 32, 64, 128), (1, 2, 4, 8), (0, 96, 128)
        ):
            if n * slots // warps in (256, 512) and (n > 8 or slots > 32):  # 8 or 16 a thread
                launch = {"BN": n, "SLOTS": slots, "num_warps": warps}
                found.append({**launch, "maxnreg": registers} if registers else launch)
        return found
    found = [(32, 8, 4, 3, 0), (32, 4, 2, 3, 0), (64, 4, 4, 3, 0), (64, 2, 2, 4, 0), (64, 2, 2, 4, 4)]
    found += [(256, 1, 4, 3, 2), (128, 1, 2, 4, 4), (128, 1, 4, 4, 4), (128, 1, 4, 4, 2)]
    return [dict(zip(("BN", "SHARES", "num_warps", "STAGES", "programs"), launch)) for launch in found]


def int8_launches(rows: int):
    """Sensible launches of `triton_products.INT8_ROW`, or of `INT8_ROWS`."""
    if rows == 1:
        sizes = itertools.product((2, 4, 8, 16), (64, 128, 256, 512, 1024), (1, 2, 4, 8))
        found = [launch for launch in sizes if 128 <= launch[0] * launch[1] // launch[2] <= 1024]  # 4 to 32 a thread
        return [dict(zip(("BN", "BK", "num_warps"), launch)) for launch in found]
    sizes = itertools.product((16, 32, 64, 128), (128, 256), (1, 2, 4), (3, 4, 6))
    found = [launch for launch in sizes if 2048 <= launch[0] * launch[1] // launch[2] <= 8192]
    return [dict(zip(("BN", "BK", "num_warps", "STAGES"), launch)) for launch in found]


def quantised_matrix(K: int, N: int, bits: int | None):
    """Random codes, as `QuantizedLinear.tensors`, or without bits as `Int8Linear.tensors`."""
    if bits is None:
        codes = torch.randint(-128, 128, (N, K), dtype=torch.int8, device="cuda")
        return codes, (torch.rand(N, device="cuda") + 0.5) * 2e-4
    n = 32 // bits
    words, zeros = (
        torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")
        for size in ((K // n, N), (K // 128, N // n))
    )
    scales = (torch.rand(K // 128, N, device="cuda") + 0.5).mul_(0.07 / 2**bits).half()
    return words, zeros, scales, None, bits, 128, 1


def quantised_product(shape, rows: int, copies: int, bits: int | None):
    """As `product`; cuBLAS multiplies by one matrix that is dequantised on the way."""
    _, K, N, normed, gated, biased, residual = shape
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(rows, K, **kind)
    matrices = [quantised_matrix(K, N, bits) for _ in range(copies * (2 if gated else 1))]
    norm, bias, stream = torch.ones(K, **kind), torch.randn(N, **kind), torch.randn(rows, N, **kind)

    def ours(i, tuning=None):
        y = triton_products.rms_norm(x, norm, 1e-6) if normed and rows > 1 else x
        return (triton_products.gptq_product if bits else triton_products.int8_product)(
            y,
            matrices[i],
            bias if biased else None,
            norm=norm if normed and rows == 1 else None,
            eps=1e-6,
            gate=matrices[copies + i] if gated else None,
            residual=stream if residual else None,
            tuning=tuning,
        )

    def cublas(i):
        for j in (i, copies + i) if gated else (i,):
            if bits:
                x @ triton_products.gptq_dequantize(*matrices[j], torch.bfloat16)
            else:
                triton_products.linear_reference(x, matrices[j][0], None, matrices[j][1])

    return ours, cublas, sum(t.nbytes for m in matrices for t in m[:3] if torch.is_tensor(t)) // copies


def quantised_products(sizes, rows, bits, tune: bool, bandwidth: float) -> None:
    table = Table("quantised", "size", "bits", "rows", "ours µs", "of the bandwidth", "dequantised, cuBLAS µs", "best")
    cases = [(m, b) for b in bits for m in rows]
    for size, (m, b), shape in ((s, c, x) for s in sizes for c in cases for x in shapes(s)):
        copies = max(2, POOL // 2 // (shape[1] * shape[2] * (2 if shape[4] else 1) * (b or 8) // 8))
        ours, cublas, size_read = quantised_product(shape, m, copies, b)
        best = []
        for launch in (gptq_launches if b else int8_launches)(m) if tune else ():
            try:
                best.append((microseconds(functools.partial(ours, tuning=launch), copies, 3), launch))
            except Exception as error:  # noqa: BLE001
                print(launch, str(error)[:200])
        best.sort(key=lambda pair: pair[0])
        found = "; ".join(f"{t:.1f} {'/'.join(map(str, launch.values()))}" for t, launch in best[:8])
        took = microseconds(ours, copies)
        share = f"{size_read / took * 1e6 / bandwidth:.0%}"
        table.row(shape[0], size, b or "int8", m, took, share, microseconds(cublas, min(copies, 4)), found)
        torch.cuda.empty_cache()


def attention(sizes, rows, tune: bool, bandwidth: float) -> None:
    table = Table("attention", "size", "rows", "tokens", "bits", "µs", "of the bandwidth", "best")
    for size, bits, B, S in itertools.product(sizes, (16, 8, 4), rows, (128, 2048, 8192, 32000)):
        hidden, _, heads, _, _ = SIZES[size]
        hd = hidden // heads
        widths = [2 * hd] if bits == 16 else triton_attention.quantized_sizes(hd, bits)
        read = 2 * B * heads * S * sum(widths)
        copies = max(1, min(8, POOL // (4 * read)))
        if read * copies > 2**34:
            continue
        dtype = torch.bfloat16 if bits == 16 else torch.uint8
        capacity = -(-S // 256) * 256
        stores = [
            [torch.zeros(B, heads, capacity, w // dtype.itemsize, dtype=dtype, device="cuda") for w in widths * 2]
            for _ in range(copies)
        ]
        if bits == 16:
            for tensors in stores:
                for tensor in tensors:
                    tensor.normal_()
        else:
            for tensors in stores:
                for tensor, width in zip(tensors, widths * 2):
                    tensor.random_(0, 256) if width >= hd // 2 else tensor.fill_(60)
        base = torch.zeros(1, dtype=dtype, device="cuda")
        addresses = [(t.data_ptr() - base.data_ptr()) // base.element_size() for tensors in stores for t in tensors]
        lengths = torch.tensor([S, capacity, *addresses], device="cuda")
        starts = torch.zeros(B, dtype=torch.int64, device="cuda")
        # As a step has it: a full-precision cache gets the new token, rotated, within the attention.
        x = torch.randn(B, 1, 3 * heads * hd, dtype=torch.bfloat16, device="cuda")
        rotation = heads, *(torch.rand(B, 1, hd // 2, device="cuda") for _ in range(2)), None
        if bits != 16:
            x, rotation = x.view(B, 1, 3, heads, hd)[:, :, 0].transpose(1, 2), None
        slots = len(stores[0])

        def run(i, launch=None):
            place = base, bits, lengths, triton_attention.HEADER + slots * i  # noqa: B023
            triton_attention.attend(x, *place, starts, hd**-0.5, launch, rotation)  # noqa: B023

        took = microseconds(run, copies)
        best = []
        for launch in attention_launches(bits) if tune and bits != 4 else ():
            try:
                best.append((microseconds(functools.partial(run, launch=launch), copies, 3), launch))
            except Exception:  # noqa: BLE001
                continue
        found = sorted(best, key=lambda pair: pair[0])[:3]
        found = "; ".join(f"{t:.1f} {'/'.join(str(launch[k]) for k in LAUNCH)}" for t, launch in found)
        table.row(size, B, S, bits, took, f"{read / took * 1e6 / bandwidth:.0%}", found)
        del stores


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels of a decoding step, one by one.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["7B"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--gptq", nargs="+", type=int, choices=(4, 8), help="bits")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    began = time.perf_counter()
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a sum reads {bandwidth / 1e12:.2f} TB/s")
    quantised = [*(arguments.gptq or ()), *([None] if arguments.int8 else ())]
    if quantised:
        quantised_products(arguments.sizes, arguments.rows, quantised, arguments.tune, bandwidth)
        return
    products(arguments.sizes, arguments.rows, arguments.tune, bandwidth)
    attention(arguments.sizes, [1, 16], arguments.tune, bandwidth)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
