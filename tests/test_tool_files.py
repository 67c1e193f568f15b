"""What every tool does with files: which weights it reads, and what a full disk, a read-only one or a kill leaves."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, modeling_qwen, random_ids, tiny_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(ROOT / "tools"))
NAMES = ("checkpoint_files", "upgrade_checkpoint", "quantize_weights", "extend_vocabulary", "export_fast_tokenizer")
checkpoint_files, upgrade, quantize, extend, export = map(importlib.import_module, NAMES)
INDEX = checkpoint_files.INDEX


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with this code in it but one module, which an upgrade would write."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    tiny_model(vocab_size=4096).save_pretrained(folder)
    shutil.copy(ROOT / "demo" / "qwen.tiktoken", folder)
    shutil.copy(ROOT / "tokenizer_config.json", folder)
    upgrade.write(folder, upgrade.planned(folder))
    for backup in upgrade.backups(folder):
        shutil.rmtree(backup)
    (folder / "modeling_qwen.py").write_text("import torch\n" + (ROOT / "modeling_qwen.py").read_text())
    (folder / "words.tsv").write_text("我是一只猫\t20\n", encoding="utf-8")
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in Unicode only")
def test_a_target_of_any_name_is_made_and_named(tmp_path, monkeypatch):
    """Also one that is not in UTF-8, on an output that has other characters only."""
    target = tmp_path / os.fsdecode(b"\xff\xe4")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1"))

    def make():
        with checkpoint_files.new_folder(target):
            print(f"{target}: 完成", flush=True)

    assert checkpoint_files.exit_status(make) == 0
    assert target.is_dir()
    assert rb"\udcff\udce4: \u5b8c\u6210" in written.getvalue()


# --- What was named ------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The working directory: folders that a program may be pointed to, without weights."""
    monkeypatch.chdir(tmp_path)
    files = {
        "new": ["config.json", "tokenizer_config.json", "modeling_qwen.py", "qwen_loading.py"],
        "deaf": ["config.json", "modeling_qwen.py", "qwen_loading.py"],
        "old": ["config.json", "modeling_qwen.py"],
        "empty": [],
        "Qwen": [],
    }
    for name, inside in files.items():
        (tmp_path / name).mkdir()
        for file in inside:
            (tmp_path / name / file).write_text("{}")
    for name, base in (("adapter", "new"), ("lost", "gone"), ("hub_adapter", "owner/name")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("old", "old holds the code published in 2023.* python tools/upgrade_checkpoint.py old --write"),
        ("empty", "^empty has no config.json, so it is not a checkpoint.$"),
        ("deaf", "^deaf has no tokenizer_config.json. It comes with the checkpoint"),
        ("file", "^file is a file"),
        ("adapter", "^adapter is an adapter, not a checkpoint: merge it first"),
        *((path, f"^There is no folder {path}.$") for path in ("nope", "./nope", "~/nope", "/a/b", "a/b/c", "../b")),
        ("Qwen/nope", "^There is no folder Qwen/nope.$"),
    ],
)
def test_what_is_no_checkpoint_is_said_before_anything_is_loaded(folders, path, message):
    with pytest.raises(checkpoint_files.Problem, match=message):
        checkpoint_files.check_loadable(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenization_qwen.py", "# Copyright (c) Alibaba Cloud.", r"2023 \(tokenization_qwen.py\), which .* --write$"),
        ("cpp_kernels.py", "from torch.utils import cpp_extension", r"2023 \(cpp_kernels.py\)"),
        ("modeling_qwen.py", "from .qwen_ops import x\nfrom .qwen_loading import y", "lacks files .* qwen_ops.py"),
        (
            "config.json",
            '{"auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}',
            "lacks files of the code: configuration_qwen.py",
        ),
    ],
)
def test_code_in_parts_is_said_before_anything_is_loaded(folders, name, text, message):
    (folders / "new" / name).write_text(text)
    with pytest.raises(checkpoint_files.Problem, match=message):
        checkpoint_files.check_loadable("new")


