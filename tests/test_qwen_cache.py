"""The caches under every way of generating, against transformers' own and against what they are said to store."""

from __future__ import annotations

import contextlib
import copy
import importlib
import threading

import pytest
import torch
import transformers
from conftest import ROOT, lacks, needs_prefill_in_chunks, needs_sdpa, random_ids, run, sampled, tiny_config, tiny_model
from qwen.transformers_compat import DynamicCache, crop_cache
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

kernels = importlib.import_module("qwen.qwen_ops")
caches = importlib.import_module("qwen.qwen_cache")
QWenCache, QWenQuantizedCache = caches.QWenCache, caches.QWenQuantizedCache

NTK_LOGN = {"use_dynamic_ntk": True, "use_logn_attn": True}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CACHES = {
    "full": QWenCache,
    "int8": lambda: QWenQuantizedCache(8),
    "int4": lambda: QWenQuantizedCache(4),
    "int8, read back": lambda: QWenQuantizedCache(8, kernel=False),
}
every_cache = pytest.mark.parametrize("make", list(CACHES.values()), ids=list(CACHES))


@pytest.fixture(scope="module")
def model():
    return tiny_model(**NTK_LOGN)


def generate(model, ids, **kwargs):
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **GREEDY, **kwargs})


def logits(model, parts, cache, **kwargs):
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache, **kwargs).logits for part in parts], 1)


def padded(rows):
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return ids, mask


def assert_near(found, expected, share=5e-4):
    """The default leaves room for a few codes that another order of additions rounds the other way."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= share * expected.norm()


# --- What is stored and attended to ------------------------------------------------------------------------------


class RoundedCache(DynamicCache):
    """A DynamicCache that rounds keys and values as the format says: what decoding over codes must compute."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits

    def rounded(self, x):
        sizes = kernels.quantized_sizes(x.shape[-1], self.bits)
        stored = [torch.zeros(*x.shape[:-1], n, dtype=torch.uint8) for n in sizes]
        kernels.quantize_append_reference(*stored, x, 0)
        return kernels.rotate(kernels.dequantize(*stored, x.shape[-1])).to(x.dtype)

    def update(self, key, value, layer_idx, *args, **kwargs):
        T = key.shape[2]
        exact_to_itself = self.get_seq_length(layer_idx) == 0 or T > QWenQuantizedCache.MAX_NEW_TOKENS
        stored = super().update(self.rounded(key), self.rounded(value), layer_idx, *args, **kwargs)
        if not exact_to_itself:
            return stored
        return tuple(torch.cat((s[:, :, :-T], new), 2) for s, new in zip(stored, (key, value)))


@pytest.mark.parametrize("lengths", [(40, 1, 1, 1), (7, 5, 1, 3, 60, 1), (250, 5, 1, 1), (1, 1, 1), (300, 200, 20)])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_steps_attend_to_what_is_stored(model, bits, lengths):
    """A prompt, or many tokens, exactly to themselves; else to everything as it is stored; over growth, in pieces."""
    parts = random_ids(2, sum(lengths)).split(lengths, 1)
    cache = QWenCache() if bits is None else QWenQuantizedCache(bits)
    found = logits(model, parts, cache)
    if bits is None:
        assert_near(found, logits(model, parts, DynamicCache()), 2e-6)
    else:
        assert_near(found, logits(model, parts, RoundedCache(bits)))
    assert cache.get_seq_length() == sum(lengths)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.02), (4, 0.2)])
def test_reading_back_computes_the_same_but_for_what_is_new(model, bits, share):
    parts = random_ids(2, 60).split((50, 1, 1, 3, 1, 1, 3), 1)
    exact = logits(model, parts, DynamicCache())
    found = logits(model, parts, QWenQuantizedCache(bits, kernel=False))
    assert 1e-4 < (found - exact).norm() / exact.norm() < share


def test_memory_of_a_token():
    k = torch.randn(1, 2, 1024, 128).bfloat16()
    exact = 2 * 2 * k.numel()
    for cache, share in ((QWenCache(), 1), (QWenQuantizedCache(8), 0.53), (QWenQuantizedCache(4), 0.30)):
        cache.update(k, k, 0)
        assert share - 0.03 < cache.nbytes / exact <= share
        tensors = cache.layers[0].keys.tensors + cache.layers[0].values.tensors
        assert cache.nbytes == sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def test_storage_grows_in_blocks_and_stays_in_place_between():
    cache = QWenCache()
    k = torch.randn(1, 2, 600, 16)
    cache.update(k[:, :, :10], k[:, :, :10], 0)
    places = set()
    for i in range(10, 600):
        keys, _ = cache.update(k[:, :, i : i + 1], k[:, :, i : i + 1], 0)
        storage = cache.layers[0].keys.tensors[0]
        places.add((storage.data_ptr(), storage.shape[2]))
    assert len(places) == 3
    assert torch.equal(keys, k)


