"""Serving the demo on loopback to the official `openai` client, and to `transformers chat`."""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, lacks, python, tokenization_qwen
from hypothesis import given
from hypothesis import strategies as st
from qwen.qwen_generation_utils import OBSERVATION, make_context, make_tool_context, parse_react

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

PATH = str(ROOT / "demo")


@contextlib.contextmanager
def serving(command: list, log: Path, host: str = "--host", port_name: str = "--port"):
    """The address of a server that runs meanwhile."""
    if sys.version_info < (3, 10) or not importlib.util.find_spec("transformers.cli"):
        lacks("has no server for one checkpoint")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [*python(), *command, host, "127.0.0.1", port_name, str(port), "--cpu-only"]
    with open(log, "wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
    try:
        for _ in range(1200):
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
        server.wait(timeout=300)


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
import time
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
    if "count" in prompt:
        put = 0
        try:
            for put in range(4000):
                for token in written.encode(f"{{put}} "):
                    streamer.put(torch.tensor([token]))
                time.sleep(0.02)
        finally:
            print("counted to", put, flush=True)
    if "break" in prompt:
        raise RuntimeError('it said "no"\\nand ended')
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


CREDENTIALS = base64.b64encode(b"user:pass:word").decode()


@pytest.fixture(scope="module")
def scripted_log(tmp_path_factory):
    return tmp_path_factory.mktemp("scripted") / "log"


@pytest.fixture(scope="module")
def guarded(scripted_log):
    """The address of that server, started with the options of the published one."""
    options = ["-c", PATH, "--disable-gc", "--api-auth", "user:pass:word"]
    with serving(["-c", SCRIPTED, *options], scripted_log, "--server-name", "--server-port") as address:
        yield address


@pytest.fixture(scope="module")
def scripted(guarded):
    return openai.OpenAI(base_url=f"{guarded}/v1", api_key=CREDENTIALS, max_retries=0)


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
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        client.models.retrieve("other")
    for name in names:
        answer = client.chat.completions.create(model=name, messages=KENYA)
        assert answer.model == name
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
    assert client.completions.create(model="demo", prompt=[prompt], max_tokens=1).choices[0].text == " Nairobi"
    for bad in ("", [], [""], [prompt, prompt], [5]):
        with pytest.raises(openai.BadRequestError, match="prompt must be one text"):
            client.completions.create(model="demo", prompt=bad, max_tokens=1)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"temperature": -1}, "temperature must be a number from 0 to 100, found -1"),
        ({"top_p": "x"}, "top_p must be a number from 0 to 1, found 'x'"),
        ({"max_tokens": 0}, "max_tokens must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"n": 2}, "n is not served here, found 2"),
        ({"logprobs": True}, "logprobs is not served here"),
        ({"response_format": {"type": "json_object"}}, "response_format is not served here"),
        ({"stop": ["a", ""]}, "stop must be a text or a list of texts"),
        ({"extra_body": {"max_length": 5}}, r"The prompt has \d+ tokens, and max_length=5 leaves none"),
        ({"extra_body": {"top_k": -1}}, "top_k must be a whole number"),
        ({"extra_body": {"stream": "yes"}}, "stream must be true or false"),
        ({"extra_body": {"generation_config": "{"}}, "generation_config"),
        ({"logit_bias": {"Nai": 5}}, "logit_bias must be an object of ids of tokens"),
        ({"logit_bias": {"5": 101}}, "numbers from -100 to 100"),
        ({"logit_bias": {"5": "5"}}, "numbers from -100 to 100"),
        ({"logit_bias": {"4096": 5}}, "ids of tokens, below 4096"),
        ({"extra_body": {"logit_bias": ["5"]}}, "logit_bias must be an object"),
        ({"messages": []}, r"at least one message, found \[\]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "A role must be one of .*, found 'robot'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "at least one of the role user"),
        ({"messages": [{"content": "x"}]}, "a role and a content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "parts of the type text",
        ),
        ({"messages": [*KENYA, {"role": "assistant", "tool_calls": ["x"]}]}, "messages or tools can't be read"),
        ({"messages": KENYA, "tools": [{"x": 1}]}, "A tool must be a dictionary with a name"),
        ({"messages": KENYA + KENYA, "tools": TOOLS}, "role 'user' has no place"),
        ({"messages": KENYA, "tools": TOOLS, "tool_choice": "required"}, "choose auto or none"),
        ({"extra_body": {"generation_config": '{"num_beams": 2}'}}, "num_beams must be 1, found 2"),
    ],
)
def test_bad_requests(client, body, text):
    with pytest.raises(openai.BadRequestError, match=text) as raised:
        client.chat.completions.create(model="demo", **{"messages": KENYA, **body})
    assert raised.value.body["type"] == "invalid_request_error"


