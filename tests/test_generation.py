"""Generation through transformers' own `generate`, in every mode."""

from __future__ import annotations

import importlib
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    HAS_STATIC,
    TINY,
    compat,
    lacks,
    needs_prefill_in_chunks,
    random_ids,
    sampled,
    static_cache,
    tiny_model,
)
from qwen.qwen_cache import QWenCache
from qwen.qwen_generation_utils import StopWordsLogitsProcessor
from qwen.transformers_compat import ASSISTANTS_GENERATE, DynamicCache, resolved_settings
from reference import greedy as reference_greedy
from reference import qwen2_of
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, TextStreamer

NTK_LOGN = {"use_dynamic_ntk": True, "use_logn_attn": True}
NOTES_PROMPTS = hasattr(GenerationMixin, "_prepare_cache_for_generation")  # from 4.45
QWEN2 = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_model(**NTK_LOGN)


def generate(model, ids, **kwargs):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **kwargs})


@pytest.mark.parametrize("length", [10, 25, 50])
def test_greedy_equals_the_definition(model, length):
    ids = random_ids(1, length)
    expected, _ = reference_greedy(model.state_dict(), model.config, ids[0].tolist(), 12)
    assert generate(model, ids, max_new_tokens=12)[0].tolist() == expected
    if HAS_STATIC:
        assert generate(model, ids, max_new_tokens=12, cache_implementation="static")[0].tolist() == expected
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    # Releases up to 4.37 ask for a first token, don't use it, and return it in front.
    new = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12, bos_token_id=0, **GREEDY)
    assert new[0, -12:].tolist() == expected[length:]


def test_embeddings_beside_ids_that_are_not_theirs(model):
    """The prompt, and so its NTK scale, are the embeddings; the ids are only returned in front."""
    prompt = random_ids(1, 50)
    expected, _ = reference_greedy(model.state_dict(), model.config, prompt[0].tolist(), 6)
    embeds = model.get_input_embeddings()(prompt)
    assert model.generate(prompt[:, :0], inputs_embeds=embeds, max_new_tokens=6, **GREEDY)[0].tolist() == expected[50:]


def test_without_cache_as_long_as_alpha_is_the_same(model):
    ids = random_ids(2, 12)
    assert torch.equal(
        generate(model, ids, max_new_tokens=16), generate(model, ids, max_new_tokens=16, use_cache=False)
    )


@pytest.mark.parametrize("static", [False, True])
def test_rows_of_a_left_padded_batch_give_what_they_give_alone(model, static):
    """Also beyond seq_length (32), where each row has its own NTK scale and LogN positions."""
    rows = [random_ids(1, length, seed=length) for length in (5, 31, 45, 70, 140)]
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    kwargs = {"max_new_tokens": 20, **GREEDY}
    if static:
        if not HAS_STATIC:
            lacks("has no static cache for all layers")
        kwargs["cache_implementation"] = "static"
    batch = model.generate(ids, attention_mask=mask, **kwargs)
    for row, output in zip(rows, batch):
        alone = generate(model, row, max_new_tokens=20)
        assert output[width:].tolist() == alone[0, row.shape[1] :].tolist()


def test_beams_equal_an_exhaustive_search():
    model = tiny_model(vocab_size=8, **NTK_LOGN)
    ids = random_ids(1, 40, vocab_size=8)
    sequences = torch.cartesian_prod(*[torch.arange(8)] * 3)  # (512, 3)
    cache = DynamicCache()
    with torch.no_grad():
        prompts = model(ids.expand(512, -1), past_key_values=cache).logits
        logits = model(sequences[:, :2], past_key_values=cache).logits  # with the prompt's alpha, as in generation
    p = torch.cat((prompts[:, -1:], logits), 1).log_softmax(-1)
    best = sequences[p.gather(-1, sequences[..., None]).sum((1, 2)).argmax()].tolist()
    output = generate(model, ids, max_new_tokens=3, num_beams=8 * 8, num_return_sequences=3, early_stopping=False)
    assert output.shape[0] == 3
    assert output[0, 40:].tolist() == best


