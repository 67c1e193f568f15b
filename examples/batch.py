"""
Answer many questions, several at a time.

    python examples/batch.py [--checkpoint CHECKPOINT] [--batch-size 8] FILE    a question a line; "-": standard input
    python examples/batch.py --output answers.jsonl FILE    {"question": ..., "answer": ...} a line, batch by batch

Prompts of a batch are padded on the left, and every row gets what it would get alone. With --output an interrupted run
goes on when it is started again: questions that have an answer in that file are not asked again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
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


def answered(path: Path) -> set[str]:
    """The questions that have an answer in a file of --output; of an interrupted last line nothing stays."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    try:
        return {json.loads(line)["question"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{path} holds no answers of this program. Name another file with --output.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer many questions, several at a time.")
    parser.add_argument("file", help="a question a line; - for standard input")
    add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines there; go on if it has some")
    parser.add_argument("-s", "--seed", type=int, default=1234, help="of random numbers (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, found {arguments.batch_size}")
    try:
        text = sys.stdin.read() if arguments.file == "-" else Path(arguments.file).read_text(encoding="utf-8")
        text = text.lstrip("\ufeff")
    except FileNotFoundError:
        raise SystemExit(f"There is no file {arguments.file}.") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{arguments.file} is not a text in UTF-8 ({error}).") from None
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise SystemExit(f"{arguments.file} holds no question. Write one a line.")
    done = answered(arguments.output) if arguments.output else set()
    model, tokenizer = load(arguments.checkpoint_path, arguments.cpu_only, padding_side="left")
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))  # little padding in every batch
    order = [i for i in order if questions[i] not in done]
    answers: dict[int, str] = {}
    try:
        for begin in tqdm(range(0, len(order), arguments.batch_size), unit="batch"):
            batch = order[begin : begin + arguments.batch_size]
            torch.manual_seed(arguments.seed)
            new = dict(zip(batch, answer_batch(model, tokenizer, [questions[i] for i in batch])))
            answers.update(new)
            if arguments.output:
                with arguments.output.open("a", encoding="utf-8") as file:
                    for i in batch:
                        file.write(json.dumps({"question": questions[i], "answer": new[i]}, ensure_ascii=False) + "\n")
    finally:  # what is answered is not lost with the rest
        if not arguments.output:
            for i in sorted(answers):
                print(f"{questions[i]}\t{answers[i]}")


if __name__ == "__main__":
    main()
