"""Serving the demo on loopback to the official `openai` client, and to `transformers chat`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, lacks, tokenization_qwen
from qwen.qwen_generation_utils import make_context

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

PATH = str(ROOT / "demo")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a server that runs while the tests do."""
    if sys.version_info < (3, 10) or not command("transformers"):
        lacks("has no server for one checkpoint")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [PATH, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "wb") as file:
        server = subprocess.Popen(
            [sys.executable, ROOT / "tools" / "serve.py", *arguments], stdout=file, stderr=file, env=environment
        )
    try:
        for _ in range(240):
            if server.poll() is not None:
                text = log.read_text(encoding="utf-8", errors="replace")
                if "no command `transformers serve`" in text or "unexpected extra argument" in text:  # up to 5.0
                    lacks("has no server for one checkpoint")
                pytest.fail(text)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        try:
            client.chat.completions.create(model=PATH, messages=[{"role": "user", "content": "hi"}])
        except openai.InternalServerError:
            if "'Encoding' object has no attribute 'convert_tokens_to_ids'" in log.read_text(errors="replace"):
                lacks("has a server for tokenizers of its own kinds only")  # seen with 5.10
            raise
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)


def command(name: str) -> str | None:
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else None


def test_the_openai_client(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
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
