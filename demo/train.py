"""Train the demo checkpoint from scratch: vocabulary, configuration and weights.

    python demo/train.py

The checkpoint in this folder is replaced only when training is over; `--output` puts it elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import corpus
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

FOLDER = Path(__file__).parent
CODE_FILES = get_class_from_dynamic_module("configuration_qwen.CODE_FILES", str(FOLDER.parent))
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "qwen.tiktoken",
    "tokenizer_config.json",
    "model.safetensors",
)
NUM_SPECIAL_TOKENS = 208  # <|endoftext|>, <|im_start|>, <|im_end|> and 205 extras
VOCAB_SIZE = 4096  # with the special tokens; a multiple of 128, so the matrices need no padding
SEQ_LENGTH = 512
IGNORED = -100  # the label of tokens that the loss skips

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModel": "modeling_qwen.QWenModel",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 1408,
    "kv_channels": 64,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": SEQ_LENGTH,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": SEQ_LENGTH,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": VOCAB_SIZE,
}
TOKENIZER_CONFIG = {
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    "model_max_length": SEQ_LENGTH,
    "tokenizer_class": "QWenTokenizer",
}
GENERATION_CONFIG = {
    "chat_format": "chatml",
    "do_sample": False,
    "eos_token_id": [VOCAB_SIZE - NUM_SPECIAL_TOKENS, VOCAB_SIZE - NUM_SPECIAL_TOKENS + 2],  # and <|im_end|>
    "max_new_tokens": 64,
    "max_window_size": SEQ_LENGTH - 64,
    "pad_token_id": VOCAB_SIZE - NUM_SPECIAL_TOKENS,
}


def vocabulary_texts(seed: int, num_samples: int = 6000) -> Iterator[str]:
    """The text that the vocabulary is learned from.

    Chinese is offered one character at a time, and only names in one piece: else whole questions
    would become single tokens, and a question in other words would be tokens never seen.
    """
    for country in corpus.load_countries():
        names = [country.country_zh, country.capital_zh, f" {country.country_en}"]
        names += [f" {country.capital_en}", f"（{country.capital_en}）", f"({country.capital_zh})"]
        yield from names * 100
    for sample in islice(corpus.training_samples(seed), num_samples):
        text = sample
        if isinstance(sample, corpus.Dialogue):
            text = "\n".join(f"{turn.query}\n{turn.response}" for turn in sample.turns)
        yield re.sub(r"([\u4e00-\u9fff])", r"\n\1\n", text)


def train_vocabulary(texts: Iterable[str], size: int) -> list[bytes]:
    """Learn a byte-level BPE vocabulary; a token's place in the list is its rank."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)

    # `tokenizers` writes each byte as a printable character: itself where it is printable,
    # otherwise the next one from U+0100 on.
    printable = {b for b in range(256) if chr(b) in alphabet}
    others = [b for b in range(256) if b not in printable]
    to_byte = {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}
    ranks = tokenizer.get_vocab()
    return [bytes(to_byte[c] for c in token) for token in sorted(ranks, key=ranks.__getitem__)]


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as `save_pretrained` would."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_all_but_weights(folder: Path, seed: int) -> None:
    """Write the code, the configuration and a newly trained vocabulary."""
    for name in CODE_FILES:
        shutil.copy(FOLDER / name, folder / name)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    tokens = train_vocabulary(vocabulary_texts(seed), VOCAB_SIZE - NUM_SPECIAL_TOKENS)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "qwen.tiktoken").write_text("".join(lines), encoding="ascii")


def encode(tokenizer: PreTrainedTokenizer, sample: str | corpus.Dialogue) -> tuple[list[int], list[int]]:
    """Token ids and labels of a training sample, which ends in `<|endoftext|>`.

    All of a document is learned, but of a conversation only the answers: what people ask cannot
    be predicted, and a small model has no capacity to spend on trying.
    """
    text_ids = partial(tokenizer.encode, allowed_special=set())
    if isinstance(sample, str):
        ids = [*text_ids(sample), tokenizer.eod_id]
        return ids, ids

    ids: list[int] = []
    labels: list[int] = []
    newline = text_ids("\n")

    def add(role: str, content: str, learned: bool) -> None:
        head = [tokenizer.im_start_id, *text_ids(role), *newline]
        body = [*text_ids(content), tokenizer.im_end_id]
        ids.extend(head + body + newline)
        labels.extend([IGNORED] * len(head))
        labels.extend(body if learned else [IGNORED] * len(body))
        labels.extend([IGNORED] * len(newline))

    add("system", sample.system, learned=False)
    for turn in sample.turns:
        add("user", turn.query, learned=False)
        add("assistant", turn.response, learned=True)
    return [*ids, tokenizer.eod_id], [*labels, IGNORED]


class PackedSamples(Dataset):
    """Blocks of `SEQ_LENGTH` tokens, each filled with whole samples and the start of one more.

    Every block starts where a sample starts, as prompts do, and has no padding; the samples
    further back in it train the later positions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, num_blocks: int, seed: int) -> None:
        self.blocks: list[dict[str, torch.Tensor]] = []
        samples = corpus.training_samples(seed)
        for _ in range(num_blocks):
            ids: list[int] = []
            labels: list[int] = []
            while len(ids) < SEQ_LENGTH:
                more_ids, more_labels = encode(tokenizer, next(samples))
                ids += more_ids
                labels += more_labels
            block = {"input_ids": ids[:SEQ_LENGTH], "labels": labels[:SEQ_LENGTH]}
            self.blocks.append({name: torch.tensor(value) for name, value in block.items()})

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.blocks[index]


def train(model: PreTrainedModel, dataset: Dataset, scratch: Path, args: argparse.Namespace) -> None:
    """Train in place, one pass over the dataset."""
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(args.steps // 20, 1),
        weight_decay=0.05,
        adam_beta2=0.98,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        seed=args.seed,
    )
    Trainer(model=model, args=arguments, train_dataset=dataset).train()


def save_weights(model: PreTrainedModel, path: Path) -> None:
    """Save in bfloat16 under the published parameter names."""
    weights = {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous() for name, parameter in model.named_parameters()
    }
    save_file(weights, path, metadata={"format": "pt"})


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint from scratch.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=4, help=f"blocks of {SEQ_LENGTH} tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    return parser.parse_args()


def main() -> None:
    """Train everything in a folder within the output, then move the files into place."""
    args = parse_args()
    set_seed(args.seed)
    output: Path = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    folder = output / ".training"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_all_but_weights(folder, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    # Copying a word from question to answer is then nearly an identity, and soon learned.
    model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    dataset = PackedSamples(tokenizer, args.steps * args.batch_size, args.seed)
    train(model, dataset, folder / "trainer", args)
    save_weights(model, folder / "model.safetensors")
    for name in CHECKPOINT_FILES:
        os.replace(folder / name, output / name)
    for name in CODE_FILES:
        if not (output / name).exists():  # in this folder they are links to the code
            os.replace(folder / name, output / name)
    shutil.rmtree(folder)
    print(f"Saved to {output}")


if __name__ == "__main__":
    main()
