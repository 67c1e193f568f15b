"""
What matrices in 8 and 4 bits lose: rounded to the nearest, by our GPTQ, and by gptqmodel's where it is installed.

    python benchmarks/quantisation_quality.py demo                  perplexity of the demo's held-out text
    python benchmarks/quantisation_quality.py random [--size 1.8B] [--layers 24] [--samples 24]

`demo`: calibration with samples of the demo's training text, the same ids for both quantisers; symmetric groups of 128.
`random`: random weights of the true widths. The text (docs/faq.md calibrates, docs/chat.md is measured, by the demo's
vocabulary) says only which random embeddings follow each other. Everything is computed in float32. Errors are relative,
root mean square: of the logits, and of the weights of the blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random

import torch
import transformers
from gpu import SIZES, Table, config_of
from kv_cache import ROOT, held_out_text, modeling, perplexity

sys.path.append(str(ROOT / "tools"))
import gptq
import quantize_weights

GROUP = 128
OURS = {
    "rounded, 4 bits": {"bits": 4, "method": "rtn"},
    "our GPTQ, 4 bits": {"bits": 4},
    "our GPTQ, 4 bits, desc_act": {"bits": 4, "desc_act": True},
    "our GPTQ, 4 bits, output layer too": {"bits": 4, "lm_head": True},
    "our GPTQ, 4 bits, output layer in int8": {"bits": 4, "int8_lm_head": True},
    "rounded, 8 bits": {"bits": 8, "method": "rtn"},
    "our GPTQ, 8 bits": {"bits": 8},
    "int8": None,
}
# The first has the settings of ours; the second what gptqmodel does when it is told nothing.
GPTQMODEL = {
    "gptqmodel, 4 bits": {"bits": 4, "desc_act": False, "act_group_aware": False, "damp_percent": 0.01},
    "gptqmodel, 4 bits, its defaults": {"bits": 4},
    "gptqmodel, 8 bits": {"bits": 8, "desc_act": False, "act_group_aware": False, "damp_percent": 0.01},
}


def quantise(source: Path, target: Path, settings: dict | None, calibration: Path, samples: int, length: int) -> None:
    """A checkpoint by our tool, which is silent here."""
    with contextlib.redirect_stdout(io.StringIO()):
        if settings is None:
            quantize_weights.make(source, target)
        else:
            settings = dict(settings)
            int8_lm_head = settings.pop("int8_lm_head", False)
            text = {} if settings.get("method") == "rtn" else {"calibration": calibration}
            gptq.make(source, target, group_size=GROUP, samples=samples, length=length, **text, **settings)
            path = target / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "int8_lm_head": int8_lm_head}))


def by_gptqmodel(source: Path, target: Path, settings: dict, ids: list[list[int]]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(group_size=GROUP, **settings)
    model = GPTQModel.load(str(source), config, trust_remote_code=True, device="cpu")
    with torch.compiler.set_stance("force_eager"):
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    model.save(str(target))


def load(folder: Path):
    return modeling.QWenLMHeadModel.from_pretrained(folder, fp32=True).eval()


def error_of_weights(source: Path, model) -> float:
    """Of the matrices of the blocks."""
    exact, wrong, total = gptq.Weights(source), 0.0, 0.0
    for name, module in model.named_modules():
        if not getattr(module, "HOLDS_CODES", False) or name == "lm_head":
            continue
        weight = exact[f"{name}.weight"].float()
        is_gptq = hasattr(module, "qweight")
        found = module.dequantize() if is_gptq else module.codes.float() * module.weight_scale[:, None]
        wrong += float((found - weight).pow(2).sum())
        total += float(weight.pow(2).sum())
    return (wrong / total) ** 0.5


@torch.no_grad()
def compare(source: Path, ways: dict, ids: torch.Tensor, labels: torch.Tensor) -> None:
    """ways: name to a function that makes a checkpoint in a folder, of which the last part of the path is not there."""
    table = Table("matrices", "perplexity", "change", "error of logits", "error of weights")
    model = load(source)
    first = perplexity(model, ids, labels, transformers.DynamicCache(), ids.shape[1])
    exact = model(ids).logits[labels >= 0]
    table.row("float32", f"{first:.5f}", "", "", "")
    del model
    for name, make in ways.items():
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            target = Path(folder) / "quantised"
            make(target)
            model = load(target)
        found = perplexity(model, ids, labels, transformers.DynamicCache(), ids.shape[1])
        error = float((model(ids).logits[labels >= 0] - exact).norm() / exact.norm())
        weights = error_of_weights(source, model)
        table.row(name, f"{found:.5f}", f"{found / first - 1:+.3%}", f"{error:.3%}", f"{weights:.3%}")
        del model


def demo(folder: Path, samples: int) -> None:
    source = folder / "demo"
    shutil.copytree(ROOT / "demo", source)
    tokenizer = gptq.load_tokenizer(source)
    ids, labels = held_out_text(tokenizer, 512)
    corpus = importlib.import_module("corpus")  # held_out_text has put its folder on the path
    texts, draw = [], Random(7)
    for i in range(samples):
        if i % 3 == 0:
            texts.append(corpus.random_document(draw))
            continue
        turns = [{"query": turn.query, "response": turn.response} for turn in corpus.random_dialogue(draw).turns]
        names = {"query": "user", "response": "assistant"}
        texts.append({"conversations": [{"from": names[k], "value": v} for turn in turns for k, v in turn.items()]})
    calibration = folder / "calibration.json"
    calibration.write_text(json.dumps(texts))
    same = gptq.calibration_samples(tokenizer, calibration, samples, 512)
    print(f"\n{int((labels >= 0).sum())} tokens of held-out text, {sum(map(len, same))} of calibration text")
    ways = {n: lambda t, s=s: quantise(source, t, s, calibration, samples, 512) for n, s in OURS.items()}
    if importlib.util.find_spec("gptqmodel") is None:
        print("gptqmodel is not installed, and left out")
    else:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it needs two
        os.chdir(folder)  # it writes where it is called
        ways |= {n: lambda t, s=s: by_gptqmodel(source, t, s, same) for n, s in GPTQMODEL.items()}
    compare(source, ways, ids, labels)


def random(folder: Path, size: str, layers: int | None, samples: int, length: int = 256) -> None:
    source, config = folder / "random", config_of(size)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    model = modeling.QWenLMHeadModel._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(source)
    del model
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copy(ROOT / "demo" / name, source)
    tokenizer = gptq.load_tokenizer(source)
    calibration, text = (ROOT / "docs" / name for name in ("faq.md", "chat.md"))
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"][: 2 * length]).view(2, length)
    print(f"\n{size}, {config.num_hidden_layers} layers; {samples} x {length} tokens of calibration text")
    ways = {n: s for n, s in OURS.items() if "desc_act" not in n}
    ways = {n: lambda t, s=s: quantise(source, t, s, calibration, samples, length) for n, s in ways.items()}
    compare(source, ways, ids, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description="What matrices in 8 and 4 bits lose.")
    parser.add_argument("what", choices=["demo", "random"])
    parser.add_argument("--size", choices=SIZES, default="1.8B")
    parser.add_argument("--layers", type=int, help="of `random`; default: all")
    parser.add_argument("--samples", type=int, help="of calibration text")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "demo":
            demo(Path(folder), arguments.samples or 256)
        else:
            random(Path(folder), arguments.size, arguments.layers, arguments.samples or 24)


if __name__ == "__main__":
    main()
