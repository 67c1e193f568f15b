"""
Compile the kernels of a decoding step for GPUs that need not be here, without running them.

    python tests/compiled_kernels.py 80 90 120 [--rows 1 4]

Numbers are compute capabilities; each takes some minutes. What does not compile is printed, and the exit status is 1
then.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import sys
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

HIDDEN, HEADS, INTERMEDIATE, GROUP = 4096, 32, 11008, 128  # Qwen-7B
SHARED_MEMORY = 99 * 2**10  # bytes of a program, on the GPUs that have least


class Driver:
    """What Triton asks a GPU's driver for before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def modules():
    """triton_attention, triton_launch, triton_products, as on a GPU."""
    torch.version.cuda = torch.version.cuda or "13.0"  # else there are no instructions of NVIDIA's
    package = types.ModuleType("qwen")
    package.__path__ = [str(Path(__file__).resolve().parent.parent)]
    sys.modules["qwen"] = package
    found = [importlib.import_module(f"qwen.triton_{name}") for name in ("attention", "launch", "products")]
    for module in found:
        vars(module).update(
            multiprocessors=lambda device: 108,
            shared_memory=lambda device: SHARED_MEMORY,
            known_options=lambda launch, cuda: launch,
        )
    return found


def matrix(bits: int, K: int, N: int):
    if bits == 16:
        return torch.empty(N, K, dtype=torch.bfloat16)
    codes = 32 // bits
    words, zeros = (torch.empty(*size, dtype=torch.int32) for size in ((K // codes, N), (K // GROUP, N // codes)))
    return words, zeros, torch.empty(K // GROUP, N, dtype=torch.float16), None, bits, GROUP, 1


def compute(attention, products, rows) -> None:
    """Launches what steps of so many rows do, and what many rows are dequantised by."""
    kind = {"dtype": torch.bfloat16}
    norm, bias = torch.empty(HIDDEN, **kind), torch.empty(3 * HIDDEN, **kind)
    of_int8 = torch.empty(HIDDEN, HIDDEN, dtype=torch.int8), torch.empty(HIDDEN)
    for M in rows:
        x, wide = torch.empty(M, HIDDEN, **kind), torch.empty(M, INTERMEDIATE, **kind)
        arguments = {"eps": 1e-6, "norm": norm if M == 1 else None}
        for bits in (16, 4, 8):
            product = products.product if bits == 16 else products.gptq_product
            up = matrix(bits, HIDDEN, INTERMEDIATE)
            product(x, matrix(bits, HIDDEN, 3 * HIDDEN), bias, **arguments)
            product(x, up, gate=up, **arguments)
            product(wide, matrix(bits, INTERMEDIATE, HIDDEN), residual=x)
        products.int8_product(x, of_int8, **arguments)
        products.int8_product(x, of_int8, gate=of_int8, **arguments)
        products.rms_norm(x, norm, 1e-6)
    products.gptq_dequantize(*matrix(4, HIDDEN, HIDDEN), torch.bfloat16)

    hd = HIDDEN // HEADS
    table, starts, scale = torch.zeros(6, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.empty(1, 1)
    for bits, T in itertools.product((16, 8, 4), (1, 3)):
        base = torch.empty(1, dtype=torch.bfloat16 if bits == 16 else torch.uint8)
        qkv, angles = torch.empty(1, T, 3 * HIDDEN, **kind), torch.empty(1, T, hd // 2)
        for scales in (None, scale.expand(1, T).contiguous()):
            attention.rotate_and_attend(qkv, angles, angles, scales, base, bits, table, 2, HEADS, starts, hd**-0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels of a decoding step, without running them.")
    parser.add_argument("capabilities", nargs="+", type=int, help="for example 90, of an H100")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 16])
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    attention, launch, products = modules()
    compiled, failed = set(), set()

    def compile_(self, grid):
        def of(*args, **options):
            name = self.jitted.__name__
            try:
                self.jitted.warmup(*args, grid=(1,), **{"enable_fp_fusion": True, **options})
                compiled.add(name)
            except Exception as error:  # noqa: BLE001 (whatever the compiler or the assembler raises)
                failed.add(f"{name} {options}: {type(error).__name__}: {str(error)[-500:]}")

        return of

    launch.Kernel.__getitem__ = compile_
    for capability in arguments.capabilities:
        triton.runtime.driver.set_active(Driver(capability))
        compute(attention, products, arguments.rows)
        print(f"{capability}, Triton {triton.__version__}: {' '.join(sorted(compiled))}", *sorted(failed), sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
