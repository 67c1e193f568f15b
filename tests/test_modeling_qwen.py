"""The forward pass: against an independent implementation, transformers' Qwen2, and itself in other forms."""

from __future__ import annotations

import math
import types

import pytest
import torch
import transformers
from conftest import (
    golden_folder,
    lacks,
    modeling_qwen,
    needs_sdpa,
    random_ids,
    sampled,
    static_cache,
    tiny_config,
    tiny_model,
)
from qwen.transformers_compat import HAS_SDPA, DynamicCache, masking_utils
from reference import forward as reference_forward
from reference import qwen2_of
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

# Names of the recorded cases, with the configurations they were made with.
NTK_LOGN = {"use_dynamic_ntk": True, "use_logn_attn": True}
PLAIN = {"use_dynamic_ntk": False, "use_logn_attn": False}


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("switches", [NTK_LOGN, PLAIN], ids=["ntk_logn", "plain"])
def test_logits_equal_the_definition(switches, length):
    model = tiny_model(**switches, rotary_emb_base=1000000 if switches is PLAIN else 10000)
    ids = random_ids(1, length)
    with torch.no_grad():
        logits = model(ids).logits
    close(logits[0], reference_forward(model.state_dict(), model.config, ids[0].tolist()))


@pytest.mark.parametrize(
    "changes", [{"no_bias": False}, {"rotary_pct": 0.5}, {"scale_attn_weights": False}, {"kv_channels": 24}], ids=str
)
def test_configuration_keys_equal_the_definition(changes):
    model = tiny_model(**changes, initializer_range=0.1)
    ids = random_ids(1, 40)
    with torch.no_grad():
        logits = model(ids).logits
    close(logits[0], reference_forward(model.state_dict(), model.config, ids[0].tolist()))


