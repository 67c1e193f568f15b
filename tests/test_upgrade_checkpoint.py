"""tools/upgrade_checkpoint.py: what it reads, writes, undoes, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import threading
import time
import traceback

import pytest
import torch
from conftest import ROOT, sampled, tiny_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, dynamic_module_utils

sys.path.insert(0, str(ROOT / "tools"))
checkpoint_files, upgrade = map(importlib.import_module, ("checkpoint_files", "upgrade_checkpoint"))

# An earlier version of the code in miniature: the published modules' names and imports of each other.
EARLIER = {
    "configuration_qwen.py": """
from transformers import PretrainedConfig
class QWenConfig(PretrainedConfig):
    model_type = "qwen"
    def __init__(self, **kwargs):
        for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
            setattr(self, key, kwargs.pop(key, 1))
        super().__init__(**kwargs)
""",
    "qwen_generation_utils.py": """
HistoryType = list
def make_context(): ...
def decode_tokens(): ...
def get_stop_words_ids(): ...
class StopWordsLogitsProcessor: ...
""",
    "tokenization_qwen.py": """
from transformers import PreTrainedTokenizer
class QWenTokenizer(PreTrainedTokenizer): ...
""",
    "modeling_qwen.py": """
import torch
from transformers import PreTrainedModel
from .configuration_qwen import QWenConfig
from .qwen_generation_utils import (
    HistoryType, make_context, decode_tokens, get_stop_words_ids, StopWordsLogitsProcessor)
class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
class QWenModel(QWenPreTrainedModel): ...
class QWenLMHeadModel(QWenPreTrainedModel):
    is_earlier = True
""",
}
# Formatting that is not json.dumps's, and keys of other software.
CONFIG_STYLE = {"indent": 4, "separators": (", ", ": ")}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    tiny_model(vocab_size=4096).save_pretrained(folder)
    (folder / "transformers_compat.py").unlink()
    for name, text in EARLIER.items():
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config.pop("auto_map", None)
    config["somebody_elses_key"] = [1, 2, {"a": None}]
    config["auto_map"] = {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    }
    (folder / "config.json").write_text(json.dumps(config, **CONFIG_STYLE))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class":"QWenTokenizer","model_max_length":32}')
    shutil.copy(ROOT / "demo" / "qwen.tiktoken", folder)
    return folder


BACKUP = upgrade.BACKUP_PREFIX


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, **CONFIG_STYLE))


def test_check_reads_only(checkpoint, capsys):
    before = contents(checkpoint)
    assert upgrade.main([str(checkpoint)]) == 1
    printed = capsys.readouterr().out
    assert "weights: all 27 are there, in the shapes of config.json" in printed
    assert "vocabulary: 4096 tokens, not the official one" in printed
    for line in ("would add     transformers_compat.py", "would replace modeling_qwen.py", "would replace config.json"):
        assert line in printed
    assert contents(checkpoint) == before


def test_help_says_what_the_exit_status_means(capsys):
    with pytest.raises(SystemExit):
        upgrade.main(["--help"])
    assert "1 there is something to do, and --write was not given" in " ".join(capsys.readouterr().out.split())


def test_write_then_restore_is_exact(checkpoint, capsys):
    before = contents(checkpoint)
    assert upgrade.main([str(checkpoint), "--write"]) == 0
    printed = capsys.readouterr().out
    assert "loads: QWenLMHeadModel" in printed
    for name in ("transformers_compat.py", "modeling_qwen.py", "config.json"):  # once each
        assert re.findall(rf"^(?:would|wrote) .*\b{re.escape(name)}$", printed, re.MULTILINE) == [f"wrote {name}"]
    for name in upgrade.MODULES:
        assert (checkpoint / name).read_bytes() == (ROOT / name).read_bytes()
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["somebody_elses_key"] == [1, 2, {"a": None}]
    assert config["auto_map"]["AutoModel"] == "modeling_qwen.QWenModel"
    text, old_text = (checkpoint / "config.json").read_text(), before["config.json"].decode()
    assert text.split('"auto_map"')[0] == old_text.split('"auto_map"')[0]  # to the letter
    tokenizer_config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert tokenizer_config["auto_map"] == {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    assert tokenizer_config["model_max_length"] == 32

    after = contents(checkpoint)
    assert upgrade.main([str(checkpoint), "--write"]) == 0  # a second time changes nothing
    assert contents(checkpoint) == after
    assert upgrade.main([str(checkpoint)]) == 0

    assert upgrade.main([str(checkpoint), "--restore"]) == 0
    assert contents(checkpoint) == before
    assert upgrade.main([str(checkpoint), "--restore"]) == 2
    assert "nothing to restore" in capsys.readouterr().err


def in_child(work) -> int:
    """Run a function in a forked process; its exit status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 (the parent fails)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def loads(folder, modules) -> None:
    """Load the configuration, the tokenizer's and the model's class as a fresh process would, with an empty cache."""

    def work():
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]
        dynamic_module_utils.HF_MODULES_CACHE = str(modules)
        modules.mkdir()
        sys.path.insert(0, str(modules))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        get_class = dynamic_module_utils.get_class_from_dynamic_module
        model = get_class(config.auto_map["AutoModelForCausalLM"], str(folder))
        get_class("tokenization_qwen.QWenTokenizer", str(folder))
        assert model.__module__.startswith("transformers_modules")
        assert getattr(model, "is_earlier", False) == ("is_earlier" in (folder / "modeling_qwen.py").read_text())

    assert in_child(work) == 0


