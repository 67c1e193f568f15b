"""
Write the tokenizer of a checkpoint as a tokenizer.json, for servers and tools that want a fast tokenizer.

    python tools/export_fast_tokenizer.py CHECKPOINT OUTPUT

OUTPUT is a new folder, with tokenizer.json and tokenizer_config.json, which `AutoTokenizer` and
`PreTrainedTokenizerFast` load; the checkpoint is only read. The ids are the same, the special tokens and the chat
template too, and there are offsets, which point into the text as it was given. Exit status: 0 done; 2 something is
wrong, or can't be written, or the tokenizer made does not encode the text of every token as ours does, and there is no
OUTPUT.

How the parts of a tokenizer.json make what tiktoken does:

- NFC is the normalizer; special tokens are looked for after it (`normalized`), as ours does.
- The pattern splits, then bytes stand for themselves in the alphabet of GPT-2 (one printable character for a byte).
- tiktoken merges any two neighbours whose concatenation is a token, the lowest rank first; `BPE` has a list of pairs.
  Merging the bytes of a token by itself gives the pair that it is made of, and no other pair ever makes it: as long as
  no merge has crossed the token's ends, what happens between them does not depend on the text around.
- A piece that is a token as a whole is that token even if no merges lead there, which is `ignore_merges`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from byte_pairs import byte_alphabet, recovered_pairs
from checkpoint_files import Problem, exit_status, from_code, new_folder, write_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast
from upgrade_checkpoint import load_tokenizer

QWenTokenizer = from_code("tokenization_qwen.QWenTokenizer")
tokenization_qwen = sys.modules[QWenTokenizer.__module__]
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_json(tokenizer) -> dict:
    """The tokenizer in the form of the library `tokenizers`; everything in it is older than any supported release."""
    alphabet = byte_alphabet()
    names = {token: "".join(alphabet[byte] for byte in token) for token in tokenizer.mergeable_ranks}
    pairs = [f"{names[left]} {names[right]}" for left, right in recovered_pairs(tokenizer.mergeable_ranks)]
    clash = next((token for token in tokenizer.special_tokens if token.encode() in tokenizer.mergeable_ranks), None)
    if clash is not None:
        raise Problem(
            f"The vocabulary has a regular token that reads {clash}, which a tokenizer.json can't tell apart."
        )
    vocab = {name: tokenizer.mergeable_ranks[token] for token, name in names.items()}
    vocab.update(tokenizer.special_tokens)  # else they would get the ids behind the extra tokens
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": True,
            }
            for token, index in tokenizer.special_tokens.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": tokenization_qwen.PAT_STR},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": pairs,
        },
    }


def tokenizer_config(tokenizer) -> dict:
    named = {name: str(getattr(tokenizer, name)) for name in NAMED if getattr(tokenizer, name, None) is not None}
    template = tokenizer.chat_template  # the default one in the form that every release of transformers reads
    template = tokenization_qwen.PLAIN_CHAT_TEMPLATE if template == tokenization_qwen.CHAT_TEMPLATE else template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [token for token in tokenizer.special_tokens if token not in named.values()],
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_input_names": tokenizer.model_input_names,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
    }


def check(tokenizer, folder: Path) -> None:
    """Problem unless the exported tokenizer encodes the text of each token as ours does."""
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = [token.decode(errors="replace") for token in tokenizer.mergeable_ranks] + list(tokenizer.special_tokens)
    for i in tqdm(range(0, len(texts), 1000), desc="comparing", unit_scale=1000, unit="token", mininterval=1):
        some = [f"{text} {text}{text}" for text in texts[i : i + 1000]]
        for text, ids, expected in zip(some, fast(some)["input_ids"], tokenizer(some)["input_ids"]):
            if ids != expected:
                raise Problem(
                    f"The exported tokenizer would give {ids} for {text!r}, not {expected}. Please report this."
                )


def export(checkpoint: Path, output: Path) -> None:
    if not (checkpoint / "qwen.tiktoken").exists():
        raise Problem(f"There is no vocabulary {checkpoint / 'qwen.tiktoken'}.")
    with new_folder(output) as folder:
        tokenizer = load_tokenizer(checkpoint)
        files = {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": tokenizer_config(tokenizer)}
        for name, content in files.items():
            write_file(folder / name, json.dumps(content, ensure_ascii=False, indent=1).encode())
        check(tokenizer, folder)
    print(f"{len(tokenizer)} tokens in {output}: PreTrainedTokenizerFast.from_pretrained({str(output)!r})")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tokenizer of a checkpoint as a tokenizer.json.")
    parser.add_argument("checkpoint", type=Path, help="folder with qwen.tiktoken and tokenizer_config.json")
    parser.add_argument("output", type=Path, help="folder to write, new or empty")
    args = parser.parse_args(arguments)
    return exit_status(export, args.checkpoint, args.output)


if __name__ == "__main__":
    sys.exit(main())
