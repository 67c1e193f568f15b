"""Contexts, decoding, stop words and streams of text."""

from __future__ import annotations

import copy
import inspect
import json
from collections import UserDict
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import transformers
from conftest import ROOT, lacks, tokenization_qwen
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen import qwen_generation_utils as utils

RECORDED = json.loads((ROOT / "tests" / "golden" / "tokenizer.json").read_text(encoding="utf-8"))
CHAT_TEMPLATES = hasattr(transformers.PreTrainedTokenizer, "apply_chat_template")
contents = st.lists(
    st.one_of(
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "system\n", " \n", "\n\n", "你好", "\ufdd0"]),
    ),
    max_size=4,
).map("".join)


@pytest.mark.parametrize("case", RECORDED["contexts"], ids=lambda case: case["chat_format"])
def test_recorded_contexts(official_tokenizer, case):
    arguments = {key: case[key] for key in ("query", "history", "system", "max_window_size", "chat_format")}
    assert utils.make_context(official_tokenizer, **arguments) == (case["raw_text"], case["tokens"])


@pytest.mark.parametrize("case", RECORDED["decodes"], ids=lambda case: case["response"])
def test_recorded_decodings(official_tokenizer, case):
    tokens = case["context"] + case["tail"]
    for given_tokens in (tokens, torch.tensor(tokens)):
        assert utils.decode_tokens(
            given_tokens,
            official_tokenizer,
            raw_text_len=len(case["raw_text"]),
            context_length=len(case["context"]),
            chat_format=case["chat_format"],
            return_end_reason=True,
            errors=case["errors"],
        ) == (case["response"], case["end_reason"])


def test_recorded_stop_words(official_tokenizer):
    for chat_format, expected in RECORDED["stop_words"].items():
        assert utils.get_stop_words_ids(chat_format, official_tokenizer) == expected


@settings(max_examples=200, deadline=None)
@given(query=contents, history=st.lists(st.tuples(contents, contents), max_size=3), system=contents)
def test_contexts_hold_exactly_the_control_tokens_of_the_format(demo_tokenizer, query, history, system):
    tokenizer, before = demo_tokenizer, list(history)
    text, ids = utils.make_context(tokenizer, query, history, system, max_window_size=10**6)
    assert history == before
    control = [token for token in ids if token in range(tokenizer.eod_id, len(tokenizer))]
    turns = 2 + 2 * len(history)  # system and query, and what came before
    assert control == [tokenizer.im_start_id, tokenizer.im_end_id] * turns + [tokenizer.im_start_id]
    messages = [{"role": "system", "content": system}]
    for past_query, past_response in history:
        messages += [{"role": "user", "content": past_query}, {"role": "assistant", "content": past_response}]
    messages.append({"role": "user", "content": query})
    template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert template == ids
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text


def test_template_with_and_without_system_batched_and_as_tensors(demo_tokenizer):
    tokenizer = demo_tokenizer
    chats = [[{"role": "user", "content": "1+1=?"}], [{"role": "user", "content": "<|im_end|>你好呀"}]]
    expected = [
        utils.make_context(tokenizer, chat[0]["content"], system="You are a helpful assistant.")[1] for chat in chats
    ]
    assert tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False) == expected
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], expected):
        assert ids[mask.bool()].tolist() == row
    finished = [*chats[0], {"role": "assistant", "content": "2"}]
    assert tokenizer.apply_chat_template(finished, return_dict=False) == expected[0] + tokenizer.encode("2") + [
        tokenizer.im_end_id
    ]


def by_message(tokenizer, messages):
    """ChatML, a message at a time: ids, and 1 for those that an assistant says."""
    newline = tokenizer.encode("\n")
    ids, mask = [], []
    for i, message in enumerate(messages):
        head = [*(newline if i else []), tokenizer.im_start_id, *tokenizer.encode(message["role"]), *newline]
        said = [*tokenizer.encode(message["content"], allowed_special=set()), tokenizer.im_end_id]
        ids += head + said
        mask += [0] * len(head) + [int(message["role"] == "assistant")] * len(said)
    return ids, mask


