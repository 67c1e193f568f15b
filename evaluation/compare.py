"""
What quantisation, an adapter or another release changed: two checkpoints on the same text.

    python evaluation/compare.py A B FILE [FILE ...] [--length 2048] [--tokens 8192]

Prints the perplexity of both, and of B against A: the Kullback-Leibler divergence of the next token's distribution
(mean, 99th percentile, largest; in nats), and how often the most likely token is the same. One checkpoint is in memory
at a time; the distributions of A lie in a temporary file meanwhile, 4 bytes for each token and entry of the vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from windows import (
    add_dtype,
    check_named,
    checkpoint_files,
    load_model,
    load_tokenizer,
    log_probs,
    positive,
    read_texts,
    windows,
)


def distributions(model, sequences: list[list[int]], piece: int):
    """Log-probabilities, float32 (tokens, vocab), and the tokens that come next, for pieces of all sequences."""
    for ids in sequences:
        start = 0
        for rows in log_probs(model, ids, piece):
            targets = torch.tensor(ids[start + 1 : start + len(rows) + 1])
            start += len(rows)
            yield rows[: len(targets)].cpu(), targets


def compare(pairs) -> dict:
    """
    pairs: (log-probabilities of A, of B, the tokens that come next), float32 (tokens, vocab) twice and int64 (tokens,).

    Returns the losses `nll` of both (nats), `perplexity` of both, `kl` of B from A: mean, p99, max, and `agreement`.
    """
    losses, divergences, agreed = [[], []], [], []
    for a, b, targets in pairs:
        for found, rows in zip(losses, (a, b)):
            found.append(-rows.gather(1, targets[:, None])[:, 0].double())
        a, b = a.double(), b.double()
        # A logit of -inf has no probability, and adds nothing.
        divergences.append(torch.where(a.isfinite(), a.exp() * (a - b), 0.0).sum(1).clamp(min=0))
        agreed.append((a.argmax(1) == b.argmax(1)).double())
    nll = [float(torch.cat(found).mean()) for found in losses]
    kl = torch.cat(divergences)
    return {
        "tokens": len(kl),
        "nll": nll,
        "perplexity": [math.exp(value) for value in nll],
        "kl": {"mean": float(kl.mean()), "p99": float(kl.quantile(0.99)), "max": float(kl.max())},
        "agreement": float(torch.cat(agreed).mean()),
    }


def compare_checkpoints(a: str, b: str, files: list[Path], length: int, tokens: int, piece: int, dtype: str) -> dict:
    """Raises ValueError for texts shorter than a window, or checkpoints that don't have the same tokens."""
    texts = read_texts(load_tokenizer(a), files)
    sequences = [ids for ids, _ in itertools.islice(windows(texts, length), max(tokens // length, 1))]
    if not sequences:
        raise ValueError(
            f"The longest text has {max(map(len, texts))} tokens, a window {length}. Pass a smaller --length."
        )
    if read_texts(load_tokenizer(b), files) != texts:
        raise ValueError("The tokenizers differ on this text; the distributions would be of other tokens.")
    model = load_model(a, dtype)
    with tempfile.TemporaryFile() as file:
        sizes = []
        for rows, targets in distributions(model, sequences, piece):
            rows.numpy().tofile(file)
            sizes.append((rows.shape, targets))
        del model
        gc.collect()
        model = load_model(b, dtype)
        file.seek(0)

        def pairs():
            for ((tokens_, vocab), targets), (rows, _) in zip(sizes, distributions(model, sequences, piece)):
                before = torch.from_numpy(np.fromfile(file, np.float32, tokens_ * vocab)).view(tokens_, vocab)
                width = min(vocab, rows.shape[1])  # a vocabulary may be padded further
                yield before[:, :width], rows[:, :width], targets

        return compare(pairs())


def table(result: dict, a: str, b: str) -> str:
    kl = result["kl"]
    return "\n".join(
        [
            f"| {result['tokens']} tokens | {Path(a).name} | {Path(b).name} |",
            "| --- | --- | --- |",
            f"| perplexity | {result['perplexity'][0]:.4f} | {result['perplexity'][1]:.4f} |",
            f"| KL divergence, mean | | {kl['mean']:.6f} |",
            f"| KL divergence, 99th percentile | | {kl['p99']:.6f} |",
            f"| KL divergence, largest | | {kl['max']:.6f} |",
            f"| same most likely token | | {result['agreement']:.2%} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What quantisation, an adapter or another release changed: two checkpoints on the same text."
    )
    parser.add_argument("a", metavar="A", help="checkpoint, or a folder with an adapter")
    parser.add_argument("b", metavar="B", help="what is compared with it")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="texts in UTF-8")
    parser.add_argument("--length", type=positive, default=2048, help="tokens of a window")
    parser.add_argument("--tokens", type=positive, default=8192, help="about so many tokens in all")
    parser.add_argument("--piece", type=positive, default=512, help="tokens that are computed at once")
    add_dtype(parser)
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    check_named((args.a, args.b), args.files)
    try:
        result = compare_checkpoints(args.a, args.b, args.files, args.length, args.tokens, args.piece, args.dtype)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(table(result, args.a, args.b))
    if args.output:
        args.output.write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    sys.exit(checkpoint_files.exit_status(main))
