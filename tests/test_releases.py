"""What holds for releases of transformers that differ from today's, those that don't exist yet above all."""

from __future__ import annotations

import ast
import importlib
import logging
import re
import sys
import types
import warnings

import matrix
import pytest
import torch
import transformers
from conftest import CODE, ROOT, compat, random_ids, tiny_model
from qwen.transformers_compat import ALL_ATTENTION_FUNCTIONS, CACHE, DynamicCache
from transformers import GenerationMixin

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NEW = 6
FUTURE = "99.0.0"


def generate(model, ids, **kwargs):
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, **GREEDY, **kwargs})


# --- What is said about releases ---------------------------------------------------------------------------------


def test_the_newest_tested_release_is_the_same_everywhere():
    oldest, newest = compat.TESTED
    assert (oldest, newest) == (matrix.RELEASES[0], matrix.RELEASES[-1])
    assert f"\ntransformers=={newest}; python_version >= " in (ROOT / "requirements.txt").read_text()
    assert re.search(rf"\| transformers \| {oldest}, .* to {newest}: ", (ROOT / "README.md").read_text())
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert f"With a release newer than {newest} " in page
    assert f"4.57.6 and {newest}:" in page


def test_the_newest_version_is_read_from_what_pip_prints():
    answer = "torch (2.13.0+cpu)\nAvailable versions: 2.13.0+cpu, 2.13.0, 2.12.1\n  INSTALLED: 2.13.0+cpu\n"
    assert matrix.first_version(answer) == "2.13.0"
    assert matrix.first_version("transformers (5.24.0)\nAvailable versions: 5.24.0") == "5.24.0"
    with pytest.raises(ValueError, match="ERROR: No matching"):
        matrix.first_version("ERROR: No matching distribution found for transformers")


# --- Two names of the cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_goes_in_and_out_under_both_names(name):
    model, ids = tiny_model(), random_ids(2, 9)
    expected = model(ids).logits
    for network in (model, model.transformer):
        cache = DynamicCache()
        first = network(ids[:, :5], **{name: cache})
        assert first.past_key_values is first.cache is cache
        assert tuple(first)[1] == CACHE
        assert first[1] is cache
        second = network(ids[:, 5:], **{name: cache})
        if network is model:
            torch.testing.assert_close(second.logits, expected[:, 5:])
        assert cache.get_seq_length() == 9
        assert network(ids, use_cache=False).cache is None
    cache = DynamicCache()
    output = generate(model, ids, return_dict_in_generate=True, **{name: cache})
    assert torch.equal(output.sequences, generate(model, ids))
    assert cache.get_seq_length() == 9 + NEW - 1
    if hasattr(output, CACHE):  # from 4.36
        assert output.cache is output.past_key_values is cache