def asked(address: str, **headers) -> tuple:
    """Status, headers and JSON of the answer to a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def test_errors_of_the_application_are_objects_too(address, client):
    for path, status in (("/v1/nothing", 404), ("/v1/chat/completions", 405)):
        code, _, body = asked(address + path)
        assert code == status
        assert set(body["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.UnprocessableEntityError, match=r"Unexpected fields in the request: \{'colour'\}"):
        client.chat.completions.create(model="demo", messages=KENYA, extra_body={"colour": 1})
    with pytest.raises(openai.BadRequestError, match="prompt must be one text"):
        client.completions.create(model="demo", prompt=[1, 2])
    for sent in (b"[" * 100_000, b'{"messages": "\\ud800"}'):  # too deep to be read; half a character
        request = urllib.request.Request(address + "/v1/chat/completions", data=sent)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request, timeout=60)
        assert raised.value.code == 400
    with pytest.raises(openai.BadRequestError, match="can't be read: KeyError: 'input'"):
        client.responses.create(model="demo")
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        client.responses.create(model="demo", input="Hi", tools=[{"type": "function", "name": "f"}])
    with pytest.raises(openai.BadRequestError, match="can't be read: KeyError: 'file'"):
        client.post("/audio/transcriptions", body={}, cast_to=object)


NAIROBI = "The capital of Kenya is Nairobi."


def test_stop(client):
    """The answer ends before the first of the texts, with and without a stream; there is no word of them in it."""

    def ask(stop, **arguments):
        return client.chat.completions.create(model="demo", messages=KENYA, stop=stop, **arguments)

    for stop, expected in (
        (" Kenya", "The capital of"),
        (["robi", "Ken", "zzz"], "The capital of "),
        (["zzz"], NAIROBI),
        ([], NAIROBI),
        (".", NAIROBI[:-1]),
    ):
        answer = ask(stop).choices[0]
        assert (answer.message.content, answer.finish_reason) == (expected, "stop")
        assert streamed(ask(stop, stream=True)) == (expected, [], "stop")
    done = client.completions.create(model="demo", prompt="The capital of Kenya is", max_tokens=20, stop="robi")
    assert (done.choices[0].text, done.choices[0].finish_reason) == (" Nai", "stop")
    # The server goes on with the next one.
    assert ask(None).choices[0].message.content == NAIROBI


def test_bias_of_tokens(client, demo_tokenizer):
    """OpenAI's clients send whole numbers."""
    (token,) = demo_tokenizer.encode("Sorry")
    for bias, answer in (({}, "The capital of Kenya is Nairobi."), ({str(token): 100}, "SorrySorry")):
        found = client.chat.completions.create(
            model="demo", messages=KENYA, temperature=0, max_tokens=2 if bias else 20, logit_bias=bias
        )
        assert found.choices[0].message.content == answer


