"""The tokenizer: recorded outputs, a naive second implementation, round trips, control tokens, damaged files."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import re
import unicodedata

import pytest
import regex
import tiktoken
from conftest import ROOT, official_vocabulary, sampled, tokenization_qwen
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import MARKS, TIKTOKEN_TAKES_LONG_PIECES, generated_texts, without_surrogates
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


# --- 20,000 generated texts against tiktoken itself -------------------------------------------------------------


PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def raw_tiktoken(path) -> tiktoken.Encoding:
    """tiktoken with the vocabulary file, read here, the pattern and the special tokens of SPEC.md."""
    with open(path, "rb") as file:
        ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in file}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    return tiktoken.Encoding(
        "raw",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + i for i, name in enumerate(names)},
    )


@pytest.fixture(scope="module", params=["demo", "official"])
def ours_and_raw(request):
    path = ROOT / "demo" / "qwen.tiktoken" if request.param == "demo" else official_vocabulary()
    if path is None:
        pytest.skip("needs the official qwen.tiktoken: set QWEN_VOCAB to it, or install dashscope")
    return QWenTokenizer(str(path)), raw_tiktoken(path)


ALLOWED_AND_DISALLOWED = [
    ("all", ()),
    (set(), ()),
    ({"<|im_end|>"}, ()),
    ({"<|im_start|>", "<|extra_1|>"}, ("<|endoftext|>",)),
    (set(), "all"),
    ({"<|im_end|>", "<|endoftext|>"}, "all"),
    ("all", ("<|im_start|>",)),
]


@pytest.mark.parametrize("batch", sampled(range(20)))
def test_ids_equal_tiktoken_on_generated_texts(ours_and_raw, batch):
    tokenizer, raw = ours_and_raw
    texts = generated_texts(500, seed=batch)
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    expected = [raw.encode(text, allowed_special="all", disallowed_special=()) for text in normal]
    assert tokenizer(texts)["input_ids"] == expected
    for text, ids in zip(texts, expected):
        assert tokenizer.decode(ids) == without_surrogates(unicodedata.normalize("NFC", text))
    for allowed, disallowed in ALLOWED_AND_DISALLOWED:
        for text, nfc in zip(texts, normal):
            arguments = {"allowed_special": allowed, "disallowed_special": disallowed}
            try:
                ids = raw.encode(nfc, **arguments)
            except ValueError:
                with pytest.raises(ValueError, match="disallowed special token"):
                    tokenizer.encode(text, **arguments)
            else:
                assert tokenizer.encode(text, **arguments) == ids, text
    some = texts[::50]
    for arguments in ({}, {"allowed_special": set()}, {"allowed_special": {"<|im_end|>"}}):
        ids = [tokenizer(text, **arguments)["input_ids"] for text in some]
        assert ids == [tokenizer.encode(text, **arguments) for text in some]
        assert ids == tokenizer(some, **arguments)["input_ids"]
        assert ids == [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, **arguments)) for text in some]


@pytest.mark.skipif(not TIKTOKEN_TAKES_LONG_PIECES, reason="tiktoken before 0.13 takes quadratic time")
def test_a_megabyte_without_a_space(ours_and_raw):
    tokenizer, raw = ours_and_raw
    for word in ("首都是", "abc", "é1", "<|im_", "\ud800"):
        text = word * (1_000_000 // len(without_surrogates(word).encode()))
        ids = tokenizer(text)["input_ids"]
        assert ids == raw.encode(text, disallowed_special=())
        assert tokenizer.decode(ids) == without_surrogates(text)


# --- White space and combining marks without end ------------------------------------------------------------------

SPACES = " \t\u3000\xa0\x85\u2028\x0b\x1c\u200b\n\r"


@pytest.mark.parametrize("allowed", sampled([{"<|im_end|>"}, "all", set()]), ids=str)
def test_long_white_space_is_encoded_as_tiktoken_does(tmp_path, monkeypatch, allowed):
    """With the guard for runs that tiktoken can't split made so low that many runs need it, and tokens for runs."""
    runs = [space * length for space in (" ", "\t", "\u3000", " \t", " \n") for length in range(2, 12)]
    tokens = [bytes([byte]) for byte in range(256)] + [run.encode() for run in runs]
    (tmp_path / "qwen.tiktoken").write_bytes(
        tokenization_qwen.format_tiktoken_bpe({t: i for i, t in enumerate(tokens)})
    )
    tokenizer, raw = QWenTokenizer(str(tmp_path / "qwen.tiktoken")), raw_tiktoken(tmp_path / "qwen.tiktoken")
    arguments = {"allowed_special": allowed, "disallowed_special": ()}
    pieces = st.sampled_from(["a", "!", "1", "<|im_end|>", "<|im_start|>", "你", "'s", *SPACES])
    monkeypatch.setattr(tokenization_qwen, "_LONG_SPACE", 4)

    @settings(max_examples=700, deadline=None)
    @given(parts=st.lists(st.tuples(pieces, st.integers(1, 9)), max_size=9))
    def check(parts):
        text = "".join(piece * times if piece.isspace() else piece for piece, times in parts)
        assert tokenizer.encode(text, **arguments) == raw.encode(text, **arguments), text

    check()