@pytest.mark.parametrize("case", ["base_72b_style", "ntk_logn", "ntk_logn_crossing"])
def test_recorded_outputs_of_the_published_implementation(case):
    folder = golden_folder()
    if folder is None:
        pytest.skip("needs the recorded outputs: set QWEN_GOLDEN to their folder")
    expected = load_file(folder / case / "expected.safetensors")
    model = modeling_qwen.QWenLMHeadModel.from_pretrained(folder / case)
    lengths = sorted(int(key[4:]) for key in expected if key.startswith("ids_"))
    # Recorded in float32: its own distance from float64 is about 1e-4, and torch 1.12 adds up in another order.
    tolerance = 1e-4 if HAS_SDPA else 1.5e-4
    for length in lengths:
        ids = expected[f"ids_{length}"]
        with torch.no_grad():
            close(model(ids).logits, expected[f"logits_{length}"], tolerance)
        if length <= 65:  # the definition is slow, and right for all lengths if it is for some beyond seq_length
            definition = reference_forward(model.state_dict(), model.config, ids[0].tolist())
            close(definition, expected[f"logits_{length}"][0], 2e-4)

    new_tokens = expected["decode_logits"].shape[1]
    output = model.generate(
        expected["prompt_ids"],
        attention_mask=torch.ones_like(expected["prompt_ids"]),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert output.sequences.tolist() == expected["greedy_ids"].tolist()
    close(torch.stack(output.scores, 1), expected["decode_logits"])

    model.train()
    ids = expected[f"ids_{lengths[0]}"]
    labels = ids.clone()
    labels[:, :3] = -100
    loss = model(ids, labels=labels).loss
    loss.backward()
    norms = torch.stack([p.grad.norm() for _, p in sorted(model.named_parameters())])
    torch.testing.assert_close(loss, expected["loss"][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(norms, expected["grad_norms"], rtol=1e-4, atol=0)


def test_equals_qwen2_in_logits_hidden_states_attentions_loss_and_gradients():
    model = tiny_model(**PLAIN)
    qwen2 = qwen2_of(model)
    ids = random_ids(2, 50)
    asked = {"output_hidden_states": True, "output_attentions": True, "labels": ids}
    ours, theirs = model(ids, **asked), qwen2(ids, **asked)
    close(ours.logits, theirs.logits, 1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    for a, b in zip(ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions):
        close(a, b, 1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    torch.testing.assert_close(model.transformer.wte.weight.grad, qwen2.model.embed_tokens.weight.grad)
    c_attn = model.transformer.h[0].attn.c_attn.weight.grad
    attention = qwen2.model.layers[0].self_attn
    parts = [attention.q_proj.weight.grad, attention.k_proj.weight.grad, attention.v_proj.weight.grad]
    torch.testing.assert_close(c_attn, torch.cat(parts))


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=needs_sdpa)])
def test_packed_rows_train_as_their_parts_do(attention):
    """Positions that begin again separate the texts of a row, in loss and gradients."""
    if masking_utils is None:
        lacks("has no packed rows")
    model = tiny_model(attn_implementation=attention).train()
    parts = [random_ids(1, length, seed=length) for length in (17, 5, 40)]
    position_ids = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    labels = torch.cat([torch.cat((torch.full((1, 1), -100), part[:, 1:]), 1) for part in parts], 1)
    packed = model(torch.cat(parts, 1), position_ids=position_ids, labels=labels).loss
    packed.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    predicted = sum(part.shape[1] - 1 for part in parts)
    separate = sum(model(part, labels=part).loss * (part.shape[1] - 1) for part in parts) / predicted
    separate.backward()
    torch.testing.assert_close(packed, separate)
    for gradient, p in zip(gradients, model.parameters()):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-6)


@needs_sdpa
def test_attention_weights_come_from_the_eager_kernel_with_one_warning(caplog):
    transformers_logging.warning_once.cache_clear()
    model, ids = tiny_model(attn_implementation="sdpa"), random_ids(1, 9)
    model(ids, output_attentions=True)
    weights = model(ids, output_attentions=True).attentions
    assert caplog.text.count("attention by sdpa has no weights to return") == 1
    for ours, eager in zip(weights, tiny_model(attn_implementation="eager")(ids, output_attentions=True).attentions):
        close(ours, eager, 1e-6)
    assert caplog.text.count("no weights to return") == 1


def test_ntk_alpha_is_exact_around_every_octave():
    for seq_length in (32, 2048, 8192):
        lengths = [1, seq_length - 1]
        for octave in range(6):
            lengths += [(seq_length << octave) + d for d in (0, 1, 2)]
        exact = []
        for length in lengths:
            octaves = 0  # ceil(log2(length / seq_length)) in integers
            while seq_length << octaves < length:
                octaves += 1
            exact.append(2 ** (octaves + 1) - 1)
        assert modeling_qwen.ntk_alpha(torch.tensor(lengths), seq_length).tolist() == exact


def test_logn_has_no_longest_position():
    scale = modeling_qwen.logn_scale(torch.tensor([[0, 8191, 8192, 32767, 1_000_000]]), 8192)
    expected = [max(1, math.log(p + 1) / math.log(8192)) for p in (0, 8191, 8192, 32767, 1_000_000)]
    close(scale[0], torch.tensor(expected), 1e-6)


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=needs_sdpa)])
@pytest.mark.parametrize("length", [20, 50])
def test_left_and_right_padding_do_not_change_a_row(attention, length):
    model = tiny_model(attn_implementation=attention)
    row, longer = random_ids(1, length, seed=1), random_ids(1, 80, seed=2)
    with torch.no_grad():
        alone = model(row).logits
        for side in ("left", "right"):
            pad = torch.zeros(1, 80 - length, dtype=torch.long)
            padded = torch.cat((pad, row) if side == "left" else (row, pad), 1)
            mask = torch.cat((pad, torch.ones_like(row)) if side == "left" else (torch.ones_like(row), pad), 1)
            batch = model(torch.cat((padded, longer)), attention_mask=torch.cat((mask, torch.ones_like(longer)))).logits
            close(batch[:1][mask.bool()][None], alone)
            close(batch[1:], model(longer).logits)


def test_explicit_positions_are_used():
    model = tiny_model(**NTK_LOGN)
    ids = random_ids(1, 20)
    with torch.no_grad():
        given = model(ids, position_ids=torch.arange(20)[None]).logits
        shifted = model(ids, position_ids=torch.arange(100, 120)[None]).logits
        close(given, model(ids).logits)
        assert (shifted - given).abs().max() > 1e-2  # LogN and NTK look at the positions
        plain = tiny_model(**PLAIN)
        close(plain(ids, position_ids=torch.arange(100, 120)[None]).logits, plain(ids).logits)  # RoPE is relative