def test_what_may_be_a_checkpoint_goes_on(folders, monkeypatch):
    for path in ("new", "./new", str(folders / "new"), "owner/name", "owner.x/some-1_8B.v2"):
        checkpoint_files.check_loadable(path)
    monkeypatch.setattr(checkpoint_files, "try_to_load_from_cache", lambda repo, file: "/cache/config.json")
    checkpoint_files.check_loadable("Qwen/cached")  # though there is a folder Qwen
    for adapter in ("adapter", "hub_adapter"):
        checkpoint_files.check_loadable(adapter, adapters=True)
    with pytest.raises(checkpoint_files.Problem, match="The base of the adapter lost: There is no folder gone"):
        checkpoint_files.check_loadable("lost", adapters=True)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nope", "There is no folder nope"),
        ("new", "new is a checkpoint, not an adapter"),
        ("empty", "empty has no adapter_config.json, so it is not an adapter"),
    ],
)
def test_what_is_no_adapter_is_not_merged(folders, capsys, path, message):
    merge_adapter = importlib.import_module("merge_adapter")
    assert merge_adapter.main([path, "merged"]) == 2
    assert message in capsys.readouterr().err
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "adapter"}
    (folders / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({}, folders / "adapter" / "adapter_model.safetensors")
    assert merge_adapter.main(["adapter", "merged"]) == 2
    assert "adapter is an adapter, not a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--bits", "4", "--method", "rtn"]])