def run_and_kill(folder, action: str, moment: int) -> bool:
    """
    The tool in a process that is killed (SIGKILL) just before its `moment`th change of the folder; whether it was.

    Everything that a program does to files, Python announces as an audit event.
    """
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open")
    steps = iter(range(1, 1000))

    def hook(event, arguments):
        concerns = event in changes and str(folder) in str(arguments[0])
        if concerns and (event != "open" or "w" in str(arguments[1])) and next(steps) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        plan = upgrade.planned(folder)
        sys.addaudithook(hook)
        upgrade.write(folder, plan) if action == "--write" else upgrade.restore(folder)

    status = in_child(work)
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
@pytest.mark.parametrize("action", sampled(["--write", "--restore"]))
def test_a_kill_at_any_moment_leaves_a_folder_that_loads(checkpoint, tmp_path, monkeypatch, action):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and for power failures only
    before, plan = contents(checkpoint), upgrade.planned(checkpoint)
    upgrade.write(checkpoint, plan)
    written = contents(checkpoint)
    upgrade.restore(checkpoint)
    states = set()
    for moment in range(1, 1000):
        if action == "--restore":
            upgrade.write(checkpoint, plan)
        killed = run_and_kill(checkpoint, action, moment)
        now = {name: (checkpoint / name).read_bytes() for name in plan if (checkpoint / name).exists()}
        assert all(content in (before.get(name), written[name]) for name, content in now.items())  # whole files
        state = tuple(now.get(name) == written[name] for name in plan)
        if state not in states:
            loads(checkpoint, tmp_path / f"modules{moment}")
            states.add(state)
        if action == "--write":
            upgrade.write(checkpoint, upgrade.planned(checkpoint))  # goes on where it stopped
            assert contents(checkpoint).items() >= {name: written[name] for name in plan}.items()
        with contextlib.suppress(upgrade.Problem):  # when there is nothing left to restore
            while True:
                upgrade.restore(checkpoint)
        assert contents(checkpoint) == before
        if not killed:
            break
    assert moment > 20
    assert len(states) == len(plan) + 1