@pytest.mark.skipif(not TIKTOKEN_TAKES_LONG_PIECES, reason="tiktoken before 0.13 takes quadratic time")
def test_white_space_that_overflows_the_stack_of_tiktoken(demo_tokenizer):
    raw = raw_tiktoken(demo_tokenizer.vocab_file)
    below = " " * 999_000
    assert demo_tokenizer.encode(below) == raw.encode(below)
    for text in (" " * 1_100_000, "a" + "\t" * 1_100_000 + "b", "\n" + "\u3000" * 1_100_000 + "<|im_end|>"):
        with pytest.raises(BaseException, match=r"(?i)stack"):  # an exception of Rust in some releases of tiktoken
            raw.encode(text, allowed_special="all")
        assert demo_tokenizer.decode(demo_tokenizer.encode(text)) == text


def test_which_characters_begin_with_a_combining_mark():
    for character in map(chr, range(0x110000)):
        first = unicodedata.normalize("NFD", character)[0]
        assert tokenization_qwen._is_mark(character) == (unicodedata.combining(first) != 0), hex(ord(character))


def test_long_runs_of_marks_are_normalised_as_unicodedata_does(monkeypatch):
    monkeypatch.setattr(tokenization_qwen, "_LONG_MARKS", 4)
    marks = st.sampled_from([*MARKS, "\u0f73", "\u0344", "\u0301", "\u0327"])
    starters = st.sampled_from(["a", "é", "가", "\u1112", "\u1161", "か", "\u0915", "\u212b", " "])

    @settings(max_examples=700, deadline=None)
    @given(parts=st.lists(st.one_of(starters, st.lists(marks, max_size=20).map("".join)), max_size=6))
    def check(parts):
        text = "".join(parts)
        assert tokenization_qwen._nfc(text) == unicodedata.normalize("NFC", text)

    check()


# ------------------------------------------------------------------------------------------------------------------


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


def test_unknown_tokens_have_the_unknown_id_or_none(demo_tokenizer):
    unknown = "not a token at all"
    assert demo_tokenizer.convert_tokens_to_ids(unknown) is None
    assert demo_tokenizer.convert_tokens_to_ids([b"a", unknown, unknown.encode()]) == [64, None, None]
    with pytest.raises(ValueError, match=f"There is no token b'{unknown}'"):
        demo_tokenizer.encode([b"a", unknown.encode()])
    other = copy.deepcopy(demo_tokenizer)
    other.unk_token = "<|extra_0|>"
    assert other.convert_tokens_to_ids([b"a", unknown]) == [64, other.special_tokens["<|extra_0|>"]]


def test_ids_without_a_token_are_decoded_as_nothing(demo_tokenizer, monkeypatch):
    """As a fast tokenizer does; a model with more rows than tokens can sample them."""
    warnings = []
    monkeypatch.setattr(tokenization_qwen.logger, "warning_once", warnings.append)
    ids = demo_tokenizer.encode("龘 capital")
    with_holes = [99999, *ids[:1], len(demo_tokenizer), *ids[1:], 2**40]
    assert demo_tokenizer.decode(with_holes) == "龘 capital"
    end = demo_tokenizer.im_end_id
    assert demo_tokenizer.decode([*with_holes, end], skip_special_tokens=True) == "龘 capital"
    assert demo_tokenizer.decode(99999) == demo_tokenizer.decode([99999]) == ""
    assert demo_tokenizer.batch_decode([[99999, 64], [64]]) == ["a", "a"]
    stream = demo_tokenizer.decode_stream()
    assert "".join(map(stream.put, with_holes)) + stream.finish() == "龘 capital"
    assert len(set(warnings)) == 1
    assert re.search(r"4096 tokens.*suppress_tokens=", warnings[0])
    for call in (demo_tokenizer.decode, demo_tokenizer.decode_stream().put):
        with pytest.raises(ValueError, match="no token with the id -100"):
            call(-100)
    with pytest.raises(ValueError, match="no token with the id 99999"):
        demo_tokenizer.convert_ids_to_tokens([64, 99999])