def test_beams_in_a_padded_batch_equal_single_prompts(model):
    rows = [random_ids(1, 40, seed=1), random_ids(1, 70, seed=2)]
    ids = torch.cat((torch.nn.functional.pad(rows[0], (30, 0)), rows[1]))
    mask = torch.cat((torch.nn.functional.pad(torch.ones_like(rows[0]), (30, 0)), torch.ones_like(rows[1])))
    kwargs = {"max_new_tokens": 8, "num_beams": 3, **GREEDY}
    batch = model.generate(ids, attention_mask=mask, **kwargs)
    for row, output in zip(rows, batch):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **kwargs)
        assert output[70:].tolist() == alone[0, row.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    sampled(
        [
            {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "repetition_penalty": 0.8},
            {},
            {"temperature": 0.6},
            {"top_k": 7},
            {"top_p": 0.7},
            {"repetition_penalty": 1.4},
        ]
    ),
    ids=str,
)
def test_sampling_follows_the_distribution(settings):
    """20,000 draws of the next token against the definitions of the settings, by the chi-square test."""
    stats = pytest.importorskip("scipy.stats")
    model = tiny_model(vocab_size=48, num_hidden_layers=1, initializer_range=0.12, **NTK_LOGN)
    ids = random_ids(1, 7, vocab_size=48)
    torch.manual_seed(0)
    samples = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        **{"top_k": 0, "top_p": 1.0, **settings},
        num_return_sequences=20_000,
        max_new_tokens=1,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert samples.shape == (20_000, 8)
    with torch.no_grad():
        logits = model(ids).logits[0, -1].double()
    seen = ids[0].unique()  # Keskar et al. 2019: divided, or multiplied where negative, by the penalty
    penalty = settings.get("repetition_penalty", 1.0)
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    logits = logits / settings.get("temperature", 1.0)
    order = logits.argsort(descending=True)
    kept = order[: settings.get("top_k", 48)]
    probabilities = logits[kept].softmax(0)
    before = probabilities.cumsum(0) - probabilities  # of the more likely ones: below top_p the token stays
    kept = kept[before < settings.get("top_p", 1.0)]
    expected = torch.zeros(48, dtype=torch.float64)
    expected[kept] = logits[kept].softmax(0)

    counts = torch.bincount(samples[:, -1], minlength=48)
    assert not counts[expected == 0].any()
    common = expected * 20_000 >= 5  # what the test asks for; the rest is counted together
    observed = torch.cat((counts[common], counts[~common].sum()[None])).tolist()
    wanted = torch.cat((expected[common], expected[~common].sum()[None])) * 20_000
    pairs = [(o, w) for o, w in zip(observed, wanted.tolist()) if w > 0]
    assert stats.chisquare(*zip(*pairs)).pvalue > 1e-3


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_equal_those_of_qwen2(beams):
    model = tiny_model(use_dynamic_ntk=False, use_logn_attn=False)
    other = qwen2_of(model)
    ids = random_ids(2, 20)
    kwargs = {"max_new_tokens": 12, "num_beams": beams, "num_return_sequences": 2, "length_penalty": 0.7, **GREEDY}
    assert torch.equal(generate(model, ids, **kwargs), generate(other, ids, **kwargs))


# Releases up to 4.44 leave no room for a note: there only prompts far from a power of two give the same.
lengths_with_drafts = pytest.mark.parametrize("length", [10, 20, 60, 63])


def drafts_would_count(length):
    if length > 10 and not NOTES_PROMPTS:
        lacks("counts draft tokens for the NTK scale of a prompt that they lift over a power of two")


@lengths_with_drafts
def test_assisted_decoding_gives_the_greedy_ids(model, length):
    """Draft tokens behind the prompt must not count for the NTK scale: 60 + 5 drafts would cross 64."""
    drafts_would_count(length)
    assistant = tiny_model(seed=0, **NTK_LOGN)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # agrees sometimes
    ids = random_ids(1, length)
    expected = generate(model, ids, max_new_tokens=16, eos_token_id=319)
    assert torch.equal(generate(model, ids, max_new_tokens=16, eos_token_id=319, assistant_model=assistant), expected)