@torch.no_grad()
def test_storage_grows_towards_the_expected_length_and_not_beyond():
    """A long generation that ends early must not have taken the memory of all its steps."""
    cache = QWenCache()
    cache.expect(1500)
    k, capacities = torch.randn(1, 2, 1600, 16), []
    for i in range(0, 1600, 10):
        cache.update(k[:, :, i : i + 10], k[:, :, i : i + 10], 0)
        capacities.append(cache.layers[0].keys.tensors[0].shape[2])
    block = caches.BLOCK
    assert capacities[0] <= 10 + 5 * block < 1500
    assert sorted(set(capacities))[1] == -(-1500 // block) * block
    assert all(10 * (i + 1) <= capacity for i, capacity in enumerate(capacities))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kernel", [True, False])
def test_the_default_precision_of_the_program_changes_nothing(bits, kernel):
    """A cache is also read back for several tokens, and by what stands in for kernels."""
    model = tiny_model(**NTK_LOGN, hidden_size=128, num_attention_heads=2, kv_channels=64)
    parts = random_ids(2, 40).split((33, 1, 6), 1)

    def logits() -> torch.Tensor:
        cache = QWenCache() if bits is None else QWenQuantizedCache(bits, kernel=kernel)
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)

    expected = logits()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = logits()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reordered", [False, True])
@every_cache
def test_a_cache_may_be_filled_in_inference_mode_and_used_outside(model, make, reordered):
    parts = random_ids(2, 30).split((20, 1, 9), 1)
    expected = logits(model, parts, make())
    cache = make()
    with torch.inference_mode():
        first = model(parts[0], past_key_values=cache).logits.clone()
        if reordered:
            cache.reorder_cache(torch.tensor([0, 1]))
    assert_near(torch.cat((first, logits(model, parts[1:], cache)), 1), expected)


def test_a_cache_says_what_it_is():
    cache = QWenQuantizedCache(bits=4)
    assert repr(cache) == "QWenQuantizedCache(bits=4, kernel=True)"
    k = torch.randn(1, 2, 256, 64)
    cache.update(k, k, 0)
    assert repr(cache).startswith("QWenQuantizedCache(bits=4, kernel=True): 256 tokens, 1 layers, 0.0 MB, attention: ")
    assert repr(QWenCache(device="cpu")) == "QWenCache(device='cpu')"
    with pytest.raises(ValueError, match="8 or 4 bits, found bits=3"):
        QWenQuantizedCache(3)


def test_the_first_gpu_may_be_named_by_its_number():
    k = torch.zeros(1, 2, 3, 16)
    with contextlib.nullcontext() if torch.cuda.is_available() else pytest.raises((RuntimeError, AssertionError)):
        cache = QWenCache(device=0)
        cache.update(k, k, 0)
        assert cache.storages()[0].device == torch.device("cuda", 0)


