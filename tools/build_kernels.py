"""
Build the native CPU kernels ahead of the first model, and say which are in use.

    python tools/build_kernels.py                  build if need be, and report
    python tools/build_kernels.py --source FOLDER  with the cpp_kernels.cpp of this folder, such as a checkpoint's
    python tools/build_kernels.py --pin            for developers: write the hash of a changed source into the module

A container image that is built with a compiler keeps the library (TORCH_EXTENSIONS_DIR says where) and needs no
compiler later. Exit status: 0 native kernels are in use, 1 they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import re
import sys
import time
import types
from pathlib import Path

from checkpoint_files import ROOT, exit_status
from transformers.utils import logging


def load_module(name: str):
    """A module of this repository. They import each other relatively: a package whose path is the root holds them."""
    package = types.ModuleType("qwen_code")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


def pin(folder: Path = ROOT) -> str:
    """Write the SHA-256 of cpp_kernels.cpp into cpp_kernels.py; returns it."""
    found = hashlib.sha256((folder / "cpp_kernels.cpp").read_bytes()).hexdigest()
    module = folder / "cpp_kernels.py"
    text = module.read_text(encoding="utf-8")
    module.write_text(re.sub(r'(?m)^SOURCE_SHA256 = "\w*"', f'SOURCE_SHA256 = "{found}"', text), encoding="utf-8")
    return found


def report() -> int:
    """Print what runs on this machine's CPU."""
    began = time.monotonic()
    found = load_module("cpp_kernels").kernels_in_use()
    for name in load_module("qwen_ops").OPERATIONS:
        print(f"{name:28} {'native, ' + found['instructions'] if found['native'] else 'PyTorch'}")
    if not found["native"]:
        print(f"why not native: {found['reason']}")
        return 1
    print(f"library: {found['library']} (ready after {time.monotonic() - began:.1f} s)")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the native CPU kernels and report which are in use.")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="folder with cpp_kernels.cpp")
    parser.add_argument("--pin", action="store_true", help="write the hash of the source into cpp_kernels.py and stop")
    args = parser.parse_args(arguments)
    if args.pin:
        print(pin())
        return 0
    logging.set_verbosity_info()
    if args.source is not None:
        load_module("cpp_kernels").set_source_folder(args.source)
    return exit_status(report)


if __name__ == "__main__":
    sys.exit(main())
