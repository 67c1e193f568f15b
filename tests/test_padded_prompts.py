"""Prompts with padding: the layers get the tokens alone, packed, and give what they give padded and row by row."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import compat, modeling_qwen, needs_sdpa, random_ids, static_cache, tiny_model
from qwen import qwen_attention
from qwen.modeling_qwen import QWenCache, QWenQuantizedCache

pytestmark = needs_sdpa
LENGTHS = (20, 40, 60)  # each with an NTK scale of its own: the context is 32
CACHES = {
    "none": lambda config: None,
    "ours": lambda config: QWenCache(),
    "int8": lambda config: QWenQuantizedCache(8),
    "int4": lambda config: QWenQuantizedCache(4),
    "dynamic": lambda config: compat.DynamicCache(),
    "static": lambda config: static_cache(config, 80, 3),
}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model():
    return tiny_model(attn_implementation="sdpa", use_dynamic_ntk=True, use_logn_attn=True)


@pytest.fixture
def seen(monkeypatch):
    """The shapes that the norms of the layers see, without their width."""
    shapes, rms_norm = [], modeling_qwen.rms_norm

    def watched(x, *args):
        shapes.append(tuple(x.shape[:-1]))
        return rms_norm(x, *args)

    monkeypatch.setattr(modeling_qwen, "rms_norm", watched)
    return shapes


def padded(side: str):
    """Ids and mask, (3, 60) each; "both": padding before and behind the tokens."""
    ids, mask = random_ids(3, LENGTHS[-1]), torch.zeros(3, LENGTHS[-1], dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        before = {"left": LENGTHS[-1] - length, "right": 0, "both": (LENGTHS[-1] - length) // 2}[side]
        mask[row, before : before + length] = 1
    return ids, mask


def pack_nothing(monkeypatch):
    monkeypatch.setattr(qwen_attention, "PACKED_PROMPT", 10**9)


@torch.no_grad()
def prompt_and_step(model, ids, mask, cache):
    """Logits of the prompt (B, T, vocab), and with a cache those of a token behind it (B, 1, vocab)."""
    output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
    if cache is None:
        return [output.logits]
    longer = F.pad(mask, (0, 1), value=1)
    return [output.logits, model(ids[:, :1], attention_mask=longer, past_key_values=output.past_key_values).logits]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_tokens_alone_give_what_padded_rows_give(model, seen, monkeypatch, side, cache):
    ids, mask = padded(side)
    found = prompt_and_step(model, ids, mask, CACHES[cache](model.config))
    assert set(seen[:7]) == {(1, sum(LENGTHS))}  # of three layers, and the last
    pack_nothing(monkeypatch)
    seen.clear()
    expected = prompt_and_step(model, ids, mask, CACHES[cache](model.config))
    assert set(seen[:7]) == {(3, LENGTHS[-1])}
    # A code of a quantised cache may be another where a value lies between two.
    tolerances = [1e-4, {"int8": 0.02, "int4": 0.2}.get(cache, 1e-4)]
    for a, b, real, tolerance in zip(found, expected, [mask.bool(), ...], tolerances):
        assert a.isfinite().all()
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=tolerance)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("ntk", [False, True])
def test_rows_equal_the_row_alone(model, seen, side, ntk):
    model = model if ntk else tiny_model(attn_implementation="sdpa")
    ids, mask = padded(side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        assert set(seen) == {(1, sum(LENGTHS))}
        for row in range(3):
            alone = model(ids[row : row + 1, mask[row].bool()]).logits[0]
            torch.testing.assert_close(logits[row, mask[row].bool()], alone, rtol=0, atol=1e-4)
        last = model(ids, attention_mask=mask, logits_to_keep=1).logits
    torch.testing.assert_close(last, logits[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch, "set_default_device"), reason="torch 1 has no default device")
@torch.no_grad()
def test_the_default_device_of_the_program_is_not_where_rows_are_counted(model, seen):
    """It may be a GPU, of a program with a model on the CPU."""
    ids, mask = padded("left")
    expected = model(ids, attention_mask=mask).logits
    torch.set_default_device("meta")
    try:
        found = model(ids, attention_mask=mask).logits
    finally:
        torch.set_default_device(None)
    assert seen[0] == (1, sum(LENGTHS))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cache", CACHES)
def test_generated_ids_equal_those_of_the_row_alone(model, seen, cache):
    ids, mask = padded("left")

    def generate(ids, mask):
        past = {} if cache in ("none", "static") else {"past_key_values": CACHES[cache](model.config)}
        return model.generate(ids, attention_mask=mask, **GREEDY, **past)[:, ids.shape[1] :].tolist()

    found = generate(ids, mask)
    assert seen[0] == (1, sum(LENGTHS))
    alone = [generate(row[real.bool()][None], real[real.bool()][None])[0] for row, real in zip(ids, mask)]
    assert found == alone


def test_positions_of_the_caller_are_packed_too(model, monkeypatch):
    ids, mask = padded("left")
    for positions in (torch.arange(60)[None], (mask.cumsum(-1) - 1).clamp(min=0)):
        with torch.no_grad():
            found = model(ids, attention_mask=mask, position_ids=positions).logits
            with monkeypatch.context() as patch:
                pack_nothing(patch)
                expected = model(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def ordinary():
    """What the layers get padded: changes of the model, of the mask, and further arguments."""

    def hole(mask):
        mask[2, 30:33] = 0

    def empty_row(mask):
        mask[0] = 0

    def little_padding(mask):
        mask[:] = 1
        mask[0, :5] = 0

    def hooked(model):
        model.transformer.h[1].mlp.w1.register_forward_hook(lambda *args: None)

    def patched(model):
        block = model.transformer.h[1]
        block.forward = block.forward

    def eager(model):
        model.config._attn_implementation = "eager"

    nothing = lambda it: None  # noqa: E731
    return {
        "hole": (nothing, hole, {}),
        "empty row": (nothing, empty_row, {}),
        "little padding": (nothing, little_padding, {}),
        "hooked": (hooked, nothing, {}),
        "patched": (patched, nothing, {}),
        "eager": (eager, nothing, {}),
        "training": (lambda model: model.train(), nothing, {}),
        "hidden states": (nothing, nothing, {"output_hidden_states": True}),
        "attentions": (nothing, nothing, {"output_attentions": True}),
    }


@pytest.mark.parametrize("case", ordinary())
def test_what_goes_the_ordinary_way(model, seen, case):
    change_model, change_mask, arguments = ordinary()[case]
    model, (ids, mask) = copy.deepcopy(model), padded("left")
    change_model(model)
    change_mask(mask)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, **arguments)
    assert set(seen) == {(3, LENGTHS[-1])}
    assert output.logits.isfinite().all()
    for states in output.hidden_states or ():
        assert states.shape == (3, LENGTHS[-1], 64)


def test_gradients_and_later_tokens_go_the_ordinary_way(model, seen):
    ids, mask = padded("left")
    model(ids, attention_mask=mask)
    assert set(seen) == {(3, LENGTHS[-1])}
    mask[:] = 1
    mask[0, :14] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for cache in (compat.DynamicCache(), QWenCache()):
            alpha = model.transformer.prompt_alpha(mask.sum(-1))
            pieces = []
            for begin, end, shape in ((0, 30, (1, 76)), (30, 60, (3, 30))):
                seen.clear()
                part, known = ids[:, begin:end], mask[:, :end]
                pieces.append(model(part, attention_mask=known, past_key_values=cache, ntk_alpha=alpha).logits)
                assert set(seen) == {shape}
            found = torch.cat(pieces, 1)[mask.bool()]
            torch.testing.assert_close(found, whole[mask.bool()], rtol=0, atol=1e-4)


def test_columns_for_tokens_to_come_mean_nothing(model, seen):
    ids, mask = padded("left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        found = model(ids, attention_mask=F.pad(mask, (0, 7), value=1)).logits
    assert set(seen) == {(1, sum(LENGTHS))}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_blocks_that_accelerate_calls(model, seen):
    """Rows go along to the device of a block."""
    hooks = pytest.importorskip("accelerate.hooks")
    ids, mask = padded("left")
    moved = copy.deepcopy(model)
    for block in moved.transformer.h:
        hooks.add_hook_to_module(block, hooks.AlignDevicesHook(execution_device="cpu"))
    with torch.no_grad():
        expected, found = (m(ids, attention_mask=mask).logits for m in (model, moved))
    assert set(seen) == {(1, sum(LENGTHS))}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rows_on_another_device():
    """Tensors go there once; `meta` stands for a second GPU."""
    mask = padded("both")[1]
    rows = qwen_attention.PaddedRows.of(mask, *mask.shape, None)
    assert rows.to("meta") is rows
    there = rows._on(torch.device("meta"))
    assert rows.to("meta")._on(torch.device("meta")) is there
    assert rows.pack(torch.empty(3, 60, 2, device="meta")).shape == (1, sum(LENGTHS), 2)
    assert rows.unpack(torch.empty(1, sum(LENGTHS), 2, device="meta")).shape == (3, 60, 2)


def test_adapters(model, seen):
    """LoRA sees tokens; with an adapter for each row it has to see rows."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["c_attn", "w1", "w2"], "init_lora_weights": False}
    torch.manual_seed(1)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings), adapter_name="one")
    adapted.add_adapter("two", peft.LoraConfig(**settings))
    adapted.eval()
    ids, mask = padded("left")

    def alone(row, name):
        adapted.set_adapter(name)
        return adapted(ids[row : row + 1, mask[row].bool()]).logits[0]

    with torch.no_grad():
        found = adapted(input_ids=ids, attention_mask=mask).logits
        assert set(seen) == {(1, sum(LENGTHS))}
        for row in range(3):
            torch.testing.assert_close(found[row, mask[row].bool()], alone(row, "one"), rtol=0, atol=1e-4)
        names = ["one", "two", "one"]
        mixed = adapted(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row, mask[row].bool()], alone(row, name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("release", ["2.10", "2.11"])
def test_attention_of_variable_lengths(model, monkeypatch, release):
    """PyTorch's function is for GPUs: its arguments, and the way to it."""
    calls = []

    def attend(q, k, v, starts_q, starts_k, longest_q, longest_k, scaling):
        assert starts_q.dtype == torch.int32
        assert starts_q.tolist() == starts_k.tolist() == [0, 20, 60, 120]
        assert longest_q == longest_k == 60
        assert q.shape == k.shape == v.shape == (120, 4, 16)
        calls.append(scaling)
        return torch.cat(
            [
                F.scaled_dot_product_attention(
                    *(x[begin:end].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=scaling
                )[0].transpose(0, 1)
                for begin, end in ((0, 20), (20, 60), (60, 120))
            ]
        )

    def older(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal
        return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, None)

    def newer(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0)
        return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale)

    ids, mask = padded("left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        function, names = (older, ("is_causal",)) if release == "2.10" else (newer, ("scale", "window_size"))
        monkeypatch.setattr(compat, "_varlen", function, raising=False)
        monkeypatch.setattr(compat, "_VARLEN_ARGUMENTS", names)
        monkeypatch.setattr(qwen_attention, "has_varlen_attention", lambda *args: True)
        found = model(ids, attention_mask=mask).logits
    assert calls == [None if release == "2.10" else 16**-0.5] * 3
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)
