"""A decoding step from the weights against the layers, and what keeps a step from being computed that way."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib

import pytest
import torch
from conftest import modeling_qwen, needs_sdpa, random_ids, tiny_model
from qwen.transformers_compat import DynamicCache
from test_quantization import with_codes
from torch import nn

qwen_cache = importlib.import_module("qwen.qwen_cache")
qwen_decode = importlib.import_module("qwen.qwen_decode")
qwen_ops = importlib.import_module("qwen.qwen_ops")
QWenCache, QWenQuantizedCache = qwen_cache.QWenCache, qwen_cache.QWenQuantizedCache

NTK_LOGN = {"seq_length": 16, "use_dynamic_ntk": True, "use_logn_attn": True}
PLAIN = {"use_dynamic_ntk": False, "use_logn_attn": False}


@contextlib.contextmanager
def without_layers(allowed: bool = False):
    """Calls of blocks fail, or are counted."""
    calls = []
    to_device_of = modeling_qwen.to_device_of  # of each block, before it is called: a patched one would not be left out

    def watched(block, inputs):
        assert allowed, "the step went through the layers"
        calls.append(block)
        return to_device_of(block, inputs)

    modeling_qwen.to_device_of = watched
    try:
        yield calls
    finally:
        modeling_qwen.to_device_of = to_device_of


def filled(model, make, ids, **kwargs):
    cache = make()
    with torch.no_grad():
        model(ids, past_key_values=cache, **kwargs)
    return cache


@pytest.mark.parametrize("settings", [PLAIN, NTK_LOGN, {**NTK_LOGN, "no_bias": False, "rotary_pct": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("padding", [0, 5])
def test_equals_the_layers(settings, dtype, new, padding):
    model = tiny_model(**settings).to(dtype)
    ids = random_ids(2, 24 + new)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    arguments = {"attention_mask": mask[:, :24]} if padding else {}
    caches = [filled(model, make, ids[:, :24], **arguments) for make in (QWenCache, DynamicCache)]
    arguments = {"attention_mask": mask} if padding else {}
    with torch.no_grad():
        with without_layers():
            logits = model(ids[:, 24:], past_key_values=caches[0], **arguments).logits
        expected = model(ids[:, 24:], past_key_values=caches[1], **arguments).logits
    assert logits.dtype == dtype
    bound = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 5e-3}[dtype]
    assert (logits - expected).norm() <= bound * expected.norm()
    for layer in range(3):
        for ours, theirs in zip(caches[0][layer], filled(model, QWenCache, ids, **arguments)[layer]):
            real = mask.bool()[:, None, :, None].expand_as(ours)
            assert (ours[real] - theirs[real]).norm() <= bound * theirs[real].norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_equals_the_layers_over_a_quantised_cache(bits):
    model = tiny_model(**NTK_LOGN)
    ids = random_ids(2, 30)
    one, other = (filled(model, lambda: QWenQuantizedCache(bits), ids[:, :24]) for _ in range(2))
    with torch.no_grad():
        with without_layers():
            logits = [model(ids[:, i : i + 1], past_key_values=one).logits for i in range(24, 30)]
        model.transformer.h[1].register_forward_hook(lambda *args: None)  # through the layers
        with without_layers(allowed=True) as calls:
            expected = [model(ids[:, i : i + 1], past_key_values=other).logits for i in range(24, 30)]
    assert len(calls) == 6 * 3
    torch.testing.assert_close(torch.cat(logits, 1), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", [{"bits": 4, "lm_head": True}, {"bits": 8, "sym": False}, {"bits": 4, "desc_act": True}], ids=str
)
def test_matrices_of_gptq(kind, dtype):
    """Steps of few rows, for which there is a kernel, and of many."""
    with torch.no_grad():
        model = with_codes(tiny_model(**NTK_LOGN).to(dtype), **kind)
    for rows in (1, 9):
        ids = random_ids(rows, 26)
        ours, theirs = (filled(model, make, ids[:, :24]) for make in (QWenCache, DynamicCache))
        with torch.no_grad():
            with without_layers():
                found = model(ids[:, 24:], past_key_values=ours).logits
            expected = model(ids[:, 24:], past_key_values=theirs).logits
        assert (found - expected).norm() <= (2e-5 if dtype == torch.float32 else 0.05) * expected.norm()


def test_masks_positions_and_what_is_kept():
    model = tiny_model(**NTK_LOGN)
    ids = random_ids(2, 30)
    seen = torch.rand(2, 1, 4, 30) > 0.3
    seen[..., -4:] = torch.eye(4, dtype=torch.bool)
    for arguments in (
        {"attention_mask": seen},
        {"position_ids": torch.arange(26, 30)[None] + 5},
        {"logits_to_keep": 1},
        {"logits_to_keep": torch.tensor([0, 2])},
        {"ntk_alpha": torch.tensor([15.0, 15.0])},  # the cache remembers another one
        {"use_cache": True, "output_attentions": False, "labels": None},
    ):
        caches = [filled(model, make, ids[:, :26]) for make in (QWenCache, DynamicCache)]
        with torch.no_grad():
            with without_layers():
                output = model(ids[:, 26:], past_key_values=caches[0], **arguments)
            expected = model(ids[:, 26:], past_key_values=caches[1], **arguments).logits
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
        assert output.past_key_values is caches[0]


def test_the_place_in_the_cache_is_a_position():
    """What `generate` of releases up to 4.57 says, and Qwen2 there counts positions from."""
    model, ids = tiny_model(**NTK_LOGN), random_ids(2, 27)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for padded in ({}, {"attention_mask": mask}):
        places = torch.tensor([20 if padded else 31])
        caches = [filled(model, make, ids[:, :26]) for make in (QWenCache, DynamicCache)]
        with torch.no_grad():
            with without_layers():
                found = model(ids[:, 26:], past_key_values=caches[0], cache_position=places, **padded).logits
            rows = (mask.cumsum(-1) - 1)[:, places] if padded else places[None]
            expected = model(ids[:, 26:], past_key_values=caches[1], position_ids=rows, **padded).logits
            other = model(ids[:, 26:], past_key_values=filled(model, QWenCache, ids[:, :26]), **padded).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - other).abs().max() > 0.01


def test_the_network_without_its_head():
    model = tiny_model(**NTK_LOGN).transformer
    ids = random_ids(2, 30)
    cache = filled(model, QWenCache, ids[:, :26])
    with torch.no_grad():
        expected = model(ids).last_hidden_state[:, 26:]
        with without_layers():
            output = model(inputs_embeds=model.wte(ids[:, 26:]), past_key_values=cache)
            assert output.to_tuple()[1] is cache
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Subclass(torch.Tensor):
    pass


def exchange(model):
    linear = model.transformer.h[1].mlp.w1
    model.transformer.h[1].mlp.w1 = Doubled(linear.in_features, linear.out_features, linear.bias is not None)


def patch(model):
    norm = model.transformer.ln_f
    forward = norm.forward
    norm.forward = lambda x: forward(x) * 2


class Wrapped(nn.Module):
    """Around a module, whose attributes it gives for its own."""

    def __init__(self, module, factor=2):
        super().__init__()
        self.module, self.factor = module, factor

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs) * self.factor


class Opaque(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def wrap_block(model):
    model.transformer.h[1] = Opaque(model.transformer.h[1])


def reorder(model):
    one, other, last = model.transformer.h
    model.transformer.h = nn.ModuleList([other, one, last])


NOT_PLAIN = {
    "another norm": lambda m: setattr(m.transformer, "ln_f", nn.LayerNorm(m.config.hidden_size)),
    "a wrapped norm": lambda m: setattr(m.transformer, "ln_f", Wrapped(m.transformer.ln_f)),
    "no norm": lambda m: setattr(m.transformer, "ln_f", nn.Identity()),
    "a wrapped block": wrap_block,
    "blocks in another order": reorder,
    "a norm of another epsilon": lambda m: setattr(m.transformer.h[1].ln_2, "eps", 1.0),
    "hook of the dropout": lambda m: m.transformer.drop.register_forward_hook(lambda m, x, y: y * 2),
    "another dropout": lambda m: setattr(m.transformer, "drop", nn.Hardtanh(-0.01, 0.01)),
    "hook of a matrix": lambda m: m.transformer.h[2].attn.c_attn.register_forward_hook(lambda m, x, y: y * 2),
    "hook before a matrix": lambda m: m.transformer.h[0].mlp.w2.register_forward_pre_hook(lambda m, x: (x[0] * 2,)),
    "hook of a block": lambda m: m.transformer.h[0].register_forward_hook(lambda m, x, y: y * 2),
    "hook of a norm": lambda m: m.transformer.h[0].ln_2.register_forward_hook(lambda m, x, y: y * 2),
    "hook of the last norm": lambda m: m.transformer.ln_f.register_forward_hook(lambda m, x, y: y * 2),
    "hook of the network": lambda m: m.transformer.register_forward_hook(lambda m, x, y: None),
    "hook of the head": lambda m: m.lm_head.register_forward_hook(lambda m, x, y: y * 2),
    "hook of the activation": lambda m: m.transformer.h[0].mlp.act.register_forward_hook(lambda m, x, y: y * 2),
    "another class of matrix": exchange,
    "a patched forward": patch,
    "another activation": lambda m: setattr(m.transformer.h[0].mlp, "act", nn.GELU()),
    "a parametrization": lambda m: nn.utils.parametrizations.spectral_norm(m.transformer.h[0].mlp.w1),
    "a norm of numbers that lie apart": lambda m: setattr(
        m.transformer.h[1].ln_1, "weight", nn.Parameter(torch.ones(m.config.hidden_size, 2)[:, 0], requires_grad=False)
    ),
    "a weight of another precision": lambda m: m.transformer.h[0].mlp.w1.bfloat16(),
    "a subclass of tensors": lambda m: setattr(
        m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach().as_subclass(Subclass), requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", NOT_PLAIN)
def test_what_is_not_plain_goes_through_the_layers(change):
    model = tiny_model(**PLAIN)
    NOT_PLAIN[change](model)
    ids = random_ids(2, 12)
    if "precision" in change:  # which the layers refuse
        cache = QWenCache()
        whole = tiny_model(**PLAIN)
        with torch.no_grad():
            whole(ids[:, :9], past_key_values=cache)
            with pytest.raises(RuntimeError, match="dtype"):
                model(ids[:, 9:], past_key_values=cache)
        return
    cache = filled(model, QWenCache, ids[:, :9])
    with torch.no_grad():
        with without_layers(allowed=True) as calls:
            logits = model(ids[:, 9:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 9:]
    assert len(calls) == 3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def doubled(forward):
    return lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 2


def doubled_as_decorators_do(forward):
    """It says that it is of the module that the other function is of."""
    return functools.wraps(forward)(doubled(forward))


@pytest.mark.parametrize("patch", [doubled, doubled_as_decorators_do])
@pytest.mark.parametrize("owner", ["RMSNorm", "QWenAttention", "QWenMLP", "Linear", "hook", "hook before"])
def test_classes_that_are_patched_and_hooks_of_all_modules_are_not_left_out(owner, patch, monkeypatch):
    model, ids = tiny_model(**PLAIN), random_ids(2, 12)
    handle = None
    if owner == "hook":
        register = nn.modules.module.register_module_forward_hook
        handle = register(lambda m, x, y: y * 2 if isinstance(m, modeling_qwen.QWenMLP) else None)
    elif owner == "hook before":
        register = nn.modules.module.register_module_forward_pre_hook
        handle = register(lambda m, x: (x[0] * 2,) if isinstance(m, modeling_qwen.QWenMLP) else None)
    else:
        kind = nn.Linear if owner == "Linear" else getattr(modeling_qwen, owner)
        monkeypatch.setattr(kind, "forward", patch(kind.forward))
    try:
        cache = filled(model, QWenCache, ids[:, :9])
        with torch.no_grad():
            logits = model(ids[:, 9:], past_key_values=cache).logits
            expected = model(ids, use_cache=False).logits[:, 9:]
    finally:
        if handle is not None:
            handle.remove()
    assert (logits - expected).norm() <= 1e-4 * expected.norm()


def test_every_block_has_its_own_scale_of_the_scores():
    model, ids = tiny_model(**PLAIN), random_ids(2, 12)
    model.transformer.h[1].attn.scaling = 1.0
    cache = filled(model, QWenCache, ids[:, :9])
    with torch.no_grad():
        with without_layers():
            logits = model(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 9:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["own", "sdpa"])
def test_an_attention_function_of_the_user_is_asked(name, monkeypatch):
    table = importlib.import_module("qwen.transformers_compat").ALL_ATTENTION_FUNCTIONS
    model, ids = tiny_model(**PLAIN), random_ids(2, 12)

    def mean(module, query, key, value, attention_mask, **kwargs):
        return value.mean(2, keepdim=True).expand_as(query).transpose(1, 2), None

    monkeypatch.setitem(getattr(table, "_global_mapping", table), name, mean)
    model.config._attn_implementation = name
    mask = torch.ones(2, 1, 3, 12, dtype=torch.bool)
    logits = []
    for make in (QWenCache, DynamicCache):
        cache = make()
        with torch.no_grad():
            model(ids[:, :9], past_key_values=cache, attention_mask=mask[:, :, :1, :9].expand(2, 1, 9, 9))
            logits.append(model(ids[:, 9:], past_key_values=cache, attention_mask=mask).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["embedding", "attention"])
def test_dropout_that_is_left_on_drops(where):
    model, ids = tiny_model(emb_dropout_prob=0.5, attn_dropout_prob=0.5, **PLAIN), random_ids(2, 12)
    (model.transformer.drop if where == "embedding" else model.transformer.h[2].attn).train()
    begun = filled(model, QWenCache, ids[:, :9])
    logits = []
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            logits.append(model(ids[:, 9:], past_key_values=copy.deepcopy(begun)).logits)
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "asked", [{"output_hidden_states": True}, {"labels": random_ids(2, 3)}, {"marker": 7}, {"use_cache": False}]
)
def test_a_call_that_asks_for_more_goes_through_the_layers(asked):
    model = tiny_model(**PLAIN)
    ids = random_ids(2, 12)
    cache = filled(model, QWenCache, ids[:, :9])
    with torch.no_grad(), without_layers(allowed=True) as calls:
        output = model(ids[:, 9:], past_key_values=cache, **asked)
    assert len(calls) == 3
    if "output_hidden_states" in asked:
        assert len(output.hidden_states) == 4
    if "labels" in asked:
        assert output.loss > 0
    assert output.past_key_values is (None if "use_cache" in asked else cache)
    assert cache.get_seq_length() == 12


def test_attention_weights_are_those_of_the_eager_function():
    model = tiny_model(**PLAIN)
    ids = random_ids(2, 12)
    cache = filled(model, QWenCache, ids[:, :9])
    with torch.no_grad():
        found = model(ids[:, 9:], past_key_values=cache, output_attentions=True).attentions
        expected = model(ids, output_attentions=True).attentions
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs[:, :, 9:], rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_weights_behind_a_cache():
    model = tiny_model(**PLAIN)
    ids = random_ids(2, 12)
    cache = filled(model, QWenCache, ids[:, :9])
    model(ids[:, 9:], past_key_values=cache).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.transformer.h.parameters())


@needs_sdpa
def test_derivatives_in_forward_mode_are_not_lost():
    model = tiny_model(attn_implementation="eager", **PLAIN)
    ids = random_ids(1, 12)
    embeds = model.transformer.wte(ids).detach()
    tangent = torch.randn_like(embeds)

    def of_the_end(x):
        cache = QWenCache()
        model(inputs_embeds=x[:, :9], past_key_values=cache)
        return model(inputs_embeds=x[:, 9:], past_key_values=cache).logits

    with torch.no_grad():
        _, derivative = torch.func.jvp(of_the_end, (embeds,), (tangent,))
        _, expected = torch.func.jvp(lambda x: model(inputs_embeds=x).logits[:, 9:], (embeds,), (tangent,))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(derivative, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [QWenCache, QWenQuantizedCache])
def test_the_cache_of_a_model_with_other_heads_is_refused(make):
    """As many numbers together are not the same heads."""
    model, other = tiny_model(**PLAIN), tiny_model(num_attention_heads=2, kv_channels=32, **PLAIN)
    cache = filled(other, make, random_ids(1, 9))
    with torch.no_grad(), pytest.raises(ValueError, match=r"holds 1 rows of 2 heads, the new tokens are \(1, 4\)"):
        model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("change", ["in place", "exchanged", "another dtype"])
def test_weights_that_change_between_steps_are_the_new_ones(change):
    model = tiny_model(**PLAIN)
    ids = random_ids(1, 12)
    cache = filled(model, QWenCache, ids[:, :9])
    with torch.no_grad():
        before = model(ids[:, 9:10], past_key_values=cache).logits
        w1 = model.transformer.h[0].mlp.w1
        if change == "in place":
            w1.weight.mul_(3)
        elif change == "exchanged":
            w1.weight = nn.Parameter(w1.weight * 3)
        else:
            model.double()
        cache.crop(9)
        fresh = DynamicCache()
        layers = [tuple(t.to(model.dtype) for t in cache[i]) for i in range(3)]
        for i, (keys, values) in enumerate(layers):
            fresh.update(keys, values, i)
        if change == "another dtype":
            cache = filled(model, QWenCache, ids[:, :9])
        after = model(ids[:, 9:10], past_key_values=cache).logits
        expected = model(ids[:, 9:10], past_key_values=fresh).logits
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    if change != "another dtype":
        assert (after - before).abs().max() > 1e-3


def test_a_wrong_id_and_a_short_mask_are_the_errors_of_the_network():
    model = tiny_model(**PLAIN)
    cache = filled(model, QWenCache, random_ids(1, 9))
    with torch.no_grad():
        with pytest.raises(IndexError, match="input_ids hold 320, but this model's vocabulary has the ids 0 to 319"):
            model(torch.tensor([[320]]), past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask has 1 columns, but there are 9 cached and 1 new"):
            model(torch.tensor([[3]]), past_key_values=cache, attention_mask=torch.ones(1, 1))
        where = {"attention_mask": torch.ones(1, 2), "position_ids": torch.tensor([[9]])}
        with pytest.raises(ValueError, match="attention_mask has 2 columns, but there are 9 cached and 1 new"):
            model(torch.tensor([[3]]), past_key_values=cache, **where)
        assert cache.get_seq_length() == 9
        model(torch.tensor([[3]]), past_key_values=cache)


@pytest.mark.parametrize("make", [QWenCache, QWenQuantizedCache])
@pytest.mark.parametrize(
    "refused",
    [{"position_ids": torch.tensor([[9, 10]])}, {"attention_mask": torch.ones(1, 3, 1, 10, dtype=torch.bool)}],
    ids=["positions", "mask"],
)
def test_a_refused_step_leaves_the_cache_as_it_was(refused, make):
    """The tokens that it would have added are not there: the next step must not attend to them."""
    model, ids = tiny_model(**PLAIN), random_ids(1, 10)
    cache, expected = (filled(model, make, ids[:, :9]) for _ in range(2))
    with torch.no_grad(), without_layers():
        with pytest.raises(RuntimeError):
            model(ids[:, 9:], past_key_values=cache, **refused)
        assert cache.get_seq_length() == 9
        found, expected = (model(ids[:, 9:], past_key_values=c).logits for c in (cache, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_same_through_generate_with_and_without_the_step(monkeypatch):
    model = tiny_model(**NTK_LOGN)
    prompt = random_ids(2, 14)
    mask = torch.ones_like(prompt)
    mask[1, :6] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with without_layers(allowed=True) as calls:
        fast = model.generate(prompt, past_key_values=QWenCache(), **settings)
    assert len(calls) == 3  # the prompt
    monkeypatch.setattr(qwen_decode, "_compute", lambda *args: None)
    assert model.generate(prompt, past_key_values=QWenCache(), **settings).tolist() == fast.tolist()
    assert copy.deepcopy(model).generate(prompt, past_key_values=DynamicCache(), **settings).tolist() == fast.tolist()


@pytest.mark.skipif(qwen_ops.FunctionMode is None, reason="PyTorch 1.12 has no function modes")
@pytest.mark.parametrize("tokens", [3, 40, 90])
def test_prompts_of_bfloat16_are_multiplied_as_the_cpu_can(tokens, monkeypatch):
    """By our product where PyTorch's is slow, and only there; with gradients PyTorch's."""
    model, ids, seen = tiny_model(**PLAIN).bfloat16(), random_ids(1, tokens), []
    expected = copy.deepcopy(model).double()(ids, use_cache=False).logits

    def watched(*args):
        seen.append(args[1])
        return product(*args)

    product = qwen_ops.linear
    monkeypatch.setattr(qwen_ops, "linear", watched)
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for is_fast, has_gradients in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(qwen_ops, "cpu_supports_bf16", lambda is_fast=is_fast: is_fast)
        seen.clear()
        with torch.set_grad_enabled(has_gradients):
            logits = model(ids, past_key_values=None if has_gradients else QWenCache()).logits
        assert len(seen) == (0 if is_fast or has_gradients else len(matrices))
        assert all(any(weight is m.weight for weight in seen) for m in matrices) == (not is_fast and not has_gradients)
        assert (logits.double() - expected).norm() < 0.02 * expected.norm()
    logits.sum().backward()
    assert all(m.weight.grad is not None for m in matrices)


def test_adapters_of_embeddings_generate():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(**PLAIN), random_ids(1, 6)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    adapters = peft.LoraConfig(target_modules=["wte", "w1"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, adapters).eval()
    found = adapted.generate(input_ids=ids, past_key_values=QWenCache(), **settings)
    assert found.tolist() == adapted.merge_and_unload().generate(ids, use_cache=False, **settings).tolist()


def patch_class(model):
    modeling_qwen.QWenMLP.forward = doubled(modeling_qwen.QWenMLP.forward)


def hook_all(model):
    def hook(module, x, y):
        return y * 2 if isinstance(module, modeling_qwen.QWenMLP) else None

    model.handle = nn.modules.module.register_module_forward_hook(hook)


def exchange_weight(model):
    w1 = model.transformer.h[1].mlp.w1
    w1.weight = nn.Parameter(w1.weight * 3)


def exchange_data(model):
    w1 = model.transformer.h[1].mlp.w1
    w1.weight.data = w1.weight.data * 3


def subclass(model):
    """Of the same memory."""
    w1 = model.transformer.h[1].mlp.w1
    w1.weight = nn.Parameter(w1.weight.detach().as_subclass(Subclass), requires_grad=False)


def other_tensors(model):
    """As `__setstate__` has it."""
    w1 = model.transformer.h[1].mlp.w1
    w1._parameters = {**w1._parameters, "weight": nn.Parameter(w1.weight * 3)}


def other_blocks(model):
    blocks = model.transformer.h
    blocks._modules = dict(zip(blocks._modules, reversed(blocks)))
    for layer_idx, block in enumerate(blocks):
        block.attn.layer_idx = layer_idx


def rename(model):
    mlp = model.transformer.h[1].mlp
    names = {"w1": "w2", "w2": "w1"}
    items = [(names.get(name, name), module) for name, module in mlp._modules.items()]
    mlp._modules.clear()
    mlp._modules.update(items)


class DoubledParameter(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs or {})
        return y * 2 if func is nn.functional.linear else y


WHILE_GENERATING = {name: change for name, change in NOT_PLAIN.items() if "precision" not in name}
WHILE_GENERATING["a patched class"] = patch_class
WHILE_GENERATING["hook of all modules"] = hook_all
WHILE_GENERATING["a subclass of a block's weight"] = subclass
WHILE_GENERATING["attention in training"] = lambda m: m.transformer.h[1].attn.train()
WHILE_GENERATING["another class of the same matrix"] = lambda m: setattr(
    m.transformer.h[1].mlp.w1, "__class__", Doubled
)
WHILE_GENERATING["another class of the same weight"] = lambda m: setattr(
    m.transformer.h[1].mlp.w1.weight, "__class__", DoubledParameter
)
WHILE_GENERATING["an attribute before a weight"] = lambda m: vars(m.transformer.h[1].mlp.w1).update(
    weight=m.transformer.h[1].mlp.w1.weight * 3
)
WHILE_GENERATING["blocks with the numbers of others"] = lambda m: [
    setattr(block.attn, "layer_idx", 2 - i) for i, block in enumerate(m.transformer.h)
]
PLAIN_AFTERWARDS = {
    "other parameters": other_tensors,
    "other blocks": other_blocks,
    "names of other matrices": rename,
    "a weight in place": lambda m: m.transformer.h[1].mlp.w1.weight.mul_(3),
    "another weight": exchange_weight,
    "another tensor of a weight": exchange_data,
    "another scale of the scores": lambda m: setattr(m.transformer.h[0].attn, "scaling", 3.0),
}


@pytest.mark.parametrize("change", [*WHILE_GENERATING, *PLAIN_AFTERWARDS])
def test_what_changes_while_it_generates_counts_from_the_next_token(change, monkeypatch):
    def generate():
        model, ids = tiny_model(**PLAIN), random_ids(2, 9)
        forward = modeling_qwen.QWenMLP.forward

        def processor(input_ids, scores):
            if input_ids.shape[1] == 12:
                {**WHILE_GENERATING, **PLAIN_AFTERWARDS}[change](model)
            return scores

        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
        try:
            with without_layers(allowed=True) as calls:
                cache = QWenCache()
                output = model.generate(
                    ids, past_key_values=cache, logits_processor=[processor], output_scores=True, **settings
                )
        finally:
            modeling_qwen.QWenMLP.forward = forward
            if hasattr(model, "handle"):
                model.handle.remove()
        return torch.stack(output.scores), len(calls)

    scores, calls = generate()
    assert calls == (3 if change in PLAIN_AFTERWARDS else 3 + 4 * 3)
    monkeypatch.setattr(qwen_decode, "_found_before", lambda network: None)
    expected, calls_of_looking = generate()
    assert calls == calls_of_looking
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


def test_a_network_is_looked_at_once_in_a_generation(monkeypatch):
    looked = []
    is_as_made = qwen_decode.is_as_made
    monkeypatch.setattr(qwen_decode, "is_as_made", lambda network: looked.append(network) or is_as_made(network))
    model = tiny_model(**PLAIN)
    for i in range(2):
        model.generate(random_ids(1, 9), past_key_values=QWenCache(), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert looked == [model.transformer] * (i + 1)
    assert not hasattr(qwen_decode._GENERATION, "found")
    cache = filled(model, QWenCache, random_ids(1, 9))
    for _ in range(2):  # steps of a caller's own
        with torch.no_grad():
            model(random_ids(1, 1), past_key_values=cache)
    assert len(looked) == 4


@pytest.mark.parametrize("change", ["zeros", "groups"])
def test_a_format_that_changes_while_it_generates_counts(change, monkeypatch):
    def generate():
        with torch.no_grad():
            model = with_codes(tiny_model(**PLAIN), bits=4, group_size=16).eval()
        w1 = model.transformer.h[1].mlp.w1
        assert w1.is_ordered

        def processor(input_ids, scores):
            if input_ids.shape[1] == 12 and change == "zeros":
                w1.format = dataclasses.replace(w1.format, zero_offset=1 - w1.format.zero_offset)
            elif input_ids.shape[1] == 12:
                w1.g_idx.copy_(w1.g_idx.flip(0))
                w1.set_order()
            return scores

        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
        cache = QWenCache()
        with without_layers(allowed=True) as calls:
            output = model.generate(
                random_ids(1, 9), past_key_values=cache, logits_processor=[processor], output_scores=True, **settings
            )
        assert len(calls) == 3
        return torch.stack(output.scores)

    scores = generate()
    monkeypatch.setattr(qwen_decode, "_found_before", lambda network: None)
    torch.testing.assert_close(scores, generate(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["wte", "rotary_emb"])
def test_what_a_step_calls_may_be_compiled(name):
    model, ids = tiny_model(**PLAIN), random_ids(1, 9)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "past_key_values": QWenCache()}
    expected = model.generate(ids, **{**settings, "past_key_values": QWenCache()})
    setattr(model.transformer, name, torch.compile(getattr(model.transformer, name), backend="eager"))
    assert model.generate(ids, **settings).tolist() == expected.tolist()


def test_hooks_of_all_modules_count_for_a_network_without_a_head_too():
    model, other, ids = tiny_model(**PLAIN), tiny_model(1, **PLAIN).transformer, random_ids(1, 9)
    cache, handles = filled(other, QWenCache, ids), []

    def processor(input_ids, scores):
        if input_ids.shape[1] == 11:
            register = nn.modules.module.register_module_forward_hook
            handles.append(register(lambda m, x, y: y * 2 if isinstance(m, modeling_qwen.QWenMLP) else None))
        before = len(calls)
        other(input_ids[:, -1:], past_key_values=cache)
        assert len(calls) - before == (3 if handles else 0)
        return scores

    settings = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, "use_cache": False}
    try:
        with without_layers(allowed=True) as calls:
            model.generate(ids, logits_processor=[processor], **settings)
    finally:
        for handle in handles:
            handle.remove()
    assert handles


def test_a_weight_that_changes_its_precision_while_it_generates_is_refused():
    """As by the layers; the kernels would read it as what it was."""
    model = tiny_model(**PLAIN)
    w1 = model.transformer.h[1].mlp.w1

    def processor(input_ids, scores):
        if input_ids.shape[1] == 12:
            w1.weight.data = w1.weight.data.bfloat16()
        return scores

    with pytest.raises(RuntimeError, match="dtype"):
        model.generate(random_ids(1, 9), max_new_tokens=8, pad_token_id=0, logits_processor=[processor])