def test_another_batch_does_not_fit(model):
    cache = QWenCache()
    logits(model, [random_ids(2, 5)], cache)
    with pytest.raises(ValueError, match="holds 2 rows of 4 heads, the new tokens are"):
        logits(model, [random_ids(3, 1)], cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 0
    ids = random_ids(3, 5)
    with torch.enable_grad():
        learned = model(ids, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    assert_near(learned, logits(model, [ids], DynamicCache()))
    assert_near(logits(model, [ids], cache), logits(model, [ids], DynamicCache()))


# --- Rows and lengths change -------------------------------------------------------------------------------------


@every_cache
def test_rows_can_be_reordered_repeated_and_selected(model, make):
    ids, more = random_ids(3, 70), random_ids(3, 2, seed=1)
    ids[0, :60], mask = 0, torch.ones(3, 72, dtype=torch.long)
    mask[0, :60] = 0  # 10 tokens: another NTK scale than those of the other rows

    def continued(change, rows):
        cache = make()
        logits(model, [ids], cache, attention_mask=mask[:, :70])
        change(cache)
        return logits(model, [more[rows]], cache, attention_mask=mask[rows])

    whole = continued(lambda cache: None, [0, 1, 2])
    for rows, change in (
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([2, 1], lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))),
        ([1, 2], lambda cache: cache.batch_select_indices(torch.tensor([False, True, True]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ):
        assert_near(continued(change, rows), whole[rows], 1e-3)  # products of other numbers of rows differ too


@every_cache
def test_crop_takes_tokens_back(model, make):
    """Also all of them, more than there are, and none."""
    ids = random_ids(2, 60)
    expected = logits(model, ids.split((40, 1, 1, 18), 1), make())[:, -20:]
    cache = make()
    logits(model, ids[:, :40].split((40,), 1), cache)
    logits(model, [random_ids(2, 7, seed=5)], cache)
    cache.crop(-7)
    assert cache.get_seq_length() == 40
    cache.crop(100)
    assert cache.get_seq_length() == 40
    found = logits(model, ids[:, 40:].split((1, 1, 18), 1), cache)
    assert_near(found, expected)
    cache.crop(41)
    assert_near(logits(model, [ids[:, 41:42]], cache), expected[:, 1:2])
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    assert_near(logits(model, ids.split((40, 1, 1, 18), 1), cache)[:, -20:], expected)


def test_the_prefix_of_many_prompts_is_computed_once(model):
    prefix = random_ids(1, 50)
    for make in CACHES.values():
        cache = make()
        logits(model, [prefix], cache)
        for seed in (1, 2):
            more = random_ids(1, 6, seed=seed)
            fresh = make()
            expected = logits(model, [prefix, more], fresh)[:, 50:]
            assert_near(logits(model, [more], copy.deepcopy(cache)), expected)
        assert cache.get_seq_length() == 50


@every_cache
def test_a_reset_cache_is_empty(model, make):
    ids = random_ids(2, 70)
    cache = make()
    logits(model, [ids], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    short = random_ids(1, 20).split((18, 1, 1), 1)
    assert_near(logits(model, short, cache), logits(model, short, make()))


# --- generate ----------------------------------------------------------------------------------------------------


@needs_sdpa
def test_generate_takes_it_on_a_cpu(model):
    """It gives what transformers' own gives, greedy, sampled and in beams; the caller's choice stands."""
    rows = [random_ids(1, length, seed=length) for length in (5, 31, 45, 140)]
    ids, mask = padded(rows)
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 10}):
        kwargs = {**GREEDY, "max_new_tokens": 12, "attention_mask": mask, **settings}
        outputs = []
        for cache in ({}, {"past_key_values": DynamicCache()}):
            torch.manual_seed(0)
            outputs.append(model.generate(ids, **kwargs, **cache))
        assert torch.equal(*outputs)
    output = generate(model, ids, max_new_tokens=2, return_dict_in_generate=True)
    if not hasattr(output, "past_key_values"):
        lacks("does not return the cache")
    assert type(output.past_key_values) is QWenCache
    own = DynamicCache()
    output = generate(model, ids, max_new_tokens=2, return_dict_in_generate=True, past_key_values=own)
    assert output.past_key_values is own


def test_generate_leaves_other_models_to_transformers(model):
    def chosen(model, **kwargs):
        return model._with_cache(model.generation_config, kwargs, kwargs.pop("cache_bits", None)).get("past_key_values")

    assert chosen(copy.deepcopy(model).half()) is None
    assert chosen(copy.deepcopy(model).train()) is None
    assert chosen(model, use_cache=False) is None
    assert chosen(model, cache_implementation="static") is None
    eager = tiny_model()
    eager.config._attn_implementation = "eager"
    assert chosen(eager) is None
    assert type(chosen(eager, cache_bits=4)) is QWenQuantizedCache


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_a_padded_batch_give_what_they_give_alone(model, bits):
    """Beyond seq_length (32) too, where every row has an NTK scale of its own."""
    rows = [random_ids(1, length, seed=length) for length in (5, 31, 45, 70, 140)]
    ids, mask = padded(rows)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=15, cache_bits=bits, **GREEDY)
    for row, output in zip(rows, batch):
        alone = generate(model, row, max_new_tokens=15, cache_bits=bits)
        assert output[ids.shape[1] :].tolist() == alone[0, row.shape[1] :].tolist()


@pytest.mark.parametrize("bits", [8, 4])
def test_beams_of_a_quantised_cache(model, bits):
    """Those of the cache that rounds and otherwise is transformers' own."""
    if not hasattr(transformers, "DynamicCache"):
        lacks("has no DynamicCache")
    ids, mask = padded([random_ids(1, 25), random_ids(1, 45)])
    kwargs = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 2, **GREEDY}
    found = model.generate(ids, cache_bits=bits, **kwargs)
    assert torch.equal(found, model.generate(ids, past_key_values=RoundedCache(bits), **kwargs))


