"""tools/extend_vocabulary.py and tools/export_fast_tokenizer.py: what they learn and write, and what they refuse."""

from __future__ import annotations

import base64
import doctest
import importlib
import json
import shutil
import sys
import unicodedata

import pytest
import torch
from conftest import ROOT, lacks, needs_offsets, official_vocabulary, sampled, tiny_model, tokenization_qwen
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import KNOWN, generated_texts, without_surrogates
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(ROOT / "tools"))
byte_pairs, extend, export = map(importlib.import_module, ("byte_pairs", "extend_vocabulary", "export_fast_tokenizer"))

QWenTokenizer = tokenization_qwen.QWenTokenizer
DEMO = ROOT / "demo" / "qwen.tiktoken"
WORDS = "我是一只猫\t20\n你是一只猫\t10\n他是一只猫\t5\n一只\t200\n一只猫\t100\n夸张的 比喻手法\t20\n"


@pytest.mark.parametrize("module", [byte_pairs, extend, export], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0
    assert all("tools/" + module.__name__ in module.__doc__ for module in (extend, export))


# --- Learning -----------------------------------------------------------------------------------------------------


def read(path) -> list[tuple[str, int]]:
    lines = path.read_text().splitlines()
    return [(base64.b64decode(line.split()[0]).decode(errors="replace"), int(line.split()[1])) for line in lines]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text(WORDS, encoding="utf-8")
    return path


def test_the_known_answer(official_tokenizer, words, tmp_path, capsys):
    output = tmp_path / "qwen_extra.tiktoken"
    assert extend.main([official_tokenizer.vocab_file, str(words), str(output), "--start-id", "151851"]) == 0
    learned = ["一只猫", "只猫", "是一只猫", "我是一只猫", "你是一只猫", "他是一只猫"]
    assert read(output) == [(token, 151851 + i) for i, token in enumerate(learned)]
    printed = capsys.readouterr().out
    assert "skipped  '一只': it is a token already, 102292" in printed
    assert "refused  '夸张的 比喻手法': it is split before merging, into '夸张的', ' 比喻手法'" in printed
    assert "4 of 4 words are one token now" in printed
    tokenizer = QWenTokenizer(official_tokenizer.vocab_file, extra_vocab_file=str(output))
    assert tokenizer.encode("我是一只猫，一只狗") == [151854, *official_tokenizer.encode("，一只狗")]


@pytest.mark.parametrize("seed", range(4))
def test_learned_tokens_are_what_the_tokenizer_makes(demo_tokenizer, tmp_path, seed):
    """Whole words become one token, and texts that have none of them stay as they were."""
    some = {
        word
        for text in generated_texts(150, seed)
        for word in unicodedata.normalize("NFC", without_surrogates(text)).split()
        if len(word) < 30 and "|" not in word
    }
    path, output = tmp_path / "words.tsv", tmp_path / "extra.tiktoken"
    path.write_text("".join(f"{word}\t{1 + len(word) % 5}\n" for word in sorted(some)), encoding="utf-8")
    assert extend.main([str(DEMO), str(path), str(output)]) == 0
    tokenizer = QWenTokenizer(str(DEMO), extra_vocab_file=str(output))
    new = set(tokenizer.extra_ranks.values())
    assert new == set(range(len(demo_tokenizer), len(tokenizer)))
    whole = [word for word in some if len(tokenizer.encode(word)) == 1]
    assert len(whole) > 30
    for text in generated_texts(300, seed=100 + seed):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == demo_tokenizer.decode(demo_tokenizer.encode(text))
        if not new & set(ids):
            assert ids == demo_tokenizer.encode(text)


@settings(max_examples=200, deadline=None)
@given(words=st.dictionaries(st.text("abc", min_size=1, max_size=8), st.integers(1, 9), max_size=8))
def test_learning_equals_a_naive_implementation(words):
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"aa": 4, b"aab": 5}
    words = {word.encode(): frequency for word, frequency in words.items() if word.encode() not in ranks}
    expected, current = {}, dict(ranks)
    while True:
        counts = {}
        for word, frequency in words.items():
            parts = [bytes([byte]) for byte in word]
            for _ in byte_pairs.merges(parts, current):
                pass
            for pair in map(bytes.__add__, parts, parts[1:]):
                counts[pair] = counts.get(pair, 0) + frequency
        if not counts:
            break
        token = min(counts, key=lambda pair: (-counts[pair], pair))
        expected[token] = counts[token]
        current[token] = len(current)
    assert list(extend.learn(words, ranks).items()) == list(expected.items())
    assert list(extend.learn(words, ranks, max_tokens=2).items()) == list(expected.items())[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"word 5\n", r"line 1: expected word<TAB>frequency, .* found 'word 5'"),
        (b"good\t3\nword\tmany\n", "line 2: expected word<TAB>frequency"),
        (b"word\t0\n", "line 1: expected"),
        (b"word\t-1\n", "line 1: expected"),
        (b"\t5\n", "line 1: expected"),
        ("wörd\t5".encode("latin-1"), "not UTF-8.*Save it as UTF-8"),
        (b"", "nothing to learn"),
        ("一只猫 一只狗\t5\n".encode(), "nothing to learn"),
        (None, "There is no file"),
    ],
)
def test_words_that_are_not_such_a_file(tmp_path, content, message):
    path, output = tmp_path / "words.tsv", tmp_path / "extra.tiktoken"
    if content is not None:
        path.write_bytes(content)
    assert extend.main([str(DEMO), str(path), str(output)]) == 2
    assert not output.exists()
    with pytest.raises(extend.Problem, match=message):
        extend.extend(DEMO, path, output, None, None)


