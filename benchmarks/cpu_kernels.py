"""
The native CPU kernels against PyTorch and against what the memory delivers, in the shapes of Qwen-1.8B.

    python benchmarks/cpu_kernels.py            speed: interleaved, medians, on an otherwise idle machine
    python benchmarks/cpu_kernels.py --errors   error of attention over quantised keys and values, by layout

Everything of a group runs once a round, in turn, for `--rounds` rounds. The tensors are larger than any cache, but for
products of more rows than 8, where they need not be. "read" is what has to come from memory; "share" is that speed
relative to the sum of a large tensor in the same rounds.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

package = types.ModuleType("qwen")  # the modules import each other relatively
package.__path__ = [str(Path(__file__).resolve().parent.parent)]
sys.modules.setdefault("qwen", package)
kernels = importlib.import_module("qwen.qwen_ops")
building = importlib.import_module("qwen.cpp_kernels")

HIDDEN, WIDTH, HEADS, HEAD_DIM = 2048, 5504, 16, 128
LAYERS = 12  # of linear layers, 270 MB in bfloat16
MEMORY = 1 << 28  # bytes of keys and values in bfloat16 that an attention benchmark goes through


def measure(cases: dict, rounds: int) -> dict:
    """Seconds of each function, a list a name; `cases`: name to function."""
    for function in cases.values():
        function()
    seconds: dict = {name: [] for name in cases}
    for _ in range(rounds):
        for name, function in cases.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def show(title: str, cases: dict, rounds: int, repeats: int = 1) -> None:
    """cases: name to (function, bytes read); the first is PyTorch's. `repeats`: operations in one call."""
    bulk = torch.ones(1 << 26)  # 256 MB
    functions = {"memory": bulk.sum, **{name: function for name, (function, _) in cases.items()}}
    seconds = measure(functions, rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    speed = {name: read / median[name] / 1e9 for name, (_, read) in cases.items()}
    memory = bulk.nbytes / median["memory"] / 1e9
    first = next(iter(cases))
    print(f"\n{title} (memory: {memory:.1f} GB/s)\n")
    print("| | ms, median | ms, best | read, GB/s | share | times as fast |\n|---|---|---|---|---|---|")
    for name in cases:
        middle, best = (1e3 / repeats * t for t in (median[name], min(seconds[name])))
        ratio = median[first] / median[name]
        print(f"| {name} | {middle:.3f} | {best:.3f} | {speed[name]:.1f} | {speed[name] / memory:.0%} | {ratio:.2f} |")


def linear_layers(rounds: int) -> None:
    weights = [torch.randn(WIDTH, HIDDEN).bfloat16() for _ in range(LAYERS)]
    scales = [w.float().abs().amax(1) / 127 for w in weights]
    int8 = [(w.float() / s[:, None]).round().to(torch.int8) for w, s in zip(weights, scales)]
    size = weights[0].nbytes * LAYERS
    for rows in (1, 2, 4, 8):
        x = torch.randn(rows, HIDDEN).bfloat16()
        cases = {
            "PyTorch, bfloat16": (lambda x=x: [F.linear(x, w) for w in weights], size),
            "native, bfloat16": (lambda x=x: [kernels.linear(x, w) for w in weights], size),
            "native, int8": (lambda x=x: [kernels.linear(x, w, None, s) for w, s in zip(int8, scales)], size // 2),
        }
        show(f"linear, {HIDDEN} to {WIDTH}, {rows} rows", cases, rounds, LAYERS)


def gptq(inputs: int, outputs: int, bits: int, any_order: bool = False) -> tuple:
    """What `gptq_linear` takes behind x: a matrix of random codes, in groups of 128 inputs."""
    codes = torch.randint(-(2**31), 2**31 - 1, (inputs * bits // 32, outputs), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31 - 1, (inputs // 128, outputs * bits // 32), dtype=torch.int32)
    scales = torch.rand(inputs // 128, outputs).half() / 2**bits
    groups = torch.randperm(inputs).to(torch.int32) // 128 if any_order else None
    return codes, zeros, scales, groups, bits, 128, 1


def rows(rounds: int) -> None:
    """Products of several rows, up to a prompt, with matrices of each kind; one of them, which a cache may hold."""
    for inputs, outputs in ((HIDDEN, 3 * HIDDEN), (WIDTH, HIDDEN)):
        weight = torch.randn(outputs, inputs).bfloat16()
        scale = weight.float().abs().amax(1) / 127
        int8 = (weight.float() / scale[:, None]).round().to(torch.int8)
        products = {
            "bfloat16": lambda x, weight=weight: kernels.linear(x, weight),
            "int8": lambda x, int8=int8, scale=scale: kernels.linear(x, int8, None, scale),
        }
        for name, form in {"4 bits": (4,), "4 bits, desc_act": (4, True), "8 bits": (8,)}.items():
            matrix = gptq(inputs, outputs, *form)
            products[f"GPTQ, {name}"] = lambda x, matrix=matrix: kernels.gptq_linear(x, *matrix)
        print(f"\n{inputs} to {outputs}: ms, and the speed as a share of bfloat16's\n")
        print(f"| rows | {' | '.join(products)} |\n|---|{'---|' * len(products)}")
        for number in (12, 16, 32, 64, 128, 512):
            x = torch.randn(number, inputs).bfloat16()
            seconds = measure({name: lambda x=x, f=f: f(x) for name, f in products.items()}, rounds)
            median = {name: statistics.median(times) for name, times in seconds.items()}
            row = [f"{1e3 * each:.2f} ({median['bfloat16'] / each:.2f})" for each in median.values()]
            print(f"| {number} | {' | '.join(row)} |")


def quantized(x: torch.Tensor, bits: int) -> list[torch.Tensor]:
    stored = [torch.zeros(*x.shape[:-1], n, dtype=torch.uint8) for n in kernels.quantized_sizes(x.shape[-1], bits)]
    kernels.quantize_append(*stored, x, 0)
    return stored


def attention(rounds: int) -> None:
    for S in (512, 4096, 8192):
        shape = (1, HEADS, S, HEAD_DIM)
        layers = max(2, MEMORY // (4 * HEADS * S * HEAD_DIM))
        keys_values = [(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()) for _ in range(layers)]
        stores = {bits: [quantized(k, bits) + quantized(v, bits) for k, v in keys_values] for bits in (8, 4)}
        wide = [(k.float(), v.float()) for k, v in keys_values[: layers // 2]]
        size = 2 * keys_values[0][0].nbytes * layers
        for T in (1, 4):
            q = torch.randn(1, HEADS, T, HEAD_DIM).bfloat16()
            wide_q = q.float()
            cases = {
                "PyTorch, bfloat16": (
                    lambda q=q, kv=keys_values: [F.scaled_dot_product_attention(q, k, v) for k, v in kv],
                    size,
                ),
                "PyTorch, float32": (
                    lambda q=wide_q, kv=wide: [F.scaled_dot_product_attention(q, k, v) for k, v in kv * 2],
                    2 * size,
                ),
                "native, bfloat16": (
                    lambda q=q, kv=keys_values: [kernels.decode_attention(q, k, v) for k, v in kv],
                    size,
                ),
                "native, float32": (
                    lambda q=wide_q, kv=wide: [kernels.decode_attention(q, k, v) for k, v in kv * 2],
                    2 * size,
                ),
            }
            for bits, stored in stores.items():
                read = sum(t.nbytes for layer in stored for t in layer)
                cases[f"native, int{bits}"] = (
                    lambda q=q, stored=stored: [kernels.quantized_decode_attention(q, *layer) for layer in stored],
                    read,
                )
            show(f"attention of {T} tokens over {S}, {HEADS} heads of {HEAD_DIM}", cases, rounds, layers)


def small_operations(rounds: int) -> None:
    """What a layer does beside, for one token; these are bound by calls, not by memory."""
    x, weight = torch.randn(1, 1, HIDDEN).bfloat16(), torch.randn(HIDDEN).bfloat16()
    head = torch.randn(1, 1, HEADS, HEAD_DIM).bfloat16().transpose(1, 2)
    cos, sin = torch.rand(1, 1, 1, HEAD_DIM // 2), torch.rand(1, 1, 1, HEAD_DIM // 2)
    cases = {
        "rms_norm, PyTorch": lambda: F.rms_norm(x, weight.shape, weight, 1e-6),
        "rms_norm, native": lambda: kernels.rms_norm(x, weight, 1e-6),
        "rotary, PyTorch": lambda: kernels.rotary_reference(head, cos, sin),
        "rotary, native": lambda: kernels.rotary(head, cos, sin),
    }
    for bits in (8, 4):
        stored = quantized(torch.zeros(1, HEADS, 4, HEAD_DIM), bits)
        cases[f"quantize_append, int{bits}, native"] = lambda stored=stored: kernels.quantize_append(*stored, head, 2)
    seconds = measure({name: lambda f=f: [f() for _ in range(100)] for name, f in cases.items()}, rounds)
    print("\none token, microseconds\n\n| | median | best |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {1e4 * statistics.median(times):.1f} | {1e4 * min(times):.1f} |")


# --- Errors ------------------------------------------------------------------------------------------------------


def by_groups(x: torch.Tensor, size: int, dim: int = -1) -> torch.Tensor:
    """The usual 4-bit rounding: a step and a lowest value for each `size` neighbours along `dim`."""
    groups = x.movedim(dim, -1).unflatten(-1, (-1, size))
    low, high = groups.amin(-1, keepdim=True).half().float(), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).half().float()
    return (((groups - low) / step).round().clamp(0, 15) * step + low).flatten(-2).movedim(-1, dim)


def ours(x: torch.Tensor, bits: int) -> torch.Tensor:
    return kernels.rotate(kernels.dequantize(*quantized(x, bits), x.shape[-1]))


def errors() -> None:
    """Relative to float64; keys of real models have channels with large means and large deviations."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, HEADS, 16, HEAD_DIM),
        torch.randn(1, HEADS, 1024, HEAD_DIM),
        torch.randn(1, HEADS, 1024, HEAD_DIM),
    )
    large = [3, 9, 40, 77, 100]
    means, deviations = k.clone(), k.clone()
    means[..., large] += 10
    deviations[..., large] *= 6
    damped = q.clone()
    damped[..., large] *= 0.3
    layouts = {
        "int8, 0.516": lambda k, v: (ours(k, 8), ours(v, 8)),
        "int4, 0.297": lambda k, v: (ours(k, 4), ours(v, 4)),
        "int4, keys less their mean, 0.297": lambda k, v: (ours(k - k.mean(-2, keepdim=True), 4), ours(v, 4)),
        "groups of 32 channels of a token, 0.312": lambda k, v: (by_groups(k, 32), by_groups(v, 32)),
        "keys by channel over 32 tokens, 0.312; values int4": lambda k, v: (by_groups(k, 32, -2), ours(v, 4)),
        "keys by channel over 64 tokens, 0.281; values int4": lambda k, v: (by_groups(k, 64, -2), ours(v, 4)),
    }

    def attend(q, k, v):
        return (q.double() @ k.double().mT * HEAD_DIM**-0.5).softmax(-1) @ v.double()

    data = {
        "random": (q, k),
        "5 channels with mean 10": (q, means),
        "5 channels 6 times as large": (damped, deviations),
    }
    print(f"\n| layout, bytes relative to bfloat16 | {' | '.join(data)} |\n|---|{'---|' * len(data)}")
    for name, layout in layouts.items():
        row = []
        for queries, keys in data.values():
            exact = attend(queries, keys, v)
            row.append(f"{(attend(queries, *layout(keys, v)) - exact).norm() / exact.norm():.2%}")
        print(f"| {name} | {' | '.join(row)} |")


def processor() -> str:
    """The name of the CPU, where the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the native CPU kernels.")
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--instructions", help="avx512_bf16, avx512, avx2 or portable; default: the best that is there")
    parser.add_argument("--only", choices=["linear", "rows", "attention", "small"], help="default: all")
    parser.add_argument("--errors", action="store_true", help="errors of quantisation instead of speed")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    found = building.kernels_in_use()
    if not found["native"]:
        sys.exit(f"There are no native kernels here: {found['reason']}")
    if arguments.instructions is not None:
        found["instructions"] = building.set_instructions(arguments.instructions)
    print(f"{processor()}, {torch.get_num_threads()} threads, {found['instructions']}, torch {torch.__version__}")
    speeds = {"linear": linear_layers, "rows": rows, "attention": attention, "small": small_operations}
    with torch.no_grad():
        if arguments.errors:
            return errors()
        for name, group in tqdm(speeds.items(), leave=False, disable=None):
            if arguments.only in (None, name):
                group(arguments.rounds)


if __name__ == "__main__":
    main()