@pytest.mark.parametrize("length", [10, 20, 63])
@pytest.mark.parametrize("bits", [8, 4])
def test_draft_tokens_are_taken_back(model, bits, length):
    if not hasattr(transformers.DynamicCache if hasattr(transformers, "DynamicCache") else None, "crop"):
        lacks("reads keys and values out of the cache to take draft tokens back")
    if not hasattr(transformers.GenerationMixin, "_prepare_cache_for_generation") and length > 10:
        lacks("counts draft tokens for the NTK scale of a prompt that they lift over a power of two")
    ids = random_ids(1, length)
    kwargs = {"max_new_tokens": 16, "eos_token_id": 319, "cache_bits": bits}
    expected = generate(model, ids, **kwargs)
    assistant = tiny_model(seed=0, **NTK_LOGN)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # agrees sometimes
    assert torch.equal(generate(model, ids, **kwargs, assistant_model=assistant), expected)
    assert torch.equal(generate(model, ids, **kwargs, prompt_lookup_num_tokens=4), expected)


@needs_sdpa
def test_contrastive_search(model):
    """It takes rows and tokens back as well; another attention function leaves the cache to transformers."""
    if not any(hasattr(transformers.GenerationMixin, name) for name in ("contrastive_search", "_contrastive_search")):
        lacks("has no contrastive search of its own")
    eager = copy.deepcopy(model)
    eager.config._attn_implementation = "eager"
    ids = random_ids(1, 20)
    kwargs = {"max_new_tokens": 8, "penalty_alpha": 0.6, "top_k": 4}
    assert torch.equal(generate(model, ids, **kwargs), generate(eager, ids, **kwargs))


