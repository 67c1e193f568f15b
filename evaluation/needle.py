"""
Needle in a haystack: does the model find a sentence at every depth of a text of every length?

    python evaluation/needle.py PATH FILE [FILE ...] --lengths 1024 8192 32768 --plot needle.svg

The files are the haystack. The needle is put behind the end of a sentence, at each depth from the beginning (0) to the
end (100 percent); then the question is asked. An answer counts by the share of the expected words that it holds.
Chat models are asked by their template, base models by `Question: ... Answer:`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import figures
import torch
from windows import add_dtype, check_named, checkpoint_files, load_model, load_tokenizer, positive, read_texts

NEEDLE = "The harbour master keeps the key of lighthouse number 7391 under a blue stone."
QUESTION = "Under what does the harbour master keep the key of the lighthouse?"
ANSWER = ["blue", "stone"]
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", "\n")


def place(hay: list[int], needle: list[int], depth: float, ends) -> list[int]:
    """The hay with the needle behind the last sentence that ends within `depth` (0 to 1) of it; `ends(token)`."""
    at = round(depth * len(hay))
    while 0 < at < len(hay) and not ends(hay[at - 1]):
        at -= 1
    return [*hay[:at], *needle, *hay[at:]]


def score(response: str, expected: list[str]) -> float:
    """The share of the expected words in the response, whatever their capitals."""
    return sum(word.lower() in response.lower() for word in expected) / len(expected)


def prompt(tokenizer, chat: bool, question: str) -> tuple[list[int], list[int]]:
    """Token ids before and behind the haystack."""
    if not chat:
        return [], tokenizer.encode(f"\n\nQuestion: {question}\nAnswer:", allowed_special=set())
    start, end = [tokenizer.im_start_id], [tokenizer.im_end_id]

    def text(words: str) -> list[int]:
        return tokenizer.encode(words, allowed_special=set())

    before = [*start, *text("system\nYou are a helpful assistant."), *end, *text("\n"), *start, *text("user\n")]
    return before, [*text(f"\n\n{question}"), *end, *text("\n"), *start, *text("assistant\n")]


def ask(model, tokenizer, ids: list[int], new_tokens: int) -> str:
    tokens = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=[tokenizer.eod_id, tokenizer.im_end_id],
            pad_token_id=tokenizer.eod_id,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Needle in a haystack: does the model find a sentence at every depth of a text of every length?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="checkpoint, or a folder with an adapter")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="texts in UTF-8: the haystack")
    parser.add_argument("--lengths", nargs="+", type=positive, default=[1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--depths", nargs="+", type=float, default=[0, 20, 40, 60, 80, 100], help="in percent")
    parser.add_argument("--needle", default=NEEDLE)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--answer", nargs="+", default=ANSWER, help="words that the answer must hold")
    parser.add_argument("--new-tokens", type=positive, default=48)
    parser.add_argument("--raw", action="store_true", help="without template, even for a chat model")
    add_dtype(parser)
    parser.add_argument("--output", type=Path, help="JSON with every answer")
    parser.add_argument("--plot", type=Path, help="SVG")
    args = parser.parse_args()
    if not all(0 <= depth <= 100 for depth in args.depths):
        parser.error("--depths are between 0 and 100 percent")
    check_named([args.path], args.files)
    model, tokenizer = load_model(args.path, args.dtype), load_tokenizer(args.path)
    chat = not args.raw and getattr(model.generation_config, "chat_format", None) == "chatml"
    before, behind = prompt(tokenizer, chat, args.question)
    needle = tokenizer.encode(f" {args.needle} ", allowed_special=set())
    hay = [token for ids in read_texts(tokenizer, args.files) for token in ids]
    room = [length - len(before) - len(behind) - len(needle) - args.new_tokens for length in args.lengths]
    if min(room) < 1 or max(room) > len(hay):
        raise SystemExit(
            f"The files have {len(hay)} tokens; --lengths from {min(args.lengths) - min(room) + 1} to "
            f"{len(hay) + max(args.lengths) - max(room)} are possible."
        )

    def ends(token: int) -> bool:
        return tokenizer.decode([token]).rstrip(" ").endswith(SENTENCE_ENDS)

    cells = []
    for depth in args.depths:
        for length, n in zip(args.lengths, room):
            ids = [*before, *place(hay[:n], needle, depth / 100, ends), *behind]
            response = ask(model, tokenizer, ids, args.new_tokens)
            found = score(response, args.answer)
            cells.append({"depth": depth, "length": length, "score": found, "response": response})
            print(f"{length} tokens, depth {depth:g}%: {found:.0%}", file=sys.stderr)
    values = [[cell["score"] for cell in cells if cell["depth"] == depth] for depth in args.depths]
    print("| depth | " + " | ".join(map(str, args.lengths)) + " |\n| --- |" + " --- |" * len(args.lengths))
    for depth, row in zip(args.depths, values):
        print(f"| {depth:g}% | " + " | ".join(f"{value:.0%}" for value in row) + " |")
    if args.plot:
        names = [f"{depth:g}%" for depth in args.depths], [f"{length:,}" for length in args.lengths]
        title = f"{Path(args.path).name}: needle in a haystack"
        args.plot.write_text(figures.grid(values, *names, title, "depth", "tokens"), "utf-8")
    if args.output:
        args.output.write_text(json.dumps(cells, ensure_ascii=False), "utf-8")


if __name__ == "__main__":
    sys.exit(checkpoint_files.exit_status(main))
