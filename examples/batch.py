"""
Answer many questions, several at a time.

    python examples/batch.py [--checkpoint CHECKPOINT] [--batch-size 8] FILE    a question a line; "-": standard input

Prompts of a batch are padded on the left, and every row gets what it would get alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkpoint import add_arguments, load
from tqdm import tqdm


def answer_batch(model, tokenizer, questions: list[str], **settings) -> list[str]:
    """One answer to each question, without earlier turns."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    ends = [tokenizer.eod_id, tokenizer.im_end_id]  # published chat checkpoints name only the first
    output = model.generate(**inputs, eos_token_id=ends, pad_token_id=tokenizer.eod_id, **settings)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer many questions, several at a time.")
    parser.add_argument("file", help="a question a line; - for standard input")
    add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, found {arguments.batch_size}")
    try:
        text = sys.stdin.read() if arguments.file == "-" else Path(arguments.file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SystemExit(f"There is no file {arguments.file}.") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{arguments.file} is not a text in UTF-8 ({error}).") from None
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise SystemExit(f"{arguments.file} holds no question. Write one a line.")
    model, tokenizer = load(arguments.checkpoint_path, arguments.cpu_only, padding_side="left")
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))  # little padding in every batch
    answers: dict[int, str] = {}
    try:
        for begin in tqdm(range(0, len(order), arguments.batch_size), unit="batch"):
            batch = order[begin : begin + arguments.batch_size]
            answers.update(zip(batch, answer_batch(model, tokenizer, [questions[i] for i in batch])))
    finally:  # what is answered is not lost with the rest
        for i in sorted(answers):
            print(f"{questions[i]}\t{answers[i]}")


if __name__ == "__main__":
    main()