def test_many_threads_get_what_they_get_alone(model):
    prompts = [random_ids(1, length, seed=length) for length in (5, 20, 40, 65, 90, 130)]
    kinds = [{}, {"cache_bits": 8}, {"cache_bits": 4}] * 2
    expected = [generate(model, ids, max_new_tokens=12, **kind) for ids, kind in zip(prompts, kinds)]
    found = [[] for _ in prompts]

    def work(i):
        for _ in range(3):
            found[i].append(generate(model, prompts[i], max_new_tokens=12, **kinds[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, alone in zip(found, expected):
        assert len(outputs) == 3
        assert all(torch.equal(output, alone) for output in outputs)


def test_a_prompt_in_chunks(model):
    needs_prefill_in_chunks()
    if transformers.__version__.startswith("4.51."):
        lacks("always compiles a prefill in chunks, which does not attend to what is stored")
    ids = random_ids(2, 100)
    for bits, within in ((8, 5e-3), (4, 5e-2)):  # a key's rounding may turn over by the arithmetic of a machine
        cache = QWenQuantizedCache(bits)
        settings = {"prefill_chunk_size": 16, "disable_compile": True, "return_dict_in_generate": True}
        settings |= {"output_logits": True, "max_new_tokens": 6, "past_key_values": cache}
        output = generate(model, ids, **settings)
        found = torch.stack(output.logits, 1)
        alpha = model.transformer.prompt_alpha(torch.tensor([100, 100]))

        def error(*prompt):
            parts = [*prompt, *output.sequences[:, 100:-1].split(1, 1)]  # noqa: B023
            again = logits(model, parts, RoundedCache(bits), ntk_alpha=alpha)[:, 99:]  # noqa: B023
            return ((found - again).norm() / again.norm()).item()  # noqa: B023

        # Some releases compute the last token by itself.
        assert min(error(*ids.split(16, 1)), error(*ids[:, :-1].split(16, 1), ids[:, -1:])) < within
        assert error(ids) > 2 * within  # in one piece, exactly to itself


# --- How it is asked for -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(**NTK_LOGN).save_pretrained(folder)
    return folder


def cache_of(model, **kwargs):
    return model._with_cache(model.generation_config, kwargs, kwargs.pop("cache_bits", None)).get("past_key_values")


@pytest.mark.parametrize(
    ("loading", "calling", "bits", "kernel"),
    [
        ({"use_cache_quantization": True}, {}, 8, False),
        ({"use_cache_quantization": True, "use_cache_kernel": True}, {}, 8, True),
        ({"use_cache_quantization": True, "use_cache_kernel": True, "cache_bits": 4}, {}, 4, True),
        ({"use_cache_quantization": True, "cache_bits": 4}, {"cache_bits": 8}, 8, False),
        ({}, {"cache_bits": 4}, 4, True),
        ({}, {"cache_implementation": "quantized"}, 8, True),
        ({"cache_bits": 4}, {"cache_implementation": "quantized"}, 4, True),
    ],
    ids=str,
)
def test_by_configuration_at_loading_and_at_generation(checkpoint, loading, calling, bits, kernel):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, **loading)
    cache = cache_of(model, **calling)
    assert repr(cache) == f"QWenQuantizedCache(bits={bits}, kernel={kernel})"
    ids = random_ids(1, 40)
    expected = generate(model, ids, max_new_tokens=8, past_key_values=cache)
    assert cache.get_seq_length() == 47
    assert torch.equal(generate(model, ids, max_new_tokens=8, **calling), expected)
    if loading.get("use_cache_quantization") and not calling:  # a plain call of the model makes one too
        with torch.no_grad():
            made = model(ids).past_key_values
        assert repr(made).startswith(repr(cache).partition(":")[0])


def test_by_the_generation_configuration(model):
    try:
        settings = GenerationConfig(max_new_tokens=4, cache_implementation="quantized", **GREEDY)
    except ImportError:
        lacks("takes quantised caches in a generation configuration for its own")
    if getattr(settings, "cache_config", None) is not None:  # 4.42 to 4.55
        lacks("takes quantised caches in a generation configuration for its own")
    ids = random_ids(1, 40)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    assert torch.equal(found, generate(model, ids, max_new_tokens=4, cache_bits=8))
    assert settings.cache_implementation == "quantized"
    stored = copy.deepcopy(model)
    stored.generation_config.cache_implementation = "quantized"
    assert type(cache_of(stored)) is QWenQuantizedCache
    assert torch.equal(generate(stored, ids, max_new_tokens=4), found)


def test_the_choice_is_saved_with_the_configuration(checkpoint, tmp_path):
    config = tiny_config(use_cache_quantization=True, cache_bits=4)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    assert (loaded.use_cache_quantization, loaded.use_cache_kernel, loaded.cache_bits) == (False, False, 8)
    loaded = type(config).from_pretrained(tmp_path)
    assert (loaded.use_cache_quantization, loaded.cache_bits) == (True, 4)


@pytest.mark.parametrize(
    "calling", [{"past_key_values": QWenCache()}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_contradictions_are_refused(model, calling):
    with pytest.raises(ValueError, match="cache_bits=4 asks for a quantised cache, but"):
        generate(model, random_ids(1, 4), max_new_tokens=1, cache_bits=4, **calling)


def test_bits_that_there_are_not(model, checkpoint):
    with pytest.raises(ValueError, match="8 or 4 bits, found bits=2"):
        generate(model, random_ids(1, 4), max_new_tokens=1, cache_bits=2)
    with pytest.raises(ValueError, match=r"config\.cache_bits must be 8 or 4, found 3"):
        AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, cache_bits=3)
    with pytest.raises(ValueError, match=r"config\.cache_bits must be 8, or 4 with kv_channels that 16 divides"):
        tiny_config(kv_channels=24, use_cache_quantization=True, cache_bits=4)


# --- Chat --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_conversation_keeps_its_cache(demo_tokenizer, bits):
    model = tiny_model(vocab_size=len(demo_tokenizer), seq_length=512, **NTK_LOGN)
    eod = demo_tokenizer.eod_id
    model.generation_config = GenerationConfig(
        chat_format="chatml", max_new_tokens=8, **{**GREEDY, "pad_token_id": eod}
    )
    model.config.use_cache_quantization, model.config.use_cache_kernel = bits is not None, True
    model.config.cache_bits = bits or 8
    response, history, cache = model.chat(demo_tokenizer, "hi", None, return_past_key_values=True)
    own = QWenCache if model.config._attn_implementation == "sdpa" else DynamicCache
    assert type(cache) is (own if bits is None else QWenQuantizedCache)
    assert (response, history) == model.chat(demo_tokenizer, "hi", None)
    length = cache.get_seq_length()
    seen = []
    handle = model.transformer.wte.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    second, history2, same = model.chat(
        demo_tokenizer, "1+1=?", history, past_key_values=cache, return_past_key_values=True
    )
    handle.remove()
    assert same is cache
    assert cache.get_seq_length() > length
    assert seen[0] < 40  # only the new turn is read
    if bits is None:
        assert (second, history2) == model.chat(demo_tokenizer, "1+1=?", history)
    *_, streamed = model.chat_stream(demo_tokenizer, "1+1=?", history, past_key_values=cache)
    assert streamed == second
    with pytest.raises(ValueError, match="cache_bits=4 asks for"):
        model.chat(demo_tokenizer, "hi", history, past_key_values=cache, cache_bits=4)
    _, _, cache = model.chat(demo_tokenizer, "hi", None, return_past_key_values=True, cache_bits=4)
    assert cache.bits == 4


# --- Who sees the plain path -------------------------------------------------------------------------------------


@every_cache
def test_training_with_a_cache_gives_the_gradients_of_transformers_own(make):
    gradients = []
    for cache in (make(), DynamicCache()):
        model = tiny_model(**NTK_LOGN).train()
        ids = random_ids(2, 20)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split((12, 3, 1, 4), 1)]
        if getattr(cache, "bits", None) is not None:  # nothing flows through what is rounded
            with torch.no_grad():
                step = model(ids[:, :1], past_key_values=cache).logits
            assert step.isfinite().all()
            assert cache.get_seq_length() == 21
            return
        torch.cat(parts, 1).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="needs the compiler of torch 2.4")
@pytest.mark.parametrize("make", sampled([CACHES["int8"], CACHES["full"]]), ids=["int8", "full"])
def test_a_compiled_model_gives_the_same(make):
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=2, **NTK_LOGN)
    compiled = torch.compile(model, backend="aot_eager")
    parts = random_ids(2, 44).split((40, 1, 1, 1, 1), 1)
    plain = DynamicCache() if make is QWenCache else QWenQuantizedCache(make().bits, kernel=False)
    with torch.no_grad():
        cache = make()
        found = torch.cat([compiled(part, past_key_values=cache).logits for part in parts], 1)
    assert_near(found, logits(model, parts, plain))