KILLS = int(os.environ.get("QWEN_KILLS", "8"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
@pytest.mark.parametrize("action", sampled(["--copy-to", "--write", "--restore"]))
def test_a_kill_at_random_moments_leaves_no_broken_folder(checkpoint, tmp_path, action):
    """
    The whole command in a process of its own, killed by the clock: every other time at any moment, else soon after its
    first change. QWEN_KILLS says how often.
    """
    written, work, target = tmp_path / "written", tmp_path / "work", tmp_path / "copy"
    shutil.copytree(checkpoint, written)
    plan = upgrade.planned(written)
    upgrade.write(written, plan)
    before, after = contents(checkpoint), contents(written)
    beginning = written if action == "--restore" else checkpoint
    end = before if action == "--restore" else after

    def command():
        tqdm.set_lock(threading.RLock())  # the lock of all processes would be killed with this one
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert upgrade.main([str(work), action, *([str(target)] if action == "--copy-to" else [])]) == 0

    def is_whole(folder):
        return contents(folder).items() >= {name: end[name] for name in end if BACKUP not in name}.items()

    def has_begun():
        return any(path.name.startswith((".", "partial_")) for path in (*tmp_path.iterdir(), *work.iterdir()))

    def start():
        """
        A process that does it as soon as it is told to (until fork returns here it could be through), then tells and
        waits to be killed: how long a process takes to end has nothing to do with the command.
        """
        ready, go = os.pipe()
        over, through = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.read(ready, 1)
                command()
                os.write(through, b"1")
                signal.pause()
            finally:
                traceback.print_exc()
                os._exit(1)
        os.write(go, b"1")
        for end_of_pipe in (ready, go, through):
            os.close(end_of_pipe)
        return pid, over, time.monotonic()

    def kill(pid, over):
        """Whether it was killed before it was through."""
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])  # else the command had failed
        early = not os.read(over, 1)
        os.close(over)
        return early

    duration = 60.0
    for _ in range(3):
        shutil.copytree(beginning, work)
        pid, over, began = start()
        assert select.select([over], [], [], 60)[0]
        duration = min(duration, time.monotonic() - began)
        assert not kill(pid, over)
        shutil.rmtree(work)
        shutil.rmtree(target, ignore_errors=True)
    chance, states, killed = random.Random(0), set(), 0
    for i in itertools.count():
        if i >= KILLS and (killed or i == 20 * KILLS):
            break
        shutil.copytree(beginning, work)
        pid, over, began = start()
        while i % 2 and not has_begun() and time.monotonic() < began + 2 * duration:
            pass
        time.sleep(chance.uniform(0, duration / 10 if i % 2 else duration))
        killed += kill(pid, over)
        if action == "--copy-to":
            assert contents(work) == before
            assert not target.exists() or is_whole(target)
            state = target.exists()
        else:
            now = {name: (work / name).read_bytes() for name in {**before, **plan} if (work / name).exists()}
            assert all(content in (before.get(name), after[name]) for name, content in now.items())
            state = tuple(now.get(name) == after[name] for name in plan)
        if state not in states and (action != "--copy-to" or state):
            loads(target if state is True else work, tmp_path / f"modules{i}")
        states.add(state)
        if action == "--restore":  # the command goes on where it stopped
            with contextlib.suppress(upgrade.Problem):
                upgrade.restore(work)
            assert contents(work) == before
        elif action == "--write":
            upgrade.write(work, upgrade.planned(work))
            assert is_whole(work)
        elif not target.exists():
            upgrade.copy_to(work, target, False)
            assert is_whole(target)
        assert not has_begun()
        shutil.rmtree(work)
        shutil.rmtree(target, ignore_errors=True)
    print(f"{action}: {killed} of {i} killed in up to {duration:.2f} s, {len(states)} states")
    assert killed


def test_what_a_killed_run_left_is_removed(checkpoint, tmp_path):
    """By the next run, whatever it does."""
    before = contents(checkpoint)

    def leave():
        (checkpoint / ".before_upgrade_1").mkdir()
        for name in (".config.json.new", ".modeling_qwen.py.new", ".generation_config.json.new"):
            (checkpoint / name).write_text("half of it")
        (checkpoint / ".before_upgrade_1" / "config.json").write_text("a copy")
        for backup in checkpoint.glob("before_upgrade_*"):
            (backup / ".manifest.json.new").write_text("{")

    leave()
    assert upgrade.main([str(checkpoint), "--restore"]) == 2  # there is nothing to restore
    assert contents(checkpoint) == before
    leave()
    assert upgrade.main([str(checkpoint), "--write"]) == 0
    assert not [path for path in checkpoint.rglob(".*")]
    leave()
    assert upgrade.main([str(checkpoint), "--restore"]) == 0
    assert contents(checkpoint) == before

    with checkpoint_files.new_folder(tmp_path / "copy") as partial:
        pass
    shutil.rmtree(tmp_path / "copy")
    (partial / "inner").mkdir(parents=True)
    (partial / "model.safetensors").write_text("half of it")
    assert upgrade.main([str(checkpoint), "--copy-to", str(tmp_path / "copy")]) == 0
    assert not partial.exists()
    assert not (tmp_path / "copy" / "inner").exists()