def test_two_caches_are_refused():
    model, ids = tiny_model(), random_ids(1, 5)
    for call in (model, model.transformer, model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(ids, past_key_values=DynamicCache(), cache=DynamicCache())
    cache = DynamicCache()
    model(ids, past_key_values=cache, cache=cache)
    assert cache.get_seq_length() == 5


def test_chat_takes_both_names(demo_tokenizer):
    model = tiny_model(vocab_size=len(demo_tokenizer))
    model.generation_config = transformers.GenerationConfig(chat_format="chatml")
    settings = {"do_sample": False, "max_new_tokens": 4}
    _, history, cache = model.chat(demo_tokenizer, "hi", None, return_past_key_values=True, **settings)
    expected, _ = model.chat(demo_tokenizer, "and?", history, **settings)
    length = cache.get_seq_length()
    response, _ = model.chat(demo_tokenizer, "and?", history, cache=cache, **settings)
    assert response == expected
    assert cache.get_seq_length() > length
    assert list(model.chat_stream(demo_tokenizer, "and?", history, cache=cache, **settings))[-1] == expected


def test_published_names_bring_no_warnings(caplog):
    model, ids = tiny_model(), random_ids(1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = model(ids, past_key_values=DynamicCache()).past_key_values
        generate(model, torch.cat((ids, ids), 1), past_key_values=cache)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_layer_that_is_computed_again_writes_no_cache_twice():
    """Gradient checkpointing takes the cache away from the layers, under whatever name it goes."""
    ids = random_ids(2, 8)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        cache = DynamicCache()
        model(ids, labels=ids, use_cache=True, past_key_values=cache).loss.backward()
        gradients.append(model.transformer.h[0].attn.c_attn.weight.grad)
        assert cache.get_seq_length() == (0 if checkpointing else 8)
    torch.testing.assert_close(*gradients)


# --- Arguments that nobody knows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        DynamicCache(),
        torch.zeros(1, 5, dtype=torch.int64),
        {"full_attention": torch.ones(1, 5)},
        (torch.ones(1, 5),),
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_forward_would_leave_out_is_refused(value):
    model, ids = tiny_model(), random_ids(1, 5)
    for network in (model, model.transformer):
        with pytest.raises(ValueError) as refused:
            network(ids, unheard_of=value)
        text = str(refused.value)
        assert "'unheard_of'" in text
        assert type(value).__name__ in text
        assert f"transformers {transformers.__version__}; tested are {' to '.join(compat.TESTED)}" in text


def test_what_changes_no_result_or_reaches_the_attention_passes(monkeypatch):
    model, ids = tiny_model(), random_ids(1, 5)
    expected = model(ids).logits
    plain = {"unheard_of": None, "a_flag": True, "a_number": 3, "a_name": "x", "token_type_ids": torch.zeros_like(ids)}
    assert torch.equal(model(ids, **plain).logits, expected)
    seen = []

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, own_table=None, **kwargs):
        seen.append(own_table)
        return modeling().eager_attention_forward(module, query, key, value, attention_mask, scaling)

    def modeling():
        return importlib.import_module("qwen.modeling_qwen")

    monkeypatch.setitem(getattr(ALL_ATTENTION_FUNCTIONS, "_global_mapping", ALL_ATTENTION_FUNCTIONS), "own", attention)
    model.config._attn_implementation = "own"
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(model(ids, attention_mask=mask, own_table={0: "page"}).logits, expected)
    assert seen == [{0: "page"}] * 3
    with pytest.raises(ValueError, match="'another_table'"):
        model(ids, attention_mask=mask, another_table={0: "page"})


# --- Releases that don't exist -----------------------------------------------------------------------------------


@pytest.fixture
def future(monkeypatch):
    """The modules as they are imported where transformers says that it is newer, as a package of their own."""
    if not hasattr(transformers.PreTrainedModel, "can_generate") or issubclass(
        transformers.PreTrainedModel, GenerationMixin
    ):
        pytest.skip("what comes is like today's releases: models no longer inherit generation, from 4.50 on")
    monkeypatch.setattr(transformers, "__version__", FUTURE)
    package = types.ModuleType("future")
    package.__path__ = [str(ROOT)]
    monkeypatch.setitem(sys.modules, "future", package)
    modeling = importlib.import_module("future.modeling_qwen")
    yield modeling
    for name in [name for name in sys.modules if name.startswith("future.")]:
        del sys.modules[name]


@pytest.fixture
def model(future):
    assert sys.modules["future.transformers_compat"].IS_NEWER
    today = tiny_model(use_dynamic_ntk=True, use_logn_attn=True)
    network = future.QWenLMHeadModel(future.QWenConfig(**today.config.to_dict())).eval()
    network.load_state_dict(today.state_dict())
    return network


@pytest.fixture
def today():
    return tiny_model(use_dynamic_ntk=True, use_logn_attn=True)


def ways(ids, assistant, config):
    """Keyword arguments of many ways to generate."""
    rows = torch.nn.functional.pad(torch.ones_like(ids), (0, 0))
    rows[1, :4] = 0
    yield "greedy", {}
    yield "padded", {"attention_mask": rows}
    yield "beams", {"num_beams": 3}
    yield "sampled", {"do_sample": True, "top_k": 5, "num_return_sequences": 2}
    yield "without a cache", {"use_cache": False}
    yield "static cache", {"cache_implementation": "static", "disable_compile": True}
    yield "given cache", {"past_key_values": DynamicCache()}
    yield "guided", {"guidance_scale": 1.5}
    yield "one token", {"max_new_tokens": 1}
    yield "dictionary", {"return_dict_in_generate": True}
    yield "assisted", {"assistant_model": assistant, "one row": True}
    yield "looked up", {"prompt_lookup_num_tokens": 3, "one row": True}
    if hasattr(transformers.GenerationConfig(), "prefill_chunk_size") and CACHE == "cache":
        yield "in chunks", {"prefill_chunk_size": 4}


def test_a_release_that_changes_nothing_gives_the_same_after_one_warning(model, today, caplog):
    ids = random_ids(2, 12)
    for (name, kwargs), (_, same) in zip(ways(ids, model, model.config), ways(ids, today, today.config)):
        chosen = ids[:1] if kwargs.pop("one row", False) else ids
        same.pop("one row", None)
        outputs = []
        for network, arguments in ((model, kwargs), (today, same)):
            torch.manual_seed(0)
            output = generate(network, chosen, **arguments)
            outputs.append(output if torch.is_tensor(output) else output.sequences)
        assert torch.equal(*outputs), name
    embeds = model.get_input_embeddings()(ids)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, **GREEDY}
    new = model.generate(inputs_embeds=embeds, **arguments)
    assert torch.equal(new, generate(today, ids)[:, 12:])
    cache = DynamicCache()
    first = generate(model, ids, cache=cache)
    more = torch.cat((first, ids[:, :3]), 1)
    other = DynamicCache()
    generate(today, ids, cache=other)
    assert torch.equal(generate(model, more, cache=cache), generate(today, more, cache=other))
    said = [record.getMessage() for record in caplog.records if FUTURE in record.getMessage()]
    assert len(said) == 1
    assert f"tested are {' to '.join(compat.TESTED)}" in said[0]