def test_what_is_no_text_is_refused(demo_tokenizer):
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


@pytest.mark.parametrize("argument", ["allowed_special", "disallowed_special"])
def test_special_tokens_that_do_not_exist(demo_tokenizer, argument):
    for call in (demo_tokenizer, demo_tokenizer.encode, demo_tokenizer.tokenize):
        with pytest.raises(ValueError, match=rf"{argument}: '<\|im_ned\|>' is no special token.*<\|im_end\|>"):
            call("text", **{argument: {"<|im_end|>", "<|im_ned|>"}})
        with pytest.raises(ValueError, match=rf"{argument} must be .all. or a set"):
            call("text", **{argument: "<|im_end|>"})


def test_transformers_own_switch_against_special_tokens(demo_tokenizer):
    """Releases from 4.46 to 4.57 forget it on the way to a batch, if it is left to them."""
    text = "a<|im_end|>"
    expected = demo_tokenizer.encode(text, allowed_special=set())
    always = QWenTokenizer(demo_tokenizer.vocab_file, split_special_tokens=True)
    for tokenizer, arguments in ((demo_tokenizer, {"split_special_tokens": True}), (always, {})):
        assert tokenizer(text, **arguments)["input_ids"] == expected
        assert tokenizer([text, text], **arguments)["input_ids"] == [expected, expected]
        assert tokenizer(text, text, **arguments)["input_ids"] == expected + expected
        assert tokenizer([text], text_target=[text], **arguments)["labels"] == [expected]
        assert tokenizer([[text]], is_split_into_words=True, **arguments)["input_ids"] == [expected]
        assert tokenizer.encode(text, **arguments) == expected
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, **arguments)) == expected
        assert tokenizer(text, allowed_special="all", **arguments)["input_ids"] == expected
    assert always(text, split_special_tokens=False)["input_ids"][-1] == demo_tokenizer.im_end_id


def write_extra(path, lines) -> str:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines))
    return str(path)


def test_extra_vocabulary(demo_tokenizer, tmp_path, caplog):
    first = len(demo_tokenizer)
    lines = [("一只猫咪".encode(), first), (b"t", first + 1), ("一只猫咪呀".encode(), first + 3)]
    path = write_extra(tmp_path / "extra.tiktoken", lines)
    tokenizer = QWenTokenizer(demo_tokenizer.vocab_file, extra_vocab_file=path)
    assert tokenizer.extra_ranks == {"一只猫咪".encode(): first, "一只猫咪呀".encode(): first + 3}  # b"t" exists
    assert len(tokenizer) == first + 4
    assert tokenizer.encode("一只猫咪呀<|im_end|>") == [first + 3, tokenizer.im_end_id]
    ids = [first, tokenizer.eod_id, first + 3, tokenizer.special_tokens["<|extra_204|>"], 70]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "一只猫咪一只猫咪呀" + tokenizer.decode([70])
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == [0, 1, 0, 1, 0]
    assert tokenizer.convert_tokens_to_ids("一只猫咪".encode()) == first

    tokenizer.save_pretrained(tmp_path / "saved")
    again = QWenTokenizer.from_pretrained(tmp_path / "saved")
    for other in (again, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other.extra_ranks == tokenizer.extra_ranks
        assert other.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(("rank", "owner"), [("first", "'cat'"), (5, "the vocabulary itself"), (-1, "vocabulary")])
def test_an_id_given_twice_in_the_extra_vocabulary(demo_tokenizer, tmp_path, rank, owner):
    first = len(demo_tokenizer)
    lines = [(b"cat cat", first), (b"dog dog", first if rank == "first" else rank)]
    path = write_extra(tmp_path / "extra.tiktoken", lines)
    owner = owner.replace("'cat'", "b'cat cat'")
    with pytest.raises(ValueError, match=rf"line 2: the id -?\d+ of b'dog dog' is taken by .*{owner}.*from {first} on"):
        QWenTokenizer(demo_tokenizer.vocab_file, extra_vocab_file=path)


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
