"""Every precision with every attention kernel, cache and batch, against the definition in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import lacks, needs_sdpa, random_ids, static_cache, tiny_model
from qwen.transformers_compat import ALL_ATTENTION_FUNCTIONS, DynamicCache
from reference import forward as reference_forward

# Prompts beyond seq_length (32), with NTK scales of 3 and 7, and what follows them in the same octave.
PROMPTS, NEW = (70, 40), 4
ROWS = [random_ids(1, length + NEW, seed=length) for length in PROMPTS]
# Relative error of the logits. A wrong mask, position or scale gives 0.3 and more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}
CHANGES = {"use_dynamic_ntk": True, "use_logn_attn": True, "initializer_range": 0.1, "no_bias": False}


@pytest.fixture(scope="module")
def expected():
    """Logits of each row alone, float64 (tokens, vocab)."""
    model = tiny_model(**CHANGES)
    return [
        reference_forward(model.state_dict(), model.config, row[0].tolist(), prompt_length=length)
        for row, length in zip(ROWS, PROMPTS)
    ]


def logits_of(model, ids, mask, prompt_length, cache) -> torch.Tensor:
    """Of a whole sequence, or with a cache of its prompt and then of one token after another."""
    if cache is None:
        return model(ids, attention_mask=mask, use_cache=False).logits
    ends = [prompt_length, *range(prompt_length + 1, ids.shape[1] + 1)]
    parts = [
        model(ids[:, start:end], attention_mask=None if mask is None else mask[:, :end], past_key_values=cache).logits
        for start, end in zip([0, *ends], ends)
    ]
    return torch.cat(parts, 1)


def error(logits, expected) -> float:
    return ((logits.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("batch", ["one row", "padded"])
@pytest.mark.parametrize("kind", ["no cache", "dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=needs_sdpa), "flex_attention"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_equal_the_definition(expected, dtype, attention, kind, batch):
    if dtype == torch.float16:
        try:
            torch.zeros(2, 2, dtype=dtype) @ torch.zeros(2, 2, dtype=dtype)
        except RuntimeError:
            pytest.skip("this PyTorch has no half precision on a CPU")
    eagerly = contextlib.nullcontext()
    if attention == "flex_attention":
        if attention not in ALL_ATTENTION_FUNCTIONS:
            lacks("has no flex_attention")
        if not hasattr(getattr(torch, "compiler", None), "set_stance"):
            pytest.skip("needs torch 2.6: else flex_attention would be compiled here, for minutes")
        eagerly = torch.compiler.set_stance("force_eager")
    model = tiny_model(**CHANGES, attn_implementation=attention).to(dtype)
    assert model.config._attn_implementation == attention
    length = max(PROMPTS)
    if batch == "padded":
        padding = [length - prompt for prompt in PROMPTS]
        ids = torch.cat([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(ROWS, padding)])
        mask = (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()
    else:
        padding, ids, mask = [0], ROWS[0], None
    cache = {
        "no cache": lambda: None,
        "dynamic": DynamicCache,
        "static": lambda: static_cache(model.config, length + 10, batch_size=len(ids), dtype=dtype),
    }[kind]()
    with torch.no_grad(), eagerly:
        logits = logits_of(model, ids, mask, length, cache)
    assert logits.dtype == dtype
    for row, pad, definition in zip(logits, padding, expected):
        assert error(row[pad:], definition) < TOLERANCE[dtype]