def test_how_the_answer_is_chosen(client):
    """Published fields, and a temperature: none of them asks for the likeliest token by itself."""

    def say(**arguments):
        messages = [{"role": "user", "content": "你好"}]
        answer = client.chat.completions.create(model="demo", messages=messages, **arguments)
        return answer.choices[0].message.content

    likeliest = say()
    hot = {"temperature": 50, "max_tokens": 12}
    assert say(seed=1, **hot) == say(seed=1, **hot) != likeliest
    assert say(seed=1, **hot) != say(seed=2, **hot)
    assert say(temperature=1e-40) == say(temperature=0) == say(temperature=50, extra_body={"top_k": 1})
    assert say(temperature=0) == likeliest
    prompt = client.chat.completions.create(model="demo", messages=KENYA, max_tokens=1).usage.prompt_tokens
    answer = client.chat.completions.create(model="demo", messages=KENYA, extra_body={"max_length": prompt + 3})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_messages_of_other_roles(client):
    """A developer is a system; several systems, or a name for a person, are no error."""

    def tokens(role):
        messages = [{"role": role, "content": "Be brief."}, *KENYA]
        return client.chat.completions.create(model="demo", messages=messages).usage.prompt_tokens

    assert tokens("developer") == tokens("system")


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
    assert ask(LIMA, tools=TOOLS, functions=None).choices[0].finish_reason == "tool_calls"
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
        until, answer, seen = serve.Until([OBSERVATION]), serve.ToolAnswer(parse_react), ""
        for i in range(0, len(text), size):
            seen += answer.feed(until.feed(text[i : i + size]))
            assert shown.startswith(seen)
            if until.ended:
                break
        seen += answer.feed(until.finish())
        rest, made = answer.finish()
        assert (seen + rest, made) == (shown, call)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_a_text_ends_before_the_stop_that_is_complete_first(serve, text, stop, size):
    until, seen = serve.Until(stop), ""
    for i in range(0, len(text), size):
        seen += until.feed(text[i : i + size])
        if until.ended:
            break
    seen += until.finish()
    places = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]  # end and beginning
    assert seen == (text[: min(places)[1]] if places else text)
    assert until.ended == bool(places)


def test_a_stop_that_is_longer_than_any_answer_costs_nothing(serve):
    """Of its beginnings those are looked at that the text has room for."""

    class Counted(str):
        beginnings = 0

        def __getitem__(self, key):
            Counted.beginnings += 1
            return super().__getitem__(key)

    until = serve.Until([Counted("a" * 10**6)])
    assert [until.feed(piece) for piece in ("b", "ba", "ab", "a")] == ["b", "b", "aab", ""]
    assert 0 < Counted.beginnings < 20


def test_arguments_of_the_server(serve):
    options = "-c model --server-name 0.0.0.0 --server-port 80 --cpu-only --disable-gc --api-auth me:a:b --compile"
    expected = ["--compile", "--host", "0.0.0.0", "--port", "80", "--device", "cpu"]
    assert serve.read_arguments(options.split()) == ("model", expected, base64.b64encode(b"me:a:b"))
    ours = ["--host", "0.0.0.0", "--dtype", "float32", "--continuous-batching"]
    assert serve.read_arguments(["model", *ours]) == ("model", ours, None)
    assert serve.read_arguments(["--host", "model"]) == (None, ["--host", "model"], None)
    for wrong in ("me", ":secret", ""):
        with pytest.raises(ValueError, match="USER:PASSWORD"):
            serve.read_arguments(["model", "--api-auth", wrong])


def test_packages_that_are_missing_are_named(serve, monkeypatch):
    found = importlib.util.find_spec
    there = {"transformers.cli": True, "transformers.cli.serving": True, "fastapi": None, "uvicorn": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there[name] if name in there else found(name))
    monkeypatch.setattr(sys, "argv", ["serve.py", PATH])
    with pytest.raises(SystemExit, match=r'fastapi, uvicorn\..*pip install "transformers\[serving\]"'):
        serve.main()


def test_help_is_no_failure(serve, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--help"])
    serve.main()
    assert "python tools/serve.py CHECKPOINT" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["serve.py"])
    with pytest.raises(SystemExit, match=r"python tools/serve\.py CHECKPOINT"):
        serve.main()


def test_a_folder_that_is_no_checkpoint_is_told_in_a_line(serve, monkeypatch):
    has_cli = sys.version_info >= (3, 10) and importlib.util.find_spec("transformers.cli")
    if not has_cli or not importlib.util.find_spec("transformers.cli.serving"):
        lacks("has no server for one checkpoint")
    monkeypatch.setattr(sys, "argv", ["serve.py", "./nope"])
    with pytest.raises(SystemExit, match=r"^There is no folder \./nope\.$"):
        serve.main()