# --- Where the code lies -----------------------------------------------------------------------------------------


USES = """
import torch, logging, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True, fp32=True{more})
kernels = sys.modules[type(model).__module__.replace("modeling_qwen", "cpp_kernels")]
ids = torch.arange(40)[None]
output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                        eos_token_id=None, pad_token_id=0, cache_bits=8)
print(output[0, 40:].tolist(), kernels._state.loaded, sep="|")
"""


@needs_sdpa
def test_the_source_comes_with_a_saved_model(model, checkpoint, tmp_path):
    """transformers copies the modules only; the source stays in the checkpoint's folder and is found there."""
    assert (checkpoint / "cpp_kernels.cpp").read_bytes() == (ROOT / "cpp_kernels.cpp").read_bytes()
    native = kernels.load()
    expected = str(generate(model, torch.arange(40)[None], max_new_tokens=8, cache_bits=8)[0, 40:].tolist())
    code = USES.format(path=str(checkpoint), more="")
    for name, environment in (("native", {}), ("switched off", {"QWEN_NATIVE_KERNELS": "0"})):
        found = run(code, tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"), **environment)
        assert found == f"{expected}|{native and name == 'native'}"


@pytest.mark.parametrize("make", [QWenCache, QWenQuantizedCache])
@pytest.mark.parametrize("change", ["precision", "width"])
def test_an_emptied_cache_is_a_new_one_for_another_model(make, change):
    model, ids = tiny_model(), random_ids(1, 12)
    other = copy.deepcopy(model).bfloat16() if change == "precision" else tiny_model(kv_channels=32)
    cache, new = make(), make()
    with torch.no_grad():
        other(ids, past_key_values=cache)
        crop_cache(cache, 0)
        for each in (cache, new):
            model(ids, past_key_values=each)
    for found, expected in zip(cache.storages(), new.storages()):
        assert found.dtype == expected.dtype
        assert torch.equal(found[:, :, :12], expected[:, :, :12])
