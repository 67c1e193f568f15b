"""
The native kernels in a program of their own, check_kernels.cpp: on this CPU, on an emulated ARM CPU, and by command

    python tests/test_check_kernels.py      with the sanitizers of the compiler, for addresses, undefined and threads

Debian and Ubuntu have what ARM takes: apt install g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
COMPILER = next((found for found in map(shutil.which, ("g++", "c++", "clang++")) if found), None)
CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


def build(folder: Path, compiler: str, *flags: str) -> Path:
    program = folder / "check_kernels"
    headers = Path(torch.__file__).parent / "include"  # for bfloat16 alone, which needs no library
    source = f'-DQWEN_SOURCE="{HERE.parent / "cpp_kernels.cpp"}"'
    always = ["-std=c++17", "-O2", "-w", "-ffp-contract=off", "-pthread", f"-I{headers}", source]
    subprocess.run([compiler, *always, *flags, str(HERE / "check_kernels.cpp"), "-o", str(program)], check=True)
    return program


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_this_cpu(tmp_path):
    """With as many rows at a time as AVX-512 has: of three rows it once wrote eight. test_cpp_kernels.py has -O3."""
    assert "100 random shapes" in run(str(build(tmp_path, COMPILER, "-O1", "-DQWEN_ROWS_AT_A_TIME=8")), "100")


@pytest.mark.slow
@pytest.mark.skipif(CROSS is None, reason="needs aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu)")
@pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64 (qemu-user)")
def test_arm(tmp_path):
    """A CPU with everything has both instruction sets; one of the first generation NEON alone."""
    program = str(build(tmp_path, CROSS, "-static"))
    everything = run(QEMU, "-cpu", "max", program, "25")
    assert "neon: 25 random shapes" in everything
    assert "neon_bf16: 25 random shapes" in everything
    first = run(QEMU, "-cpu", "cortex-a53", program, "2")
    assert "neon: 2 random shapes" in first
    assert "bf16" not in first


if __name__ == "__main__":
    import tempfile

    for sanitizer in ("address,undefined", "thread"):
        with tempfile.TemporaryDirectory() as place:
            checked = build(Path(place), COMPILER, "-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
            print(f"{sanitizer}\n{run(str(checked), sys.argv[1] if len(sys.argv) > 1 else '100')}", end="")
