"""Calling tools: the prompt, reading what a model wrote, the example's loop."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from qwen import qwen_generation_utils as utils

spec = importlib.util.spec_from_file_location("tool_use", ROOT / "examples" / "tool_use.py")
tool_use = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool_use)

CALL = {"name": "calculator", "arguments": '{"expression": "1+1"}'}
MESSAGES = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "I add.", "function_call": CALL},
    {"role": "function", "name": "calculator", "content": "2"},
]


def test_prompt_of_a_question(demo_tokenizer):
    text, ids = utils.make_tool_context(demo_tokenizer, MESSAGES[:1], tool_use.TOOLS, system="sys")
    assert text.endswith("Question: What is 1+1?<|im_end|>\n<|im_start|>assistant\nThought:")
    assert text.startswith("<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\n")
    assert "one of [calculator, today]" in text
    for tool in tool_use.TOOLS:
        assert f"{tool['name']}: {tool['description']} Parameters: {json.dumps(tool['parameters'])}" in text
    plain = utils.make_context(demo_tokenizer, text.split("user\n")[1].split("<|im_end|>")[0], None, "sys")
    assert ids == plain[1] + demo_tokenizer.encode("Thought:")


def test_prompt_goes_on_behind_results_and_earlier_questions(demo_tokenizer):
    text, _ = utils.make_tool_context(demo_tokenizer, MESSAGES, tool_use.TOOLS)
    assert text.endswith(
        "<|im_start|>assistant\nThought: I add.\nAction: calculator\n"
        'Action Input: {"expression": "1+1"}\nObservation: 2\nThought:'
    )
    later = [*MESSAGES, {"role": "assistant", "content": "It is 2."}, {"role": "user", "content": "And 2+2?"}]
    text, _ = utils.make_tool_context(demo_tokenizer, later, tool_use.TOOLS)
    assert "Observation: 2\nFinal Answer: It is 2.<|im_end|>\n<|im_start|>user\n" in text
    assert text.count("Write your answer in this form") == 1  # with the last question only
    assert text.endswith("Question: And 2+2?<|im_end|>\n<|im_start|>assistant\nThought:")


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
    assert 'f: Does f. Parameters: [{"name": "x"}]' in text


def test_braces_in_a_question_are_left_alone(demo_tokenizer):
    text, _ = utils.make_tool_context(demo_tokenizer, [{"role": "user", "content": "{tools} {names}"}], tool_use.TOOLS)
    assert "Question: {tools} {names}<" in text


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([], tool_use.TOOLS, "no message from a user"),
        (MESSAGES[1:], tool_use.TOOLS, "role 'assistant' has no place"),
        ([*MESSAGES[:1], MESSAGES[0]], tool_use.TOOLS, "role 'user' has no place"),
        ([MESSAGES[0], MESSAGES[2]], tool_use.TOOLS, "role 'function' has no place"),
        ([{"role": "system", "content": "x"}], tool_use.TOOLS, "role 'system' has no place"),
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
    assert utils.parse_react(text) == ("I multiply.", "calculator", ARGUMENTS, None, None)


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
    answer, messages = tool_use.answer(complete, utils.parse_react, "What is 17 * 23?", tool_use.FUNCTIONS)
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
        tool_use.answer(complete, utils.parse_react, "?", tool_use.FUNCTIONS, max_steps=3)
    assert len(asked) == 3


def test_the_calculator():
    assert tool_use.calculator("2 ** 10 - (3 + 1) / 4") == "1023.0"
    for bad in ("__import__('os')", "9 ** 9999", "a", "'x' * 9"):
        with pytest.raises((ValueError, SyntaxError)):
            tool_use.calculator(bad)


def test_the_example_runs():
    """With a checkpoint that calls no tools: it answers, or the limit ends it."""
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / "tool_use.py", ROOT / "demo", "法国的首都是哪里？"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