def test_an_adapter_is_not_quantised(folders, capsys, options):
    assert quantize.main(["adapter", "made", *options]) == 2
    assert "adapter is an adapter, not a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_weight_file_that_is_cut_off_is_named(whole, tmp_path, capsys, name):
    """By all that read it."""
    merge_adapter, export = map(importlib.import_module, ("merge_adapter", "export_gguf"))
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(whole, base)
    adapter.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 8, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.ones(1)}, adapter / "adapter_model.safetensors")
    file = next(folder / name for folder in (adapter, base) if (folder / name).exists())
    file.write_bytes(file.read_bytes()[:40])
    programs = [merge_adapter] if "adapter" in name else [merge_adapter, export, quantize]
    for program in programs:
        assert program.main([str(adapter if program is merge_adapter else base), str(tmp_path / "made")]) == 2
        assert f"{name} is damaged (" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds list, not an object"),
        ("tokenizer_config.json", None, "tokenizer_config.json is missing"),
        ("qwen.tiktoken", None, "There is no vocabulary"),
        ("config.json", {"quantization_config": [1]}, r"must be an object \{...\}, found \[1\]|is quantised already"),
        ("config.json", {"torch_dtype": "float17"}, "config.json: dtype='float17' is not a torch data type"),
        ("config.json", {"torch_dtype": 5}, "config.json: dtype=5 is not a torch data type"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id must be the id of a token .*, found 'x'"),
    ],
)
def test_damaged_settings_are_named_before_weights_are_computed(
    whole, tmp_path, capsys, monkeypatch, name, content, message
):
    """By all that need them; nothing is left."""
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    if isinstance(content, dict):
        old = json.loads((source / name).read_text())
        content = json.dumps({key: value for key, value in old.items() if key != "dtype"} | content)
    (source / name).unlink()
    if content is not None:
        (source / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    gptq, gguf = map(importlib.import_module, ("gptq", "export_gguf"))
    called = []
    monkeypatch.setattr(quantize, "round_to_int8", called.append)
    monkeypatch.setattr(gptq, "quantize_block", called.append)
    need_it = {
        "qwen.tiktoken": (upgrade, quantize, export, gguf),
        "tokenizer_config.json": (upgrade, quantize) if content is None else (upgrade, quantize, export, gguf),
        "config.json": (upgrade, quantize, gguf),
        "generation_config.json": (gguf,),
    }
    for program in need_it[name]:
        arguments = ["source", *(["--copy-to"] if program is upgrade else []), "made"]
        for options in ([], ["--bits", "4", "--method", "rtn"]) if program is quantize else ([],):
            assert program.main([*arguments, *options]) == 2
            assert re.search(message, capsys.readouterr().err)
    assert not called
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- Which weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(whole, tmp_path):
    """A copy with the weights in two files and an index."""
    folder = tmp_path / "sharded"
    shutil.copytree(whole, folder)
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def logits(folder):
    model = modeling_qwen.QWenLMHeadModel.from_pretrained(folder, fp32=True).eval()
    with torch.no_grad():
        return model(random_ids(1, 20)).logits


def test_only_the_files_that_the_index_names_are_quantised(sharded, tmp_path):
    assert quantize.main([str(sharded), str(tmp_path / "expected")]) == 0
    stray = {name: torch.zeros_like(weight) for name, weight in load_file(sharded / "model-2.safetensors").items()}
    for name in ("a.safetensors", "model-3.safetensors", "z.safetensors"):
        save_file(stray, sharded / name, metadata={"format": "pt"})
    assert quantize.main([str(sharded), str(tmp_path / "int8")]) == 0
    assert contents(tmp_path / "int8").keys() == contents(tmp_path / "expected").keys()
    torch.testing.assert_close(logits(tmp_path / "int8"), logits(tmp_path / "expected"), rtol=0, atol=0)
    torch.testing.assert_close(logits(tmp_path / "int8"), logits(sharded), rtol=0.1, atol=0.5)


def test_a_file_without_an_index_comes_first_as_in_transformers(sharded, whole, tmp_path):
    shutil.copy(whole / "model.safetensors", sharded)
    zeros = {name: torch.zeros_like(weight) for name, weight in load_file(sharded / "model-1.safetensors").items()}
    save_file(zeros, sharded / "model-1.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits(sharded), logits(whole), rtol=0, atol=0)
    assert checkpoint_files.weight_files(sharded) == {"model.safetensors": set()}
    assert quantize.main([str(sharded), str(tmp_path / "int8")]) == 0
    assert not (tmp_path / "int8" / INDEX).exists()
    torch.testing.assert_close(logits(tmp_path / "int8"), logits(whole), rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model-2.safetensors").unlink(), "weight files are missing: model-2.safetensors"),
        (lambda f: (f / INDEX).write_text("{}"), 'has no "weight_map"'),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), 'has no "weight_map"'),
        (lambda f: (f / INDEX).write_text("[]"), "holds list, not an object"),
        (lambda f: (f / INDEX).unlink(), "There are no weights"),
        (
            lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../model-1.safetensors"}}'),
            "names '../model-1.safetensors', which is not a file of this folder",
        ),
        (
            lambda f: save_file(
                {**load_file(f / "model-1.safetensors"), **load_file(f / "model-2.safetensors")},
                f / "model-2.safetensors",
            ),
            "model-2.safetensors has .*, which the index says is in model-1.safetensors",
        ),
    ],
)
def test_an_index_that_does_not_fit_the_files(sharded, tmp_path, capsys, damage, message):
    damage(sharded)
    for tool, arguments in ((upgrade, [str(sharded)]), (quantize, [str(sharded), str(tmp_path / "new")])):
        assert tool.main(arguments) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_a_weight_that_the_index_does_not_name_is_read_as_transformers_does(sharded, tmp_path):
    """By every tool; a merged checkpoint lacked it."""
    merge_adapter = importlib.import_module("merge_adapter")
    index = json.loads((sharded / INDEX).read_text())
    unnamed = index["weight_map"].pop("transformer.h.0.attn.c_proj.weight")
    (sharded / INDEX).write_text(json.dumps(index))
    assert unnamed in index["weight_map"].values()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 8, "base_model_name_or_path": str(sharded)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    norm = load_file(sharded / index["weight_map"]["transformer.ln_f.weight"])["transformer.ln_f.weight"]
    save_file({"base_model.model.transformer.ln_f.weight": norm}, adapter / "adapter_model.safetensors")
    assert merge_adapter.main([str(adapter), str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(sharded), rtol=0, atol=0)
    options = ["--bits", "8", "--method", "rtn", "--group-size", "-1"]
    assert quantize.main([str(sharded), str(tmp_path / "int8"), *options]) == 0
    torch.testing.assert_close(logits(tmp_path / "int8"), logits(sharded), rtol=0.1, atol=0.5)


def test_only_what_belongs_to_a_checkpoint_is_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "demo", source, ignore=lambda *_: [".training"])
    beside = ["LICENSE", "README.md", "NOTICE.txt", "qwen_extra.tiktoken", "special_tokens_map.json", ".gitattributes"]
    stray = ["trainer_state.json", "questions.jsonl", "loss.svg", "model.safetensors.index.json", "rng_state.pth"]
    for name in (*beside, *stray):
        (source / name).write_text("{}")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"]["AutoModelForSequenceClassification"] = "reward.QWenReward"
    (source / "config.json").write_text(json.dumps(config))
    (source / "reward.py").write_text("from .reward_head import Head")
    (source / "reward_head.py").write_text("class Head: ...")
    target.mkdir()
    checkpoint_files.copy_companions(source, target)
    settings = ["config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"]
    code = [name for name in upgrade.MODULES if name.endswith(".py")]  # cpp_kernels.cpp is written with this code
    assert sorted(contents(target)) == sorted([*settings, *beside, *code, "reward.py", "reward_head.py"])