CHAT = [
    {"role": "system", "content": "assistant"},
    {"role": "user", "content": "1+1=? {% generation %}"},
    {"role": "assistant", "content": "\n2 <|im_end|> 龘"},
    {"role": "user", "content": "\ufdd0\ufdd2\ufdd3|"},
    {"role": "assistant", "content": ""},
]


def test_the_mask_has_what_an_assistant_says(demo_tokenizer):
    arguments = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = by_message(demo_tokenizer, CHAT)
    encoded = demo_tokenizer.apply_chat_template(CHAT, **arguments)
    assert (encoded["input_ids"], encoded["assistant_masks"]) == expected
    assert demo_tokenizer.apply_chat_template(CHAT, return_dict=False) == expected[0]
    other = by_message(demo_tokenizer, CHAT[:3])
    tokenizer = copy.deepcopy(demo_tokenizer)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.apply_chat_template([CHAT, CHAT[:3]], padding=True, return_tensors="pt", **arguments)
        for i, (ids, mask) in enumerate((expected, other)):
            shown = batch["attention_mask"][i].bool()
            assert batch["input_ids"][i][shown].tolist() == ids
            assert batch["assistant_masks"][i][shown].tolist() == mask
            assert not batch["assistant_masks"][i][~shown].any()
    short = demo_tokenizer.apply_chat_template(CHAT, truncation=True, max_length=40, **arguments)
    assert (short["input_ids"], short["assistant_masks"]) == (expected[0][:40], expected[1][:40])
    asked = demo_tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, **arguments)
    assert not any(asked["assistant_masks"])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n\n{% endfor %}", "龘b龘"),
        ("{% for m in messages %}a {%- generation -%} {{ m.content }} {%- endgeneration %}{% endfor %}", "龘ab龘"),
        ("{% for m in messages %}the capit{% generation %}al{% endgeneration %} of{% endfor %}", " capital" * 2),
    ],
)
def test_the_mask_of_another_template(demo_tokenizer, template, said):
    """A token counts if a part of it is generated; ids are the same with the mask and without."""
    chat = [{"role": "user", "content": "龘"}, {"role": "assistant", "content": "b龘"}]
    arguments = {"chat_template": template, "return_dict": True}
    encoded = demo_tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, **arguments)
    assert encoded["input_ids"] == demo_tokenizer.apply_chat_template(chat, **arguments)["input_ids"]
    text = demo_tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
    assert demo_tokenizer.encode(text) == encoded["input_ids"]
    marked = [index for index, flag in zip(encoded["input_ids"], encoded["assistant_masks"]) if flag]
    assert demo_tokenizer.decode(marked) == said


def test_a_mask_that_cannot_be_given(demo_tokenizer):
    for arguments in ({"chat_template": "{{ messages[0].content }}", "return_dict": True}, {"tokenize": False}):
        with pytest.raises(ValueError, match=r"needs tokenize=True.*generation"):
            demo_tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, **arguments)
    with pytest.raises(ValueError, match="return_dict=True"):
        demo_tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=False)


def test_a_folder_saved_with_the_earlier_template(demo_tokenizer):
    plain = tokenization_qwen.PLAIN_CHAT_TEMPLATE
    assert "generation %}" not in plain
    expected = by_message(demo_tokenizer, CHAT)[0]
    assert demo_tokenizer.apply_chat_template(CHAT, chat_template=plain, return_dict=False) == expected
    texts = [demo_tokenizer.apply_chat_template(CHAT, chat_template=t, tokenize=False) for t in (plain, None)]
    assert texts[0] == texts[1]


def test_another_template_sees_the_messages_and_stays_safe(demo_tokenizer):
    template = "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    messages = [{"role": "user", "content": "  hi  "}, {"role": "user", "content": "a<|im_end|>b"}]
    ids = demo_tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
    start, end = demo_tokenizer.im_start_id, demo_tokenizer.im_end_id
    quoted = demo_tokenizer.encode("a<|im_end|>b", allowed_special=set())
    assert ids == [start, *demo_tokenizer.encode("hi"), end, start, *quoted, end]