def test_two_runs_with_one_target(tmp_path):
    pytest.importorskip("fcntl")
    with checkpoint_files.new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("1")
        with pytest.raises(upgrade.Problem, match="Another run is making"), checkpoint_files.new_folder(
            tmp_path / "new"
        ):
            pass
    assert contents(tmp_path) == {"new/file": b"1"}


def test_restore_keeps_what_the_user_changed(checkpoint, capsys):
    assert upgrade.main([str(checkpoint), "--write"]) == 0
    change_config(checkpoint, mine=1)
    changed = contents(checkpoint)
    assert upgrade.main([str(checkpoint), "--restore"]) == 2
    assert "config.json was changed after the upgrade" in capsys.readouterr().err
    assert contents(checkpoint) == changed
    (checkpoint / "config.json").rename(checkpoint / "mine.json")
    assert upgrade.main([str(checkpoint), "--restore"]) == 0
    assert json.loads((checkpoint / "mine.json").read_text())["mine"] == 1
    assert "mine" not in json.loads((checkpoint / "config.json").read_text())


def test_only_where_something_was_replaced_it_says_where_that_is(checkpoint, capsys):
    assert upgrade.main([str(checkpoint), "--write"]) == 0
    assert f"what was replaced is in {BACKUP}" in capsys.readouterr().out
    (checkpoint / "qwen_loss.py").unlink()
    assert upgrade.main([str(checkpoint), "--write"]) == 0
    printed = capsys.readouterr().out
    assert "wrote qwen_loss.py" in printed
    assert BACKUP not in printed


@pytest.mark.parametrize("kind", ["written", "replaced", "added"])
@pytest.mark.parametrize("name", ["../mine.txt", "inner/../../mine.txt", "..\\mine.txt", "/mine.txt"])
def test_restore_stays_in_the_folder(checkpoint, tmp_path, capsys, kind, name):
    """A backup that came with a checkpoint may name any file."""
    (tmp_path / "mine.txt").write_text("mine")
    backup = checkpoint / f"{BACKUP}1"
    backup.mkdir()
    manifest = {"replaced": [], "added": [], "written": {}, "finished": True}
    manifest[kind] = {name: "0"} if kind == "written" else [name]
    (backup / "manifest.json").write_text(json.dumps(manifest))
    before = contents(tmp_path)
    assert upgrade.main([str(checkpoint), "--restore"]) == 2
    assert "manifest.json names" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_links_into_a_shared_cache_are_refused_and_copied_instead(checkpoint, tmp_path, capsys):
    blobs, snapshot = tmp_path / "models--me--qwen" / "blobs", tmp_path / "models--me--qwen" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        shutil.copy(path, blobs)
        (snapshot / path.name).symlink_to(blobs / path.name)
    before = contents(blobs)
    assert upgrade.main([str(snapshot), "--write"]) == 2
    assert "symbolic link" in (message := capsys.readouterr().err)
    assert "--copy-to" in message
    assert upgrade.main([str(snapshot), "--copy-to", str(tmp_path / "copy")]) == 0
    assert contents(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    for path in (tmp_path / "copy").iterdir():  # what writes in place writes here only
        if path.is_file():
            with open(path, "r+b") as file:
                file.write(b"#")
    assert contents(blobs) == before
    assert upgrade.main([str(snapshot), "--copy-to", str(tmp_path / "copy2")]) == 0
    loads(tmp_path / "copy2", tmp_path / "modules")
    assert upgrade.main([str(snapshot), "--copy-to", str(tmp_path / "copy")]) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: change_config(f, no_bias=False), "weights are missing, such as transformer.h.0.attn.c_proj.bias"),
        (lambda f: change_config(f, num_hidden_layers=2), "have no place in the model, such as transformer.h.2"),
        (lambda f: change_config(f, intermediate_size=200), r"another shape .*\(64, 96\), not \(64, 100\)"),
        (lambda f: change_config(f, num_attention_heads=5), "must be a multiple"),
        (lambda f: (f / "model.safetensors").unlink(), "There are no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), "model.safetensors is damaged"),
        (lambda f: (f / "qwen.tiktoken").write_bytes(b"version 1"), "line 1"),
        (lambda f: (f / "qwen.tiktoken").unlink(), "no vocabulary file"),
    ],
)
def test_problems_are_named_and_nothing_is_written(checkpoint, capsys, damage, message):
    damage(checkpoint)
    before = contents(checkpoint)
    for action in ([], ["--write"]):
        assert upgrade.main([str(checkpoint), *action]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert contents(checkpoint) == before


def test_sharded_and_pickled_weights(checkpoint, capsys):
    weights = load_file(checkpoint / "model.safetensors")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, checkpoint / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors").unlink()
    assert upgrade.main([str(checkpoint)]) == 1
    assert "weights: all 27 are there, in the shapes" in capsys.readouterr().out
    (checkpoint / "b.safetensors").unlink()
    assert upgrade.main([str(checkpoint)]) == 2
    assert "1 weight files are missing: b.safetensors. Copy them again." in capsys.readouterr().err

    (checkpoint / "model.safetensors.index.json").unlink()
    torch.save({}, checkpoint / "p.bin")
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "p.bin")}))
    assert upgrade.main([str(checkpoint)]) == 1  # names only: a pickle is not opened
    assert "weights: all 27 are there\n" in capsys.readouterr().out

    (checkpoint / "pytorch_model.bin.index.json").unlink()
    (checkpoint / "p.bin").rename(checkpoint / "pytorch_model.bin")
    assert upgrade.main([str(checkpoint)]) == 1
    assert "pytorch_model.bin, which is not opened" in capsys.readouterr().out


