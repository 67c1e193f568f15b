"""The examples as people use them: in a terminal, in a pipe, in a browser, as a notebook."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import notebooks
import pytest
import screenshot
from conftest import ROOT, python
from qwen.qwen_generation_utils import make_tool_context, parse_react
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = str(ROOT / "demo")
QUESTIONS = ["你好", "法国的首都是哪里？", "What is the capital of Kenya?", "3 + 4 = ?", "Lima?"]


sys.path.insert(0, str(ROOT / "examples"))
example = importlib.import_module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO, trust_remote_code=True, padding_side="left")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, trust_remote_code=True, fp32=True).eval()


def run(script: str, *arguments, text: str = "", **environment):
    command = [*python(), "-W", "ignore", ROOT / "examples" / script, *arguments]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=600, env=variables)
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


def test_answers_are_not_lost_with_the_batch_that_is_interrupted(tmp_path, monkeypatch, capsys):
    batch = example("batch")

    def answer_batch(model, tokenizer, questions):
        if "ccc" in questions:
            raise KeyboardInterrupt
        return [question.upper() for question in questions]

    (tmp_path / "questions.txt").write_text("ccc\nbb\na\n")
    monkeypatch.setattr(sys, "argv", ["batch.py", str(tmp_path / "questions.txt"), "--batch-size", "1"])
    monkeypatch.setattr(batch, "load", lambda *arguments, **settings: (None, None))
    monkeypatch.setattr(batch, "answer_batch", answer_batch)
    with pytest.raises(KeyboardInterrupt):
        batch.main()
    assert capsys.readouterr().out == "bb\tBB\na\tA\n"


def test_an_interrupted_batch_goes_on_from_its_output(tmp_path, monkeypatch, capsys):
    batch, output, asked = example("batch"), tmp_path / "answers.jsonl", []

    def answer_batch(model, tokenizer, questions):
        asked.extend(questions)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [question.upper() + "\n\t" for question in questions]

    (tmp_path / "questions.txt").write_text("\ufeffccc\nbb\na\n", encoding="utf-8")
    options = ["--batch-size", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["batch.py", str(tmp_path / "questions.txt"), *options])
    monkeypatch.setattr(batch, "load", lambda *arguments, **settings: (None, None))
    monkeypatch.setattr(batch, "answer_batch", answer_batch)
    with pytest.raises(KeyboardInterrupt):
        batch.main()
    with output.open("a") as file:
        file.write('{"question": "bb", "an')  # a process that was killed
    batch.main()
    assert asked == ["a", "bb", "bb", "ccc"]
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"question": q, "answer": q.upper() + "\n\t"} for q in ("a", "bb", "ccc")]
    assert capsys.readouterr().out == ""
    output.write_text("my notes\n")
    with pytest.raises(SystemExit, match="holds no answers of this program"):
        batch.main()


def test_answers_are_not_lost_where_they_cannot_be_written_out(tmp_path):
    """As into a file on Windows, which has the encoding of its region."""
    file = tmp_path / "questions.txt"
    file.write_text("法国的首都是哪里？", encoding="utf-8")
    answer = run("batch.py", str(file), PYTHONIOENCODING="ascii").strip().encode().decode("unicode_escape")
    assert answer == "法国的首都是哪里？\t法国的首都是巴黎。"


def test_chat_in_a_pipe():
    lines = ["法国的首都是哪里？", ":history", ":set foo 3", "", ":seed", "法国的首都是哪里？", ":q", "never asked"]
    output = run("chat.py", "-c", DEMO, "--cpu-only", "-s", "7", text="\n".join(lines)).splitlines()
    assert output[:3] == ["法国的首都是巴黎。", "user: 法国的首都是哪里？", "assistant: 法国的首都是巴黎。"]
    assert output[3] == "There is no setting 'foo'. These can be set:"
    assert output[-2:] == ["The seed is 7.", "法国的首都是巴黎。"]


def test_a_checkpoint_that_is_not_there_is_named_in_a_line(tmp_path):
    load = example("checkpoint").load
    with pytest.raises(SystemExit, match=r"^There is no folder no-such-folder\.$"):
        load("no-such-folder", cpu_only=True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modeling_qwen.py").write_text("import transformers_stream_generator")
    with pytest.raises(SystemExit, match=r"code published in 2023"):
        load(str(tmp_path), cpu_only=True)
    (tmp_path / "modeling_qwen.py").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"can't be loaded as a folder, or from a hub"):
        load(str(tmp_path), cpu_only=True)
    shutil.copytree(DEMO, tmp_path / "cut", ignore=shutil.ignore_patterns("__pycache__"))
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    with pytest.raises(SystemExit, match=r"A weight file of .* is damaged .*upgrade_checkpoint.py .* says which"):
        load(str(tmp_path / "cut"), cpu_only=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "There is no file "), (b" \n\n", "holds no question"), (b"\xff", "not a text in UTF-8")],
)
def test_a_file_without_questions_is_told_before_anything_is_loaded(tmp_path, monkeypatch, content, message):
    batch, file = example("batch"), tmp_path / "questions.txt"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(batch, "load", lambda *arguments, **settings: pytest.fail("loaded"))
    monkeypatch.setattr(sys, "argv", ["batch.py", str(file)])
    with pytest.raises(SystemExit, match=message):
        batch.main()


@pytest.fixture
def shown():
    return []


@pytest.fixture
def chat(model, tokenizer, shown):
    return example("chat").Chat(model, tokenizer, show=shown.append)


def test_commands_of_the_chat(chat, shown, model, tokenizer):
    answer = io.StringIO()
    assert chat.ask("What is the capital of Kenya?", answer.write) == "The capital of Kenya is Nairobi."
    assert answer.getvalue() == "The capital of Kenya is Nairobi.\n"
    expected, _ = model.chat(tokenizer, "And of Peru?", chat.history)
    assert chat.ask("And of Peru?", answer.write) == expected
    for line, words in (
        (":help", ":reset-conf"),
        (":h", ":clear-his"),
        (":history", "user: And of Peru?"),
        (":clear", "The conversation goes on"),
        (":his", "user: And of Peru?"),
        (":seed", "The seed is 1234."),
        (":seed 7", "The seed is 7."),
        (":conf", "max_new_tokens = 64   (a whole number from 1 to 32768)"),
        (":set max_new_tokens 2", "max_new_tokens = 2"),
        (":conf do_sample=True top_p = 0.5 temperature=1", "top_p = 0.5   (a number from 0 to 1)"),
        (":conf", "do_sample = true   (true or false)"),
        (":reset-conf", "do_sample = false"),
        (":conf", "top_k = as transformers has it" if model.generation_config.top_k is None else "top_k = "),
        (":conf", "max_new_tokens = 64"),
        (":set max_new_tokens=2", "max_new_tokens = 2"),
        (":clear-his", "forgotten"),
        (":history", "Nothing was said yet."),
        (":system Be brief.", "Be brief."),
        (":nonsense", "no command :nonsense"),
    ):
        shown.clear()
        assert chat.command(line)
        assert any(words in text for text in shown), (line, shown)
    assert chat.ask("hi", answer.write) == model.chat(tokenizer, "hi", None, "Be brief.", max_new_tokens=2)[0]
    for line in (":quit", ":exit", ":q"):
        assert not chat.command(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (":set foo 3", r"no setting 'foo'.*set:\n  do_sample: true or false\n  temperature: a number from 0.01 to 100"),
        (":conf foo=3", "no setting 'foo'"),
        (":conf num_beams=4", "no setting 'num_beams'"),
        (":conf top_k=1 foo=3", "no setting 'foo'"),
        (":set temperature -1", "temperature must be a number from 0.01 to 100, found '-1'"),
        (":conf temperature=nan", "temperature must be"),
        (":conf temperature=inf", "temperature must be"),
        (":conf temperature=0", "temperature must be"),
        (":conf top_p=1.5", "top_p must be"),
        (":conf top_k=1 top_p=x", "top_p must be"),
        (":set max_new_tokens x", "max_new_tokens must be a whole number from 1 to 32768, found 'x'"),
        (":conf max_new_tokens=0", "max_new_tokens must be"),
        (":conf max_new_tokens=2.5", "max_new_tokens must be"),
        (":conf max_new_tokens=True", "max_new_tokens must be"),
        (":conf do_sample=1", "do_sample must be true or false"),
        (":conf repetition_penalty=0", "repetition_penalty must be"),
        (":conf top_k", "Write NAME=VALUE, such as temperature=0.7; found 'top_k'"),
        (":conf top_k=1 do_sample", "found 'do_sample'"),
        (":seed seven", "The seed must be a whole number from 0 to 4294967295, found 'seven'"),
        (":seed -1", "The seed must be"),
        (":seed 99999999999999999999", "The seed must be"),
    ],
)
def test_what_cannot_be_set_is_refused_at_once_and_changes_nothing(chat, line, words):
    chat.command(":conf max_new_tokens=3 top_k=5")
    before = (dict(chat.settings), chat.seed)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        chat.command(line)
    assert (chat.settings, chat.seed) == before


def test_no_setting_breaks_a_turn(chat, tokenizer):
    """With the lowest and the highest value of each there is an answer."""
    settings = example("chat").SETTINGS
    for name, setting in settings.items():
        for value in (setting.low, setting.high):
            chat.command(":conf do_sample=true max_new_tokens=3")
            chat.command(f":set {name} {bool(value) if setting.kind is bool else value}")
            if name == "max_new_tokens" and value > 3:
                chat.command(":set do_sample false")
            assert isinstance(chat.ask("What is the capital of Kenya?", lambda text: None), str)
            chat.command(":clear-his")
            chat.command(":reset-conf")
    assert chat.ask("What is the capital of Kenya?", lambda text: None) == "The capital of Kenya is Nairobi."


def test_the_screen_is_cleared_where_there_is_one(chat, shown, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    chat.command(":clear")
    assert len(shown) == 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chat.command(":cl")
    assert shown[1] == example("chat").CLEAR_SCREEN


def test_the_seed_decides_what_is_sampled(chat):
    chat.settings = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 12}

    def say(seed):
        chat.forget()
        chat.seed = seed
        return chat.ask("你好", lambda text: None)

    assert say(1) == say(1) != say(2)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_answer_can_be_stopped_from_the_keyboard(chat, model, tokenizer):
    def stopped(at_once: bool) -> tuple:
        """The answer, and all that was written, if Ctrl-C is pressed before or after its first words."""
        written: list[str] = []
        pressed = threading.Event()
        ends = [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]

        def press(ids, scores):
            if not pressed.is_set() and (at_once or "".join(written)):
                pressed.set()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            if pressed.is_set():  # the end comes from the keyboard, not from the model
                scores[:, ends] = -float("inf")
            time.sleep(0.05)
            return scores

        chat.settings = {"logits_processor": [press]}
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
        try:
            answer = chat.ask("What is the capital of Kenya?", written.append)
        finally:
            signal.signal(signal.SIGINT, before)
        chat.settings = {}
        return answer, "".join(written)

    assert stopped(at_once=True) == ("", " [stopped]\n")
    assert chat.history == []  # nothing was said of an answer
    answer, written = stopped(at_once=False)
    assert written == f"{answer} [stopped]\n"
    assert answer
    assert "The capital of Kenya is Nairobi.".startswith(answer)
    assert chat.history == [("What is the capital of Kenya?", answer)]
    expected, _ = model.chat(tokenizer, "法国的首都是哪里？", chat.history)
    assert chat.ask("法国的首都是哪里？", lambda text: None) == expected


def test_several_questions_with_tools_are_one_conversation(tokenizer):
    """The prompt of the last step is the published one: each question, its calls and results, its answer."""
    tool_use, toolbox = example("tool_use"), example("toolbox")
    said = iter(
        (
            ' I multiply.\nAction: calculator\nAction Input: {"expression": "17 * 23"}\n',
            " I now know the final answer.\nFinal Answer: It is 391.",
            " A date.\nAction: today\nAction Input: {}\n",
            ' And a sum.\nAction: calculator\nAction Input: {"expression": "391 + 1"}\n',
            " I now know the final answer.\nFinal Answer: 392.",
        )
    )
    prompts: list[str] = []

    def complete(messages):
        prompts.append(make_tool_context(tokenizer, messages, toolbox.TOOLS)[0])
        return next(said)

    functions = {**toolbox.FUNCTIONS, "today": lambda: "2024-02-29"}
    answer, messages = tool_use.answer(complete, parse_react, "What is 17 * 23?", functions)
    assert answer == "It is 391."
    answer, messages = tool_use.answer(complete, parse_react, "Plus 1?", functions, earlier=messages)
    assert answer == "392."
    assert messages[-1] == {"role": "assistant", "content": "392."}
    assert len(prompts) == 5
    assert "should be one of [calculator, today]\n" in prompts[-1]
    assert prompts[-1].endswith(
        "Begin!\n\nQuestion: Plus 1?<|im_end|>\n<|im_start|>assistant\n"
        "Thought: A date.\nAction: today\nAction Input: {}\nObservation: 2024-02-29\n"
        'Thought: And a sum.\nAction: calculator\nAction Input: {"expression": "391 + 1"}\n'
        "Observation: 392\nThought:"
    )
    assert (
        "user\nWhat is 17 * 23?<|im_end|>\n<|im_start|>assistant\n"
        'Thought: I multiply.\nAction: calculator\nAction Input: {"expression": "17 * 23"}\nObservation: 391\n'
        "Thought: I now know the final answer.\nFinal Answer: It is 391.<|im_end|>"
    ) in prompts[-1]


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_print_what_they_show(path):
    notebook = notebooks.read(path)
    shown = [notebooks.recorded(cell) for cell in notebooks.code_cells(notebook)]
    assert len(shown) >= 5
    assert all(shown)
    assert notebooks.run(notebook, ROOT / "examples") == shown
    first = {"cells": notebooks.code_cells(notebook)[:1]}  # where the repository is, decided once
    assert notebooks.run(first, ROOT) == shown[:1]


def test_the_calculator_computes_arithmetic_and_nothing_that_takes_for_ever():
    calculator = example("toolbox").calculator
    assert calculator("-(2 ** 10) / 4 + 1") == "-255.0"
    for expression, message in (
        ("9 ** 101", "too large"),
        ("((9 ** 99) ** 99) ** 99", "too large"),
        ("__import__('os')", "is not arithmetic"),
        ("'a' * 9", "is not arithmetic"),
    ):
        with pytest.raises(ValueError, match=message):
            calculator(expression)


def test_notebooks_are_clean():
    assert [path.name for path in notebooks.NOTEBOOKS] == ["quickstart.ipynb", "tokenizer_showcase.ipynb"]
    for path in notebooks.NOTEBOOKS:
        notebook = notebooks.read(path)
        numbers = [cell["execution_count"] for cell in notebooks.code_cells(notebook)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert not any(cell["metadata"] for cell in notebook["cells"])
        assert str(ROOT) not in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="ends in a value, 2"):
        notebooks.run({"cells": [{"cell_type": "code", "source": ["1 + 1"]}]}, ROOT)


def gradio_with_buttons(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio")
    if "buttons" not in inspect.signature(gradio.Chatbot).parameters:
        pytest.skip("needs a newer gradio, whose Chatbot has buttons")
    return gradio


def test_the_web_chat_takes_the_published_options(monkeypatch):
    gradio_with_buttons(monkeypatch)
    web_chat = example("web_chat")
    seen: list = []

    class Interface:
        def queue(self, **settings):
            return self

        def launch(self, **settings):
            seen.append(settings)

    def load(path, cpu_only):
        seen.append((path, cpu_only))
        return "model", "tokenizer"

    monkeypatch.setattr(web_chat, "load", load)
    monkeypatch.setattr(web_chat, "interface", lambda model, tokenizer: Interface())
    options = "-c some/model --cpu-only --share --inbrowser --server-port 1234 --server-name 0.0.0.0"
    for line in (options, "some/model", ""):
        monkeypatch.setattr(sys, "argv", ["web_chat.py", *line.split()])
        web_chat.main()
    everywhere = {"server_name": "0.0.0.0", "server_port": 1234, "share": True, "inbrowser": True}
    here = {"server_name": "127.0.0.1", "server_port": 8000, "share": False, "inbrowser": False}
    assert seen == [("some/model", True), everywhere, ("some/model", False), here, (DEMO, False), here]


def test_a_question_that_is_too_long_is_told_in_the_web_chat(model, tokenizer, monkeypatch):
    gradio = gradio_with_buttons(monkeypatch)
    with pytest.raises(gradio.Error, match="more than max_window_size=448"):
        next(example("web_chat").answers(model, tokenizer, "very " * 500, []))


class Slow:
    """A model that computes as many tokens as it is allowed and does not end, until it is told to be itself."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.ends = [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]
        self.patient = True
        self.allowed = threading.Semaphore(0)
        self.asked = self.steps = 0

    def chat_stream(self, *arguments):
        self.asked += 1

        def slow(ids, scores):
            self.allowed.acquire(timeout=300)
            self.steps += 1
            scores[:, self.ends] = -float("inf")
            return scores

        settings = {"logits_processor": [slow], "max_new_tokens": 400} if self.patient else {}
        return self.model.chat_stream(*arguments, **settings)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_chat_in_a_browser(model, tokenizer, tmp_path, monkeypatch):
    """Type a question, see the answer grow, stop it, ask again, have it answered again, clear."""
    gradio_with_buttons(monkeypatch)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        pytest.skip(f"needs playwright ({error})")
    slow = Slow(model, tokenizer)
    interface = example("web_chat").interface(slow, tokenizer)
    _, address, _ = interface.queue().launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=screenshot.BROWSER)
            page = browser.new_page(viewport={"width": 1000, "height": 700})
            page.goto(address, wait_until="domcontentloaded")
            box, bot = page.get_by_role("textbox").first, page.get_by_test_id("bot")
            box.fill("What is the capital of Kenya?", timeout=240_000)
            box.press("Enter")
            seen: set = set()
            for _ in range(300):  # it grows
                slow.allowed.release()
                time.sleep(0.2)
                seen.add(bot.first.inner_text(timeout=240_000).strip())
                if len(seen) > 4:
                    break
            assert len(seen) > 4, seen
            page.locator("button.stop-button").click()
            while any(thread.name == "qwen-generate" for thread in threading.enumerate()):
                slow.allowed.release()
                time.sleep(0.1)
            assert slow.steps < 399, "the computation went on to its end"
            slow.patient = False
            box.fill("法国的首都是哪里？")
            box.press("Enter")
            page.get_by_text("法国的首都是巴黎。").wait_for(timeout=240_000)
            page.screenshot(path=str(tmp_path / "chat.png"))
            assert (tmp_path / "chat.png").stat().st_size > 10_000
            asked = slow.asked
            page.get_by_role("button", name="Retry").last.click()
            began = time.monotonic()
            while slow.asked == asked:
                assert time.monotonic() - began < 300, "nothing is asked again"
                time.sleep(0.1)
            page.wait_for_function("() => !document.querySelector('button.stop-button')", timeout=240_000)
            page.get_by_text("法国的首都是巴黎。").wait_for(timeout=240_000)
            assert slow.asked == asked + 1
            assert page.get_by_text("法国的首都是哪里？").count() == 1
            page.get_by_role("button", name="Clear").click()
            page.get_by_text("法国的首都是巴黎。").wait_for(state="detached", timeout=240_000)
            browser.close()
    finally:
        interface.close()