@pytest.mark.parametrize("choice", [{"do_sample": False}, {"do_sample": True, "top_k": 5}])
def test_an_assistant_with_fewer_rows_needs_no_tokenizers(choice):
    """Qwen-1.8B has 151,936 rows, Qwen-72B 152,064: the same vocabulary, padded to another multiple."""
    drafts_would_count(10 + 16)
    model = tiny_model(**NTK_LOGN)
    config = model.config.to_dict()
    assistant = tiny_model(seed=0, **{**NTK_LOGN, "vocab_size": config["vocab_size"] - 16})
    weights = {name: weight[: config["vocab_size"] - 16] for name, weight in model.state_dict().items()}
    assistant.load_state_dict({name: weights[name].view(old.shape) for name, old in assistant.state_dict().items()})
    asked = []
    assistant.register_forward_hook(lambda *_: asked.append(1))
    ids = random_ids(1, 10) % (config["vocab_size"] - 16)
    with torch.no_grad():  # rows of padding are not generated, or the assistant of a release up to 4.36 would fail
        model.lm_head.weight[-16:] = 0
    if ASSISTANTS_GENERATE:
        ids[0, 3] = config["vocab_size"] - 1
    torch.manual_seed(0)
    new = generate(model, ids, max_new_tokens=16, eos_token_id=319, assistant_model=assistant, **choice)
    assert asked
    assert new.shape[1] > ids.shape[1]
    if not choice["do_sample"]:
        assert torch.equal(new, generate(model, ids, max_new_tokens=16, eos_token_id=319))


class Only(LogitsProcessor):
    """A caller's processor that knows the number of rows: leaves every third token."""

    def __init__(self, vocab_size: int):
        self.removed = torch.arange(vocab_size) % 3 != 1

    def __call__(self, input_ids, scores):
        return scores.masked_fill(self.removed, -torch.inf)