def change_inputs(monkeypatch, change):
    """A release whose `prepare_inputs_for_generation` returns something else."""
    original = GenerationMixin.prepare_inputs_for_generation

    def prepare(self, *args, **kwargs):
        return change(original(self, *args, **kwargs))

    prepare.__wrapped__ = original
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare)


def test_a_renamed_argument_is_an_error(monkeypatch, future, model):
    change_inputs(monkeypatch, lambda inputs: {"kv_store" if k == CACHE else k: v for k, v in inputs.items()})
    with pytest.raises(ValueError, match=rf"'kv_store' \(\w+Cache\).*transformers {FUTURE}; tested are"):
        generate(model, random_ids(1, 8))


@pytest.mark.parametrize("name", ["segment_ids", "mask_2d", "positions"])
def test_a_new_argument_with_a_tensor_is_an_error(monkeypatch, model, name):
    change_inputs(monkeypatch, lambda inputs: {**inputs, name: torch.ones_like(inputs["input_ids"])})
    with pytest.raises(ValueError, match=rf"'{name}' \(Tensor \(1, 8\)"):
        generate(model, random_ids(1, 8))


@pytest.mark.parametrize("renamed", ["attention_mask", "position_ids"])
def test_a_renamed_mask_is_an_error(monkeypatch, model, renamed):
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    change_inputs(monkeypatch, lambda inputs: {"new" if k == renamed else k: v for k, v in inputs.items()})
    with pytest.raises(ValueError, match=r"'new' \(Tensor"):
        generate(model, ids, attention_mask=mask)


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=str)
def test_a_renamed_output_is_noticed_at_the_second_step(monkeypatch, model, way):
    """Where it is asked for leniently nothing comes back, and the last token would be read alone."""
    original = GenerationMixin._update_model_kwargs_for_generation

    def update(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = original(self, outputs, model_kwargs, *args, **kwargs)
        return {**model_kwargs, CACHE: outputs.get("kv_store")}

    monkeypatch.setattr(GenerationMixin, "_update_model_kwargs_for_generation", update)
    if CACHE != "cache":
        pytest.skip("before 5.24 the whole sequence is read again")
    with pytest.raises((RuntimeError, ValueError), match=r"the answer would be wrong|cannot use beam search"):
        generate(model, random_ids(1, 8), **way)


def test_a_cache_that_lost_tokens_or_got_them_twice_is_noticed(monkeypatch, model):
    original = GenerationMixin._update_model_kwargs_for_generation
    for change in (lambda cache: compat.crop_cache(cache, 5), repeat_last):

        def update(self, outputs, model_kwargs, *args, change=change, **kwargs):
            change(outputs.past_key_values)
            return original(self, outputs, model_kwargs, *args, **kwargs)

        monkeypatch.setattr(GenerationMixin, "_update_model_kwargs_for_generation", update)
        with pytest.raises(RuntimeError, match="the answer would be wrong"):
            generate(model, random_ids(1, 8), past_key_values=DynamicCache())


def repeat_last(cache) -> None:
    for layer in range(3):
        state = torch.zeros(1, 4, 1, 16)
        cache.update(state, state, layer)


def test_another_order_of_arguments_is_an_error_or_right(monkeypatch, future, model, today):
    ids = random_ids(1, 8)

    def call(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        kwargs.pop("return_dict", None)
        return torch.nn.Module.__call__(self, input_ids, position_ids, attention_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(future.QWenLMHeadModel, "__call__", call)
        with pytest.raises(TypeError, match="by name"):
            generate(model, ids)

    original = GenerationMixin.generate

    def generate_in_another_order(self, inputs=None, logits_processor=None, generation_config=None, **kwargs):
        return original(self, inputs, generation_config, logits_processor, **kwargs)

    settings = transformers.GenerationConfig(max_new_tokens=3, **GREEDY)
    settings.eos_token_id = None
    expected = today.generate(ids, settings, attention_mask=torch.ones_like(ids))
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", generate_in_another_order)
        assert torch.equal(model.generate(ids, settings, attention_mask=torch.ones_like(ids)), expected)

    def from_config(cls, torch_dtype, config, **kwargs):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "_from_config", classmethod(from_config))
        sys.modules["future.transformers_compat"]._check_release.cache_clear()
        with pytest.raises(RuntimeError, match="has changed what this code relies on: _from_config"):
            generate(model, ids)


def test_generating_past_the_check_is_an_error(monkeypatch, model):
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **kwargs: kwargs["inputs"])
    with pytest.raises(RuntimeError, match="no step in a way that could be checked"):
        generate(model, random_ids(1, 8))


# --- Private names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", compat.PRIVATE_NAMES)
def test_private_names_are_what_they_are_taken_for(name):
    assert compat.PRIVATE_NAMES[name](), name


def test_a_changed_private_name_is_noticed(monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedModel, "_from_config", lambda dtype, config: None)
    assert not compat.PRIVATE_NAMES["_from_config"]()


def test_all_private_names_are_listed():
    """Those that our classes override, and those that modules other than the room for releases read."""
    if transformers.__version__ != compat.TESTED[1]:
        pytest.skip("older releases have shims, which are feature tests")
    private = re.compile(r"_[a-z]")
    own, read, overridden = set(), set(), set()
    for file in (name for name in CODE if name.endswith(".py") and not name.startswith("triton_")):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self":
                    own.add(node.attr)
                elif file != "transformers_compat.py":
                    read.add(node.attr)
        module = importlib.import_module("qwen." + file[:-3])
        for thing in vars(module).values():
            if isinstance(thing, type) and thing.__module__ == module.__name__:
                bases = [vars(base) for base in thing.__mro__ if base.__module__.startswith("transformers.")]
                overridden |= {n for n in vars(thing) if private.match(n) and any(n in base for base in bases)}
    overridden.discard("_abc_impl")
    assert "_from_config" in overridden
    assert overridden <= set(compat.PRIVATE_NAMES)
    torchs = {*vars(torch.nn.Module()), *vars(torch.nn.modules.module)}
    assert {name for name in read - own - torchs if private.match(name)} <= set(compat.PRIVATE_NAMES)
