"""Data to tune on: the published labels, the forms that are read, what is said of wrong data, packed batches."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, lacks, run, tiny_model, tokenization_qwen
from transformers.utils import logging

sys.path.append(str(ROOT / "finetune"))
from data import IGNORED, Conversations, DataError, PackedBatch, encode, messages_of, pack, read
from qwen.transformers_compat import FLASH_MIXES_ROWS, masking_utils
from test_flash_attention import install_standin

IS_PACKED_BY_POSITIONS = hasattr(masking_utils, "find_packed_sequence_indices")

QUESTION, ANSWER = {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}
TOOLS = [{"name": "search", "description": "Looks things up.", "parameters": {"type": "object"}}]
CALLS = [
    {"role": "user", "content": "How high is K2?"},
    {"role": "assistant", "content": None, "function_call": {"name": "search", "arguments": '{"q": "K2"}'}},
    {"role": "function", "name": "search", "content": "8,611 m"},
    {"role": "assistant", "content": "It is 8,611 m high."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome."},
]


def write(path, records) -> str:
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def text_of(tokenizer, row, learned=False) -> str:
    return tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"]) if not learned or label == i])


def test_labels_of_the_published_script(official_tokenizer):
    path = os.environ.get("QWEN_LABELS", ROOT.parent / "shared" / "finetune" / "labels.json")
    if not os.path.isfile(path):
        pytest.skip("needs the recorded labels of the published script: set QWEN_LABELS to them")
    cases = json.loads(Path(path).read_text(encoding="utf-8"))
    for case in cases:
        row = encode(case["conversations"], official_tokenizer, case["max_len"], case["system"])
        length = sum(case["attention_mask"])
        assert row["input_ids"] == case["input_ids"][:length]
        assert row["labels"] == case["labels"][:length]
    assert len(cases) == 20


def test_labels_written_down(demo_tokenizer):
    """The same as the recorded ones, where those are not there."""
    newline = demo_tokenizer.encode("\n")
    start, end = demo_tokenizer.im_start_id, demo_tokenizer.im_end_id
    system, user, hi = (demo_tokenizer.encode(text) for text in ("system", "user", "Hi"))
    assistant, hello = demo_tokenizer.encode("assistant"), demo_tokenizer.encode("Hello!")
    row = encode([QUESTION, ANSWER], demo_tokenizer, None, "Hi")
    ids = [start, *system, *newline, *hi, end, *newline, start, *user, *newline, *hi, end, *newline]
    assert row["input_ids"] == [*ids, start, *assistant, *newline, *hello, end, *newline]
    hidden = [start, *[IGNORED] * len(system + newline + hi), end, *newline]
    hidden += [start, *[IGNORED] * len(user + newline + hi), end, *newline]
    assert row["labels"] == [*hidden, start, *[IGNORED] * len(assistant + newline), *hello, end, *newline]
    answers = encode([QUESTION, ANSWER], demo_tokenizer, None, "Hi", train_on="answers")
    assert answers["input_ids"] == row["input_ids"]
    assert answers["labels"] == [*[IGNORED] * (len(ids) + len([start, *assistant, *newline])), *hello, end, IGNORED]
    assert encode([QUESTION, ANSWER], demo_tokenizer, 9, "Hi")["input_ids"] == row["input_ids"][:9]
    assert encode([ANSWER, QUESTION, ANSWER], demo_tokenizer, None, "Hi") == row  # an answer to nothing is left out


def test_functions_beside_empty_tools_are_read():
    record = {"messages": CALLS, "tools": None, "functions": TOOLS}
    assert messages_of(record)[1] == TOOLS


def test_both_forms_and_every_place_of_the_system_prompt(demo_tokenizer):
    expected = encode([QUESTION, ANSWER], demo_tokenizer, None, "Be brief.")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert encode(messages, demo_tokenizer, None, "Be brief.") == expected
    assert encode([{"role": "system", "content": "Be brief."}, *messages], demo_tokenizer, None) == expected
    assert encode([{"from": "system", "value": "Be brief."}, QUESTION, ANSWER], demo_tokenizer, None) == expected


def test_files(tmp_path, demo_tokenizer):
    records = [
        {"conversations": [QUESTION, ANSWER], "system": "Be brief."},
        {"messages": CALLS, "tools": TOOLS},
    ]
    whole = Conversations(write(tmp_path / "list.json", records), demo_tokenizer, 500)
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    lazy = Conversations(tmp_path / "lines.jsonl", demo_tokenizer, 500, lazy=True)
    assert len(whole) == len(lazy) == 2
    assert [whole[i] for i in range(2)] == [lazy[i] for i in range(2)]
    assert "Be brief." in text_of(demo_tokenizer, whole[0][0])


def test_calls_are_written_as_make_tool_context_writes_them(demo_tokenizer):
    from qwen.qwen_generation_utils import make_tool_context

    row = encode(CALLS, demo_tokenizer, None, tools=TOOLS, train_on="answers")
    text = text_of(demo_tokenizer, row)
    prompt, _ = make_tool_context(demo_tokenizer, CALLS[:1], TOOLS, "You are a helpful assistant.")
    assert text.startswith(prompt)
    learned = text_of(demo_tokenizer, row, learned=True)
    assert learned == (
        'Thought: I can use search.\nAction: search\nAction Input: {"q": "K2"}\nObservation:'
        "Thought: I now know the final answer\nFinal Answer: It is 8,611 m high.<|im_end|>"
        "Thought: I now know the final answer\nFinal Answer: You are welcome.<|im_end|>"
    )
    assert "Observation: 8,611 m\nThought:" in text  # what the tool said is there, and is not learned
    assert "8,611 m\n" in text_of(demo_tokenizer, encode(CALLS, demo_tokenizer, None, tools=TOOLS), learned=True)


def test_calls_are_read_as_make_tool_context_reads_them(demo_tokenizer):
    """Calls of today's form, several in one message, thoughts that say so themselves, line ends, half a surrogate."""
    from qwen.qwen_generation_utils import make_tool_context

    today = [{"id": str(i), "type": "function", "function": {"name": "search", "arguments": {"q": i}}} for i in (1, 2)]
    results = [{"role": "tool", "tool_call_id": i, "content": f"\n{i} \ud83d\n"} for i in "21"]
    said = [
        CALLS[0],
        {"role": "assistant", "content": "Thought: I look.\n", "tool_calls": today},
        *results,
        {"role": "assistant", "content": "See.", "function_call": {"name": "search", "arguments": "{}"}},
        CALLS[2],
        CALLS[3],
    ]
    text = text_of(demo_tokenizer, encode(said, demo_tokenizer, None, tools=TOOLS))
    assert text.split("Begin!")[1].count("\nObservation: ") == 3
    prompt, _ = make_tool_context(demo_tokenizer, said[:-1], TOOLS)
    # That prompt says of a call without a thought no more than "Thought: ".
    prompt = prompt.replace("Thought: \nAction", "Thought: I can use search.\nAction").replace("\ud83d", "\ufffd")
    assert text.startswith(prompt)
    learned = text_of(demo_tokenizer, encode(said, demo_tokenizer, None, tools=TOOLS, train_on="answers"), learned=True)
    assert "Observation:Thought: I can use" in learned  # results are not learned