def test_chat_checkpoints_are_told_to_end_at_im_end_and_can_be_made_to(checkpoint, capsys):
    settings = checkpoint / "generation_config.json"
    written = '{"chat_format": "chatml",\r\n "eos_token_id": 3888, "top_p": 0.80}'
    settings.write_bytes(written.encode())
    assert upgrade.main([str(checkpoint), "--write"]) == 0
    assert 'add --end-at-im-end, which sets "eos_token_id": [3888, 3890]' in capsys.readouterr().out
    assert settings.read_bytes() == written.encode()

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    assert (tokenizer.eod_id, tokenizer.im_end_id) == (3888, 3890)
    assert upgrade.main([str(checkpoint), "--end-at-im-end"]) == 1
    assert upgrade.main([str(checkpoint), "--end-at-im-end", "--write"]) == 0
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id == [3888, 3890]
    new = settings.read_bytes().decode()
    assert new.startswith('{"chat_format": "chatml",\r\n "eos_token_id": [')
    assert new.endswith('], "top_p": 0.80}')
    assert "advice" not in capsys.readouterr().out.split("would replace")[-1]
    for option in ([], ["--end-at-im-end"]):
        assert upgrade.main([str(checkpoint), *option]) == 0
        assert "advice" not in capsys.readouterr().out

    assert upgrade.main([str(checkpoint), "--restore"]) == 0
    assert settings.read_bytes() == written.encode()


@pytest.mark.parametrize(
    ("eos", "expected"),
    [("3890", None), ("[3888, 3890]", None), ("[3888]", [3888, 3890]), ("3889", [3889, 3890]), ("null", [3888, 3890])],
)
def test_what_ends_an_answer_already_stays(checkpoint, eos, expected):
    settings = checkpoint / "generation_config.json"
    settings.write_text(f'{{"eos_token_id": {eos}, "chat_format": "chatml"}}')
    assert upgrade.ends_of_answers(checkpoint) == expected
    assert (settings.name in upgrade.planned(checkpoint, end_at_im_end=True)) == (expected is not None)


def test_ends_of_other_models_are_left_alone(checkpoint, capsys):
    assert upgrade.main([str(checkpoint), "--end-at-im-end", "--write"]) == 2
    for text in ('{"chat_format": "raw", "eos_token_id": 3888}', "{}", "[]"):
        (checkpoint / "generation_config.json").write_text(text)
        before = contents(checkpoint)
        assert upgrade.main([str(checkpoint), "--end-at-im-end", "--write"]) == 2
        assert "generation_config.json" in capsys.readouterr().err
        assert contents(checkpoint) == before


