"""
Perplexity of texts by the length of the window, as in the model card's long-context table.

    python evaluation/perplexity.py PATH FILE [FILE ...] --lengths 8192 16384 32768 [--stride 4096] [--plot loss.svg]

Each file is a text of its own. Every window is a prompt of that length: NTK and LogN are in use as the checkpoint's
config.json says. Prefill goes in pieces, whose size bounds the memory besides that of keys and values.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import card
import figures
import torch
from tqdm import tqdm
from windows import (
    add_dtype,
    check_named,
    checkpoint_files,
    load_model,
    load_tokenizer,
    positive,
    read_texts,
    token_losses,
    windows,
)

POINTS = 64  # of a line in the plot


def measure(
    model, texts: list[list[int]], length: int, stride: int | None, piece: int, most: int | None = None
) -> dict:
    """
    Loss in nats by window, and by position.

    Returns `windows`: the mean of each; `nll` over all tokens that count; `perplexity`; `tokens`; `positions`: float64
    (length - 1,), the mean loss at each position over all windows.

    Raises ValueError for texts that are shorter than a window.
    """
    means, total, count, positions = [], 0.0, 0, torch.zeros(length - 1, dtype=torch.float64)
    chosen = list(windows(texts, length, stride))[:most]
    for ids, first in tqdm(chosen, desc=f"{length} tokens", unit="window", disable=None):
        losses = token_losses(model, ids, piece)
        positions += losses
        counted = losses[first - 1 :]
        means.append(float(counted.mean()))
        total, count = total + float(counted.sum()), count + len(counted)
    if not means:
        longest = max(map(len, texts), default=0)
        raise ValueError(f"The longest text has {longest} tokens, a window {length}. Pass longer files or --lengths.")
    nll = total / count
    return {
        "windows": means,
        "nll": nll,
        "perplexity": math.exp(nll),
        "tokens": count,
        "positions": positions / len(means),
    }


def check_lengths(texts: dict[Path, list[int]], lengths: list[int]) -> None:
    """SystemExit unless the longest text has a window of every length."""
    longest = max(texts, key=lambda file: len(texts[file]))
    size = len(texts[longest])
    too_long = sorted(length for length in lengths if length > size)
    if not too_long:
        return
    advice = "pass smaller --lengths"
    if len(too_long) < len(lengths):
        advice = f"leave out --lengths {' '.join(map(str, too_long))}"
    found = f"{longest} has" if len(texts) == 1 else f"The longest text, {longest}, has"
    raise SystemExit(
        f"{found} {size:,} tokens, too few for a window of {too_long[0]:,}: {advice}, or give a longer text."
    )


def line(positions: torch.Tensor) -> list[tuple[float, float]]:
    """Loss against position, averaged over stretches."""
    size = max(len(positions) // POINTS, 1)
    return [(i * size + size / 2, float(part.mean())) for i, part in enumerate(positions.split(size))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of texts by the length of the window.")
    parser.add_argument("path", metavar="PATH", help="checkpoint, or a folder with an adapter")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="texts in UTF-8")
    parser.add_argument("--lengths", nargs="+", type=positive, default=[8192, 16384, 32768])
    parser.add_argument("--stride", type=positive, help="overlapping windows, of which the last STRIDE tokens count")
    parser.add_argument("--windows", type=positive, help="at most so many of each length")
    parser.add_argument("--piece", type=positive, default=1024, help="tokens that are computed at once")
    add_dtype(parser)
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="SVG of the loss against the position")
    args = parser.parse_args()
    if min(args.lengths) < 2 or (args.stride and args.stride >= min(args.lengths)):
        parser.error("a window needs 2 tokens, and --stride must be smaller than every window")
    check_named([args.path], args.files)
    texts = read_texts(load_tokenizer(args.path), args.files)
    check_lengths(dict(zip(args.files, texts)), args.lengths)
    model = load_model(args.path, args.dtype)
    published = card.PERPLEXITY.get(card.of_card(model.config), {})
    print(f"| length | windows | tokens | loss | perplexity |{' the card’s |' if published else ''}")
    print("| --- | --- | --- | --- | --- |" + (" --- |" if published else ""), flush=True)
    found = {}
    for n in args.lengths:
        found[n] = result = measure(model, texts, n, args.stride, args.piece, args.windows)
        row = f"| {n} | {len(result['windows'])} | {result['tokens']} | {result['nll']:.4f} |"
        row += f" {result['perplexity']:.3f} |"
        print(row + (f" {published.get(n, '')} |" if published else ""), flush=True)
    if args.plot:
        series = {f"{n}": line(result["positions"]) for n, result in found.items()}
        args.plot.write_text(
            figures.lines(series, f"{Path(args.path).name}: loss by position", "position", "nats"), "utf-8"
        )
    if args.output:
        results = {n: {**result, "positions": result["positions"].tolist()} for n, result in found.items()}
        args.output.write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    sys.exit(checkpoint_files.exit_status(main))
