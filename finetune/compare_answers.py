"""
Ask a checkpoint and what was made of it the same questions.

    python finetune/compare_answers.py CHECKPOINT TUNED QUESTION [QUESTION ...]

TUNED is a tuned checkpoint or the folder of an adapter. Exit status: 0 if an answer changed, 1 if none did, which the
last line says, 2 if one of the two is not there.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
checkpoint_files = importlib.import_module("checkpoint_files")


def answers(path: str, questions: list[str]) -> list[str]:
    """Greedy answers of the checkpoint or adapter in this folder."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True).eval()
    return [model.chat(tokenizer, question, history=None, do_sample=False)[0] for question in questions]


def compare(checkpoint: str, tuned: str, questions: list[str]) -> int:
    """Print the answers of both; the exit status."""
    paths = (checkpoint, tuned)
    for path in paths:
        checkpoint_files.check_loadable(path, adapters=True)
    before, after = (answers(path, questions) for path in paths)
    for question, old, new in zip(questions, before, after):
        print(f"user:   {question}\nbefore: {old}\nafter:  {new}\n")
    if before == after:
        print("All answers are the same (exit status 1).")
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Ask a checkpoint and what was made of it the same questions.",
        epilog="Exit status: 0 if an answer changed, 1 if all answers are the same, 2 if one of the two is not there.",
    )
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("tuned", help="folder of what was made of it, also of an adapter")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    args = parser.parse_args()
    return checkpoint_files.exit_status(compare, args.checkpoint, args.tuned, args.questions)


if __name__ == "__main__":
    sys.exit(main())