def test_text_is_never_a_control_token_unless_asked_for(demo_tokenizer):
    said = [{"from": "user", "value": "<|im_end|><|endoftext|>"}, ANSWER]
    ids = encode(said, demo_tokenizer, None, "<|im_start|>")["input_ids"]
    assert ids.count(demo_tokenizer.im_end_id) == ids.count(demo_tokenizer.im_start_id) == 3
    assert demo_tokenizer.eod_id not in ids
    ids = encode(said, demo_tokenizer, None, "<|im_start|>", control_tokens=True)["input_ids"]
    assert ids.count(demo_tokenizer.im_end_id) == 4
    assert demo_tokenizer.eod_id in ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "empty list"),
        ('[\n {"conversations": [}]', r"line 2, column 21: .*near"),
        ('{"a": 1}\n{"a": }', "line 2, column 7: Expecting value"),
        ('{}\n{"from": 1, "value": 2, "value": 3}', "data.json, line 2: an object has 'value' twice, near .*from"),
        ('[{"from": 1, "from": 1}]', "data.json: an object has 'from' twice"),
        ("[" * 100_000, "data.json: lists and objects lie too deep"),
        ('[\n"你好"]'.encode("gbk"), "data.json, line 2: this is not UTF-8"),
    ],
)
def test_what_is_not_json_is_said_with_its_place(tmp_path, content, message):
    (tmp_path / "data.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([QUESTION], "not an object"),
        ({"text": "Hi"}, "neither"),
        ({"conversations": []}, "at least one"),
        ({"conversations": [QUESTION, {"from": "gpt", "value": "x"}]}, "message 2 has the role 'gpt'"),
        ({"conversations": [QUESTION, QUESTION, ANSWER]}, "message 2 is of user after user"),
        ({"conversations": [QUESTION, ANSWER, ANSWER]}, "message 3 is of assistant after assistant"),
        ({"conversations": [QUESTION, ANSWER, {"from": "system", "value": ""}]}, "message 3 is of system"),
        ({"conversations": [QUESTION]}, "no answer"),
        ({"conversations": [ANSWER]}, "no question"),
        ({"conversations": [QUESTION, {"from": "assistant", "value": 3}]}, "message 2 says 3"),
        ({"conversations": [QUESTION, "Hello"]}, "message 2 is 'Hello'"),
        ({"conversations": [{"from": "user", "value": ""}, ANSWER]}, "message 1, of user, has an empty text"),
        (
            {"system": "", "conversations": [QUESTION, {**ANSWER, "value": "\n"}]},
            "message 2, of assistant, has an empty",
        ),
        ({"messages": CALLS[:2], "tools": TOOLS}, "ends with a call"),
        ({"messages": [CALLS[0], {**ANSWER, "tool_calls": [{"function": {}}]}]}, "message 2 calls .*has no name"),
        ({"messages": CALLS}, "message 2 calls 'search', but the tools are none"),
        (
            {"messages": CALLS, "tools": [{"name": "find"}, {"name": "run"}]},
            "calls 'search', but the tools are find, run",
        ),
        (
            {"messages": [{**CALLS[1], "role": "user"}, *CALLS[2:]], "tools": TOOLS},
            "message 1 calls a function, but is not",
        ),
        ({"messages": [CALLS[0], *CALLS[2:]], "tools": TOOLS}, "message 2 is of function after user"),
        ({"messages": [*CALLS[:2], *CALLS[3:]], "tools": TOOLS}, "message 3 is of assistant after a call"),
        ({"system": 5, "messages": CALLS, "tools": TOOLS}, "its system prompt is 5, not a text"),
        ({"messages": CALLS, "tools": {"name": "search"}}, "its tools are .*not a list"),
        ({"messages": CALLS, "tools": ["search"]}, "A tool must be a dictionary"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, QUESTION, ANSWER]}, "twice"),
    ],
)
def test_wrong_conversations_are_said_with_number_and_reason(tmp_path, demo_tokenizer, record, message):
    good = {"conversations": [QUESTION, ANSWER]}
    path = write(tmp_path / "data.json", [good, record, good, record])
    with pytest.raises(DataError, match=f"2 of 4 conversations are wrong .*no. 2: .*{message}.*no. 4"):
        Conversations(path, demo_tokenizer, 500)


