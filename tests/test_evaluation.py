"""evaluation/: long texts, comparisons, needles, programs that a model wrote. test_lm_eval.py has the rest."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import reference
import torch
import transformers
from conftest import ROOT, random_ids, tiny_model
from matrix import LACKING
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

if not hasattr(getattr(transformers, "DynamicCache", None), "crop"):
    pytest.skip(LACKING + "has no cache that can be cropped, for the evaluation", allow_module_level=True)
sys.path.append(str(ROOT / "evaluation"))
import compare
import figures
import needle
import perplexity
import run_code
import windows

NTK = {"use_dynamic_ntk": True, "use_logn_attn": True}


def exact_losses(model, ids: list[int]) -> torch.Tensor:
    """Of the whole sequence at once, in float64, by the formula written down a second time."""
    logits = reference.forward(model.state_dict(), model.config, ids)
    return -logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("piece", [7, 32, 200])
@pytest.mark.parametrize("length", [30, 90])
def test_losses_in_pieces_are_those_of_the_whole_window(piece, length):
    model, ids = tiny_model(**NTK), random_ids(length).tolist()
    found, exact = windows.token_losses(model, ids, piece), exact_losses(model, ids)
    assert found.shape == exact.shape
    assert found.mean().item() == pytest.approx(exact.mean().item(), abs=1e-5)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stride", [None, 10])
def test_perplexity_over_windows(stride):
    model = tiny_model(**NTK)
    texts = [random_ids(100, seed=1).tolist(), random_ids(39, seed=2).tolist(), random_ids(85, seed=3).tolist()]
    result = perplexity.measure(model, texts, 40, stride, piece=16)
    losses, everywhere, count = [], torch.zeros(39, dtype=torch.float64), 0
    for text in texts:
        for start in range(0, len(text) - 39, stride or 40):
            window = exact_losses(model, text[start : start + 40])
            everywhere, count = everywhere + window, count + 1
            losses.append(window if stride is None or start == 0 else window[-stride:])
    assert len(result["windows"]) == count == (4 if stride is None else 12)
    assert result["tokens"] == sum(map(len, losses))
    assert result["nll"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))
    torch.testing.assert_close(result["positions"], everywhere / count, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="longest text has 100 tokens"):
        perplexity.measure(model, texts, 101, None, piece=16)


DEMO = str(ROOT / "demo")


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (perplexity, ["no_such_folder", "text.txt"], r"^There is no folder no_such_folder\.$"),
        (perplexity, [DEMO, "no.txt"], r"^There is no file no\.txt\.$"),
        (compare, [DEMO, DEMO, "text.txt", "no.txt"], r"^There is no file no\.txt\.$"),
        (compare, [DEMO, "no_such_folder", "text.txt"], r"^There is no folder no_such_folder\.$"),
        (needle, [DEMO, "bytes.txt"], r"^bytes\.txt is not a text in UTF-8"),
        (compare, [DEMO, DEMO, "text.txt"], "a window 2048"),
        (
            perplexity,
            [DEMO, "text.txt", "short.txt", "--lengths", "64", "8192", "4096"],
            r"^The longest text, text\.txt, has 1,\d\d\d tokens, too few for a window of 4,096: leave out --lengths "
            r"4096 8192, or give a longer text\.$",
        ),
        (perplexity, [DEMO, "short.txt", "--lengths", "64"], r"^short\.txt has \d tokens.*: pass smaller --lengths"),
        (run_code, ["no.py"], r"^There is no file no\.py\.$"),
        (run_code, [], "^2$"),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, program, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The capital of Peru is Lima (利马)\n" * 100, "utf-8")
    Path("short.txt").write_text("Lima", "utf-8")
    Path("bytes.txt").write_bytes(b"\xff")
    monkeypatch.setattr(program, "load_model", lambda *_: pytest.fail("loaded"), raising=False)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit, match=message):
        program.main()


def test_the_benchmarks_refuse_what_is_no_checkpoint(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("benchmarks_py", ROOT / "evaluation" / "evaluate.py")
    evaluate = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, evaluate)  # its dataclass looks there
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(evaluate)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", DEMO, "owner/name", "--tasks", "mmlu", "--dtype", "bf16"])
    assert evaluate.arguments().dtype == "bfloat16"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", DEMO, "../nope"])
    with pytest.raises(SystemExit):
        evaluate.arguments()
    assert "There is no folder ../nope." in capsys.readouterr().err


def test_a_long_text_is_read_without_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging.get_logger("transformers.tokenization_utils_base"), "warning", warnings.append)
    (tmp_path / "text.txt").write_text("Lima " * 1000, "utf-8")
    tokenizer = windows.load_tokenizer(DEMO)
    (ids,) = windows.read_texts(tokenizer, [tmp_path / "text.txt"])
    assert len(ids) > tokenizer.model_max_length
    assert warnings == []


def test_rows_of_perplexity_come_one_by_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("The capital of Peru is Lima (利马)\n" * 10, "utf-8")
    measure, printed = perplexity.measure, []

    def measured(*arguments):
        printed.append(capsys.readouterr().out)
        return measure(*arguments)

    monkeypatch.setattr(perplexity, "measure", measured)
    arguments = ["--lengths", "32", "64", "--windows", "1", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["perplexity.py", DEMO, str(tmp_path / "text.txt"), *arguments])
    perplexity.main()
    assert printed[0].startswith("| length | windows |")
    assert printed[1].startswith("| 32 | 1 | 31 |")
    assert capsys.readouterr().out.startswith("| 64 | 1 | 63 |")


class Rows(TorchDispatchMode):
    """The most rows of any matrix that is `widths` wide: what is computed for each token."""

    def __init__(self, widths):
        super().__init__()
        self.widths, self.most = widths, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if torch.is_tensor(tensor) and tensor.dim() > 1 and tensor.shape[-1] in self.widths:
                self.most = max(self.most, tensor.numel() // tensor.shape[-1])
        return output


def test_memory_grows_with_the_piece():
    model = tiny_model(vocab_size=321, **NTK)  # no parameter has as many rows, and no two widths are the same
    most = {}
    for length, piece in ((100, 10), (200, 10), (200, 20)):
        with Rows({321}) as rows:
            windows.token_losses(model, random_ids(length).tolist(), piece)
        most[length, piece] = rows.most
    assert most[100, 10] == most[200, 10] == 10
    assert most[200, 20] == 20


def test_comparison_is_the_formula(monkeypatch):
    torch.manual_seed(0)
    a, b = (torch.randn(50, 30).log_softmax(-1) for _ in range(2))
    a[:, 3] = b[:, 3] = -math.inf  # a vocabulary that is padded with what never comes
    targets = torch.arange(50) % 3
    found = compare.compare([(a[:20], b[:20], targets[:20]), (a[20:], b[20:], targets[20:])])
    kl = torch.stack([sum(p.exp() * (p - q) for p, q in zip(x, y) if p > -math.inf) for x, y in zip(a.double(), b)])
    assert found["kl"]["mean"] == pytest.approx(kl.mean().item())
    assert found["kl"]["max"] == pytest.approx(kl.max().item())
    assert found["agreement"] == sum(x.argmax() == y.argmax() for x, y in zip(a, b)) / 50
    assert found["nll"] == pytest.approx([-x[range(50), targets].double().mean().item() for x in (a, b)])


def test_comparing_checkpoints(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The capital of Peru is Lima (利马)\n" * 60, "utf-8")
    other = tmp_path / "other"
    shutil.copytree(ROOT / "demo", other)
    windows_ = {"length": 64, "tokens": 128, "piece": 20, "dtype": "float32"}
    same = compare.compare_checkpoints(str(ROOT / "demo"), str(other), [text], **windows_)
    assert same["kl"]["max"] == 0
    assert same["agreement"] == 1
    model, tokenizer = windows.load_model(str(other), "float32"), windows.load_tokenizer(str(other))
    ids = windows.read_texts(tokenizer, [text])[0][:128]
    before = torch.cat([model(torch.tensor([part])).logits[0, :-1].log_softmax(-1) for part in (ids[:64], ids[64:])])
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(other)
    after = torch.cat([model(torch.tensor([part])).logits[0, :-1].log_softmax(-1) for part in (ids[:64], ids[64:])])
    found = compare.compare_checkpoints(str(ROOT / "demo"), str(other), [text], **windows_)
    expected = torch.nn.functional.kl_div(after.double(), before.double(), log_target=True, reduction="batchmean")
    assert found["tokens"] == 126
    assert found["kl"]["mean"] == pytest.approx(expected.item(), rel=1e-4)
    assert found["agreement"] == 1  # half the logits, the same order
    assert "| same most likely token | | 100.00% |" in compare.table(found, "demo", str(other))


def test_a_needle_goes_behind_a_sentence():
    hay = [1, 2, 0, 3, 4, 5, 0, 6]
    ends = {0}.__contains__
    assert needle.place(hay, [9], 0, ends) == [9, *hay]
    assert needle.place(hay, [9], 0.75, ends) == [1, 2, 0, 9, 3, 4, 5, 0, 6]
    assert needle.place(hay, [9], 0.9, ends) == [1, 2, 0, 3, 4, 5, 0, 9, 6]
    assert needle.score("Under a BLUE thing", ["blue", "stone"]) == 0.5


def test_the_chat_prompt_of_a_needle_is_that_of_chat(demo_tokenizer):
    before, behind = needle.prompt(demo_tokenizer, True, "Where?")
    text = demo_tokenizer.encode("hay <|im_end|>", allowed_special=set())
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "hay <|im_end|>\n\nWhere?"},
    ]
    expected = demo_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert demo_tokenizer.decode([*before, *text, *behind]) == demo_tokenizer.decode(expected)


def test_needles_in_the_demo(tmp_path, monkeypatch, capsys):
    hay = tmp_path / "hay.txt"
    hay.write_text("The capital of Peru is Lima (利马)\n" * 60, "utf-8")
    arguments = ["needle.py", str(ROOT / "demo"), str(hay), "--lengths", "128", "200", "--depths", "0", "100"]
    arguments += ["--needle", "The capital of Kenya is Nairobi.", "--question", "What is the capital of Kenya?"]
    arguments += ["--answer", "Nairobi", "--new-tokens", "12"]
    monkeypatch.setattr(
        sys, "argv", [*arguments, "--output", str(tmp_path / "n.json"), "--plot", str(tmp_path / "n.svg")]
    )
    needle.main()
    cells = json.loads((tmp_path / "n.json").read_text("utf-8"))
    assert [cell["score"] for cell in cells] == [1.0] * 4
    assert "| 100% | 100% | 100% |" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "n.svg")
    monkeypatch.setattr(sys, "argv", [*arguments[:3], "--lengths", "100000"])
    with pytest.raises(SystemExit, match="are possible"):
        needle.main()


def test_the_figures_are_drawings():
    tree = ElementTree.fromstring(figures.lines({"a<b": [(0, 1.5), (10, 2.5)], "c": [(0, 2), (10, 1)]}, "t", "x", "y"))
    drawn = [node.get("points").split() for node in tree if node.tag.endswith("polyline")]
    assert [len(points) for points in drawn] == [2, 2]
    heights = [[float(point.split(",")[1]) for point in points] for points in drawn]
    assert heights[0][0] > heights[0][1]  # a larger value is higher up
    assert heights[1][0] < heights[1][1]
    tree = ElementTree.fromstring(figures.grid([[0, 1], [0.5, 1]], ["0%", "50%"], ["1", "2"], "t", "y", "x"))
    assert [node.get("fill")[:7] for node in tree if node.tag.endswith("rect")] == [
        "hsl(0,5",
        "hsl(120",
        "hsl(60,",
        "hsl(120",
    ]


# Programs


@pytest.fixture
def sandbox():
    problem = run_code.sandbox_problem()
    if problem:
        pytest.skip(f"no namespaces here: {problem}")


HOSTILE = {
    "wrong": "assert 1 + 1 == 3",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
    "endless output": "while True:\n    print('x' * 100000)",
    "output to the one who waits": "import os\nwhile True:\n    for i in range(64):\n        try:\n"
    "            os.write(i, b'x' * 65536)\n        except OSError:\n            pass",
    "endless loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(1000)",
    "10 GB": "x = bytearray(10 << 30)",
    "large file": "f = open('x', 'wb')\nfor _ in range(1000):\n    f.write(bytes(1 << 20))\n    f.flush()",
    "many files": "for i in range(10**6):\n    open(str(i), 'w').write('x' * 4096)",
    "end without the tests": "import sys\nsys.exit(0)",
    "end at once": "import os\nos._exit(0)",
    "the home": "import os\nassert os.listdir(HOME), 'nothing here'",
    "deleting the home": "import shutil\nshutil.rmtree(HOME)",
    "deleting all": "import shutil\nshutil.rmtree('/')",
    "the environment": "import os\nassert 'SECRET' in os.environ",
    "the environment by proc": "open('/proc/1/environ').read()",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=5)",
    "killing the parent": "import os\nos.kill(PARENT, 9)",
    "killing all": "import os\nos.kill(-1, 9)",
    "a command": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'])",
    "other namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "another root": "import os\nos.chroot('/tmp')",
}


@pytest.fixture
def home():
    """A folder that anyone may read and write."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o777)
        (Path(folder) / "letter").write_text("dear")
        yield Path(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name, sandbox, home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SECRET", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = f"HOME, PARENT, PORT = {str(home)!r}, {os.getpid()}, {server.getsockname()[1]}\n"
        server.settimeout(0)
        outcome = run_code.run_program(known + HOSTILE[name], run_code.Limits(seconds=2))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not outcome.passed, outcome
    assert (home / "letter").read_text() == "dear"
    assert run_code.run_program("assert 1 + 1 == 2").passed


@pytest.mark.parametrize("name", ["the environment", "10 GB", "endless loop", "wrong", "end at once"])
def test_limits_hold_without_a_sandbox(name):
    assert not run_code.run_program(HOSTILE[name], run_code.Limits(seconds=2), sandbox=False).passed
    assert run_code.run_program("import math\nassert math.sqrt(4) == 2", sandbox=False).passed


def test_a_right_program_may_use_the_library_and_files(sandbox):
    program = "import re, math, heapq, itertools, collections, json, decimal, dataclasses, typing, hashlib, random\n"
    program += "open('note', 'w').write('x')\nassert open('note').read() == 'x'\n"
    program += "@dataclasses.dataclass\nclass P:\n    x: int = 1\nassert P().x == 1\n"
    assert run_code.run_program(program).reason == "passed"


def test_nothing_runs_where_there_are_no_namespaces(monkeypatch, tmp_path):
    monkeypatch.setattr(run_code, "sandbox_problem", lambda: "it is not Linux")
    with pytest.raises(RuntimeError, match=r"not Linux.*--no-sandbox"):
        run_code.run_program("pass")
    monkeypatch.setattr(run_code, "_unsafe", False)
    run_code.allow_unsafe()
    assert run_code.run_program("pass").passed
