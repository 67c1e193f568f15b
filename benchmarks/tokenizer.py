"""
Speed of the tokenizer beside raw tiktoken and the exported fast tokenizer, and its time on input made to be slow.

    python benchmarks/tokenizer.py VOCABULARY

VOCABULARY is a qwen.tiktoken. What is compared is measured in turn, in an order that changes, in one run; the figures
are medians over --repetitions. Texts: English from Python's documentation, Chinese from the demo's phrasings and facts,
code from this repository, mixed from its README and documents. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import pydoc_data.topics
import random
import re
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from export_fast_tokenizer import QWenTokenizer, export  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

SIZE = 20_000  # bytes of a text


def read(*patterns: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for pattern in patterns for path in sorted(ROOT.glob(pattern)))


def texts_of(content: str, count: int = 8) -> list[str]:
    """Texts of about SIZE bytes each, from different places of the content."""
    content *= 1 + SIZE // len(content.encode())
    length = int(len(content) * SIZE / len(content.encode()))
    step = max(1, (len(content) - length) // count)
    return [content[i * step : i * step + length] for i in range(count)]


def corpora() -> dict[str, list[str]]:
    chinese = re.sub(r"[^\u3000-\u303f\u4e00-\u9fff\uff00-\uffef\n]", "", read("demo/phrasings.json", "demo/facts.tsv"))
    return {
        "English": texts_of("".join(pydoc_data.topics.topics.values())),
        "Chinese": texts_of(re.sub(r"\n+", "\n", chinese)),
        "code": texts_of(read("*.py", "tools/*.py")),
        "mixed": texts_of(read("README.md", "docs/*.md")),
    }


def medians(functions: dict, arguments: list, repetitions: int) -> dict[str, float]:
    """Seconds of each function, called in turn on each of the arguments; medians."""
    names, seconds = list(functions), {name: [] for name in functions}
    for i in range(repetitions):
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            functions[name](arguments[i % len(arguments)])
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def speeds(title: str, functions: dict, arguments_of: dict, repetitions: int) -> None:
    """A table in MB/s, with the speeds relative to the first function behind them."""
    first, *others = functions
    print(
        f"\n{title}\n\n{row('', *(f'{name}, MB/s' for name in functions), *(f'{name} : {first}' for name in others))}"
    )
    print(row("---", *("---" for _ in functions), *("---" for _ in others)))
    for kind, arguments in arguments_of.items():
        found = medians(functions, arguments, repetitions)
        print(
            row(
                kind,
                *(f"{SIZE / 1e6 / seconds:.1f}" for seconds in found.values()),
                *(f"{found[first] / found[name]:.2f}" for name in others),
            )
        )


def threads(tokenizer, texts: list[str], repetitions: int) -> None:
    batch = texts * 8
    functions = {
        f"{name}, {count}": lambda texts, encode=encode, count=count: encode(texts, num_threads=count)
        for name, encode in (("tiktoken", tokenizer.tokenizer.encode_ordinary_batch), ("ours", tokenizer))
        for count in (1, 2)
    }
    found = medians(functions, [batch], repetitions)
    size = sum(len(text.encode()) for text in batch) / 1e6
    print(f"\nA batch of {len(batch)} English texts\n\n{row('', '1 thread, MB/s', '2 threads, MB/s', '2 : 1')}")
    print(row(*["---"] * 4))
    for name in ("tiktoken", "ours"):
        one, two = found[f"{name}, 1"], found[f"{name}, 2"]
        print(row(name, f"{size / one:.1f}", f"{size / two:.1f}", f"{one / two:.2f}"))


def repeated_characters(tokenizer) -> None:
    characters = {
        **{"letter": "a", "digit": "1", "punctuation": "!", "`<`": "<", "`<\\|`": "<|", "Chinese": "中", "emoji": "😀"},
        **{"space": " ", "tab": "\t", "newline": "\n", "ideographic space": "\u3000", "NUL": "\0"},
        **{"mark": "\u0301", "two marks out of order": "\u0301\u0327", "lone surrogate": "\ud800"},
        **{"control token": "<|im_end|>"},
    }
    sizes = (62_500, 250_000, 1_000_000)
    print(f"\nOne character repeated, nanoseconds a byte\n\n{row('', *(f'{size / 1000:g} KB' for size in sizes))}")
    print(row("---", *("---" for _ in sizes)))
    for name, character in characters.items():
        cells = []
        for size in sizes:
            text = character * (size // len(character.encode("utf-8", "surrogatepass")))
            cells.append(f"{min(medians({'': tokenizer}, [text], 1)[''] for _ in range(3)) / size * 1e9:.0f}")
        print(row(name, *cells))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the tokenizer beside tiktoken and the fast tokenizer.")
    parser.add_argument("vocabulary", type=Path, help="a qwen.tiktoken")
    parser.add_argument("--repetitions", type=int, default=400, help="default: %(default)s")
    args = parser.parse_args()
    tokenizer = QWenTokenizer(str(args.vocabulary))
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(args.vocabulary.resolve(), Path(folder) / "qwen.tiktoken")
        (Path(folder) / "tokenizer_config.json").write_text("{}")
        export(Path(folder), Path(folder) / "fast")
        fast = PreTrainedTokenizerFast.from_pretrained(Path(folder) / "fast")
    raw = tokenizer.tokenizer
    packages = ", ".join(f"{name} {version(name)}" for name in ("tiktoken", "tokenizers", "transformers"))
    print(f"{packages}, Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    texts = corpora()
    for kind, some in tqdm(texts.items(), desc="same ids"):
        for text in some:
            assert raw.encode(text, disallowed_special=()) == tokenizer(text, allowed_special=set())["input_ids"], kind
            assert fast(text)["input_ids"] == tokenizer(text)["input_ids"], kind
    encoders = {
        "tiktoken": lambda text: raw.encode(text, allowed_special="all", disallowed_special=()),
        "ours": tokenizer,
        "fast": fast,
    }
    speeds(f"Encoding a text of {SIZE / 1000:g} KB", encoders, texts, args.repetitions)
    ids = {kind: [tokenizer.encode(text) for text in some] for kind, some in texts.items()}
    speeds(
        "Decoding it",
        {"tiktoken": raw.decode, "ours": tokenizer.decode, "fast": fast.decode},
        ids,
        args.repetitions,
    )
    threads(tokenizer, texts["English"], args.repetitions // 8)
    repeated_characters(tokenizer)


if __name__ == "__main__":
    main()