def test_positions_not_given_are_those_of_the_cache():
    """Where tokens go may be said by `cache_position` alone, as loops of releases up to 4.57 do."""
    # One layer, and its last token: up to 4.57 cache_position also decides which keys the earlier tokens see.
    model = tiny_model(num_hidden_layers=1)
    ids, places = random_ids(1, 20), torch.arange(100, 120)
    with torch.no_grad():
        given = model(ids, position_ids=places[None]).logits[:, -1]
        derived = model(ids, cache_position=places).logits[:, -1]
        assert (given - model(ids).logits[:, -1]).abs().max() > 0.01
    close(derived, given)


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=needs_sdpa)])
def test_4d_masks_boolean_and_additive(attention):
    model = tiny_model(attn_implementation=attention)
    ids = random_ids(2, 24)
    allowed = torch.ones(24, 24, dtype=torch.bool).tril()[None, None].expand(2, 1, 24, 24)
    added = torch.zeros(2, 1, 24, 24).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids).logits
        close(model(ids, attention_mask=allowed).logits, expected)
        close(model(ids, attention_mask=added).logits, expected)
        window = allowed & ~torch.ones(24, 24, dtype=torch.bool).tril(-4)
        assert (model(ids, attention_mask=window).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        *((torch.ones(shape), r"must be of shape \(2, 8\).*, found") for shape in ((8,), (3, 8), (2, 5, 8))),
        *((torch.ones(2, 1, *shape), r"\(2 or 1, heads or 1, 5, 8\), found") for shape in ((5, 7), (4, 8))),
        (torch.ones(3, 1, 5, 8), r"found \(3, 1, 5, 8\)"),
        (torch.ones(2, 1, 5, 8, dtype=torch.int64), "must be boolean.*found torch.int64"),
    ],
)
def test_a_mask_that_does_not_fit_is_named_before_the_cache_grows(mask, message):
    model, cache = tiny_model(attn_implementation="eager"), DynamicCache()
    model(random_ids(2, 3), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 5), past_key_values=cache, attention_mask=mask)
    assert cache.get_seq_length() == 3


def test_inputs_embeds_instead_of_ids():
    model = tiny_model()
    ids = random_ids(2, 40)
    with torch.no_grad():
        close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding_equals_the_whole_sequence(kind):
    model = tiny_model(**NTK_LOGN)
    ids = random_ids(2, 30)  # stays within seq_length, where alpha is the same with and without a cache
    cache = DynamicCache() if kind == "dynamic" else static_cache(model.config, 40, batch_size=2)
    with torch.no_grad():
        expected = model(ids, use_cache=False)
        assert expected.past_key_values is None
        logits = [model(ids[:, :10], past_key_values=cache, use_cache=True).logits]
        for i in range(10, 30):
            logits.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    close(torch.cat(logits, 1), expected.logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_ntk_scale_is_that_of_the_prompt_and_kept(kind):
    model = tiny_model(**NTK_LOGN)
    ids = random_ids(1, 70)
    cache = DynamicCache() if kind == "dynamic" else static_cache(model.config, 100)
    weights = model.state_dict()
    with torch.no_grad():
        for prompt_length in (30, 40):  # the second time on the same cache, which was reset
            model(ids[:, :prompt_length], past_key_values=cache)
            logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt_length, 70)]
            expected = reference_forward(weights, model.config, ids[0].tolist(), prompt_length=prompt_length)
            close(torch.cat(logits, 1)[0], expected[prompt_length:])
            if kind == "dynamic":
                break
            cache.reset()


@pytest.mark.parametrize("first", ["generate", "forward"])
def test_a_reset_cache_knows_nothing_of_its_earlier_prompt(first):
    model = tiny_model(**NTK_LOGN)
    cache, fresh = static_cache(model.config, 120), static_cache(model.config, 120)
    long, short = random_ids(1, 100), random_ids(1, 20, seed=1)
    with torch.no_grad():
        if first == "generate":
            model.generate(long, past_key_values=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
        else:
            model(long, past_key_values=cache)
        cache.reset()
        for part in (short[:, :1], short[:, 1:]):
            close(model(part, past_key_values=cache).logits, model(part, past_key_values=fresh).logits)


def test_an_attention_function_of_another_name():
    """As vLLM registers one: it sees heads, scaling and whatever keywords the caller passed."""
    model = tiny_model(**NTK_LOGN)
    if not hasattr(model, "set_attn_implementation"):
        lacks("chooses the attention function when a model is made only")
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ids = random_ids(2, 40)
    calls = []

    def other(module, query, key, value, attention_mask, marker=None, **kwargs):
        calls.append((module.layer_idx, query.shape, key.shape, value.shape, kwargs["scaling"], marker))
        assert module.is_causal
        return modeling_qwen.eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("other", other)
    transformers.AttentionMaskInterface.register("other", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    with torch.no_grad():
        expected = model(ids).logits
        for name in ("eager", "other", "sdpa"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            close(model(ids, marker=7).logits, expected)
    assert calls == [(layer, *[(2, 4, 40, 16)] * 3, 16**-0.5, 7) for layer in range(3)]


@pytest.mark.parametrize("B", [1, 2])
def test_the_output_layer_takes_rows_without_gaps(B):
    """PyTorch multiplies others by a copy of the matrix for each row if it is frozen: seconds for a published size."""
    model, strides = tiny_model().requires_grad_(False), []
    model.lm_head.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
    model(random_ids(B, 6), logits_to_keep=1)
    h = model.config.hidden_size
    assert strides == [(h, h, 1)]


def test_logits_to_keep():
    model = tiny_model()
    ids = random_ids(2, 12)
    with torch.no_grad():
        whole = model(ids).logits
        close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
        close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])


def test_loss_and_its_divisor():
    model = tiny_model()
    ids = random_ids(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        logits = model(ids).logits
        log_p = logits[:, :-1].double().log_softmax(-1)
        each = -log_p.gather(-1, ids[:, 1:, None])[..., 0][labels[:, 1:] != -100]
        torch.testing.assert_close(model(ids, labels=labels).loss.double(), each.mean(), rtol=1e-5, atol=0)
        divided = model(ids, labels=labels, num_items_in_batch=100).loss
        torch.testing.assert_close(divided.double(), each.sum() / 100, rtol=1e-5, atol=0)


def test_tuple_output():
    model = tiny_model()
    output = model(random_ids(1, 5), return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].shape == (1, 5, 320)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model().train()
    ids = random_ids(2, 40)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls = []
    hook = model.transformer.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    hook.remove()
    assert len(calls) == 2  # once, and once again in the backward pass
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=needs_sdpa)])
def test_dropout_only_in_training(attention):
    ids = random_ids(1, 20)
    for changes in ({"emb_dropout_prob": 0.5}, {"attn_dropout_prob": 0.5}):
        model = tiny_model(**changes, attn_implementation=attention)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids).logits)
            model.train()
            assert not torch.equal(model(ids).logits, model(ids).logits)


