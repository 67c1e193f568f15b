"""`chat`, `chat_stream` and pipelines, on a random model: what they compute, not whether it makes sense."""

from __future__ import annotations

import copy
import gc
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch
from conftest import PIPELINES_TAKE_MESSAGES, lacks, static_cache, tiny_model
from qwen import qwen_generation_utils as utils
from qwen.transformers_compat import DynamicCache
from transformers import GenerationConfig, StoppingCriteria, pipeline
from transformers.generation import utils as generation_utils


@pytest.fixture(scope="module")
def model(demo_tokenizer):
    model = tiny_model(vocab_size=len(demo_tokenizer), seq_length=512)
    eod = demo_tokenizer.eod_id
    model.generation_config = GenerationConfig(
        chat_format="chatml",
        max_window_size=400,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=eod,
        pad_token_id=eod,
    )
    return model


def by_hand(model, tokenizer, query, history=None, system="You are a helpful assistant.", new_tokens=12):
    """The answer, computed with plain forward passes."""
    _, ids = utils.make_context(tokenizer, query, history, system)
    answer = []
    ends = {tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id}
    with torch.no_grad():
        for _ in range(new_tokens):
            token = model(torch.tensor([ids + answer])).logits[0, -1].argmax().item()
            if token in ends:
                break
            answer.append(token)
    return tokenizer.decode(answer).strip()


def qwen_threads():
    return [thread for thread in threading.enumerate() if thread.name == "qwen-generate"]


