"""Serving the demo on loopback to the official `openai` client, and to `transformers chat`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, lacks, tokenization_qwen
from qwen.qwen_generation_utils import OBSERVATION, make_context, make_tool_context, parse_react

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

PATH = str(ROOT / "demo")


@contextlib.contextmanager
def serving(command: list, log: Path):
    """The address of a server that runs meanwhile."""
    if sys.version_info < (3, 10) or not importlib.util.find_spec("transformers.cli"):
        lacks("has no server for one checkpoint")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
    try:
        for _ in range(480):
            if server.poll() is not None:
                text = log.read_text(encoding="utf-8", errors="replace")
                if "This needs" in text or "unexpected extra argument" in text:  # up to 5.0
                    lacks("has no server for one checkpoint")
                pytest.fail(text)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serving([ROOT / "tools" / "serve.py", "./demo/"], log) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


CALL = """Thought: I look it up.
Action: weather
Action Input: {"city": "Lima 京"}
Observation: made up"""
ANSWER = """ I now know the final answer.
Final Answer: In Lima it is 22 °C,
an Observation."""
# The server, with a model that calls a tool if it is offered one, and answers when it sees the result.
SCRIPTED = f"""
import sys
sys.path.insert(0, "tools")
sys.argv[0] = "tools/serve.py"
import torch
import serve
from transformers.dynamic_module_utils import get_class_from_dynamic_module

path = {PATH!r}
model_class = get_class_from_dynamic_module("modeling_qwen.QWenLMHeadModel", path)
tokenizer_class = get_class_from_dynamic_module("tokenization_qwen.QWenTokenizer", path)
written = tokenizer_class(path + "/qwen.tiktoken")

def generate(self, input_ids, attention_mask, streamer, **kwargs):
    assert attention_mask.shape == input_ids.shape
    streamer.put(input_ids)
    prompt = written.decode(input_ids[0])
    if prompt.endswith("Observation: 22\\nThought:"):
        text = {ANSWER!r}
    elif "weather: Call this tool to interact with the weather API." in prompt:
        text = {CALL!r}
    else:
        text = "No tool here."
    for token in [*written.encode(text), written.im_end_id]:
        streamer.put(torch.tensor([token]))
    streamer.end()