@pytest.mark.skipif(not ASSISTANTS_GENERATE, reason="needs an assistant whose generate is called")
@pytest.mark.parametrize(
    "choice",
    [
        {"bad_words_ids": [[5], [7, 8]]},
        {"sequence_bias": {(5,): -9.0, (7, 8): 9.0}},
        {"logits_processor": [Only(TINY["vocab_size"])]},
        {"logits_processor": [Only(TINY["vocab_size"])], "bad_words_ids": [[4]], "repetition_penalty": 1.2},
    ],
    ids=lambda choice: "+".join(choice),
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_beside_an_assistant_with_fewer_rows(model, choice, do_sample):
    drafts_would_count(8 + 16)
    assistant = tiny_model(seed=0, **{**NTK_LOGN, "vocab_size": TINY["vocab_size"] - 16})
    ids, settings = random_ids(1, 8) % 300, {"max_new_tokens": 16, "eos_token_id": 3, **choice}
    torch.manual_seed(0)
    new = generate(model, ids, assistant_model=assistant, do_sample=do_sample, **settings)
    if not do_sample:
        assert torch.equal(new, generate(model, ids, **settings))
    for token in new[0, ids.shape[1] :].tolist():
        assert token % 3 == 1 or token == 3 or "logits_processor" not in choice
        assert [token] not in choice.get("bad_words_ids", [])


@lengths_with_drafts
def test_prompt_lookup_gives_the_greedy_ids(model, length):
    if not hasattr(GenerationConfig(), "prompt_lookup_num_tokens"):
        lacks("has no prompt look-up decoding")
    drafts_would_count(length)
    ids = random_ids(1, length)
    expected = generate(model, ids, max_new_tokens=16, eos_token_id=319)
    assert torch.equal(generate(model, ids, max_new_tokens=16, eos_token_id=319, prompt_lookup_num_tokens=4), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_early_exit_drafts_with_the_first_layers(attention):
    """The sampled ids are those of Qwen2 only if the drafts are, too."""
    if not hasattr(GenerationConfig(), "assistant_early_exit"):
        lacks("has no drafts by the first layers")
    model = tiny_model(attn_implementation=attention)
    ids, found = random_ids(1, 20), []
    for each in (model, qwen2_of(model)):
        torch.manual_seed(1)
        found.append(generate(each, ids, max_new_tokens=20, assistant_early_exit=2, do_sample=True, eos_token_id=3))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [QWenCache, DynamicCache])
def test_drafts_behind_a_cache_that_has_a_part_of_the_prompt(model, kind):
    """transformers 5 gives the model all of the prompt once more, behind these keys."""
    if not hasattr(GenerationConfig(), "prompt_lookup_num_tokens") or not hasattr(DynamicCache, "crop"):
        pytest.skip("needs prompt look-up, and caches that can be cropped")
    ids = random_ids(1, 6).repeat(1, 3)
    expected = generate(model, ids, max_new_tokens=8, eos_token_id=319)
    cache = kind()
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
    found = generate(model, ids, max_new_tokens=8, eos_token_id=319, prompt_lookup_num_tokens=3, past_key_values=cache)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() in (expected.shape[1] - 1, expected.shape[1])


def test_prefill_in_chunks_equals_whole(model):
    needs_prefill_in_chunks()
    ids = random_ids(2, 100)
    expected = generate(model, ids, max_new_tokens=6)
    try:
        chunked = generate(model, ids, max_new_tokens=6, prefill_chunk_size=16, disable_compile=True)
    except ValueError as error:
        if "prefill chunking without a cache" not in str(error):
            raise
        lacks("makes no cache for a prefill in chunks")  # 5.0.0, for any model
    assert torch.equal(chunked, expected)


def test_a_static_cache_can_be_used_again(model):
    cache = static_cache(model.config, 200)
    for length in (40, 100, 20):
        ids = random_ids(1, length)
        cache.reset()
        assert torch.equal(
            generate(model, ids, max_new_tokens=5, past_key_values=cache), generate(model, ids, max_new_tokens=5)
        )


def test_a_cache_continues_a_conversation(model):
    """The second call goes on with the first one's keys, values and NTK scale."""
    ids, more = random_ids(1, 40), random_ids(1, 30, seed=1)
    first = generate(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    if not hasattr(getattr(first, "past_key_values", None), "ntk_alpha"):
        lacks("does not return the cache")
    assert first.past_key_values.ntk_alpha.item() == 3
    whole = torch.cat((first.sequences, more), 1)
    second = generate(model, whole, max_new_tokens=5, past_key_values=first.past_key_values)
    expected, _ = reference_continue(model, whole, 40, 5)
    assert second[0].tolist() == expected


def reference_continue(model, ids, prompt_length, new_tokens):
    from reference import forward

    sequence = ids[0].tolist()
    for _ in range(new_tokens):
        logits = forward(model.state_dict(), model.config, sequence, prompt_length=prompt_length)
        sequence.append(int(logits[-1].argmax()))
    return sequence, None


def test_eight_threads_on_one_model_get_what_they_get_alone(model):
    prompts = [random_ids(1, length, seed=length) for length in (5, 20, 33, 40, 65, 70, 90, 130)]
    expected = [generate(model, prompt, max_new_tokens=15) for prompt in prompts]
    results = [[] for _ in prompts]

    def work(i):
        for _ in range(3):
            results[i].append(generate(model, prompts[i], max_new_tokens=15))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, alone in zip(results, expected):
        assert len(outputs) == 3
        assert all(torch.equal(output, alone) for output in outputs)


@pytest.mark.parametrize("is_varlen", [False, True])
def test_continuous_batching_gives_every_prompt_what_it_gets_alone(is_varlen, monkeypatch):
    """Several sequences share a row there; each has its own NTK scale and LogN positions."""
    if not hasattr(GenerationMixin, "generate_batch"):
        lacks("has no continuous batching")
    rows = [random_ids(1, length, seed=length) for length in (5, 40, 20, 70, 100)]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = {"num_blocks": 64, "max_batch_tokens": 256}  # or it takes most of the machine's memory for its cache
    kwargs = {}
    if hasattr(transformers, "ContinuousBatchingConfig"):
        kwargs["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**small)
    for name, value in small.items():
        setattr(settings, name, value)

    def is_right(model):
        expected = [generate(model, row, max_new_tokens=8)[0, row.shape[1] :].tolist() for row in rows]
        outputs = model.generate_batch([row[0].tolist() for row in rows], generation_config=settings, **kwargs)
        by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return [by_prompt.get(tuple(row[0].tolist())) for row in rows] == expected

    if not is_right(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN2)).eval()):
        lacks("has no continuous batching on a CPU")  # up to 5.0
    calls = []

    def varlen(q, k, v, starts, key_starts, longest, longest_key, *, scale, window_size):
        """As PyTorch's on a GPU, which replaces SDPA: the last query of a sequence has the last key."""
        assert window_size == (-1, 0)
        calls.append(longest)
        lengths, key_lengths = starts.diff().tolist(), key_starts.diff().tolist()
        assert longest >= max(lengths)
        assert longest_key >= max(key_lengths)
        attended = []
        for q_k_v in zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths)):
            q1, k1, v1 = (x.transpose(0, 1) for x in q_k_v)
            mask = torch.ones(q1.shape[1], k1.shape[1], dtype=torch.bool).tril(k1.shape[1] - q1.shape[1])
            attended.append(F.scaled_dot_product_attention(q1, k1, v1, mask, scale=scale).transpose(0, 1))
        return torch.cat(attended)

    if is_varlen:
        monkeypatch.setattr(compat, "_varlen", varlen)
        monkeypatch.setattr(compat, "_VARLEN_ARGUMENTS", ("scale", "window_size"))
        monkeypatch.setattr(compat, "has_varlen_attention", lambda *args: True)
    model = tiny_model(**NTK_LOGN)
    assert is_right(model)
    if is_varlen:
        assert len(calls) >= model.config.num_hidden_layers * 8
        assert min(calls) == 1 < max(calls)