def test_what_else_is_refused(words, tmp_path, capsys):
    output = tmp_path / "extra.tiktoken"
    damaged = tmp_path / "qwen.tiktoken"
    damaged.write_bytes(DEMO.read_bytes()[:-20])
    for vocabulary, options, message in (
        (damaged, [], "damaged or truncated"),
        (tmp_path / "none.tiktoken", [], "There is no vocabulary file"),
        (DEMO, ["--start-id", "4000"], "4000 is taken; ids are free from 4096 on"),
        (DEMO, ["--start-id", str(10**30)], "is more than an id can be: take 4096"),
        (DEMO, ["--max-tokens", "0"], "nothing to learn"),
    ):
        assert extend.main([str(vocabulary), str(words), str(output), *options]) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.glob("*extra*")) == []
    with pytest.raises(SystemExit):
        extend.main([str(DEMO), str(words), str(output), "--max-tokens", "-1"])
    assert "--max-tokens must be at least 0" in capsys.readouterr().err
    output.write_text("")
    assert extend.main([str(DEMO), str(words), str(output)]) == 2
    assert "exists, and embeddings may have been trained" in capsys.readouterr().err


def test_words_with_the_same_normal_form_and_a_mark_at_the_beginning(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_bytes("\ufeffzéta\t2\r\nze\u0301ta\t3\r\n\r\n zéta\t1\r\n".encode())
    assert extend.read_words(path) == {"zéta": 5, " zéta": 1}


@pytest.mark.parametrize("rows", [4096, 4200])
def test_a_model_with_the_new_tokens(words, tmp_path, rows):
    """Too few embeddings are made more; the spare ones of a padded vocabulary are used as they are."""
    output = tmp_path / "extra.tiktoken"
    assert extend.main([str(DEMO), str(words), str(output)]) == 0
    tokenizer = QWenTokenizer(str(DEMO), extra_vocab_file=str(output))
    model = tiny_model(vocab_size=rows)
    old = torch.tensor([tokenizer.encode("the capital", allowed_special=set())])
    with torch.no_grad():
        before = model(old).logits
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
    rows = max(rows, len(tokenizer))
    assert model.config.vocab_size == rows
    assert model.transformer.wte.weight.shape[0] == model.lm_head.weight.shape[0] == rows
    with torch.no_grad():
        torch.testing.assert_close(model(old).logits[..., :4096], before[..., :4096])
    text = "我是一只猫，你是一只猫"
    ids = torch.tensor([tokenizer.encode(text)])
    assert ids[0, 0] >= 4096
    assert ids[0, -1] >= 4096
    model.train()
    model(ids, labels=ids).loss.backward()
    assert model.transformer.wte.weight.grad[ids[0, 0]].abs().sum() > 0
    model.eval()
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > ids.shape[1]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)
    assert QWenTokenizer.from_pretrained(tmp_path / "model").encode(text) == ids[0].tolist()