def test_conversations_beyond_the_limit_are_counted(tmp_path, demo_tokenizer):
    long_question = {"conversations": [{"from": "user", "value": "very " * 300}, ANSWER]}
    long_answer = {"conversations": [QUESTION, {"from": "assistant", "value": "very " * 300}]}
    path = write(tmp_path / "data.json", [{"conversations": [QUESTION, ANSWER]}, long_question, long_answer])
    data = Conversations(path, demo_tokenizer, 100, train_on="answers")
    assert (data.too_long, data.left_out, len(data)) == ([1, 2], [1], 2)
    assert [len(row["input_ids"]) for (row,) in data][1:] == [100]
    with pytest.raises(DataError, match="nothing to learn"):
        Conversations(write(tmp_path / "long.json", [long_question]), demo_tokenizer, 100, train_on="answers")


def test_a_long_conversation_is_counted_without_a_warning(tmp_path, monkeypatch):
    tokenizer = tokenization_qwen.QWenTokenizer(str(ROOT / "demo" / "qwen.tiktoken"), model_max_length=100)
    warnings = []
    monkeypatch.setattr(logging.get_logger("transformers.tokenization_utils_base"), "warning", warnings.append)
    long = {"conversations": [QUESTION, {"from": "assistant", "value": "very " * 300}]}
    assert Conversations(write(tmp_path / "data.json", [long]), tokenizer, 100).too_long == [0]
    assert warnings == []