@pytest.mark.parametrize(
    ("template", "messages", "variables"),
    [
        ("{{ m.content[0] }}{{ m.content[1] }}", {"content": ["<|im_", "end|>"]}, {}),
        ("{{ m.content[0] }}{{ m.content[1] }}{{ m.content[2] }}", {"content": ["<", "|im_end|", ">"]}, {}),
        ("{{ m.content | lower }}", {"content": "<|IM_END|>"}, {}),
        ("{{ m.role }}{{ m.content }}", {"role": "<|im_", "content": "end|>"}, {}),
        ("{{ m.call | tojson }}", {"content": "", "call": {"<|im_end|>": 1}}, {}),
        ("{{ note }}", {"content": ""}, {"note": "<|im_end|>"}),
        ("{{ m.content.split('</think>')[-1] }}", {"content": "x</think><|im_end|>"}, {}),
        ("{{ m.content[:1] }}{{ m.content[1:] }}", {"content": "<|im_end|>"}, {}),
        ("{{ m.content | reverse }}", {"content": ">|dne_mi|<"}, {}),
        ("{{ m.content | replace('-', '') }}", {"content": "<|im-_end|>"}, {}),
    ],
)
def test_no_template_makes_control_tokens_out_of_texts(demo_tokenizer, template, messages, variables):
    template = "{% for m in messages %}" + template + "{% endfor %}"
    ids = demo_tokenizer.apply_chat_template(
        [{"role": "user", **messages}], chat_template=template, return_dict=False, **variables
    )
    assert ids
    assert demo_tokenizer.im_end_id not in ids


def test_a_text_cut_up_by_a_template_is_whole_in_the_ids(demo_tokenizer):
    template = "<|im_start|>{{ messages[0].content.split('#')[1] | tojson }}{{ messages[0].call | tojson }}<|im_end|>"
    messages = [{"role": "user", "content": "a|b#c|d <|im_end|>", "call": {"x|y": "<|endoftext|>"}}]
    ids = demo_tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
    text = demo_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert demo_tokenizer.decode(ids) == text
    inside = text[len("<|im_start|>") : -len("<|im_end|>")]
    ordinary = demo_tokenizer.encode(inside, allowed_special=set())
    assert ids == [demo_tokenizer.im_start_id, *ordinary, demo_tokenizer.im_end_id]


def test_a_text_breaks_no_control_token_of_the_template(demo_tokenizer):
    """In NFC ">" with U+0338 is one character, which is no end of a control token."""
    messages = [{"role": "user", "content": "\u0338"}]
    for template in ("<|im_start|>{{ messages[0].content }}<|im_end|>", None):
        ids = demo_tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
        assert [ids[0], ids[-1]] == [demo_tokenizer.im_start_id, demo_tokenizer.im_end_id]


def test_messages_of_other_kinds(demo_tokenizer):
    class Chat:
        messages = [UserDict(role="user", content="<|im_end|>"), MappingProxyType({"role": "user", "content": "a"})]

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    expected = demo_tokenizer.encode("<|im_end|>a", allowed_special=set())
    for chat in (Chat, Chat.messages, tuple(Chat.messages)):
        assert demo_tokenizer.apply_chat_template(chat, chat_template=template, return_dict=False) == expected
        assert demo_tokenizer.apply_chat_template(chat, return_dict=False).count(demo_tokenizer.im_end_id) == 3
    for bad in (Path("<|im_end|>"), b"<|im_end|>", {"<|im_end|>"}, object()):
        for messages in ([{"role": "user", "content": bad}], [bad], bad):
            with pytest.raises(TypeError, match=f"found {type(bad).__name__} in them"):
                demo_tokenizer.apply_chat_template(messages, chat_template=template)


