"""What the programs that read long texts share: checkpoints, texts in windows, log-probabilities in pieces."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
checkpoint_files = importlib.import_module("checkpoint_files")

DTYPES = {"auto": None, "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # the model class's switches


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default="auto",
        type=checkpoint_files.precision,
        choices=DTYPES,
        help="of the weights; auto: the checkpoint's",
    )


def check_named(paths: Iterable[str], files: list[Path]) -> None:
    """SystemExit says which checkpoint or text is not one; nothing is loaded for that."""
    try:
        for path in paths:
            checkpoint_files.check_loadable(path, adapters=True)
        for file in files:
            file.read_text("utf-8")
    except FileNotFoundError as error:
        raise SystemExit(f"There is no file {error.filename}.") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{file} is not a text in UTF-8 ({error}).") from None
    except (checkpoint_files.Problem, OSError) as problem:
        raise SystemExit(str(problem)) from None


def base_of(path: str) -> str:
    """The checkpoint of a PEFT adapter's folder; another path as it is."""
    adapter = Path(path) / "adapter_config.json"
    return json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"] if adapter.exists() else path


def load_tokenizer(path: str):
    return AutoTokenizer.from_pretrained(base_of(path), trust_remote_code=True)


def load_model(path: str, dtype: str = "auto"):
    """
    The model of a checkpoint, on the GPUs if there are any; a PEFT adapter's folder is loaded on its base.

    dtype: one of DTYPES; "auto" is the checkpoint's.
    """
    base = base_of(path)
    kwargs = {} if dtype == "auto" else {DTYPES[dtype]: True}
    place = "auto" if torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, device_map=place, **kwargs)
    if base != path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path)
    return model.eval()


def read_texts(tokenizer, files: list[Path]) -> list[list[int]]:
    """Token ids of each file; what looks like a control token is text."""
    return [tokenizer.encode(path.read_text("utf-8"), allowed_special=set(), verbose=False) for path in files]


def windows(texts: list[list[int]], length: int, stride: int | None = None) -> Iterator[tuple[list[int], int]]:
    """
    Windows of `length` tokens, none across two texts, and the index of the first token that counts in each.

    stride: windows overlap, and from the second window of a text on only the last `stride` tokens count, so that each
    is predicted from length - stride tokens at least. Default: windows follow each other and all tokens count but the
    first, which nothing predicts. What is left over at the end of a text is dropped.
    """
    for ids in texts:
        for start in range(0, len(ids) - length + 1, stride or length):
            yield ids[start : start + length], 1 if stride is None or start == 0 else length - stride


def log_probs(model, ids: list[int], piece: int) -> Iterator[torch.Tensor]:
    """
    Log-probabilities of the next token behind each token of a sequence, float32 (tokens of a piece, vocab), in pieces.

    The memory taken, besides keys and values, grows with the piece, not with the sequence. What depends on the length
    of a prompt (NTK) is that of the whole sequence from the first piece on.
    """
    config, device, length = model.config, model.get_input_embeddings().weight.device, len(ids)
    cache, whole = DynamicCache(), {}
    if config.use_dynamic_ntk:
        whole["ntk_alpha"] = model.transformer.prompt_alpha(torch.tensor([length], device=device))
    for start in range(0, length, piece):
        tokens = ids[start : start + piece]
        with torch.inference_mode():
            logits = model(
                torch.tensor([tokens], device=device),
                attention_mask=torch.ones(1, start + len(tokens), dtype=torch.long, device=device),
                past_key_values=cache,
                use_cache=True,
                **whole,
            ).logits[0]  # (tokens of the piece, vocab)
        yield logits.log_softmax(-1, dtype=torch.float32)


def token_losses(model, ids: list[int], piece: int) -> torch.Tensor:
    """Negative log-likelihood of each token but the first, in nats, float64 (len(ids) - 1,) on the CPU."""
    losses, start = [], 0
    for rows in log_probs(model, ids, piece):
        targets = torch.tensor(ids[start + 1 : start + len(rows) + 1], device=rows.device)
        losses.append(-rows[: len(targets)].gather(1, targets[:, None])[:, 0].double().cpu())
        start += len(rows)
    return torch.cat(losses)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value