def test_generate_stops_at_texts(model, demo_tokenizer, monkeypatch):
    """The tokens are bytes: transformers' own criterion sorts a vocabulary of texts."""
    if not hasattr(model.generation_config, "stop_strings"):
        pytest.skip("before 4.39 transformers knows no stop_strings")
    ids = demo_tokenizer("1+1=?", return_tensors="pt")["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, **settings)
    stop = demo_tokenizer.decode(whole[0, ids.shape[1] : ids.shape[1] + 3])
    for texts in (stop, [stop, "never said"]):
        output = model.generate(ids, stop_strings=texts, tokenizer=demo_tokenizer, **settings)
        assert torch.equal(output, whole[:, : ids.shape[1] + 3])
    criteria = [lambda ids, scores, **kwargs: torch.zeros(len(ids), dtype=torch.bool)]
    output = model.generate(ids, None, None, criteria, stop_strings=stop, tokenizer=demo_tokenizer, **settings)
    assert torch.equal(output, whole[:, : ids.shape[1] + 3])
    config = GenerationConfig(stop_strings=stop, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for _ in range(2):
        output = model.generate(ids, generation_config=config, tokenizer=demo_tokenizer)
        assert torch.equal(output, whole[:, : ids.shape[1] + 3])
        assert config.stop_strings == stop
    monkeypatch.setattr(model.generation_config, "stop_strings", [stop])
    output = model.generate(ids, tokenizer=demo_tokenizer, **settings)
    assert torch.equal(output, whole[:, : ids.shape[1] + 3])
    assert torch.equal(model.generate(ids, tokenizer=demo_tokenizer, stop_strings=None, **settings), whole)


def test_chat_stops_at_texts_of_the_generation_configuration(model, demo_tokenizer, monkeypatch):
    if not hasattr(model.generation_config, "stop_strings"):
        pytest.skip("before 4.39 transformers knows no stop_strings")
    answer, _ = model.chat(demo_tokenizer, "1+1=?", None)
    monkeypatch.setattr(model.generation_config, "stop_strings", [answer[:1]])  # its first token has it
    shorter, _ = model.chat(demo_tokenizer, "1+1=?", None)
    assert answer.startswith(shorter)
    assert len(shorter) < len(answer)
    assert list(model.chat_stream(demo_tokenizer, "1+1=?"))[-1] == shorter


def test_chat_equals_plain_forward_passes_and_leaves_history_alone(model, demo_tokenizer):
    history = [("你好", "你好！")]
    response, new_history = model.chat(demo_tokenizer, "1+1=?", history)
    assert response == by_hand(model, demo_tokenizer, "1+1=?", history)
    assert history == [("你好", "你好！")]
    assert new_history == [("你好", "你好！"), ("1+1=?", response)]
    other, _ = model.chat(demo_tokenizer, "1+1=?", None, system="Answer in verse.")
    assert other == by_hand(model, demo_tokenizer, "1+1=?", None, "Answer in verse.")


@pytest.mark.parametrize("end", ["im_end_id", "im_start_id", "eod_id"])
def test_answers_end_at_each_of_the_control_tokens(model, demo_tokenizer, end):
    """A processor makes the model say the control token as its third."""
    context = len(utils.make_context(demo_tokenizer, "hi", system="You are a helpful assistant.")[1])
    token = getattr(demo_tokenizer, end)

    def force(ids, scores):
        if ids.shape[1] == context + 2:
            scores = torch.full_like(scores, -float("inf"))
            scores[:, token] = 0
        return scores

    expected = by_hand(model, demo_tokenizer, "hi", new_tokens=2)
    response, _ = model.chat(demo_tokenizer, "hi", None, logits_processor=[force])
    assert response == expected
    assert list(model.chat_stream(demo_tokenizer, "hi", None, logits_processor=[force]))[-1] == expected


def test_stream_ends_with_what_chat_returns(model, demo_tokenizer):
    for query in ("hi", "法国的首都是哪里？", "<|im_end|>"):
        expected, _ = model.chat(demo_tokenizer, query, None)
        parts = list(model.chat_stream(demo_tokenizer, query, None))
        assert parts[-1] == expected
        assert len(parts) > 3
        assert not qwen_threads()


def test_settings_by_keyword_and_by_configuration(model, demo_tokenizer):
    short, _ = model.chat(demo_tokenizer, "hi", None, max_new_tokens=3)
    assert short == by_hand(model, demo_tokenizer, "hi", new_tokens=3)
    config = GenerationConfig(
        chat_format="chatml", max_new_tokens=5, do_sample=False, eos_token_id=demo_tokenizer.eod_id
    )
    assert model.chat(demo_tokenizer, "hi", None, generation_config=config)[0] == by_hand(
        model, demo_tokenizer, "hi", new_tokens=5
    )
    assert model.generation_config.max_new_tokens == 12


def test_a_configuration_alone_gives_no_warnings(model, demo_tokenizer, monkeypatch):
    """As the published demos call it; transformers warns of keywords beside a configuration."""
    warnings = []
    for name in ("warning_once", "warning"):
        monkeypatch.setattr(generation_utils.logger, name, lambda text, *args: warnings.append(text))
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.pad_token_id = 5, None
    before = config.to_dict()
    expected = by_hand(model, demo_tokenizer, "hi", new_tokens=5)
    assert model.chat(demo_tokenizer, "hi", None, generation_config=config)[0] == expected
    assert list(model.chat_stream(demo_tokenizer, "hi", None, generation_config=config))[-1] == expected
    assert not warnings
    assert config.to_dict() == before
    short = model.chat(demo_tokenizer, "hi", None, generation_config=config, max_new_tokens=2, eos_token_id=64)[0]
    assert short == by_hand(model, demo_tokenizer, "hi", new_tokens=2)


def test_an_argument_stream_is_told_where_streams_are(model, demo_tokenizer):
    for method in (model.chat, model.chat_stream):
        for stream in (True, False):
            with pytest.raises(ValueError, match="call chat_stream"):
                method(demo_tokenizer, "hi", None, stream=stream)


def test_arguments_in_the_wrong_order_are_told_the_right_one(model, demo_tokenizer):
    for ask in (model.chat, model.chat_stream):
        with pytest.raises(TypeError, match=r"found str and QWenTokenizer\. Write model\.chat\(tokenizer, query"):
            ask("hi", demo_tokenizer)
        with pytest.raises(TypeError, match="found QWenTokenizer and NoneType"):
            ask(demo_tokenizer, None)


def test_stop_words(model, demo_tokenizer):
    _, ids = utils.make_context(demo_tokenizer, "hi", system="You are a helpful assistant.")
    output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    words = output[0, len(ids) + 2 : len(ids) + 4].tolist()
    response, _ = model.chat(demo_tokenizer, "hi", None, stop_words_ids=[words])
    assert response == by_hand(model, demo_tokenizer, "hi", new_tokens=4)
    for bad in ([], "stop", [[]], [3]):
        with pytest.raises(ValueError, match="stop_words_ids"):
            model.chat(demo_tokenizer, "hi", None, stop_words_ids=bad)
        with pytest.raises(ValueError, match="stop_words_ids"):
            model.chat_stream(demo_tokenizer, "hi", None, stop_words_ids=bad)


def test_closing_a_stream_stops_the_computation(model, demo_tokenizer):
    steps = []

    def count(ids, scores):
        steps.append(1)
        time.sleep(0.02)
        scores[:, [demo_tokenizer.eod_id, demo_tokenizer.im_start_id, demo_tokenizer.im_end_id]] = -float("inf")
        return scores

    stream = model.chat_stream(demo_tokenizer, "hi", None, max_new_tokens=2000, logits_processor=[count])
    next(stream)
    next(stream)
    stream.close()
    assert not qwen_threads()
    assert len(steps) < 40  # those computed ahead among them
    assert model.chat(demo_tokenizer, "hi", None)[0] == by_hand(model, demo_tokenizer, "hi")


def test_errors_in_generation_reach_the_caller(model, demo_tokenizer):
    class Fails(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire") as caught:
        list(model.chat_stream(demo_tokenizer, "hi", None, stopping_criteria=[Fails()]))
    assert any(frame.name == "__call__" and frame.path.name == "test_chat.py" for frame in caught.traceback)
    assert not qwen_threads()


def test_many_streams_at_once(model, demo_tokenizer):
    queries = ["hi", "你好", "who are you?", "1+1=?"]
    expected = [model.chat(demo_tokenizer, query, None)[0] for query in queries]
    streams = [model.chat_stream(demo_tokenizer, query, None) for query in queries]
    last = [None] * 4
    open_streams = dict(enumerate(streams))
    while open_streams:  # one part of each in turn
        for i in list(open_streams):
            try:
                last[i] = next(open_streams[i])
            except StopIteration:
                del open_streams[i]
    assert last == expected


def test_a_base_model_is_told_how_to_go_on(model, demo_tokenizer):
    for chat_format, found in (
        ("raw", "has chat_format='raw'"),
        (None, "names no chat_format"),
        ("alpaca", "'alpaca'"),
    ):
        config = GenerationConfig(eos_token_id=demo_tokenizer.eod_id)
        if chat_format is not None:
            config.chat_format = chat_format
        for method in (model.chat, model.chat_stream):
            with pytest.raises(ValueError, match=f"(?s){found}.*model.generate.*chat_format = 'chatml'"):
                method(demo_tokenizer, "hi", None, generation_config=config)


def test_a_question_longer_than_the_window(model, demo_tokenizer):
    for method in (model.chat, model.chat_stream):
        with pytest.raises(ValueError, match=r"take \d+ tokens, more than max_window_size=20"):
            method(demo_tokenizer, "a b c " * 10, None, max_window_size=20)
        with pytest.raises(ValueError, match="max_window_size=400"):
            method(demo_tokenizer, "a b c " * 200, None)


def test_the_window_is_of_6144_tokens_where_no_setting_says(model, demo_tokenizer):
    """As published: a prompt of so many tokens is computed, one token more is refused."""
    config = copy.deepcopy(model.generation_config)
    config.max_window_size = None
    frame = len(utils.make_context(demo_tokenizer, "", None, "You are a helpful assistant.")[1])
    (word,) = demo_tokenizer.encode(" a")
    for number in (6144 - frame, 6145 - frame):
        query = demo_tokenizer.decode([word] * number)
        turn = (demo_tokenizer, query, None, "You are a helpful assistant.", None, config, None, None, {})
        if number + frame == 6144:
            assert model._prepare_chat(*turn).input_ids.shape == (1, 6144)
        else:
            with pytest.raises(ValueError, match=r"take 6145 tokens, more than max_window_size=6144"):
                model._prepare_chat(*turn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_return_sequences": 2}, "one response"), ({"num_beams": 2}, "beams"), ({"streamer": object()}, "streamer")],
)
def test_streams_refuse_at_the_call_what_cannot_be_streamed(model, demo_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.chat_stream(demo_tokenizer, "hi", None, **arguments)


def test_chat_with_a_dictionary_asked_for(model, demo_tokenizer):
    expected = by_hand(model, demo_tokenizer, "hi")
    assert model.chat(demo_tokenizer, "hi", None, return_dict_in_generate=True)[0] == expected


def test_stop_texts_end_the_answer_and_are_not_part_of_it(model, demo_tokenizer):
    whole = model.chat(demo_tokenizer, "hi", None)[0]
    for begin, end in ((3, 5), (4, 12), (0, 2), (len(whole) - 2, len(whole))):  # within and across tokens
        stop = whole[begin:end]
        expected = whole[: whole.index(stop)].strip()
        assert model.chat(demo_tokenizer, "hi", None, stop=stop)[0] == expected
        parts = list(model.chat_stream(demo_tokenizer, "hi", None, stop=["not there", stop]))
        assert (parts or [""])[-1] == expected
        for part in parts:
            assert expected.startswith(part)
    assert model.chat(demo_tokenizer, "hi", None, stop="not there")[0] == whole


def test_stop_texts_cut_what_the_beams_give_in_the_end(model, demo_tokenizer):
    """A beam that ended at its first stop text would win or lose by the score of a part."""
    whole = model.chat(demo_tokenizer, "hi", None, num_beams=3)[0]
    for begin in range(0, len(whole) - 1, 7):
        stop = whole[begin : begin + 2]
        expected = whole[: whole.index(stop)].strip()
        assert model.chat(demo_tokenizer, "hi", None, stop=stop, num_beams=3)[0] == expected


def test_stop_texts_end_the_computation(model, demo_tokenizer):
    steps = []

    def count(ids, scores):
        steps.append(ids.shape[1])
        return scores

    whole = model.chat(demo_tokenizer, "hi", None, logits_processor=[count])[0]
    all_steps = len(steps)
    steps.clear()
    model.chat(demo_tokenizer, "hi", None, stop=whole[2:4], logits_processor=[count])
    assert len(steps) < all_steps / 2


def test_an_id_without_a_token_loses_no_answer(demo_tokenizer):
    """A model with more rows in its embedding than there are tokens, which says one of the rest as its second."""
    model = tiny_model(vocab_size=len(demo_tokenizer) + 40, seq_length=512)
    model.generation_config = GenerationConfig(chat_format="chatml", max_new_tokens=6, do_sample=False)
    context = len(utils.make_context(demo_tokenizer, "hi", system="You are a helpful assistant.")[1])

    def force(ids, scores):
        chosen = len(demo_tokenizer) + 5 if ids.shape[1] == context + 1 else 64 + ids.shape[1] - context
        scores = torch.full_like(scores, -float("inf"))
        scores[:, chosen] = 0
        return scores

    expected = demo_tokenizer.decode([64, 66, 67, 68, 69])
    assert model.chat(demo_tokenizer, "hi", None, logits_processor=[force])[0] == expected
    assert list(model.chat_stream(demo_tokenizer, "hi", None, logits_processor=[force]))[-1] == expected
    assert model.chat(demo_tokenizer, "hi", None, logits_processor=[force], stop="never")[0] == expected
    pipe = pipeline("text-generation", model=model, tokenizer=demo_tokenizer)
    ids = demo_tokenizer("a" * context)["input_ids"]
    context = len(ids)
    answer = pipe("a" * context, do_sample=False, max_new_tokens=6, logits_processor=[force], return_full_text=False)
    assert answer[0]["generated_text"] == expected
    # What the warning recommends.
    most = list(range(len(demo_tokenizer), model.config.vocab_size))
    output = model.generate(torch.tensor([ids]), do_sample=True, temperature=9.0, suppress_tokens=most)
    assert output.max() < len(demo_tokenizer)


@pytest.mark.parametrize("bad", ["", [], [""], 5, [5], {"a": 1}], ids=repr)
def test_bad_stop_texts(model, demo_tokenizer, bad):
    for method in (model.chat, model.chat_stream):
        if bad == []:
            continue  # nothing to stop at
        with pytest.raises(ValueError, match="stop must be a text or a list of texts"):
            method(demo_tokenizer, "hi", None, stop=bad)


def test_who_stops_asking_stops_the_computation(model, demo_tokenizer):
    """Without closing the stream, a few tokens are computed ahead and no more."""
    steps = []

    def count(ids, scores):
        steps.append(1)
        scores[:, [demo_tokenizer.eod_id, demo_tokenizer.im_start_id, demo_tokenizer.im_end_id]] = -float("inf")
        return scores

    stream = model.chat_stream(demo_tokenizer, "hi", None, max_new_tokens=400, logits_processor=[count])
    next(stream)
    time.sleep(1)
    assert len(steps) < 40
    stream.close()
    assert not qwen_threads()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupt_from_the_keyboard(model, demo_tokenizer):
    def press(*args):
        raise KeyboardInterrupt

    steps = []

    def third_step(ids, scores):
        steps.append(1)
        if len(steps) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
        time.sleep(0.05)
        scores[:, [demo_tokenizer.eod_id, demo_tokenizer.im_start_id, demo_tokenizer.im_end_id]] = -float("inf")
        return scores

    settings = {"max_new_tokens": 2000, "logits_processor": [third_step]}
    before = signal.signal(signal.SIGALRM, press)
    try:
        for run in (
            lambda: model.chat(demo_tokenizer, "hi", None, **settings),
            lambda: list(model.chat_stream(demo_tokenizer, "hi", None, **settings)),
        ):
            steps.clear()
            with pytest.raises(KeyboardInterrupt):
                run()
            assert len(steps) < 1000  # and not all of them
            assert not qwen_threads()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert model.chat(demo_tokenizer, "hi", None)[0] == by_hand(model, demo_tokenizer, "hi")


def count_positions(model):
    """Notes how many tokens every forward pass computes."""
    lengths = []
    forward = model.transformer.forward

    def counted(input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    model.transformer.forward = counted
    return lengths


@pytest.mark.parametrize("ntk", [False, True])
def test_a_conversation_keeps_its_cache(demo_tokenizer, ntk):
    """Every turn says the same as without the cache, and computes only what is new."""
    model = tiny_model(vocab_size=len(demo_tokenizer), seq_length=64, use_dynamic_ntk=ntk, use_logn_attn=ntk)
    model.generation_config = GenerationConfig(chat_format="chatml", max_new_tokens=10, do_sample=False)
    tokenizer, history, cache = demo_tokenizer, None, None
    lengths = count_positions(model)
    prompts = []
    for turn, query in enumerate(("hi", "你好", "What is the capital of Kenya?", "bye", "1+1=?")):
        expected, _ = model.chat(tokenizer, query, history)
        lengths.clear()
        if turn == 3:  # the same through a stream, which extends the cache in place
            response = list(model.chat_stream(tokenizer, query, history, past_key_values=cache))[-1]
            history = [*history, (query, response)]
        else:
            response, history, cache = model.chat(
                tokenizer, query, history, past_key_values=cache, return_past_key_values=True
            )
        assert response == expected
        prompts.append(lengths[0])
        assert len(cache.token_ids) == cache.get_seq_length()
    whole = len(utils.make_context(tokenizer, query, history[:-1], "You are a helpful assistant.")[1])
    assert prompts[-1] < whole / 2 or ntk  # a new power of two of the NTK scale needs everything anew
    assert prompts[1] < 40


def test_a_cache_is_shortened_when_the_history_changes(model, demo_tokenizer):
    first, history, cache = model.chat(demo_tokenizer, "hi", None, return_past_key_values=True)
    for other in (history, None, [("hi", "something else")], [("ho", first)]):
        expected, _ = model.chat(demo_tokenizer, "and then?", other)
        response, _, cache = model.chat(
            demo_tokenizer, "and then?", other, past_key_values=cache, return_past_key_values=True
        )
        assert response == expected


def test_a_turn_that_breaks_off_leaves_the_cache_as_it_was(model, demo_tokenizer):
    _, history, cache = model.chat(demo_tokenizer, "hi", None, return_past_key_values=True)
    expected, _ = model.chat(demo_tokenizer, "go on", history)

    def fail(ids, scores):
        if ids.shape[1] > cache.get_seq_length() + 1 or len(calls) > 3:
            raise OSError("disk on fire")
        calls.append(1)
        return scores

    for method in (model.chat, lambda *a, **k: list(model.chat_stream(*a, **k))):
        calls = []
        with pytest.raises(OSError, match="on fire"):
            method(demo_tokenizer, "go on", history, past_key_values=cache, logits_processor=[fail])
        assert len(cache.token_ids) == cache.get_seq_length()
    stream = model.chat_stream(demo_tokenizer, "go on", history, past_key_values=cache)
    next(stream)
    stream.close()
    response, _, _ = model.chat(demo_tokenizer, "go on", history, past_key_values=cache, return_past_key_values=True)
    assert response == expected


def test_a_cache_of_unknown_tokens_is_refused(model, demo_tokenizer):
    cache = DynamicCache()
    model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 3 tokens that chat has not seen"):
        model.chat(demo_tokenizer, "hi", None, past_key_values=cache)
    static = static_cache(model.config, 200)
    model(torch.tensor([[1, 2, 3]]), past_key_values=static)
    static.token_ids = [1, 2, 3]
    if hasattr(next(iter(getattr(static, "layers", ())), None), "crop"):  # from 5.24
        expected = model.chat(demo_tokenizer, "hi", None)
        assert model.chat(demo_tokenizer, "hi", None, past_key_values=static) == expected
        return
    with pytest.raises(ValueError, match="StaticCache can't be shortened"):
        model.chat(demo_tokenizer, "hi", None, past_key_values=static)


def test_streams_in_random_order_leave_nothing_behind(model, demo_tokenizer):
    """Concurrent, cancelled, failing and whole streams: every answer is right, no thread and no tensor is left."""
    random = Random(0)
    queries = ["hi", "你好", "who are you?", "1+1=?", "bye"]
    expected = {query: model.chat(demo_tokenizer, query, None)[0] for query in queries}

    def fail(ids, scores):
        raise OSError("disk on fire")

    def one(seed):
        random = Random(seed)
        query = random.choice(queries)
        kind = random.choice(["whole", "cancelled", "abandoned", "failing", "plain"])
        if kind == "plain":
            return model.chat(demo_tokenizer, query, None)[0] == expected[query]
        if kind == "failing":
            with pytest.raises(OSError, match="on fire"):
                list(model.chat_stream(demo_tokenizer, query, None, logits_processor=[fail]))
            return True
        stream = model.chat_stream(demo_tokenizer, query, None)
        if kind == "whole":
            return list(stream)[-1] == expected[query]
        parts = [next(stream, "") for _ in range(random.randrange(4))]
        if kind == "cancelled":
            stream.close()
        return all(expected[query].startswith(part) for part in parts)

    def tensors():
        gc.collect()
        return sum(1 for item in gc.get_objects() if type(item) is torch.Tensor)

    one(0)
    before, threads_before = tensors(), threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, [random.randrange(10**6) for _ in range(200)]))
    gc.collect()
    assert threading.active_count() == threads_before
    assert not qwen_threads()
    assert tensors() <= before + 2


def test_text_generation_pipeline(model, demo_tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=demo_tokenizer)
    text = "法国的首都是"
    ids = demo_tokenizer(text, return_tensors="pt")
    expected = demo_tokenizer.decode(model.generate(**ids, max_new_tokens=6)[0], skip_special_tokens=True)
    assert pipe(text, max_new_tokens=6, do_sample=False)[0]["generated_text"] == expected


def test_text_generation_pipeline_with_messages(model, demo_tokenizer):
    if not PIPELINES_TAKE_MESSAGES:
        lacks("has no pipelines for messages")
    pipe = pipeline("text-generation", model=model, tokenizer=demo_tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    answer = pipe(messages, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert answer[:-1] == messages
    assert answer[-1]["role"] == "assistant"
    assert answer[-1]["content"].strip() == by_hand(model, demo_tokenizer, "hi", new_tokens=6)
