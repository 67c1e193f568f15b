"""What the tests share: the modules of the repository as a package, small models, the official vocabulary."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from matrix import LACKING

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The modules import each other relatively, as remote code does; a package whose path is the root holds them.
package = types.ModuleType("qwen")
package.__path__ = [str(ROOT)]
sys.modules["qwen"] = package
configuration_qwen = importlib.import_module("qwen.configuration_qwen")
modeling_qwen = importlib.import_module("qwen.modeling_qwen")
tokenization_qwen = importlib.import_module("qwen.tokenization_qwen")

PIPELINES_TAKE_MESSAGES = hasattr(importlib.import_module("transformers.pipelines.text_generation"), "Chat")

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 192,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # so that attention is far from uniform and a wrong mask shows
}


def lacks(what: str) -> None:
    """Skip a test of what the release of transformers can't do; the table of `make matrix` says so."""
    pytest.skip(LACKING + what)


def tiny_config(**changes):
    return configuration_qwen.QWenConfig(**{**TINY, **changes})


def tiny_model(seed: int = 0, **changes):
    """A random model in float32 and evaluation mode; biases and norms random too, so that none is a no-op."""
    torch.manual_seed(seed)
    model = modeling_qwen.QWenLMHeadModel(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save(model, folder) -> None:
    """Save in safetensors, which releases up to 4.34 do only when told."""
    import inspect

    told = "safe_serialization" in inspect.signature(model.save_pretrained).parameters
    model.save_pretrained(folder, **({"safe_serialization": True} if told else {}))


def static_cache(config, length: int, batch_size: int = 1):
    """A StaticCache for `length` tokens; skips where the release has none."""
    import inspect

    try:
        from transformers import StaticCache
    except ImportError:
        lacks("has no static cache")
    parameters = inspect.signature(StaticCache.__init__).parameters
    if "max_batch_size" not in parameters and "batch_size" not in parameters:
        return StaticCache(config=config, max_cache_len=length)
    size = {"max_batch_size" if "max_batch_size" in parameters else "batch_size": batch_size}
    return StaticCache(config=config, max_cache_len=length, device="cpu", dtype=torch.float32, **size)


def random_ids(*shape: int, seed: int = 0, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def golden_folder() -> Path | None:
    """Recorded outputs of the published implementation, where a developer has them."""
    folder = Path(os.environ.get("QWEN_GOLDEN", ROOT.parent / "shared" / "golden"))
    return folder if folder.is_dir() else None


def official_vocabulary() -> Path | None:
    """The 151,643 tokens of the published checkpoints: from a developer's folder, or the dashscope package."""
    places = [os.environ.get("QWEN_VOCAB"), ROOT.parent / "shared" / "vocab" / "qwen.tiktoken"]
    spec = importlib.util.find_spec("dashscope")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent / "resources" / "qwen.tiktoken")
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


@pytest.fixture(scope="session")
def official_tokenizer():
    path = official_vocabulary()
    if path is None:
        pytest.skip("needs the official qwen.tiktoken: set QWEN_VOCAB to it, or install dashscope")
    return tokenization_qwen.QWenTokenizer(str(path))


@pytest.fixture(scope="session")
def demo_tokenizer():
    return tokenization_qwen.QWenTokenizer(str(ROOT / "demo" / "qwen.tiktoken"))


def pytest_configure(config):
    """Stop if the release under test is not the one that was asked for."""
    import transformers

    expected = os.environ.get("QWEN_EXPECT_TRANSFORMERS", transformers.__version__)
    if transformers.__version__ != expected:
        raise pytest.UsageError(f"asked for transformers {expected}, found {transformers.__version__}")