def test_a_name_with_a_point(checkpoint, capsys):
    """transformers up to 4.56 looks for a module `8B-Chat` in the folder Qwen-1 then."""
    named = checkpoint.rename(checkpoint.parent / "Qwen-1.8B-Chat")
    advice = "advice: the name of the folder, {}, has a point, by which transformers up to 4.56"
    assert upgrade.main([str(named)]) == 1
    assert advice.format("Qwen-1.8B-Chat") in (said := capsys.readouterr().out)
    assert "rename it, for instance to Qwen-1_8B-Chat" in said
    assert upgrade.main([str(named), "--copy-to", str(checkpoint)]) == 0
    assert "advice" not in capsys.readouterr().out
    assert upgrade.main([str(checkpoint), "--copy-to", str(checkpoint.parent / "v1.5")]) == 0  # loads where it is made
    assert advice.format("v1.5") in capsys.readouterr().out
    with contextlib.chdir(named) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        assert checkpoint_files.advice_about_name(type(named)("." if hasattr(contextlib, "chdir") else named))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"a": 1}',
        '{\n\t"a": 1,\n\t"auto_map": {"AutoConfig": "x.y"},\n\t"b": [1,2]\n}\n',
        '{"auto_map":{},"z":0}',
        '{"auto_map": null, "z": [{}, "\\"auto_map\\": 1"]}',
        '{"inner": {"auto_map": {"AutoModel": "n.N"}}, "s": "\\"auto_map\\": {}", "auto_map": {"A": "b.C"}}',
        '{"inner": [{"auto_map": {"AutoModel": "n.N"}}], "x": NaN, "y": 1e400, "z": 12345678901234567890123}',
        '\n { "a" : {"auto_map":{}} , "auto_map" :{"AutoModel":"m.N"} , "auto_map" : {"A":"b.C"} } \n',
        '{"a": {"auto_map": 1}, "auto\\u005fmap": {"A": "b.C"}}',
        '{\r\n  "a": "\u4f60",\r\n  "auto_map": {"A": "b.C"},\r\n  "b": 1\r\n}\r\n',
        '{\r\n    "a": 1\r\n}\r\n',
    ],
)
def test_auto_map_is_merged_into_any_formatting(text):
    merged = upgrade.merged_auto_map(text, {"AutoModel": "m.M"})
    old, new = json.loads(text), json.loads(merged)
    assert new.pop("auto_map") == {**(old.pop("auto_map", None) or {}), "AutoModel": "m.M"}
    assert repr(new) == repr(old)  # repr: NaN is not equal to itself
    assert upgrade.merged_auto_map(merged, {"AutoModel": "m.M"}) == merged
    if "\r" in text:
        assert merged.count("\n") == merged.count("\r\n") > text.count("\n")
    outside = re.compile(r'"auto(_|\\u005f)map"\s*:\s*({[^{}]*}|null),?|\s')
    assert outside.sub("", merged) == outside.sub("", text)  # the other values are written as they were


@pytest.mark.parametrize("value", ["[1]", '"x"', "3", "true"])
def test_an_auto_map_that_is_none_is_refused(checkpoint, capsys, value):
    text = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(re.sub(r'"auto_map": \{[^}]*\}', f'"auto_map": {value}', text))
    before = contents(checkpoint)
    assert upgrade.main([str(checkpoint), "--write"]) == 2
    assert '"auto_map" must be an object' in capsys.readouterr().err
    assert contents(checkpoint) == before


def test_line_ends_are_kept(checkpoint):
    for name in ("config.json", "tokenizer_config.json"):
        path = checkpoint / name
        path.write_bytes(json.dumps(json.loads(path.read_text()), indent=2).replace("\n", "\r\n").encode())
    before = contents(checkpoint)
    assert upgrade.main([str(checkpoint), "--write"]) == 0
    for name in ("config.json", "tokenizer_config.json"):
        now = (checkpoint / name).read_bytes()
        assert now != before[name]
        assert now.count(b"\n") == now.count(b"\r\n") > 5
    assert upgrade.main([str(checkpoint), "--restore"]) == 0
    assert contents(checkpoint) == before


def test_an_edit_that_would_say_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_value_span", lambda text, key: (19, 21))  # the inner one
    with pytest.raises(upgrade.Problem, match=r'"auto_map" can.t be changed .* by hand'):
        upgrade.merged_auto_map('{"a": {"auto_map": {}}}', {"AutoModel": "m.M"})


def test_the_example_in_the_docstring():
    assert doctest.testmod(checkpoint_files) == (0, 1)


def test_the_modules_are_all_that_the_code_imports():
    for name in upgrade.MODULES:
        for module in re.findall(r"^from \.(\w+) import", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE):
            assert upgrade.MODULES.index(f"{module}.py") < upgrade.MODULES.index(name)
