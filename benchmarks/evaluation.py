"""
Log-likelihoods of five-shot multiple choice: evaluation/qwen_lm.py beside the stock class of lm-evaluation-harness.

    pip install -r requirements-evaluation.txt
    python benchmarks/evaluation.py [PATH] [--batch-size 8] [--questions 16] [--rounds 3] [--dtype float32]
    python benchmarks/evaluation.py --size 7B        # random weights of this size, bfloat16, on a GPU

Both compute the same requests in turn, in one process; printed are seconds (the best of the rounds, on a CPU the
processor's), the largest difference of a log-likelihood, and on a GPU the memory at its peak. Without PATH: the demo.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "evaluation"))
from qwen_lm import QWenLM

ROOT = Path(__file__).resolve().parent.parent


def multiple_choice(questions: int, subjects: int = 3) -> list[Instance]:
    """Questions of subjects with five examples each; four choices of one token."""
    draw = random.Random(0)
    lines = (ROOT / "demo" / "facts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    words = [word for line in lines for word in line.split("\t") if word]

    def ask() -> str:
        choices = "".join(f"\n{letter}. {draw.choice(words)}" for letter in "ABCD")
        return f"Question: What is the capital of {draw.choice(words)}?{choices}\nAnswer:"

    requests = []
    for _ in range(subjects):
        shots = "".join(f"{ask()} {draw.choice('ABCD')}\n\n" for _ in range(5))
        for _ in range(questions):
            context = shots + ask()
            requests += [Instance("loglikelihood", {}, (context, f" {letter}"), 0) for letter in "ABCD"]
    return requests


def measure(models: dict, requests: list, rounds: int) -> dict:
    """Name of a model: its seconds in each round, and its answers; the models take turns."""
    found = {name: {"seconds": [], "memory": 0} for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            on_gpu = model.device.type == "cuda"
            clock = time.perf_counter if on_gpu else time.process_time
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = clock()
            found[name]["answers"] = model.loglikelihood(requests, disable_tqdm=True)
            if on_gpu:
                torch.cuda.synchronize()
                found[name]["memory"] = torch.cuda.max_memory_allocated()
            found[name]["seconds"].append(clock() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Log-likelihoods of five-shot multiple choice, beside the stock class of lm-evaluation-harness."
    )
    parser.add_argument("path", nargs="?", default=str(ROOT / "demo"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--questions", type=int, default=16, help="of each of three subjects")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--size", help="random weights instead of a checkpoint: 1.8B, 7B, 14B, 72B or tiny")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = args.path, None
    if args.size:
        from gpu import make_models

        model, tokenizer = make_models(args.size)[0], AutoTokenizer.from_pretrained(args.path, trust_remote_code=True)
    stock = HFLM(
        model,
        tokenizer=tokenizer,
        dtype=args.dtype,
        device=device,
        batch_size=args.batch_size,
        trust_remote_code=True,
        softmax_dtype="float32",
    )
    models = {"HFLM": stock, "qwen": QWenLM(stock.model, tokenizer=stock.tokenizer, batch_size=args.batch_size)}
    requests = multiple_choice(args.questions)
    found = measure(models, requests, args.rounds)
    for name, result in found.items():
        memory = f", {result['memory'] / 2**30:.1f} GiB" if result["memory"] else ""
        print(f"{name:5} {min(result['seconds']):8.2f} s{memory}")
    ratio = min(found["qwen"]["seconds"]) / min(found["HFLM"]["seconds"])
    pairs = zip(found["HFLM"]["answers"], found["qwen"]["answers"])
    print(
        f"ratio {ratio:.2f}, largest difference {max(abs(a[0] - b[0]) for a, b in pairs):.1e}, {len(requests)} requests"
    )


if __name__ == "__main__":
    main()