def test_ntk_and_logn_are_off_in_training():
    ids = random_ids(1, 100)
    model, plain = tiny_model(**NTK_LOGN).train(), tiny_model(**PLAIN).train()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert not torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def test_initial_weights():
    model = modeling_qwen.QWenLMHeadModel(
        tiny_config(
            hidden_size=256, kv_channels=64, intermediate_size=1024, num_hidden_layers=8, initializer_range=0.02
        )
    )
    block = model.transformer.h[3]
    for weight in (block.attn.c_attn.weight, block.mlp.w1.weight, model.lm_head.weight, model.transformer.wte.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.attn.c_attn.bias.any()
    assert (block.ln_1.weight == 1).all()


def test_resizing_the_vocabulary():
    model = tiny_model()
    ids = random_ids(1, 10)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(400)
        assert model.config.vocab_size == model.lm_head.out_features == 400
        close(model(ids).logits[..., :320], before)
        model.resize_token_embeddings(300)
        assert model(ids[ids < 300][None]).logits.shape[-1] == 300


@pytest.mark.parametrize("switches", sampled([NTK_LOGN, PLAIN]), ids=["ntk_logn", "plain"])
def test_compiled_forward_and_decoding_step_without_breaks_or_recompiles(switches):
    if not hasattr(torch, "compiler"):
        pytest.skip("needs the compiler of torch 2.1")
    if transformers.__version__.startswith(("4.54.", "4.55.")):
        lacks("makes no cache inside of a compiled call")
    model = tiny_model(**switches)
    ids = random_ids(2, 48)
    torch._dynamo.reset()
    forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(forward(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        close(forward(ids, use_cache=True).logits, model(ids).logits)

        cache = static_cache(model.config, 64, batch_size=2)
        expected_cache = DynamicCache()
        model(ids[:, :40], past_key_values=cache)
        model(ids[:, :40], past_key_values=expected_cache)
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        step = torch.compile(model.forward, fullgraph=True, backend=backend)
        for i in range(40, 48):
            position = {"position_ids": torch.tensor([[i]]), "cache_position": torch.tensor([i])}
            logits = step(ids[:, i : i + 1], past_key_values=cache, **position).logits
            close(logits, model(ids[:, i : i + 1], past_key_values=expected_cache).logits)
    assert len(graphs) == 1


def test_bad_inputs_are_named():
    model = tiny_model()
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.transformer.wte(ids))
    for bad in (320, -1):
        with pytest.raises(IndexError, match=f"hold {bad}, but this model's vocabulary has the ids 0 to 319"):
            model(torch.tensor([[1, bad]]))
        with pytest.raises(IndexError, match=f"hold {bad}, but this model's vocabulary"):
            model.generate(torch.tensor([[1, bad]]), max_new_tokens=1)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="has 5 columns, but there are 5 cached and 5 new tokens"):
        model(ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="has 5 columns, but there are 5 cached and 5 new tokens"):
        model(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), position_ids=torch.arange(5, 10)[None])
    with pytest.raises(ValueError, match="must be a transformers Cache, found int"):
        model(ids, past_key_values=5)
    single_layer = types.SimpleNamespace(key_cache=torch.zeros(1), update=None)  # the StaticCache of 4.38 to 4.40
    with pytest.raises(ValueError, match="StaticCache holds a single layer"):
        model(ids, past_key_values=single_layer)
