"""What the examples share: which checkpoint to load, and where."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
checkpoint_files = importlib.import_module("checkpoint_files")

DEMO = str(ROOT / "demo")
checkpoint_files.print_any_text()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options for a checkpoint; the names are those of the published programs."""
    parser.add_argument(
        "-c",
        "--checkpoint-path",
        "--checkpoint",
        default=DEMO,
        metavar="CHECKPOINT",
        help="a folder or a repository of the hub (default: the demo)",
    )
    parser.add_argument("--cpu-only", action="store_true", help="use no GPU")


def check(path: str) -> None:
    """Ends the program with a line unless it may be a checkpoint, or an adapter over one."""
    try:
        checkpoint_files.check_loadable(path, adapters=True)
    except checkpoint_files.Problem as problem:
        raise SystemExit(str(problem)) from None


def load(path: str, cpu_only: bool = False, **tokenizer_settings):
    """The model, ready to answer, and its tokenizer. Ends the program with a line if they can't be loaded."""
    check(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, **tokenizer_settings)
        device_map = "cpu" if cpu_only else "auto"
        model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, trust_remote_code=True).eval()
    except (OSError, ValueError) as error:  # a missing or wrong file, a hub that can't be reached
        raise SystemExit(f"{path!r} can't be loaded as a folder, or from a hub. {error}") from None
    except SafetensorError as error:
        told = f"python tools/upgrade_checkpoint.py {path} says which. Copy it again."
        raise SystemExit(f"A weight file of {path} is damaged ({error}): {told}") from None
    return model, tokenizer