def test_continuous_batching_captures_graphs_beforehand_only_where_they_stay(monkeypatch):
    seen = []
    if "warmup" not in inspect.signature(getattr(GenerationMixin, "generate_batch", lambda: None)).parameters:
        lacks("captures no graphs beforehand")
    monkeypatch.setattr(GenerationMixin, "generate_batch", lambda self, inputs, **kwargs: seen.append(kwargs))
    model = tiny_model()
    for kwargs in ({}, {"persistent_manager": True}, {"warmup": True}, {"persistent_manager": True, "warmup": False}):
        model.generate_batch([[1]], **kwargs)
    assert [kwargs["warmup"] for kwargs in seen] == [False, True, True, False]


@pytest.mark.parametrize("plan", ["auto", {"lm_head": "colwise_gather_output"}])
def test_tensor_parallelism_is_not_told_the_names_for_continuous_batching(plan, caplog):
    model = tiny_model()
    if not hasattr(model, "_resolve_parallel_plans"):
        lacks("makes no plan of modules' names")
    module = importlib.import_module("transformers.distributed")
    before = dict(model._tp_plan)
    model._resolve_parallel_plans(module.DistributedConfig(tp_size=2, tp_plan=plan))
    assert "match nothing" not in caplog.text
    assert model._tp_plan == before == model.tp_plan


def test_streamer_sees_every_token(model, demo_tokenizer, capsys):
    ids = random_ids(1, 10)
    output = generate(model, ids, max_new_tokens=8, streamer=TextStreamer(demo_tokenizer, skip_prompt=True))
    expected = demo_tokenizer.decode(output[0, 10:])
    assert capsys.readouterr().out.strip() == expected.strip()
    for beams in ({"num_beams": 2}, {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=2)}):
        with pytest.raises(ValueError, match="Beams can't be streamed"):
            model.generate(ids, streamer=TextStreamer(demo_tokenizer), **beams)


@pytest.mark.parametrize("prompt", ["hi", [[1, 2]], {"input_ids": [[1, 2]]}])
def test_a_prompt_that_is_no_tensor(model, prompt):
    with pytest.raises(
        TypeError, match=f"must be a tensor of token ids, found {type(prompt).__name__}\\. Encode a text"
    ):
        model.generate(prompt)


def test_stop_words_force_the_end(model):
    ids = random_ids(2, 10)
    free = generate(model, ids, max_new_tokens=12)
    words = free[0, 13:15].tolist()  # generated as the 4th and 5th token of the first row
    processors = []
    stopped = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=319,
        pad_token_id=0,
        stop_words_ids=[words, [318, 318, 318]],
        logits_processor=processors,
    )
    assert not processors  # the caller's list is not changed
    assert stopped[0, 10:15].tolist() == free[0, 10:15].tolist()
    assert stopped[0, 15:].tolist() == [319] + [0] * (stopped.shape[1] - 16)
    assert stopped[1].tolist() == free[1, : stopped.shape[1]].tolist()