model_class.generate = generate
serve.main()
"""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    log = tmp_path_factory.mktemp("scripted") / "log"
    with serving(["-c", SCRIPTED, PATH], log) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def command(name: str) -> str | None:
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else None


def test_the_openai_client(client):
    messages = [{"role": "user", "content": "What is the capital of Kenya?"}]
    answer = client.chat.completions.create(model=PATH, messages=messages)
    assert answer.choices[0].message.content == "The capital of Kenya is Nairobi."
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model=PATH, messages=messages, stream=True)
    parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(filter(None, parts)) == "The capital of Kenya is Nairobi."
    assert len(parts) > 5
    # What a person says never becomes a control token, here neither.
    text = "<|im_end|>" * 5
    answer = client.chat.completions.create(model=PATH, messages=[{"role": "user", "content": text}])
    tokenizer = tokenization_qwen.QWenTokenizer(f"{PATH}/qwen.tiktoken")
    _, tokens = make_context(tokenizer, text, system="You are a helpful assistant.")
    assert answer.usage.prompt_tokens == len(tokens)


KENYA = [{"role": "user", "content": "What is the capital of Kenya?"}]
LIMA = [{"role": "user", "content": "Is it warm in Lima?"}]
WEATHER = {
    "name": "weather",
    "description": "The weather of a city. Format the arguments as a JSON object.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]


def test_names_of_the_model(client):
    names = [model.id for model in client.models.list()]
    assert sorted(names) == sorted(["./demo/", PATH, "demo"])
    for name in names:
        answer = client.chat.completions.create(model=name, messages=KENYA)
        assert answer.choices[0].message.content == "The capital of Kenya is Nairobi."
        client.completions.create(model=name, prompt="The", max_tokens=1)
    for what in ({"messages": KENYA}, {"prompt": "a"}):
        create = client.chat.completions.create if "messages" in what else client.completions.create
        with pytest.raises(openai.NotFoundError, match=r"There is no model 'qwen' here; there is .*demo"):
            create(model="qwen", **what)


def test_completions(client):
    prompt = "The capital of Kenya is"
    done = client.completions.create(model="demo", prompt=prompt, max_tokens=1)
    assert done.choices[0].text == " Nairobi"
    assert (done.choices[0].finish_reason, done.usage.completion_tokens) == ("length", 1)
    whole = client.completions.create(model="demo", prompt=prompt, max_tokens=6).choices[0].text
    stream = client.completions.create(model="demo", prompt=prompt, max_tokens=6, stream=True)
    parts = [chunk.choices[0].text for chunk in stream]
    assert "".join(parts) == whole
    assert len(parts) > 3


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": []}, r"at least one message, found \[\]"),
        ({"messages": [{"content": "x"}]}, "a role and a content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "parts of the type text",
        ),
        ({"messages": KENYA, "tools": [{"x": 1}]}, "A tool must be a dictionary with a name"),
        ({"messages": KENYA + KENYA, "tools": TOOLS}, "role 'user' has no place"),
        ({"messages": KENYA, "tools": TOOLS, "tool_choice": "required"}, "choose auto or none"),
    ],
)
def test_bad_requests(client, body, text):
    with pytest.raises(openai.BadRequestError, match=text):
        client.chat.completions.create(model="demo", **body)


def test_a_model_that_calls_no_tools_answers(client):
    """The demo is one; whatever it says behind the prompt with tools is its answer."""
    answer = client.chat.completions.create(model="demo", messages=KENYA, tools=TOOLS)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None
    tokenizer = tokenization_qwen.QWenTokenizer(f"{PATH}/qwen.tiktoken")
    assert answer.usage.prompt_tokens == len(make_tool_context(tokenizer, KENYA, TOOLS)[1])


def streamed(stream) -> tuple:
    """Content, calls (name and arguments) and the reason for the end of a streamed answer."""
    content, calls, reason = "", [], None
    for chunk in stream:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        calls += [call.function for call in delta.tool_calls or []]
        calls += [delta.function_call] if delta.function_call else []
        reason = chunk.choices[0].finish_reason or reason
    return content, [(call.name, call.arguments) for call in calls], reason


def test_tools_are_called_and_their_results_answered(scripted):
    def ask(messages, **arguments):
        return scripted.chat.completions.create(model="demo", messages=messages, **arguments)

    call = ("weather", '{"city": "Lima 京"}')
    answer = ask(LIMA, tools=TOOLS).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", "I look it up.")
    (made,) = answer.message.tool_calls
    assert (made.function.name, made.function.arguments) == call
    assert streamed(ask(LIMA, tools=TOOLS, stream=True)) == ("I look it up.", [call], "tool_calls")
    messages = [*LIMA, answer.message, {"role": "tool", "tool_call_id": made.id, "content": "22"}]
    final = "In Lima it is 22 °C,\nan Observation."
    answer = ask(messages, tools=TOOLS).choices[0]
    assert (answer.finish_reason, answer.message.content, answer.message.tool_calls) == ("stop", final, None)
    assert streamed(ask(messages, tools=TOOLS, stream=True)) == (final, [], "stop")
    parts = [chunk.choices[0].delta.content for chunk in ask(messages, tools=TOOLS, stream=True)]
    assert len(list(filter(None, parts))) > 5  # the answer grows
    assert streamed(ask(LIMA, tools=TOOLS, tool_choice="none", stream=True)) == ("No tool here.", [], "stop")

    # The interface of the published server.
    answer = ask(LIMA, functions=[WEATHER]).choices[0]
    assert answer.finish_reason == "function_call"
    assert (answer.message.function_call.name, answer.message.function_call.arguments) == call
    assert streamed(ask(LIMA, functions=[WEATHER], stream=True)) == ("I look it up.", [call], "function_call")
    old = {"role": "assistant", "content": "I look it up.", "function_call": dict(zip(("name", "arguments"), call))}
    messages = [*LIMA, old, {"role": "function", "name": "weather", "content": "22"}]
    assert ask(messages, functions=[WEATHER]).choices[0].message.content == final


@pytest.mark.parametrize(
    ("text", "shown", "call"),
    [
        (CALL, "I look it up.", {"name": "weather", "arguments": '{"city": "Lima 京"}'}),
        ("Action: f\nAction Input: ```json\n{}\n```", "", {"name": "f", "arguments": "{}"}),
        ("Action: f\nAction Input: {'a': 1}\nFinal Answer: no", "", {"name": "f", "arguments": '{"a": 1}'}),
        ("Action: f\nAction Input: not JSON", "", {"name": "f", "arguments": "not JSON"}),
        (ANSWER, "In Lima it is 22 °C,\nan Observation.", None),
        ("Final Answer: Obs Observation: no", "Obs", None),
        ("Final Answer:  a \n b \n ", "a \n b", None),
        (" It is Monday. ", "It is Monday.", None),
        ("", "", None),
    ],
)
def test_what_is_written_with_tools_is_read_piece_by_piece(serve, text, shown, call):
    for size in (1, 2, 3, 100):
        answer, seen = serve.ToolAnswer(parse_react, OBSERVATION), ""
        for i in range(0, len(text), size):
            seen += answer.feed(text[i : i + size])
            assert shown.startswith(seen)
            if answer.ended:
                break
        rest, made = answer.finish()
        assert (seen + rest, made) == (shown, call)


@pytest.fixture(scope="module")
def serve():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("serve")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_transformers_chat(address, tmp_path):
    done = subprocess.run(
        [command("transformers"), "chat", PATH, address],
        input="法国的首都是哪里？\n!exit\n",
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},  # it refuses loopback too
    )
    assert "法国的首都是巴黎。" in done.stdout, done.stderr
