"""
Ask a checkpoint and what was made of it the same questions.

    python finetune/compare.py CHECKPOINT TUNED QUESTION [QUESTION ...]

TUNED is a tuned checkpoint or the folder of an adapter. Exit status: 0 if an answer changed, 1 if none did, which the
last line says.
"""

from __future__ import annotations

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def answers(path: str, questions: list[str]) -> list[str]:
    """Greedy answers of the checkpoint or adapter in this folder."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True).eval()
    return [model.chat(tokenizer, question, history=None, do_sample=False)[0] for question in questions]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Ask a checkpoint and what was made of it the same questions.",
        epilog="Exit status: 0 if an answer changed, 1 if all answers are the same.",
    )
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("tuned", help="folder of what was made of it, also of an adapter")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    args = parser.parse_args()
    before, after = (answers(path, args.questions) for path in (args.checkpoint, args.tuned))
    for question, old, new in zip(args.questions, before, after):
        print(f"user:   {question}\nbefore: {old}\nafter:  {new}\n")
    if before == after:
        print("All answers are the same (exit status 1).")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