@pytest.mark.parametrize("alone", [False, True], ids=["stop_words_ids", "processor"])
def test_stop_words_that_straddle_overlap_and_stand_in_the_prompt(model, alone):
    """In every row of a batch a stop word counts where all of it was generated, and only there."""
    rows = [random_ids(1, length, seed=length) for length in (10, 25, 18, 40)]
    width = 40
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    free = model.generate(ids, attention_mask=mask, max_new_tokens=14, **GREEDY)[:, width:].tolist()
    stop_words = [
        rows[0][0, -3:].tolist(),  # the end of a prompt
        [int(rows[1][0, -1]), free[1][0]],  # half in the prompt
        free[2][3:6],  # overlaps with the next, which is complete before it
        free[2][4:5] if free[2][4] not in free[2][:4] else free[2][3:5],
        free[3][5:9],
    ]
    kwargs = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "eos_token_id": 319, "pad_token_id": 0}
    if alone:
        processor = StopWordsLogitsProcessor(stop_words, 319)
        output = model.generate(ids, logits_processor=[processor], **kwargs)
        assert processor.prompt_length is None
    else:
        output = model.generate(ids, stop_words_ids=stop_words, **kwargs)
    for tokens, unstopped in zip(output[:, width:].tolist(), free):
        ends = [
            i + 1
            for i in range(len(unstopped))
            if any(unstopped[i + 1 - len(word) : i + 1] == word for word in stop_words if len(word) <= i + 1)
        ]
        expected = [*unstopped[: ends[0]], 319][:14] if ends and ends[0] < 14 else unstopped
        assert tokens[: len(expected)] == expected
        assert set(tokens[len(expected) :]) <= {0}


def test_stop_words_of_the_generation_configuration_and_not_in_the_prompt(model):
    ids = random_ids(1, 10)
    free = generate(model, ids, max_new_tokens=6)
    config = GenerationConfig(do_sample=False, eos_token_id=319, pad_token_id=0, max_new_tokens=6)
    config.stop_words_ids = [ids[0, -2:].tolist()]  # the end of the prompt: not generated, so it does not stop
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config), free)
    config.stop_words_ids = [free[0, 10:11].tolist()]
    assert model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, 11:].tolist() == [319]


def test_what_the_configuration_of_a_call_leaves_open(monkeypatch):
    """Its end and its padding are those of the model, for stop words and the NTK scale of a padded prompt too."""
    model = tiny_model(**NTK_LOGN)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=319, pad_token_id=0))
    config = GenerationConfig(do_sample=False, max_new_tokens=6)
    if resolved_settings(model, config).eos_token_id is None:
        lacks("takes nothing from the model's configuration beside that of a call")
    row = random_ids(1, 30) % 318 + 1
    free = model.generate(row, generation_config=config)[0, 30:].tolist()
    padded = model.generate(F.pad(row, (10, 0)), generation_config=config)
    assert padded[0, 40:].tolist() == free
    stopped = model.generate(row, generation_config=config, stop_words_ids=[free[:1]])
    assert stopped[0, 30:].tolist() == [free[0], 319]
    model.generation_config.use_cache = False  # from 4.50 to 4.57 that of a call that says nothing reads True
    monkeypatch.setattr(model.config, "use_dynamic_ntk", False)
    model.generate(row, generation_config=config)


@pytest.mark.parametrize("bad", [[], [[]], "Observation:", [5], [["a"]], [[-1]], [[1.5]]], ids=str)
def test_bad_stop_words_are_refused(model, bad):
    with pytest.raises(ValueError, match="stop_words_ids"):
        model.generate(random_ids(1, 4), stop_words_ids=bad, eos_token_id=319, max_new_tokens=1)


def test_stop_words_need_an_end_token(model):
    with pytest.raises(ValueError, match="eos_token_id"):
        model.generate(random_ids(1, 4), stop_words_ids=[[5]], eos_token_id=None, max_new_tokens=1)