# --- Where nothing can be written ---------------------------------------------------------------------------------


TOOLS = {  # tool, and its arguments for a target
    "upgrade --copy-to": (upgrade, lambda whole, target: [str(whole), "--copy-to", str(target)]),
    "quantize": (quantize, lambda whole, target: [str(whole), str(target)]),
    "export": (export, lambda whole, target: [str(whole), str(target)]),
    "extend": (extend, lambda whole, target: [str(whole / "qwen.tiktoken"), str(whole / "words.tsv"), str(target)]),
}


@pytest.fixture
def mount(tmp_path):
    """Gives a function that mounts a file system of so many bytes, and one that makes it read-only."""
    place = tmp_path / "disk"
    place.mkdir()

    def call(*command):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs a user who may mount a small file system (root)")

    def mounted(size):
        call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
        return place

    yield mounted, lambda: call("mount", "-o", "remount,ro", str(place))
    subprocess.run(["umount", str(place)], capture_output=True)


def total(folder):
    return sum(len(content) for content in contents(folder).values())


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("room", [0.0, 0.02, 0.9])
def test_a_full_disk_leaves_no_target(whole, mount, capsys, name, room):
    """With no room at all, with some, and with nearly enough."""
    tool, arguments = TOOLS[name]
    disk = mount[0]("64m")
    assert tool.main(arguments(whole, disk / "target")) == 0
    needed = total(disk)
    shutil.rmtree(disk / "target") if (disk / "target").is_dir() else (disk / "target").unlink()
    free = shutil.disk_usage(disk).free - int(needed * room) // 4096 * 4096
    (disk / "ballast").write_bytes(b"\1" * free)
    capsys.readouterr()
    assert tool.main(arguments(whole, disk / "target")) == 2
    assert re.search("No space left on device|A copy takes", capsys.readouterr().err)
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_full_disk_leaves_the_folder_as_it_was(whole, mount, capsys):
    disk = mount[0]("64m")
    shutil.copytree(whole, disk / "checkpoint")
    before = contents(disk)
    plan = upgrade.planned(disk / "checkpoint")
    needed = 2 * len(plan["modeling_qwen.py"])  # new and, in the backup, old
    for room in (0, needed // 3, needed * 9 // 10):
        (disk / "ballast").write_bytes(b"\1" * (shutil.disk_usage(disk).free - room // 4096 * 4096))
        assert upgrade.main([str(disk / "checkpoint"), "--write"]) == 2
        assert "No space left on device: " in capsys.readouterr().err  # and where
        (disk / "ballast").unlink()
        assert contents(disk) == before
        assert not [path for path in disk.rglob("*before_upgrade*")]
    assert upgrade.main([str(disk / "checkpoint"), "--write"]) == 0
    written = contents(disk)
    (disk / "ballast").write_bytes(b"\1" * shutil.disk_usage(disk).free)
    assert upgrade.main([str(disk / "checkpoint"), "--restore"]) == 2
    (disk / "ballast").unlink()
    assert contents(disk) == written
    assert upgrade.main([str(disk / "checkpoint"), "--restore"]) == 0
    assert contents(disk) == before


@pytest.mark.parametrize("name", [*TOOLS, "upgrade --write"])
def test_a_read_only_target(whole, mount, capsys, name):
    disk = mount[0]("64m")
    shutil.copytree(whole, disk / "checkpoint")
    mount[1]()
    before = contents(disk)
    tool, arguments = TOOLS.get(name, (upgrade, lambda whole, target: [str(disk / "checkpoint"), "--write"]))
    assert tool.main(arguments(whole, disk / "target")) == 2
    message = capsys.readouterr().err
    assert "Read-only file system" in message
    assert str(disk) in message
    assert contents(disk) == before


def test_unreadable_input_and_a_target_in_no_folder(whole, tmp_path, capsys):
    """An OSError of any kind is status 2 and names the file."""
    (tmp_path / "file").write_text("")
    for tool, arguments in TOOLS.values():
        assert tool.main(arguments(whole, tmp_path / "file" / "target")) == 2
        assert "file" in capsys.readouterr().err
    assert extend.main([str(whole / "qwen.tiktoken"), str(tmp_path), str(tmp_path / "target")]) == 2
    assert f"directory: '{tmp_path}'" in capsys.readouterr().err
    assert contents(tmp_path) == {"file": b""}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
@pytest.mark.parametrize("name", [name for name in TOOLS if name != "upgrade --copy-to"])
def test_a_killed_run_leaves_no_target_and_the_next_one_makes_it(whole, tmp_path, name):
    """
    Killed by the clock of its own processor time, which is the same on a busy machine; tests/test_upgrade_checkpoint.py
    does it with the upgrade.
    """
    tool, arguments = TOOLS[name]
    target, chance, killed = tmp_path / "target", random.Random(0), 0

    def run(seconds):
        """Its status, and the processor time that it took; 0: to its end."""
        pid = os.fork()
        if pid == 0:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends a process that does not handle it
            tqdm.set_lock(threading.RLock())  # the lock of all processes would be killed with this one
            os._exit(tool.main(arguments(whole, target)))
        _, status, usage = os.wait4(pid, 0)
        return status, usage.ru_utime + usage.ru_stime

    def remove():
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    status, duration = run(0)
    assert status == 0
    complete = contents(tmp_path)
    remove()
    kills = int(os.environ.get("QWEN_KILLS", "4"))
    for i in itertools.count():
        if i >= kills and killed:
            break
        assert i < 20 * kills
        status, _ = run(chance.uniform(0.001, duration) / (1 + i // kills))
        assert status == 0 or os.WTERMSIG(status) == signal.SIGPROF
        killed += status != 0
        if target.exists():
            assert contents(tmp_path).items() >= complete.items()
            remove()
        assert tool.main(arguments(whole, target)) == 0
        assert contents(tmp_path).items() >= complete.items()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("partial_")]
        remove()


def test_a_tool_that_is_interrupted_leaves_nothing(whole, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check", interrupted)
    assert export.main([str(whole), str(tmp_path / "target")]) == 130
    assert capsys.readouterr().err.endswith("interrupted: the same command begins again\n")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_code_that_cannot_be_written_is_a_line(monkeypatch, capsys):
    """At the import of a tool, before its arguments are read."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds it there
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", f"{os.devnull}/modules")
    with pytest.raises(SystemExit) as ended:
        checkpoint_files.from_code("configuration_qwen.QWenConfig")
    assert ended.value.code == 2
    assert re.match(r"problem: .*modules'.* Set HF_MODULES_CACHE to a folder of your own\.\n$", capsys.readouterr().err)


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
def test_who_may_read_weights_is_as_the_umask_says(tmp_path):
    """safetensors 0.8 makes files for their user alone, which a server of another user could not read."""
    for umask in (0o077, 0o022):
        before = os.umask(umask)
        try:
            checkpoint_files.save_weights({"a": torch.ones(1)}, tmp_path / f"{umask}.safetensors")
        finally:
            os.umask(before)
        assert (tmp_path / f"{umask}.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