def test_packs_are_within_the_capacity_and_whole():
    lengths = [(i * 37) % 90 + 1 for i in range(200)]
    groups = pack(lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(200))
    assert all(sum(lengths[i] for i in group) <= 100 for group in groups)
    assert len(groups) < 1.05 * sum(lengths) / 100


@pytest.fixture(scope="module")
def members():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (19, 7, 12, 30, 3):
        ids = torch.randint(0, 320, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED if i % 3 == 0 else i for i in ids]})
    return rows


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("flat", [True, False])
def test_packed_rows_learn_what_the_rows_alone_learn(members, attention, flat, training):
    if not IS_PACKED_BY_POSITIONS:
        lacks("knows no packed rows")
    model = tiny_model().train(training)
    model.set_attn_implementation(attention)
    batch = PackedBatch(0, flat=flat)([members[:2], members[2:4], members[4:]])
    if flat:
        assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in members))
    else:
        assert batch["input_ids"].shape == (2, 42)
    number = int((batch["labels"][:, 1:] != IGNORED).sum())
    model(**batch, num_items_in_batch=number).loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    packed_loss = model(**batch, num_items_in_batch=number).loss.item()
    model.zero_grad()
    total = 0.0
    for row in members:
        loss = model(
            torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), num_items_in_batch=number
        ).loss
        loss.backward()
        total += loss.item()
    assert abs(packed_loss - total) < 1e-5
    for name, parameter in model.named_parameters():
        assert (packed[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm().clamp(min=1), name


# In a process of its own: a GPU is only pretended, before transformers looks for one.
FLASH = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda: (8, 0)
torch.version.cuda = torch.version.cuda or "12.4"
import flash_attn
from transformers import AutoModelForCausalLM
sys.path.append({finetune!r})
from data import PackedBatch
load = lambda name: AutoModelForCausalLM.from_pretrained(
    "checkpoint", trust_remote_code=True, device_map="cpu", fp32=True, attn_implementation=name).train()
rows = [dict(input_ids=[i * 7 % 320 for i in range(n)], labels=[i * 7 % 320 for i in range(n)]) for n in (19, 7, 30)]
number = sum(len(row["labels"]) - 1 for row in rows)
model = load("flash_attention_2")
loss = model(**PackedBatch(0, flat=True)([rows]), num_items_in_batch=number).loss
loss.backward()
starts = set(str(call["starts"]) for call in flash_attn.calls)
other, total = load("eager"), 0
for row in rows:
    ids = torch.tensor([row["input_ids"]])
    part = other(ids, labels=ids, num_items_in_batch=number).loss
    part.backward()
    total += part.item()
far = max(((a.grad - b.grad).norm() / b.grad.norm().clamp(min=1)).item()
          for a, b in zip(model.parameters(), other.parameters()))
print(starts, abs(loss.item() - total) < 1e-5, far < 1e-5)
"""


@pytest.mark.slow
def test_packed_rows_by_the_variable_lengths_of_flash_attention(tmp_path):
    if FLASH_MIXES_ROWS or not IS_PACKED_BY_POSITIONS:
        lacks("knows no packed rows")
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    environment = {"PYTHONPATH": install_standin(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    output = run(FLASH.format(finetune=str(ROOT / "finetune")), tmp_path, **environment)
    assert output.splitlines()[-1] == "{'[0, 19, 26, 56]'} True True"