@pytest.fixture(scope="module")
def serve():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("serve")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_who_may_ask(guarded, scripted):
    for path in ("/v1/models", "/docs"):
        for headers in ({}, {"Authorization": "Basic"}, {"Authorization": f"Basic {CREDENTIALS[:-1]}"}):
            status, answered, body = asked(guarded + path, **headers)
            assert (status, answered["WWW-Authenticate"]) == (401, "Basic")
            assert body["error"]["code"] == "invalid_api_key"
    assert asked(f"{guarded}/health")[0] == 200
    assert asked(f"{guarded}/v1/models", Authorization=f"Basic {CREDENTIALS}")[0] == 200
    stranger = openai.OpenAI(base_url=f"{guarded}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="asks for a user and a password"):
        stranger.chat.completions.create(model="demo", messages=LIMA)
    named = stranger.with_options(default_headers={"Authorization": f"Basic {CREDENTIALS}"})
    assert named.chat.completions.create(model="demo", messages=LIMA).choices[0].message.content == "No tool here."


def test_a_model_that_fails_is_an_error_of_the_server(scripted):
    messages = [{"role": "user", "content": "break"}]
    with pytest.raises(openai.InternalServerError, match='it said "no"') as raised:
        scripted.chat.completions.create(model="demo", messages=messages)
    assert raised.value.body["type"] == "server_error"
    with pytest.raises(openai.APIError, match='it said "no"\nand ended'):
        list(scripted.chat.completions.create(model="demo", messages=messages, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_the_computation(scripted, scripted_log, stream):
    before = scripted_log.read_text(encoding="utf-8").count("counted to")
    messages = [{"role": "user", "content": "count"}]
    answer = scripted.chat.completions.create(model="demo", messages=messages, stop="7", stream=stream)
    content = streamed(answer)[0] if stream else answer.choices[0].message.content
    assert content == "0 1 2 3 4 5 6 "
    for _ in range(1200):
        ended = re.findall(r"counted to (\d+)", scripted_log.read_text(encoding="utf-8"))
        if len(ended) > before:
            break
        time.sleep(0.1)
    assert len(ended) == before + 1
    assert int(ended[-1]) < 3000


def test_a_server_that_does_not_answer_the_example_is_told_in_a_line(guarded, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    function_call = importlib.import_module("function_call")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for address, message in (
        (nobody, f"No server answers at {nobody}. Start one in another terminal: python tools/serve.py CHECKPOINT"),
        (f"{guarded}/v1", "asks for a user and a password: pass --api-key"),
    ):
        monkeypatch.setattr(sys, "argv", ["function_call.py", "--address", address, "Hi"])
        with pytest.raises(SystemExit, match=re.escape(message)):
            function_call.main()
    key = ["--api-key", CREDENTIALS]
    monkeypatch.setattr(sys, "argv", ["function_call.py", "--address", f"{guarded}/v2", *key, "Hi"])
    with pytest.raises(SystemExit, match=r"has no models at .*/v2\. Pass --address"):
        function_call.main()


def test_the_example_of_a_client_that_calls_functions(scripted):
    sys.path.insert(0, str(ROOT / "examples"))
    function_call = importlib.import_module("function_call")
    seen: list = []

    def weather(city: str) -> str:
        seen.append(city)
        return "22"

    messages = [*LIMA]
    answer = function_call.answer(scripted, "demo", messages, TOOLS, {"weather": weather})
    assert answer == messages[-1]["content"] == "In Lima it is 22 °C,\nan Observation."
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert seen == ["Lima 京"]
    with pytest.raises(RuntimeError, match="no answer after 2 calls"):
        function_call.answer(scripted, "demo", [*LIMA], TOOLS, {"weather": lambda city: "rain"}, max_steps=2)


def test_transformers_chat(address, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "chat", PATH, address],
        input="法国的首都是哪里？\n!exit\n",
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},  # it refuses loopback too
    )
    assert "法国的首都是巴黎。" in done.stdout, done.stderr
