"""32,768 tokens through a thin model, in memory that grows with the length and not with its square."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import compat, needs_sdpa, random_ids, static_cache, tiny_model
from qwen import qwen_attention
from qwen.transformers_compat import DynamicCache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

LENGTH, CHUNK = 32768, 1024
IDS = random_ids(1, LENGTH)
THIN = {
    "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_size": 32, "kv_channels": 16, "intermediate_size": 64,
    "seq_length": 8192, "initializer_range": 0.1, "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip
needs_memory = pytest.mark.skipif(
    not (compat.HAS_SDPA and Path("/proc/self/clear_refs").exists()), reason="needs SDPA, and memory figures of Linux"
)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {leaf.data_ptr() for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)}
        for leaf in tree_flatten(output)[0]:
            if isinstance(leaf, torch.Tensor) and leaf.data_ptr() not in given:  # a view is not made
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return output


def peak_memory(reset: bool = False) -> int:
    """Bytes that this process held at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def prefill(model, ids, mask=None, chunk=LENGTH, kept=1):
    """Logits of the last token or of `kept`, the largest tensor (elements a token), the memory (bytes) of a prefill."""
    cache = DynamicCache()
    alpha = model.transformer.prompt_alpha((torch.ones_like(ids) if mask is None else mask).sum(-1))
    before = peak_memory(reset=True)
    with torch.no_grad(), Largest() as largest:
        for start in range(0, LENGTH, chunk):
            seen = None if mask is None else mask[:, : start + chunk]
            part = ids[:, start : start + chunk]
            output = model(part, attention_mask=seen, past_key_values=cache, logits_to_keep=kept, ntk_alpha=alpha)
    return output.logits, largest.elements / LENGTH, peak_memory() - before


@pytest.fixture(scope="module")
def model():
    return tiny_model(attn_implementation="sdpa", **THIN)


@pytest.fixture(scope="module")
def whole(model):
    return prefill(model, IDS)


@needs_memory
def test_prefill(whole):
    """Nothing is wider than the queries, keys and values of a token: no mask, though NTK and LogN are at work."""
    logits, width, memory = whole
    assert logits.isfinite().all()
    assert width <= 3 * 32
    assert memory < 256 << 20  # a boolean mask alone would take 1 GB


@needs_memory
@pytest.mark.slow
def test_prefill_in_chunks_equals_whole(model, whole):
    logits, width, memory = prefill(model, IDS, chunk=CHUNK)
    torch.testing.assert_close(logits, whole[0], rtol=0, atol=1e-4)
    assert width <= CHUNK  # the mask of a chunk
    assert memory < 512 << 20


@needs_memory
@pytest.mark.slow
def test_padded_rows_equal_the_row_alone(model, whole):
    """Left and right, and without a mask of 2 GB."""
    ids, mask = IDS.repeat(2, 1), torch.ones(2, LENGTH, dtype=torch.long)
    ids[0], mask[0, :100] = IDS[0].roll(100), 0  # its last 100 tokens are cut off
    mask[1, -50:] = 0
    kept = torch.tensor([LENGTH - 51, LENGTH - 1])
    logits, width, memory = prefill(model, ids, mask, kept=kept)
    assert width <= 2 * 3 * 32
    assert memory < 256 << 20
    with torch.no_grad():
        alone = [model(IDS[:, :end], logits_to_keep=1).logits[0, 0] for end in (LENGTH - 100, LENGTH - 50)]
    torch.testing.assert_close(logits[0, 1], alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1, 0], alone[1], rtol=0, atol=1e-4)


@needs_sdpa
@pytest.mark.parametrize("kind", ["no cache", "dynamic", "static"])
def test_rows_without_a_mask_equal_those_with_one(monkeypatch, kind):
    """What long padded prompts take where their layers get padding, taken by short ones: logits, ids, gradients."""
    monkeypatch.setattr(qwen_attention, "PACKED_PROMPT", 10**9)
    model = tiny_model(attn_implementation="sdpa", use_dynamic_ntk=True, use_logn_attn=True)
    ids = random_ids(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :20], mask[1, -7:] = 0, 0
    used = []
    attend = qwen_attention.PaddedRows.attend

    def watched(self, *args):
        used.append(self.spans)
        return attend(self, *args)

    monkeypatch.setattr(qwen_attention.PaddedRows, "attend", watched)

    def results():
        cache = {"no cache": lambda: None, "dynamic": DynamicCache, "static": lambda: static_cache(model.config, 80, 3)}
        with torch.no_grad():
            first = cache[kind]()
            output = [model(ids, attention_mask=mask, past_key_values=first, use_cache=first is not None).logits]
            if first is not None:
                longer = torch.nn.functional.pad(mask, (0, 1), value=1)
                output.append(model(ids[:, :1], attention_mask=longer, past_key_values=first).logits)
        model.train()
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, 20] = -100  # padding would predict it
        loss = model(ids, attention_mask=mask, labels=labels).loss
        output += torch.autograd.grad(loss, list(model.parameters()))
        model.eval()
        return output

    expected = results()
    assert not used
    monkeypatch.setattr(qwen_attention, "LONG_PROMPT", 8)
    found = results()
    assert used == [[(20, 60), (0, 53), (0, 60)]] * 6  # in every layer, for the prompt and in training
    for a, b, real in zip(found, expected, [mask.bool(), *[...] * 99]):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)
    mask[2, 30:33] = 0  # padding between tokens is for a mask
    results()
    assert len(used) == 6
