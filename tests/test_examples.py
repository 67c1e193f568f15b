"""The examples as people use them: in a terminal, in a pipe, in a browser."""

from __future__ import annotations

import importlib.util
import inspect
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = str(ROOT / "demo")
QUESTIONS = ["你好", "法国的首都是哪里？", "What is the capital of Kenya?", "3 + 4 = ?", "Lima?"]


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO, trust_remote_code=True, padding_side="left")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, trust_remote_code=True, fp32=True).eval()


def run(script: str, *arguments, text: str = ""):
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / script, *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_batches_give_what_single_questions_give(model, tokenizer):
    batch = example("batch")
    answers = batch.answer_batch(model, tokenizer, QUESTIONS)
    assert answers == [model.chat(tokenizer, question, None)[0] for question in QUESTIONS]
    assert answers[1] == "法国的首都是巴黎。"


def test_batch_command(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(QUESTIONS) + "\n\n", encoding="utf-8")
    lines = run("batch.py", str(file), "--batch-size", "2").splitlines()
    assert [line.split("\t")[0] for line in lines] == QUESTIONS
    assert lines[2] == "What is the capital of Kenya?\tThe capital of Kenya is Nairobi."


def test_chat_in_a_pipe():
    output = run("chat.py", text="法国的首都是哪里？\n:history\n:quit\nnever asked\n")
    assert output == "法国的首都是巴黎。\nuser: 法国的首都是哪里？\nassistant: 法国的首都是巴黎。\n"


def test_commands_of_the_chat(model, tokenizer):
    shown: list[str] = []
    chat = example("chat").Chat(model, tokenizer, show=shown.append)
    answer = io.StringIO()
    assert chat.ask("What is the capital of Kenya?", answer.write) == "The capital of Kenya is Nairobi."
    assert answer.getvalue() == "The capital of Kenya is Nairobi.\n"
    expected, _ = model.chat(tokenizer, "And of Peru?", chat.history)
    assert chat.ask("And of Peru?", answer.write) == expected
    for line, words in (
        (":help", ":seed"),
        (":history", "user: And of Peru?"),
        (":seed", "The seed is 0."),
        (":seed 7", "The seed is 7."),
        (":seed seven", "found 'seven'"),
        (":set max_new_tokens 2", "'max_new_tokens': 2"),
        (":clear", "forgotten"),
        (":history", "Nothing was said yet."),
        (":system Be brief.", "Be brief."),
        (":nonsense", "no command :nonsense"),
    ):
        shown.clear()
        assert chat.command(line)
        assert any(words in text for text in shown)
    assert chat.ask("hi", answer.write) == model.chat(tokenizer, "hi", None, "Be brief.", max_new_tokens=2)[0]
    assert not chat.command(":quit")


def test_the_seed_decides_what_is_sampled(model, tokenizer):
    chat = example("chat").Chat(model, tokenizer, show=print)
    chat.settings = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 12}

    def say(seed):
        chat.clear()
        chat.seed = seed
        return chat.ask("你好", lambda text: None)

    assert say(1) == say(1) != say(2)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")
def test_an_answer_can_be_stopped_from_the_keyboard(model, tokenizer):
    chat = example("chat").Chat(model, tokenizer, show=print)

    def slow(ids, scores):
        time.sleep(0.05)
        return scores

    def press(*arguments):
        raise KeyboardInterrupt

    chat.settings = {"logits_processor": [slow]}
    written: list[str] = []
    before = signal.signal(signal.SIGALRM, press)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        answer = chat.ask("What is the capital of Kenya?", written.append)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "".join(written) == f"{answer} [stopped]\n"
    assert "The capital of Kenya is Nairobi.".startswith(answer)
    chat.settings = {}
    expected, _ = model.chat(tokenizer, "法国的首都是哪里？", chat.history)
    assert chat.ask("法国的首都是哪里？", written.append) == expected


class Slow:
    """A model that takes its time and does not come to an end, until it is told to be itself."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.ends = [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]
        self.patient = True

    def chat_stream(self, *arguments):
        def slow(ids, scores):
            time.sleep(0.1)
            scores[:, self.ends] = -float("inf")
            return scores

        settings = {"logits_processor": [slow], "max_new_tokens": 400} if self.patient else {}
        return self.model.chat_stream(*arguments, **settings)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_chat_in_a_browser(model, tokenizer, tmp_path, monkeypatch):
    """Type a question, see the answer grow, stop it, ask again, clear."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        pytest.skip(f"needs gradio and playwright ({error})")
    if "buttons" not in inspect.signature(gradio.Chatbot).parameters:
        pytest.skip("needs a newer gradio, whose Chatbot has buttons")
    slow = Slow(model, tokenizer)
    interface = example("web_chat").interface(slow, tokenizer)
    _, address, _ = interface.queue().launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--no-first-run"]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
            page = browser.new_page(viewport={"width": 1000, "height": 700})
            page.goto(address, wait_until="domcontentloaded")
            box, bot = page.get_by_role("textbox").first, page.get_by_test_id("bot")
            box.fill("What is the capital of Kenya?", timeout=60_000)
            box.press("Enter")
            bot.first.wait_for(timeout=60_000)
            seen = []
            for _ in range(30):
                seen.append(bot.first.inner_text().strip())
                if len({text for text in seen if text}) > 3:
                    break
                time.sleep(0.2)
            assert len({text for text in seen if text}) > 3, seen  # it grows
            page.locator("button.stop-button").click()
            began = time.monotonic()
            while any(thread.name == "qwen-generate" for thread in threading.enumerate()):
                assert time.monotonic() - began < 10, "the computation goes on"
                time.sleep(0.1)
            slow.patient = False
            box.fill("法国的首都是哪里？")
            box.press("Enter")
            page.get_by_text("法国的首都是巴黎。").wait_for(timeout=60_000)
            page.screenshot(path=str(tmp_path / "chat.png"))
            assert (tmp_path / "chat.png").stat().st_size > 10_000
            page.get_by_role("button", name="Clear").click()
            page.get_by_text("法国的首都是巴黎。").wait_for(state="detached", timeout=10_000)
            browser.close()
    finally:
        interface.close()