# --- The fast tokenizer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sampled(["extended", "demo", "official"]))
def ours_and_fast(request, tmp_path_factory):
    """Our tokenizer of a folder, and what the tool makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    vocabulary = official_vocabulary() if request.param == "official" else DEMO
    if vocabulary is None:
        pytest.skip("needs the official qwen.tiktoken: set QWEN_VOCAB to it, or install dashscope")
    shutil.copy(vocabulary, folder / "qwen.tiktoken")
    config = json.loads((ROOT / "tokenizer_config.json").read_text())
    if request.param == "extended":
        words = folder / "words.tsv"
        words.write_text(WORDS + "ééé\t5\n é\u0301\u0327\t3\n", encoding="utf-8")
        assert extend.main([str(DEMO), str(words), str(folder / "qwen_extra.tiktoken")]) == 0
        config.update(
            padding_side="left", eos_token="<|im_end|>", chat_template="{{ messages[0]['content'] }}<|im_end|>"
        )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert export.main([str(folder), str(folder / "fast")]) == 0
    ours = QWenTokenizer.from_pretrained(folder)
    return ours, PreTrainedTokenizerFast.from_pretrained(folder / "fast")


@pytest.mark.slow
@pytest.mark.parametrize("batch", sampled(range(20)))
def test_the_fast_tokenizer_gives_the_same_ids(ours_and_fast, batch):
    """Of the texts that tests/test_tokenization_qwen.py uses; the library `tokenizers` takes no lone surrogates."""
    ours, fast = ours_and_fast
    texts = [without_surrogates(text) for text in generated_texts(1000, seed=batch)]
    ids = ours(texts)["input_ids"]
    assert fast(texts)["input_ids"] == ids
    for some in ids[::20]:
        assert fast.decode(some) == ours.decode(some)
        assert fast.decode(some, skip_special_tokens=True) == ours.decode(some, skip_special_tokens=True)


def test_the_fast_tokenizer_knows_every_character_as_ours_does(ours_and_fast):
    """Letter, digit, white space, mark or neither: the regular expressions are those of two libraries."""
    ours, fast = ours_and_fast
    texts = [f"{c}{c}a {c}1{c}\n'{c}!{c} <{c}" for c in KNOWN]
    together = ["|".join(texts[i : i + 40]) for i in range(0, len(texts), 40)]
    assert fast(together)["input_ids"] == ours(together)["input_ids"]


def test_the_fast_tokenizer_can_be_told_that_nothing_is_special(ours_and_fast):
    ours, fast = ours_and_fast
    try:
        fast("text", split_special_tokens=True)
    except TypeError:
        lacks("has fast tokenizers that always see special tokens")
    texts = [without_surrogates(text) for text in generated_texts(1000, seed=50)]
    ids = ours(texts, allowed_special=set())["input_ids"]
    assert fast(texts, split_special_tokens=True)["input_ids"] == ids
    assert not set(fast.all_special_ids) & {index for row in ids for index in row}


def test_offsets_point_into_the_text_as_it_was_given(ours_and_fast):
    needs_offsets()
    ours, fast = ours_and_fast
    for text in map(without_surrogates, generated_texts(500, seed=51)):
        offsets = fast(text, return_offsets_mapping=True)["offset_mapping"]
        assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
        normal = unicodedata.normalize("NFC", text)
        encoded = fast(normal, return_offsets_mapping=True)
        character = [i for i, letter in enumerate(normal) for _ in letter.encode()]  # which a byte belongs to
        expected, position = [], 0
        for token in ours.convert_ids_to_tokens(encoded["input_ids"]):
            end = position + len(token)
            expected.append((character[position], character[end - 1] + 1))
            position = end
        assert encoded["offset_mapping"] == expected
        assert ours(normal, return_offsets_mapping=True)["offset_mapping"] == expected
    # A character that NFC makes of several points to the first of them; what follows points to where it is.
    text = "e\u03011 \u1112\u1161\u11ab<|im_end|>!"
    offsets = fast(text, return_offsets_mapping=True)["offset_mapping"]
    assert offsets[0] == (0, 1)
    assert (2, 3) in offsets
    assert [text[slice(*pair)] for pair in offsets[-2:]] == ["<|im_end|>", "!"]


def test_special_tokens_template_and_settings_of_the_fast_tokenizer(ours_and_fast):
    ours, fast = ours_and_fast
    assert len(fast) == len(ours)
    assert sorted(fast.get_vocab().values()) == sorted(ours.get_vocab().values())
    assert sorted(fast.all_special_ids) == ours.all_special_ids
    for name in ("eos_token", "pad_token", "eos_token_id", "pad_token_id", "padding_side", "truncation_side"):
        assert getattr(fast, name) == getattr(ours, name)
    assert fast.model_max_length == ours.model_max_length
    if hasattr(fast, "chat_template"):  # no {% generation %}, which older releases do not know
        assert "generation %}" not in fast.chat_template
    texts = ["a", "the capital of"]
    arguments = {"padding": True, "truncation": True, "max_length": 3}
    assert fast(texts, **arguments)["input_ids"] == ours(texts, **arguments)["input_ids"]
    assert set(fast(texts)) == set(ours(texts)) == {"input_ids", "attention_mask"}
    if not hasattr(fast, "apply_chat_template"):
        lacks("has no chat templates")
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2, sir"}]
    arguments = {"add_generation_prompt": True}
    text = ours.apply_chat_template(messages, tokenize=False, **arguments)
    assert fast.apply_chat_template(messages, tokenize=False, **arguments) == text
    assert fast(text)["input_ids"] == ours.apply_chat_template(messages, return_dict=False, **arguments)


def test_the_exported_folder_loads_by_itself(ours_and_fast):
    ours, fast = ours_and_fast
    loaded = AutoTokenizer.from_pretrained(fast.name_or_path)
    assert loaded.is_fast
    assert loaded("你好<|im_end|>")["input_ids"] == ours("你好<|im_end|>")["input_ids"]


def test_a_token_that_no_merges_lead_to(tmp_path, capsys):
    """A word that is a token as a whole is that token to tiktoken, and to the library `tokenizers` from 0.19 on."""
    shutil.copy(DEMO, tmp_path / "qwen.tiktoken")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "qwen_extra.tiktoken").write_bytes(base64.b64encode(b"xqzjv") + b" 4096\n")
    ours = QWenTokenizer.from_pretrained(tmp_path)
    assert ours.encode("xqzjv") == [4096]
    status = export.main([str(tmp_path), str(tmp_path / "fast")])
    assert status == (0 if hasattr(BPE(), "ignore_merges") else 2)
    if status == 2:
        assert "would give" in capsys.readouterr().err
        lacks("has fast tokenizers that can't have a token which no merges lead to")
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "fast")
    for text in ("xqzjv", "xqzjv xqzjvs", "a xqzjv!"):
        assert fast(text)["input_ids"] == ours(text)["input_ids"]


def test_what_the_export_refuses(tmp_path, capsys, monkeypatch):
    assert export.main([str(tmp_path), str(tmp_path / "fast")]) == 2
    assert "There is no vocabulary" in capsys.readouterr().err
    assert export.main([str(ROOT / "demo"), str(ROOT / "demo")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    shutil.copy(DEMO, tmp_path / "qwen.tiktoken")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    assert export.main([str(tmp_path), str(tmp_path / "fast")]) == 2
    assert "'[PAD]' is not a special token" in capsys.readouterr().err
    first = 4096
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "qwen_extra.tiktoken").write_bytes(base64.b64encode(b"<|im_end|>") + b" %d\n" % first)
    assert export.main([str(tmp_path), str(tmp_path / "fast")]) == 2
    assert "reads <|im_end|>" in capsys.readouterr().err
    # If the export were wrong, it would be found out and nothing be left.
    monkeypatch.setattr(export, "byte_alphabet", lambda: [chr(0x200 + byte) for byte in range(256)])
    assert export.main([str(ROOT / "demo"), str(tmp_path / "fast")]) == 2
    assert "would give" in capsys.readouterr().err
    assert not (tmp_path / "fast").exists()


def test_the_byte_alphabet_is_that_of_the_library(ours_and_fast):
    assert sorted(export.byte_alphabet()) == sorted(ByteLevel.alphabet())
