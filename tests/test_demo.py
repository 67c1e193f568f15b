"""The demo checkpoint: published format, no second copy of the code, right answers."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT
from qwen.qwen_generation_utils import make_context
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = ROOT / "demo"
sys.path.append(str(DEMO))
import corpus  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402


@pytest.fixture(scope="module")
def demo():
    tokenizer = AutoTokenizer.from_pretrained(DEMO, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(DEMO, trust_remote_code=True).eval(), tokenizer


def test_files():
    assert sum((DEMO / name).stat().st_size for name in train.CHECKPOINT_FILES) < 25e6
    assert len((DEMO / "qwen.tiktoken").read_bytes().splitlines()) + train.NUM_SPECIAL_TOKENS <= 8192
    for name in train.CODE_FILES:
        assert (DEMO / name).is_symlink()
        assert (DEMO / name).resolve() == ROOT / name
    for name, content in (
        ("config.json", train.CONFIG),
        ("generation_config.json", train.GENERATION_CONFIG),
        ("tokenizer_config.json", train.TOKENIZER_CONFIG),
    ):
        assert json.loads((DEMO / name).read_text()) == content


def test_vocabulary_is_what_training_writes(tmp_path):
    train.write_all_but_weights(tmp_path, seed=0)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (DEMO / "qwen.tiktoken").read_bytes()


def test_the_model_cards_prompt(demo):
    model, tokenizer = demo
    inputs = tokenizer(evaluate.CARD_PROMPT, return_tensors="pt")
    output = tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)
    assert output.startswith(evaluate.CARD_PROMPT)
    assert output[len(evaluate.CARD_PROMPT) :].partition("\n")[0] == evaluate.CARD_ANSWER


@pytest.mark.parametrize("language", corpus.LANGUAGES)
def test_completions(demo, language):
    """A third of the capitals; `demo/evaluate.py` asks for all."""
    cases = corpus.completion_cases(evaluate.SEED, language)[::3]
    prompts = [demo[1].encode(prompt) for prompt, _ in cases]
    answers = [answer.partition("\n")[0] for answer in evaluate.generate(*demo, prompts, max_new_tokens=24)]
    right = sum(answer == expected for answer, (_, expected) in zip(answers, cases))
    assert right / len(cases) >= evaluate.MIN_COMPLETIONS


def test_chat_in_phrasings_held_out_from_training(demo):
    """A tenth of the questions; `demo/evaluate.py` asks all."""
    model, tokenizer = demo
    turns = [dialogue.turns[-1] for dialogue in corpus.chat_cases(evaluate.SEED, in_conversation=False)[::10]]
    prompts = [make_context(tokenizer, turn.query, system=corpus.DEFAULT_SYSTEM)[1] for turn in turns]
    answers = evaluate.generate(model, tokenizer, prompts)
    right = sum(corpus.is_correct(turn, answer) for turn, answer in zip(turns, answers))
    assert right / len(turns) >= evaluate.MIN_CHAT


def test_a_conversation(demo):
    model, tokenizer = demo
    history = None
    for question, answer in (
        ("你好", "你好"),
        ("法国的首都是哪里？", "巴黎"),
        ("那德国呢？", "柏林"),
        ("What is the capital of Kenya?", "Nairobi"),
        ("2 + 3 = ?", "5"),
    ):
        response, history = model.chat(tokenizer, question, history)
        assert answer in response
        assert list(model.chat_stream(tokenizer, question, history[:-1]))[-1] == response


def test_chat_answers_the_same_from_an_8_bit_cache(demo):
    model, tokenizer = demo
    for dialogue in corpus.chat_cases(evaluate.SEED, True)[::50]:
        *history, turn = dialogue.turns
        arguments = (tokenizer, turn.query, [(before.query, before.response) for before in history], dialogue.system)
        assert model.chat(*arguments, cache_bits=8) == model.chat(*arguments)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("kv_cache", ROOT / "benchmarks" / "kv_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "change"), [(4, 0.02), (8, 0.003), (None, 1e-5)])
def test_perplexity_with_a_quantised_cache(demo, benchmark, bits, change):
    model, tokenizer = demo
    model = type(model).from_pretrained(DEMO, fp32=True)
    ids, labels = (t[::3] for t in benchmark.held_out_text(tokenizer, 512))
    assert (labels >= 0).sum() > 1500
    exact = torch.nn.functional.cross_entropy(
        model(ids).logits.detach()[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).exp()  # computed at once, without a cache
    cache = benchmark.QWenCache() if bits is None else benchmark.QWenQuantizedCache(bits)
    found = benchmark.perplexity(model, ids, labels, cache, chunk=16)
    assert 1 < exact < 2.5
    assert abs(found / exact.item() - 1) < change
