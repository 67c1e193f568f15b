"""The tokenizer: recorded outputs, a naive second implementation, round trips, control tokens, damaged files."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import unicodedata

import pytest
import regex
from conftest import ROOT, tokenization_qwen
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

QWenTokenizer = tokenization_qwen.QWenTokenizer
SPECIAL = tokenization_qwen.SPECIAL_TOKENS
RECORDED = json.loads((ROOT / "tests" / "golden" / "tokenizer.json").read_text(encoding="utf-8"))

# Characters that Unicode has long assigned: about newer ones two libraries may know different things.
texts = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)
snippets = st.sampled_from(
    [*SPECIAL[:4], "<|im_", "start|>", "<|", "你好", "首都是", " the", "\n", "\r\n", "e\u0301", "1+1", "'s"]
)
mixed = st.lists(st.one_of(texts, snippets), max_size=8).map("".join)


@pytest.mark.parametrize("case", RECORDED["texts"], ids=lambda case: repr(case["text"][:20]))
def test_recorded_texts(official_tokenizer, case):
    tokenizer, text = official_tokenizer, case["text"]
    assert tokenizer.encode(text) == tokenizer(text)["input_ids"] == case["ids"]
    assert tokenizer.encode(text, allowed_special=set()) == case["ids_no_special"]
    tokens = [f"b:{t.hex()}" if isinstance(t, bytes) else t for t in tokenizer.tokenize(text)]
    assert tokens == case["tokens"]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip"]


def test_official_ids(official_tokenizer):
    tokenizer = official_tokenizer
    ids = [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]
    assert [len(tokenizer), *ids] == [151851, 151643, 151644, 151645]
    assert tokenizer.special_tokens["<|extra_204|>"] == 151850


def naive_bpe(tokenizer, text: str) -> list[int]:
    """Byte pair encoding by its definition: split, then merge the neighbours of lowest rank until none can merge."""
    ids = []
    for piece in regex.findall(tokenization_qwen.PAT_STR, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            ranks = [tokenizer.mergeable_ranks.get(a + b, 1 << 60) for a, b in zip(parts, parts[1:])]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == 1 << 60:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids += [tokenizer.mergeable_ranks[part] for part in parts]
    return ids


@settings(max_examples=300, deadline=None)
@given(text=mixed)
def test_ids_equal_a_naive_implementation(demo_tokenizer, text):
    normal = unicodedata.normalize("NFC", text)
    assert demo_tokenizer.encode(text, allowed_special=set()) == naive_bpe(demo_tokenizer, normal)
    expected = []
    for part in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", normal):
        expected += [demo_tokenizer.special_tokens[part]] if part in SPECIAL else naive_bpe(demo_tokenizer, part)
    assert demo_tokenizer.encode(text) == demo_tokenizer(text)["input_ids"] == expected


@settings(max_examples=300, deadline=None)
@given(text=mixed)
def test_decoding_gives_the_text_back(demo_tokenizer, text):
    normal = unicodedata.normalize("NFC", text)
    assert demo_tokenizer.decode(demo_tokenizer.encode(text)) == normal
    assert demo_tokenizer.decode(demo_tokenizer.encode(text, allowed_special=set()), skip_special_tokens=True) == normal


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))  # lone surrogates too
def test_any_string_can_be_encoded(demo_tokenizer, text):
    assert isinstance(demo_tokenizer.decode(demo_tokenizer.encode(text)), str)


def test_control_over_special_tokens(demo_tokenizer):
    text, eod = "a<|endoftext|>b<|im_end|>", demo_tokenizer.eod_id
    assert demo_tokenizer.encode(text).count(eod) == 1
    for call in (demo_tokenizer.encode, lambda *a, **k: demo_tokenizer(*a, **k)["input_ids"]):
        assert not set(call(text, allowed_special=set())) & set(demo_tokenizer.all_special_ids)
        some = call(text, allowed_special={"<|im_end|>"})
        assert demo_tokenizer.im_end_id in some
        assert eod not in some
        with pytest.raises(ValueError, match="endoftext"):
            call(text, allowed_special=set(), disallowed_special=("<|endoftext|>",))
    assert "<|endoftext|>" in demo_tokenizer.tokenize(text)
    assert demo_tokenizer.tokenize(text, allowed_special=set())[0] == b"a"


def test_padding_batches_and_tensors(demo_tokenizer):
    left = copy.deepcopy(demo_tokenizer)
    left.padding_side = "left"
    batch = left(["a", "the capital of"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][0].tolist()[-1] == 1
    assert batch["attention_mask"][0].tolist()[0] == 0
    assert batch["input_ids"][0, 0] == demo_tokenizer.pad_token_id == demo_tokenizer.eod_id
    assert (
        demo_tokenizer("the capital of", truncation=True, max_length=1)["input_ids"]
        == demo_tokenizer.encode("the capital of")[:1]
    )
    assert demo_tokenizer("a", "b")["input_ids"] == demo_tokenizer.encode("a") + demo_tokenizer.encode("b")
    assert demo_tokenizer.batch_decode([[1, 2], [3]]) == [demo_tokenizer.decode([1, 2]), demo_tokenizer.decode([3])]


def test_undecodable_bytes(demo_tokenizer):
    ids = demo_tokenizer.encode("龘")[:1]  # a rare character: several bytes
    assert demo_tokenizer.decode(ids) == "\ufffd"
    assert demo_tokenizer.decode(ids, errors="ignore") == ""
    assert QWenTokenizer(demo_tokenizer.vocab_file, errors="ignore").decode(ids) == ""
    with pytest.raises(UnicodeDecodeError):
        demo_tokenizer.decode(ids, errors="strict")


def test_copies_and_pickles_encode_the_same(demo_tokenizer):
    text = "你好 <|im_end|>"
    for other in (copy.deepcopy(demo_tokenizer), pickle.loads(pickle.dumps(demo_tokenizer))):
        assert other.encode(text) == demo_tokenizer.encode(text)
        assert len(other) == len(demo_tokenizer)


def test_unknown_tokens_and_ids_are_named(demo_tokenizer):
    with pytest.raises(ValueError, match="no token with the id 99999"):
        demo_tokenizer.decode([1, 99999])
    with pytest.raises(ValueError, match="no token with the id 99999"):
        demo_tokenizer.convert_ids_to_tokens(99999)
    with pytest.raises(ValueError, match="There is no token 'not a token at all'"):
        demo_tokenizer.convert_tokens_to_ids("not a token at all")
    with pytest.raises(TypeError, match="Expected a text"):
        demo_tokenizer.tokenize(5)


def test_only_known_special_tokens_and_no_regular_ones(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|extra_0|>"})
    assert tokenizer.pad_token_id == tokenizer.special_tokens["<|extra_0|>"]
    assert QWenTokenizer(tokenizer.vocab_file, eos_token="<|im_end|>").eos_token_id == tokenizer.im_end_id
    with pytest.raises(ValueError, match="'<mask>' is not a special token"):
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    with pytest.raises(ValueError, match=r"regular token 'word'.*extra_vocab_file"):
        tokenizer.add_tokens(["word"])
    with pytest.raises(ValueError, match="regular token 'word'"):
        tokenizer.add_tokens([AddedToken("word")])
    assert len(tokenizer) == len(demo_tokenizer)
    with pytest.raises(ValueError, match="not a special token"):
        tokenizer.pad_token = "[PAD]"
    with pytest.raises(ValueError, match="not a special token"):
        QWenTokenizer(tokenizer.vocab_file, pad_token="[PAD]")
    assert tokenizer.pad_token == "<|extra_0|>"  # nothing refused has left a trace
    assert tokenizer.mask_token is None


def test_transformers_own_switch_against_special_tokens(demo_tokenizer):
    expected = demo_tokenizer.encode("<|im_end|>", allowed_special=set())
    assert demo_tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"] == expected


def test_extra_vocabulary(demo_tokenizer, tmp_path, caplog):
    first = len(demo_tokenizer)
    path = tmp_path / "extra.tiktoken"
    lines = [("一只猫咪".encode(), first), (b"t", first + 1), (b"zzzq", 5), ("一只猫咪呀".encode(), first + 1)]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines))
    tokenizer = QWenTokenizer(demo_tokenizer.vocab_file, extra_vocab_file=str(path))
    assert tokenizer.extra_ranks == {"一只猫咪".encode(): first, "一只猫咪呀".encode(): first + 1}
    assert len(tokenizer) == first + 2
    assert tokenizer.decode([first, tokenizer.eod_id], skip_special_tokens=True) == "一只猫咪"
    assert tokenizer.convert_tokens_to_ids("一只猫咪".encode()) == first

    tokenizer.save_pretrained(tmp_path / "saved")
    again = QWenTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:-1] + [lines[-1][:-6]], "damaged or truncated|lacks the rank"),
        (lambda lines: lines[:100] + [b"*** 100"] + lines[101:], "line 101: expected 'base64-of-the-token rank'"),
        (lambda lines: lines + [lines[5]], "the token .* is there already, with rank 5"),
        (lambda lines: lines[:-1] + [lines[-1].split()[0] + b" 7"], "the rank 7 is there twice"),
        (lambda lines: lines[:500] + lines[501:], "lacks the rank 500"),
        (lambda lines: lines[:100], "lacks the single byte"),
        (lambda lines: [b"version https://git-lfs.github.com/spec/v1", *lines], "Git LFS pointer"),
    ],
)
def test_damaged_vocabulary(demo_tokenizer, tmp_path, damage, message):
    with open(demo_tokenizer.vocab_file, "rb") as file:
        lines = file.read().splitlines()
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"\n".join(damage(lines)))
    with pytest.raises(ValueError, match=message):
        QWenTokenizer(str(path))


def test_missing_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no vocabulary file .*nowhere.tiktoken"):
        QWenTokenizer(str(tmp_path / "nowhere.tiktoken"))


def test_saved_tokenizer_loads_through_auto_tokenizer(demo_tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo", trust_remote_code=True)
    assert type(tokenizer).__name__ == "QWenTokenizer"
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (ROOT / "demo" / "qwen.tiktoken").read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.get_vocab() == demo_tokenizer.get_vocab()
    assert again.encode("你好<|im_end|>") == demo_tokenizer.encode("你好<|im_end|>")
