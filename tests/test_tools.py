"""Calling tools: the prompt, reading what a model wrote, the example's loop."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT, python
from hypothesis import given
from hypothesis import strategies as st
from qwen import qwen_generation_utils as utils

RECORDED = json.loads((ROOT / "tests" / "golden" / "react.json").read_text(encoding="utf-8"))
sys.path.insert(0, str(ROOT / "examples"))
tool_use, toolbox = map(importlib.import_module, ("tool_use", "toolbox"))

CALL = {"name": "calculator", "arguments": '{"expression": "1+1"}'}
MESSAGES = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "I add.", "function_call": CALL},
    {"role": "function", "name": "calculator", "content": "2"},
]


def chatml(system, history, query):
    """The prompt of a conversation; without a query that of the rest of its last answer."""
    text = f"<|im_start|>system\n{system}<|im_end|>"
    for asked, said in history:
        text += f"\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>"
    if query is None:
        return text[: -len("<|im_end|>")]
    return f"{text}\n<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("case", RECORDED["prompts"], ids=lambda case: case["name"])
def test_prompts_are_those_of_the_published_server(demo_tokenizer, case):
    tools = RECORDED["tools"][case["tools"]]
    text, ids = utils.make_tool_context(demo_tokenizer, case["messages"], tools)
    assert text == chatml(case["system"], case["history"], case["query"])
    assert ids == demo_tokenizer.encode(text)


@pytest.mark.parametrize("case", RECORDED["react_prompt"], ids=lambda case: case["query"])
def test_the_other_published_prompt(demo_tokenizer, case):
    messages, tools = [{"role": "user", "content": case["query"]}], RECORDED["tools"][case["tools"]]
    text, _ = utils.make_tool_context(demo_tokenizer, messages, tools, prompt=utils.REACT_PROMPT)
    assert text == chatml("You are a helpful assistant.", [], case["prompt"])


@pytest.mark.parametrize("case", RECORDED["answers"], ids=lambda case: case["text"])
def test_answers_are_read_as_the_published_server_reads_them(case):
    step = utils.parse_react(case["text"])
    if case["function_call"] is None:
        assert (step.action, step.answer) == (None, case["content"])
    else:
        assert (step.action, step.written) == (case["function_call"]["name"], case["function_call"]["arguments"])
        assert step.thought == case["content"]


def test_messages_of_todays_interface(demo_tokenizer):
    """`tool_calls`, several in one message too, with results in any order, and arguments that are no text."""

    def calls(*named):
        return [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in named]

    asked = {"role": "user", "content": "Is it warm in Lima?"}
    new = [
        asked,
        {"role": "assistant", "content": "Two.", "tool_calls": calls(("a", "weather", {"c": "京"}), ("b", "f", "{}"))},
        {"role": "tool", "tool_call_id": "b", "content": "2024"},
        {"role": "tool", "tool_call_id": "a", "content": "22"},
    ]
    old = [
        asked,
        {"role": "assistant", "content": "Two.", "function_call": {"name": "weather", "arguments": '{"c": "京"}'}},
        {"role": "function", "content": "22"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "content": "2024"},
    ]
    expected = utils.make_tool_context(demo_tokenizer, old, toolbox.TOOLS)
    assert utils.make_tool_context(demo_tokenizer, new, toolbox.TOOLS) == expected
    with pytest.raises(ValueError, match="calls that were not made: tool_call_id c"):
        utils.make_tool_context(demo_tokenizer, [*new, {"role": "tool", "tool_call_id": "c"}], toolbox.TOOLS)


def test_tools_are_named_even_if_their_turn_leaves_the_window(demo_tokenizer):
    messages = [
        {"role": "user", "content": "long " * 200},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "And today?"},
    ]
    text, _ = utils.make_tool_context(demo_tokenizer, messages, toolbox.TOOLS, max_window_size=300)
    assert "long" not in text
    assert text.endswith("Begin!\n\nQuestion: And today?<|im_end|>\n<|im_start|>assistant\n")


def test_nothing_that_is_said_becomes_a_control_token(demo_tokenizer):
    messages = json.loads(json.dumps(MESSAGES).replace("1+1", "<|im_end|>").replace('"2"', '"<|im_start|>"'))
    _, ids = utils.make_tool_context(demo_tokenizer, messages, [{"name": "<|im_end|>"}])
    control = [token for token in ids if token >= demo_tokenizer.eod_id]
    start, end = demo_tokenizer.im_start_id, demo_tokenizer.im_end_id
    assert control == [start, end, start, end, start]


@pytest.mark.parametrize(
    "tool",
    [
        {
            "name_for_model": "f",
            "name_for_human": "F",
            "description_for_model": "Does f.",
            "parameters": [{"name": "x"}],
        },
        {"name": "f", "description": "Does f.", "parameters": [{"name": "x"}]},
        {"type": "function", "function": {"name": "f", "description": "Does f.", "parameters": [{"name": "x"}]}},
    ],
)
def test_forms_of_tools(demo_tokenizer, tool):
    text, _ = utils.make_tool_context(demo_tokenizer, MESSAGES[:1], [tool])
    name = tool.get("name_for_human", "f")
    described = f"f: Call this tool to interact with the {name} API. What is the {name} API useful for? Does f."
    assert f'{described} Parameters: [{{"name": "x"}}]' in text


def test_braces_in_a_question_are_left_alone(demo_tokenizer):
    text, _ = utils.make_tool_context(demo_tokenizer, [{"role": "user", "content": "{tools} {names}"}], toolbox.TOOLS)
    assert "Question: {tools} {names}<" in text


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([], toolbox.TOOLS, "no message from a user"),
        (MESSAGES[1:], toolbox.TOOLS, "role 'assistant' has no place"),
        ([*MESSAGES[:1], MESSAGES[0]], toolbox.TOOLS, "role 'user' has no place"),
        ([MESSAGES[0], MESSAGES[2]], toolbox.TOOLS, "role 'function' has no place"),
        ([{"role": "system", "content": "x"}], toolbox.TOOLS, "no message from a user"),
        ([*MESSAGES, {"role": "system", "content": "x"}], toolbox.TOOLS, "role 'system' has no place"),
        (MESSAGES, ["calculator"], "A tool must be a dictionary"),
        (MESSAGES, [{"description": "x"}], "A tool must be a dictionary"),
    ],
)
def test_bad_arguments(demo_tokenizer, messages, tools, message):
    with pytest.raises(ValueError, match=message):
        utils.make_tool_context(demo_tokenizer, messages, tools)


ARGUMENTS = {"expression": "17 * 23"}


@pytest.mark.parametrize(
    "text",
    [
        ' I multiply.\nAction: calculator\nAction Input: {"expression": "17 * 23"}\nObservation:',
        ' I multiply.\nAction: calculator\nAction Input: {"expression": "17 * 23"}',
        'Thought: I multiply.\nAction: calculator\nAction Input: {"expression": "17 * 23"}\nObservation: 391\nThought',
        ' I multiply.\nAction:calculator\nAction Input:\n```json\n{\n  "expression": "17 * 23"\n}\n```\n',
        " I multiply.\nAction: `calculator`\nAction Input: {'expression': '17 * 23'}",
        ' I multiply.\n Action: [calculator]\n Action Input: {"expression": "17 * 23"} and so on',
        ' I multiply.\nAction: calculator\nAction Input: {"expression": "17 * 23"}\nFinal Answer: 400',
    ],
)
def test_calls_are_read_as_they_come(text):
    assert utils.parse_react(text)[:5] == ("I multiply.", "calculator", ARGUMENTS, None, None)


def test_calls_with_mistakes():
    step = utils.parse_react(" I add.\nAction: calculator\nObservation: 2")
    assert (step.action, step.arguments) == ("calculator", None)
    assert "Action Input" in step.error
    for written in ("17 * 23", "[1, 2]", '{"expression": ', "null", "{" * 100_000, "__import__('os')"):
        step = utils.parse_react(f" I add.\nAction: calculator\nAction Input: {written}")
        assert step.arguments is None
        assert f"not a JSON object: {written[:200]}".strip() in step.error
    assert utils.parse_react("Action: today\nAction Input:").arguments == {}


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        (" I know.\nFinal Answer: It is 391.", "I know.", "It is 391."),
        (" I know.\nFinal Answer: two\nlines\nAction: x", "I know.", "two\nlines\nAction: x"),
        ("It is 391.", "It is 391.", "It is 391."),
        ("", "", ""),
    ],
)
def test_answers(text, thought, answer):
    step = utils.parse_react(text)
    assert step.answer == answer
    assert step.thought in (thought, "")
    assert step.action is None


@given(st.text(alphabet=st.sampled_from("Action Input:\n{}\"'`[]\\Final Answer Observation Thought 0"), max_size=120))
def test_any_text_is_read(text):
    step = utils.parse_react(text)
    assert (step.answer is None) == (step.action is not None)
    assert (step.action is None) or (step.arguments is None) == (step.error is not None)


def scripted(*texts):
    """A model that says these, and the messages that it was asked with."""
    asked, answers = [], iter(texts)

    def complete(messages):
        asked.append(list(messages))
        return next(answers)

    return complete, asked


def test_the_loop_calls_tools_until_there_is_an_answer():
    complete, asked = scripted(
        ' First.\nAction: calculator\nAction Input: {"expression": "17 * 23"}\n',
        ' Wrong name.\nAction: calc\nAction Input: {"expression": "1"}\n',
        ' Wrong argument.\nAction: calculator\nAction Input: {"x": "1"}\n',
        " No arguments.\nAction: calculator\nAction Input: 17\n",
        ' Forbidden.\nAction: calculator\nAction Input: {"expression": "open(1)"}\n',
        " Done.\nFinal Answer: 391",
    )
    answer, messages = tool_use.answer(complete, utils.parse_react, "What is 17 * 23?", toolbox.FUNCTIONS)
    assert answer == "391"
    results = [message["content"] for message in messages if message["role"] == "function"]
    assert results[0] == "391"
    assert results[1] == "There is no tool 'calc'; there are calculator, today."
    assert results[2].startswith("TypeError")
    assert "not a JSON object: 17" in results[3]
    assert "not arithmetic" in results[4]
    assert asked[1][-1]["content"] == "391"
    assert json.loads(asked[1][1]["function_call"]["arguments"]) == ARGUMENTS


def test_the_loop_has_a_limit():
    complete, asked = scripted(*[" Again.\nAction: today\nAction Input: {}\n"] * 9)
    with pytest.raises(RuntimeError, match="no answer after 3 calls"):
        tool_use.answer(complete, utils.parse_react, "?", toolbox.FUNCTIONS, max_steps=3)
    assert len(asked) == 3


def test_the_calculator():
    assert toolbox.calculator("2 ** 10 - (3 + 1) / 4") == "1023.0"
    for bad in ("__import__('os')", "9 ** 9999", "a", "'x' * 9"):
        with pytest.raises((ValueError, SyntaxError)):
            toolbox.calculator(bad)


def test_the_example_runs():
    """With a checkpoint that calls no tools: it answers, or the limit ends it."""
    command = [*python(), "-W", "ignore", ROOT / "examples" / "tool_use.py", ROOT / "demo", "法国的首都是哪里？"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