def test_what_transformers_offers_beside_templates(demo_tokenizer):
    messages = [{"role": "user", "content": "hi <|im_end|>"}, {"role": "assistant", "content": "Sure, "}]
    ids = demo_tokenizer.apply_chat_template(messages, return_dict=False)
    assert demo_tokenizer.apply_chat_template(messages, return_dict=False, sanitize_control_tokens=True) == ids
    tools = [{"name": "f|<|im_end|>"}]
    expected = demo_tokenizer.encode("f|<|im_end|>", allowed_special=set())
    for name in ("tools", "documents"):
        arguments = {name: tools, "chat_template": "{{ " + name + "[0].name }}", "return_dict": False}
        assert demo_tokenizer.apply_chat_template(messages, **arguments) == expected
    template = "{{ tools[0].name }}"
    assert demo_tokenizer.apply_chat_template(messages, tools, None, template, return_dict=False) == expected
    method = transformers.PreTrainedTokenizer.apply_chat_template if CHAT_TEMPLATES else None
    if method is None or "continue_final_message" not in inspect.signature(method).parameters:
        lacks("continues no final message in a chat template")
    continued = demo_tokenizer.apply_chat_template(messages, return_dict=False, continue_final_message=True)
    assert continued == ids[:-1]


def test_contents_in_parts_and_empty_ones(demo_tokenizer):
    def ids(content):
        return demo_tokenizer.apply_chat_template([{"role": "user", "content": content}], return_dict=False)

    assert ids([{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]) == ids("1+1")
    assert ids(None) == ids("")
    for bad in ([{"type": "image", "url": "x"}], 5, [5]):
        with pytest.raises(ValueError, match="text only; found a message with the content"):
            ids(bad)
    for bad in ({"content": "x"}, {"role": 5, "content": "x"}, "x"):
        with pytest.raises(ValueError, match=f"a role and a content, found {bad!r}"):
            demo_tokenizer.apply_chat_template([bad])
    with pytest.raises(ValueError, match="empty"):
        demo_tokenizer.apply_chat_template([])
    with pytest.raises(ValueError, match="no place for tools"):
        demo_tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=[{"name": "f"}])


@pytest.mark.parametrize("bad", [[{"role": "user", "content": "x"}], [("a",)], [("a", None)], ["ab"]], ids=str)
def test_history_that_is_not_pairs_of_texts(demo_tokenizer, bad):
    with pytest.raises(ValueError, match=r"pairs of texts.*apply_chat_template"):
        utils.make_context(demo_tokenizer, "hi", bad)


def test_window_drops_the_oldest_turns_first(demo_tokenizer):
    history = [("first question", "first answer"), ("second question", "second answer")]
    whole = utils.make_context(demo_tokenizer, "now", history, "sys")
    none = utils.make_context(demo_tokenizer, "now", None, "sys")
    size = len(whole[1]) - len(utils.make_context(demo_tokenizer, "now", history[1:], "sys")[1])
    smaller = utils.make_context(demo_tokenizer, "now", history, "sys", max_window_size=len(whole[1]) - size)
    assert "second answer" in smaller[0]
    assert "first answer" not in smaller[0]
    assert utils.make_context(demo_tokenizer, "now", history, "sys", max_window_size=1) == none


def test_a_turn_that_fills_the_window_is_dropped(demo_tokenizer):
    """As published: the system prompt and the turns stay below `max_window_size`; the question is not counted."""
    history = [("question", "answer")]
    question = demo_tokenizer.encode("now")
    rest = len(question) + 4 + len(demo_tokenizer.encode("user")) + 2 + len(demo_tokenizer.encode("assistant")) + 1
    whole = utils.make_context(demo_tokenizer, "now", history, "sys", max_window_size=10**6)
    size = len(whole[1]) - rest
    assert utils.make_context(demo_tokenizer, "now", history, "sys", max_window_size=size + 1) == whole
    dropped = utils.make_context(demo_tokenizer, "now", None, "sys")
    assert utils.make_context(demo_tokenizer, "now", history, "sys", max_window_size=size) == dropped


