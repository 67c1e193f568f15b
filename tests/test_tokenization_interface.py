"""What callers of transformers' tokenizers use: arguments, batches, copies, processes, threads, streams."""

from __future__ import annotations

import copy
import inspect
import itertools
import multiprocessing
import pickle
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, lacks, sampled, tokenization_qwen
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import generated_texts
from transformers import AddedToken, AutoTokenizer, DataCollatorForLanguageModeling

QWenTokenizer = tokenization_qwen.QWenTokenizer
TEXTS = ["the capital of", "你好<|im_end|>", "a", "def f(x):\n    return x + 1\n", "法国的首都是巴黎，" * 3]
PADS_ON_ANY_SIDE = "padding_side" in inspect.signature(transformers.PreTrainedTokenizerBase.pad).parameters


class Detour(QWenTokenizer):
    """The same tokenizer through transformers' own code, which goes from text to tokens and from tokens to ids."""

    _encode_plus = transformers.PreTrainedTokenizer._encode_plus
    if hasattr(transformers.PreTrainedTokenizer, "_batch_encode_plus"):
        _batch_encode_plus = transformers.PreTrainedTokenizer._batch_encode_plus
    create_token_type_ids_from_sequences = transformers.PreTrainedTokenizer.create_token_type_ids_from_sequences


@pytest.fixture(scope="module")
def detour(demo_tokenizer):
    return Detour(demo_tokenizer.vocab_file)