def test_the_earliest_stop_text_ends_a_stream(demo_tokenizer):
    """Both come with one token; the one that is named first stands behind the other."""
    (token,) = demo_tokenizer.encode(" capital")
    stream = utils.TextStream(demo_tokenizer, stop=["tal", "api"])
    assert stream.put(64)
    assert not stream.put(token)
    assert stream.finish() == "a c"


def test_a_stream_holds_back_all_that_may_begin_a_stop_text(demo_tokenizer):
    for text, shown in (("xabc", "x x x x"), ("xabd", "x x x xabd"), ("ababc", "_ _ ab ab ab")):
        stream, parts = utils.TextStream(demo_tokenizer, stop=["abc"]), []
        for letter in text:
            stream.put(*demo_tokenizer.encode(letter))
            parts.append(stream.text or "_")
        assert " ".join(parts) == shown


@pytest.mark.parametrize("chat_format", ["ChatML", None, "alpaca"])
def test_unknown_chat_format(demo_tokenizer, chat_format):
    with pytest.raises(ValueError, match=r"Unknown chat_format .*'chatml', 'raw'"):
        utils.make_context(demo_tokenizer, "hi", chat_format=chat_format)
    with pytest.raises(ValueError, match="Unknown chat_format"):
        utils.get_stop_words_ids(chat_format, demo_tokenizer)
    with pytest.raises(ValueError, match="Unknown chat_format"):
        utils.decode_tokens([1], demo_tokenizer, 0, 0, chat_format)


def test_stop_words_processor_row_by_row():
    processor = utils.StopWordsLogitsProcessor([[7], [1, 2, 3]], eos_token_id=9, prompt_length=2)
    ids = torch.tensor([[0, 0, 1, 2, 3], [0, 0, 2, 2, 3], [0, 0, 0, 0, 7], [7, 7, 7, 7, 0]])
    scores = torch.randn(4, 10)
    before = scores.clone()
    result = processor(ids, scores)
    assert torch.equal(scores, before)
    assert result.argmax(-1)[[0, 2]].tolist() == [9, 9]
    assert torch.isneginf(result[[0, 2], :9]).all()
    assert torch.equal(result[[1, 3]], before[[1, 3]])
    assert torch.equal(processor(torch.tensor([[7, 7]]), scores[:1]), scores[:1])  # all of it prompt
    assert torch.equal(processor(torch.tensor([[1, 2, 3]]), scores[:1]), scores[:1])  # begins in the prompt
    first = utils.StopWordsLogitsProcessor([[0]], eos_token_id=0)  # the first token of a vocabulary is one
    assert first(torch.tensor([[3, 0]]), scores[:1]).argmax().item() == 0
    assert torch.equal(first(torch.tensor([[0, 3]]), scores[:1]), scores[:1])


@settings(max_examples=200, deadline=None)
@given(text=contents)
def test_stream_never_shows_half_a_character_and_ends_with_the_text(demo_tokenizer, text):
    ids = demo_tokenizer.encode(text, allowed_special={"<|endoftext|>"})
    stream, shown = utils.TextStream(demo_tokenizer, stop_ids={demo_tokenizer.im_end_id}), []
    for token in ids:
        assert stream.put(token)
        shown.append(stream.text)
    assert not stream.put(demo_tokenizer.im_end_id)
    whole = demo_tokenizer.decode(ids).strip()
    assert stream.finish() == whole
    for part in shown:
        assert whole.startswith(part)


def test_stream_of_broken_bytes_is_what_decode_gives(demo_tokenizer):
    first = demo_tokenizer.encode("龘")[:1]
    for ids in (first, first + demo_tokenizer.encode("a"), first + [demo_tokenizer.eod_id] + first):
        stream = utils.TextStream(demo_tokenizer)
        for token in ids:
            stream.put(token)
        assert stream.finish() == demo_tokenizer.decode(ids)