def plain(encoded):
    """A result as lists, so that it can be compared."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in encoded.items()}


EVERYTHING = {"return_token_type_ids": True, "return_special_tokens_mask": True, "return_attention_mask": True}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        EVERYTHING,
        {"add_special_tokens": False, "return_attention_mask": False},
        {"truncation": True, "max_length": 4, **EVERYTHING},
        {"max_length": 4, "truncation": "longest_first", "padding": "max_length"},
        {"padding": True, "return_tensors": "pt", **EVERYTHING},
        {"padding": "longest", "return_tensors": "np", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 40, **EVERYTHING},
        {"padding": "max_length", "max_length": 32, "truncation": True, "pad_to_multiple_of": 16},
        {"padding": True, "verbose": False},
        {"allowed_special": set()},
        {"allowed_special": {"<|im_end|>"}, "disallowed_special": ("<|endoftext|>",)},
        {"return_length": True},
        {"text_target": TEXTS},
    ],
    ids=str,
)
@pytest.mark.parametrize("sides", ["right", "left"])
def test_arguments_do_what_they_do_in_transformers(demo_tokenizer, detour, arguments, sides):
    ours, theirs = copy.deepcopy(demo_tokenizer), copy.deepcopy(detour)
    for tokenizer in (ours, theirs):
        tokenizer.padding_side = tokenizer.truncation_side = sides
    assert plain(ours(TEXTS, **arguments)) == plain(theirs(TEXTS, **arguments))
    arguments.pop("text_target", None)
    if arguments.get("return_tensors") is None:
        one_by_one = [plain(ours(text, **arguments)) for text in TEXTS]
        assert one_by_one == [plain(theirs(text, **arguments)) for text in TEXTS]
    batch = ours(TEXTS, **{**arguments, "padding": False, "return_tensors": None})
    for i, text in enumerate(TEXTS):
        alone = ours(text, **{**arguments, "padding": False, "return_tensors": None})
        assert plain(alone) == {name: values[i] for name, values in batch.items()}
    if "return_token_type_ids" not in arguments and "return_length" not in arguments:
        for text in TEXTS:
            ids = ours.encode(text, **arguments)
            assert np.array_equal(ids, theirs.encode(text, **arguments))


@pytest.mark.parametrize("truncation", ["only_first", "only_second", "longest_first", False])
@pytest.mark.parametrize("stride", [0, 1])
def test_pairs_and_what_is_cut_off(demo_tokenizer, detour, truncation, stride):
    pairs = list(itertools.product(TEXTS[1:4], TEXTS[3:]))
    for second_only in (True, False):
        arguments = {"truncation": truncation, "stride": stride, "max_length": 16, **EVERYTHING}
        arguments["return_overflowing_tokens"] = second_only and truncation in ("only_first", "only_second")
        for first, second in pairs:
            ours = plain(demo_tokenizer(first, second, **arguments))
            theirs = plain(detour(first, second, **arguments))
            if arguments["return_overflowing_tokens"]:  # where nothing is cut off some releases leave these out
                ours.setdefault("overflowing_tokens", [])
                theirs.setdefault("overflowing_tokens", [])
                for result in (ours, theirs):
                    result.pop("num_truncated_tokens", None)
            assert ours == theirs
        ours = demo_tokenizer([first for first, _ in pairs], [second for _, second in pairs], **arguments)
        assert plain(ours) == plain(demo_tokenizer(pairs, **arguments))
        for i, (first, second) in enumerate(pairs):
            row = demo_tokenizer(first, second, **arguments)
            assert plain(row) == {name: values[i] for name, values in ours.items()}
    single = demo_tokenizer(TEXTS[3], truncation=True, max_length=5, stride=2, return_overflowing_tokens=True)
    ids = demo_tokenizer.encode(TEXTS[3])
    assert single["input_ids"] == ids[:5]
    assert single["overflowing_tokens"] == ids[3:]
    assert single["num_truncated_tokens"] == len(ids) - 5
    batch = demo_tokenizer(TEXTS, truncation=True, max_length=5, return_overflowing_tokens=True, return_tensors=None)
    assert [len(ids) for ids in batch["overflowing_tokens"]] == [
        max(0, len(demo_tokenizer.encode(text)) - 5) for text in TEXTS
    ]


def test_tensors_come_without_what_was_cut_off(demo_tokenizer):
    arguments = {"truncation": True, "max_length": 3, "return_overflowing_tokens": True, "padding": True}
    for texts in (TEXTS, TEXTS[3]):
        encoded = demo_tokenizer(texts, return_tensors="pt", **arguments)
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert encoded["input_ids"].shape == (len(TEXTS) if texts is TEXTS else 1, 3)


def test_padding_side_of_a_single_call(demo_tokenizer):
    if not PADS_ON_ANY_SIDE:
        with pytest.raises(ValueError, match=r"set tokenizer\.padding_side = 'left'"):
            demo_tokenizer(["a", "the capital of"], padding=True, padding_side="left")
        lacks("takes no padding_side as an argument")
    for tokenizer_side, side in itertools.product(("left", "right"), repeat=2):
        tokenizer = copy.deepcopy(demo_tokenizer)
        tokenizer.padding_side = tokenizer_side
        batch = tokenizer(["a", "the capital of"], padding=True, padding_side=side, return_tensors="pt")
        mask = batch["attention_mask"][0].tolist()
        assert mask == sorted(mask, reverse=side == "right")
        assert 0 in mask
        assert (batch["input_ids"][0][batch["attention_mask"][0] == 0] == tokenizer.pad_token_id).all()


def test_words_tokens_and_ids_instead_of_a_text(demo_tokenizer):
    tokenizer = demo_tokenizer
    words = ["法国", "的", " capital", "<|im_end|>"]
    expected = [index for word in words for index in tokenizer.encode(word)]
    assert tokenizer(words, is_split_into_words=True)["input_ids"] == expected
    assert tokenizer([words, words[:2]], is_split_into_words=True)["input_ids"] == [expected, expected[:2]]
    assert tokenizer([], is_split_into_words=True)["input_ids"] == []
    paired = tokenizer(words[:2], words[2:], is_split_into_words=True, return_token_type_ids=True)
    assert paired["input_ids"] == expected
    assert paired["token_type_ids"] == [0] * 2 + [1] * (len(expected) - 2)
    with pytest.raises(ValueError, match="takes a list of words, found the text '法国'"):
        tokenizer("法国", is_split_into_words=True)
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.encode(ids) == ids
    assert tokenizer.encode(tokenizer.tokenize(TEXTS[0])) == ids
    assert tokenizer.prepare_for_model(ids, max_length=2, truncation=True)["input_ids"] == ids[:2]
    assert tokenizer.num_special_tokens_to_add() == tokenizer.num_special_tokens_to_add(pair=True) == 0


def test_empty_texts_and_batches(demo_tokenizer):
    assert plain(demo_tokenizer("")) == {"input_ids": [], "attention_mask": []}
    assert plain(demo_tokenizer([])) == {"input_ids": [], "attention_mask": []}
    assert plain(demo_tokenizer(["", ""])) == {"input_ids": [[], []], "attention_mask": [[], []]}
    batch = demo_tokenizer(["", "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[0], [1]]
    assert plain(demo_tokenizer("", "")) == {"input_ids": [], "attention_mask": []}
    assert demo_tokenizer([("a", ""), ("", "b")])["input_ids"] == [demo_tokenizer.encode(text) for text in "ab"]
    assert demo_tokenizer.encode("") == []
    assert demo_tokenizer.decode([]) == ""
    assert demo_tokenizer("", padding="max_length", max_length=2)["attention_mask"] == [0, 0]


@pytest.mark.parametrize("bad", [5, None, b"bytes", ["a", None], ["a", 5], {"a": 1}], ids=repr)
def test_what_is_not_a_text_is_refused(demo_tokenizer, bad):
    with pytest.raises((TypeError, ValueError)):
        demo_tokenizer(bad)
    with pytest.raises((TypeError, ValueError)):
        demo_tokenizer.encode(bad)
    with pytest.raises((TypeError, ValueError)):
        demo_tokenizer(["a", "b"], ["c"])
    with pytest.raises((TypeError, ValueError)):
        demo_tokenizer([("a", "b", "c")])


@pytest.mark.parametrize("side", ["left", "right"])
def test_offsets_are_cut_and_padded_with_the_ids(demo_tokenizer, side):
    """tests/test_vocabulary_tools.py compares offsets with those of a fast tokenizer."""
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = side
    pairs = [("the capital of France", "龘!"), ("a", "the capital <|im_end|>"), ("", "b")]
    whole = tokenizer(pairs, return_offsets_mapping=True)
    arguments = {"padding": "max_length", "truncation": True, "max_length": 6, "return_special_tokens_mask": True}
    short = tokenizer(pairs, return_offsets_mapping=True, return_tensors="pt", **arguments)
    assert short["offset_mapping"].shape == (3, 6, 2)
    expected = tokenizer(pairs, **arguments)
    for name in ("input_ids", "attention_mask", "special_tokens_mask"):
        assert short[name].tolist() == expected[name]
    for i, (first, second) in enumerate(pairs):
        offsets = tokenizer(first, return_offsets_mapping=True)["offset_mapping"]
        offsets += tokenizer(second, return_offsets_mapping=True)["offset_mapping"]
        assert whole["offset_mapping"][i] == offsets
        known = set(zip(map(tuple, offsets), whole["input_ids"][i]))
        rows = zip(short["input_ids"][i].tolist(), short["offset_mapping"][i].tolist(), short["attention_mask"][i])
        for index, offset, attended in rows:
            assert (tuple(offset), index) in known if attended else offset == [0, 0]
    words = [["the", " capital"], ["法国", "!"]]
    ours = tokenizer(words, is_split_into_words=True, return_offsets_mapping=True)
    each = [[tokenizer(word, return_offsets_mapping=True)["offset_mapping"] for word in row] for row in words]
    assert ours["offset_mapping"] == [one + other for one, other in each]
    with pytest.raises(ValueError, match="takes texts"):
        tokenizer.encode([1, 2], return_offsets_mapping=True)


@pytest.mark.parametrize("text", ["\u212b", "\u212bb", "b\u212b", "\u212b\u212b"])
def test_characters_that_are_normalised_one_by_one_have_offsets_of_their_own(demo_tokenizer, text):
    """The sign of the unit angstrom becomes a letter, of two bytes here; its neighbour is apart from it."""
    offsets = demo_tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert sorted(set(offsets)) == [(i, i + 1) for i in range(len(text))]


def test_offsets_point_into_a_text_that_is_not_normal(demo_tokenizer):
    text = "e\u03011 \u1112\u1161\u11ab<|im_end|>!\ud800x"
    encoded = demo_tokenizer(text, return_offsets_mapping=True)
    parts = [text[begin:end] for begin, end in encoded["offset_mapping"]]
    assert parts[0] == "e\u0301"
    assert parts.count("\u1112\u1161\u11ab") + parts.count(" \u1112\u1161\u11ab") >= 1
    assert "<|im_end|>" in parts
    assert parts[-1] == "x"
    for text in generated_texts(500, seed=61):
        encoded = demo_tokenizer(text, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        assert encoded["input_ids"] == demo_tokenizer(text)["input_ids"]
        if not offsets:
            continue
        assert offsets[0][0] == 0
        assert offsets[-1][1] == len(text)
        for (begin, end), (following, _) in zip(offsets, offsets[1:]):  # no gap, no step back
            assert begin <= following <= end
        # The text up to where a character ends and the next begins is encoded as these tokens give it.
        for place in (i for i in range(1, len(offsets)) if offsets[i - 1][1] == offsets[i][0]):
            head = demo_tokenizer.decode(encoded["input_ids"][:place])
            before = text[: offsets[place][0]].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            assert unicodedata.normalize("NFC", before) == head


def test_an_argument_that_does_not_exist_is_reported(demo_tokenizer, monkeypatch):
    warnings = []
    monkeypatch.setattr(tokenization_qwen.logger, "warning_once", warnings.append)
    demo_tokenizer("text", alowed_special=set())
    assert "alowed_special" in warnings[0]
    demo_tokenizer(TEXTS, padding=True, truncation=True, max_length=9, stride=1, return_length=True, verbose=False)
    demo_tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_tensors="pt", padding=True)
    assert len(warnings) == 1


def test_decoding_of_everything_that_holds_ids(demo_tokenizer):
    ids = demo_tokenizer.encode(TEXTS[1])
    for form in (ids, tuple(ids), np.array(ids), torch.tensor(ids), [np.int64(i) for i in ids]):
        assert demo_tokenizer.decode(form) == TEXTS[1]
        assert demo_tokenizer.decode(form, skip_special_tokens=True) == "你好"
        assert demo_tokenizer.batch_decode([form, form[:1]]) == [TEXTS[1], demo_tokenizer.decode(ids[:1])]
        assert demo_tokenizer.convert_ids_to_tokens(form) == demo_tokenizer.tokenize(TEXTS[1])
    for one in (ids[0], np.int64(ids[0]), torch.tensor(ids[0])):
        assert demo_tokenizer.decode(one) == demo_tokenizer.decode(ids[:1])
        assert demo_tokenizer.convert_ids_to_tokens(one) == demo_tokenizer.tokenize(TEXTS[1])[0]
    rows = torch.tensor([ids, ids])
    assert demo_tokenizer.batch_decode(rows, skip_special_tokens=True) == ["你好", "你好"]
    for bad in (-1, len(demo_tokenizer), 2**40):
        with pytest.raises(ValueError, match=rf"no token with the id {bad}; this vocabulary has \d+ tokens"):
            demo_tokenizer.convert_ids_to_tokens([1, bad])
    with pytest.raises(ValueError, match="no token with the id -1"):
        demo_tokenizer.decode([1, -1])


def test_vocabulary_as_transformers_shows_it(demo_tokenizer):
    tokenizer = demo_tokenizer
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids(list(vocabulary)) == list(vocabulary.values())
    assert tokenizer.all_special_tokens == list(tokenization_qwen.SPECIAL_TOKENS)
    assert tokenizer.all_special_ids == list(range(tokenizer.eod_id, tokenizer.eod_id + 208))
    assert {tokenizer.pad_token, tokenizer.eos_token} == {"<|endoftext|>"}
    if not isinstance(getattr(transformers.PreTrainedTokenizer, "added_tokens_decoder", None), property):
        lacks("shows as added tokens only those beyond the vocabulary")
    shown = tokenizer.added_tokens_decoder
    assert {str(token): index for index, token in shown.items()} == tokenizer.special_tokens
    assert all(token.special for token in shown.values())
    assert tokenizer.get_added_vocab() == tokenizer.added_tokens_encoder == tokenizer.special_tokens


def test_what_is_saved_is_loaded(demo_tokenizer, tmp_path):
    tokenizer = QWenTokenizer(
        demo_tokenizer.vocab_file,
        errors="ignore",
        pad_token=AddedToken("<|extra_0|>"),
        eos_token="<|im_end|>",
        padding_side="left",
        truncation_side="left",
        model_max_length=77,
        chat_template="{{ messages[0]['content'] }}",
    )
    for path in (tmp_path / "once", tmp_path / "twice"):
        tokenizer.save_pretrained(path)
        tokenizer = QWenTokenizer.from_pretrained(path)
        assert tokenizer.get_vocab() == demo_tokenizer.get_vocab()
        assert (tokenizer.errors, tokenizer.pad_token, tokenizer.eos_token) == ("ignore", "<|extra_0|>", "<|im_end|>")
        assert (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length) == ("left", "left", 77)
        assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
        assert tokenizer.special_tokens == demo_tokenizer.special_tokens
        assert (
            tokenizer(TEXTS, padding=True)["input_ids"]
            == (Detour.from_pretrained(path)(TEXTS, padding=True)["input_ids"])
        )


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("qwen.tiktoken", None, (FileNotFoundError, OSError), "There is no vocabulary file"),
        ("qwen.tiktoken", b"QQ== 0\nQg==", ValueError, "line 2: expected 'base64-of-the-token rank'"),
        ("qwen_extra.tiktoken", b"YWJjZGVm 5\n", ValueError, "line 1: the id 5 of b'abcdef' is taken"),
        ("tokenizer_config.json", b'{"pad_token": "[PAD]"}', ValueError, r"'\[PAD\]' is not a special token"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_when_it_is_loaded(tmp_path, name, content, error, message):
    (tmp_path / "qwen.tiktoken").write_bytes((ROOT / "demo" / "qwen.tiktoken").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        QWenTokenizer.from_pretrained(tmp_path)


def test_a_collator_of_transformers(demo_tokenizer):
    collator = DataCollatorForLanguageModeling(demo_tokenizer, mlm=False)
    batch = collator([demo_tokenizer(text) for text in TEXTS])
    longest = max(len(demo_tokenizer.encode(text)) for text in TEXTS)
    assert batch["input_ids"].shape == batch["labels"].shape == (len(TEXTS), longest)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


# --- Copies, threads and processes --------------------------------------------------------------------------------


def test_pickles_are_small_and_the_same_every_time(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    before = pickle.dumps(tokenizer)
    tokenizer(TEXTS, padding=True)
    tokenizer.decode([1, 2])
    assert pickle.dumps(tokenizer) == before
    with open(tokenizer.vocab_file, "rb") as file:
        assert len(before) < 2 * len(file.read())


@pytest.mark.parametrize("num_threads", [None, 1, 2, 5])
def test_batches_on_threads_equal_single_texts(demo_tokenizer, num_threads):
    texts = [text * 60 for text in generated_texts(60, seed=1)] + ["", "a"]
    assert sum(map(len, texts)) > 1000 * len(texts)  # else no threads are used
    expected = [demo_tokenizer.encode(text) for text in texts]
    assert demo_tokenizer(texts, num_threads=num_threads)["input_ids"] == expected
    pairs = list(zip(texts, reversed(texts)))
    assert demo_tokenizer(pairs, num_threads=num_threads)["input_ids"] == [
        first + second for first, second in zip(expected, reversed(expected))
    ]
    with pytest.raises(TypeError, match=r"Expected a text .* found NoneType"):
        demo_tokenizer([*texts, None], num_threads=num_threads)
    with pytest.raises(ValueError, match="disallowed special token"):
        demo_tokenizer([*texts, "<|extra_9|>"], disallowed_special=("<|extra_9|>",), num_threads=num_threads)


def test_one_tokenizer_in_many_threads(demo_tokenizer):
    texts = generated_texts(400, seed=2)
    expected = [demo_tokenizer(text)["input_ids"] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [encoded["input_ids"] for encoded in pool.map(demo_tokenizer, texts)] == expected
        assert list(pool.map(demo_tokenizer.decode, expected)) == [demo_tokenizer.decode(ids) for ids in expected]


@pytest.mark.slow
@pytest.mark.parametrize("method", sampled(["spawn", "fork"]))
def test_one_tokenizer_in_several_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system can't {method} processes")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo", trust_remote_code=True)
    texts = [text * 20 for text in generated_texts(200, seed=3)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        halves = pool.map(tokenizer, [texts[:100], texts[100:]])
    assert halves[0]["input_ids"] + halves[1]["input_ids"] == tokenizer(texts)["input_ids"]


def test_datasets_map_with_several_processes():
    datasets = pytest.importorskip("datasets")
    from datasets.fingerprint import Hasher

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo", trust_remote_code=True)
    texts = generated_texts(400, seed=4)
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]  # Arrow takes no lone surrogates
    data = datasets.Dataset.from_dict({"text": texts})
    fingerprint = Hasher.hash(tokenizer)
    for batched in (True, False):
        result = data.map(tokenizer, input_columns="text", batched=batched, num_proc=2)
        assert list(result["input_ids"]) == tokenizer(texts)["input_ids"]
    assert Hasher.hash(tokenizer) == fingerprint  # so that a second `map` finds its cache


# --- Streams of ids -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans(), errors=st.sampled_from(["replace", "ignore", "backslashreplace"]))
def test_a_stream_gives_what_decode_gives(demo_tokenizer, data, skip, errors):
    tokenizer = copy.copy(demo_tokenizer)
    tokenizer.errors = errors
    text = data.draw(st.text(max_size=20))
    ids = tokenizer.encode(text) + data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    stream = tokenizer.decode_stream(skip_special_tokens=skip)
    for _ in range(2):  # a finished stream takes another text
        parts = [stream.put(index) for index in ids]
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_stream_never_shows_half_a_character(demo_tokenizer):
    text = "龘鿕😀 é 한국어 <|im_end|>龘"
    stream, shown = demo_tokenizer.decode_stream(), ""
    ids = demo_tokenizer.encode(text)
    assert len(ids) > len(text) - len("<|im_end|>")  # some characters take several tokens
    for index in ids:
        shown += stream.put(index)
        assert text.startswith(shown)
    assert shown == text


def test_a_stream_remembers_no_more_than_half_a_character(demo_tokenizer):
    stream = demo_tokenizer.decode_stream()
    for index in demo_tokenizer.encode("龘😀 the capital" * 1000):
        stream.put(index)
        assert len(stream._bytes.getstate()[0]) < 4
    assert set(vars(stream)) == {"_tokenizer", "_skip_special_tokens", "_bytes"}
