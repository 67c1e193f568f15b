"""finetune/finetune.py: full tuning, LoRA and Q-LoRA, what is saved, merging, resuming after a kill, two processes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from conftest import CODE, LACKING, ROOT, compat, random_ids, run, tiny_model
from packaging.version import Version
from qwen.qwen_generation_utils import make_context
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip(LACKING + "is older than 4.57, which finetune/ needs", allow_module_level=True)
pytest.importorskip("peft")

FINETUNE = ROOT / "finetune"
sys.path[:0] = [str(FINETUNE), str(ROOT / "tools"), str(ROOT / "demo")]
finetune, compare_answers = map(importlib.import_module, ("finetune", "compare_answers"))
merge_adapter, quantize_weights, gptq = map(importlib.import_module, ("merge_adapter", "quantize_weights", "gptq"))

DATA = str(FINETUNE / "example.json")
QUICK = ["--data_path", DATA, "--model_max_length", "128", "--save_strategy", "no", "--disable_tqdm", "True"]
QUICK += ["--report_to", "none", "--use_cpu", "True", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
ADAPTER = "adapter_model.safetensors"
LORA = ["--use_lora", "--lora_r", "4", "--learning_rate", "1e-2"]
LORA_16 = [*LORA, "--lora_r", "16"]
GROUPING = ["--group_by_length", "True"]
if "train_sampling_strategy" in vars(transformers.TrainingArguments):
    GROUPING = ["--train_sampling_strategy", "group_by_length"]


@pytest.fixture(autouse=True)
def environment():
    """As it was, after each test: up to 4.57 transformers notes --bf16 and --fsdp there."""
    with mock.patch.dict(os.environ):
        yield


def copy_demo(target: Path) -> Path:
    """The demo's folder, without its weights and programs, with real files."""
    target.mkdir()
    for name in (*CODE, "config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"):
        shutil.copyfile(ROOT / "demo" / name, target / name)
    return target


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A chat checkpoint of two small layers with random weights."""
    folder = copy_demo(tmp_path_factory.mktemp("checkpoints") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, kv_channels=32, intermediate_size=192)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tiny_base(tiny) -> Path:
    """The same as a base model."""
    folder = tiny.parent / "tiny_base"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings.update(chat_format="raw", eos_token_id=settings["pad_token_id"])
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def tune(checkpoint, output, *arguments: str):
    common = ["--model_name_or_path", str(checkpoint), "--output_dir", str(output), *QUICK]
    return finetune.tune(*finetune.parse([*common, *arguments]))


def losses(output) -> list[float]:
    history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def loaded(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, fp32=True, **kwargs).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(200)[None]).logits


# What is saved


def test_full_tuning_saves_all_that_a_fresh_process_elsewhere_needs(tiny, tmp_path):
    trainer = tune(
        tiny, tmp_path / "out", "--max_steps", "8", "--learning_rate", "5e-3", "--eval_data_path", DATA[:-5] + ".json"
    )
    found = losses(tmp_path / "out")
    assert len(found) == 8
    assert found[-1] < found[0] - 0.5
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"tokens_per_second", "minutes_left", "memory_gb"} <= set(entry)
    ids = trainer.model(torch.arange(50)[None]).logits.argmax(-1)[0].tolist()
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
path = {str(tmp_path / "moved")!r}
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, fp32=True).eval()
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model.chat(tokenizer, "Hi", None, max_new_tokens=2)
print(model(torch.arange(50)[None]).logits.argmax(-1)[0].tolist(), model.generation_config.eos_token_id)
"""
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    eos = [trainer.processing_class.eod_id, trainer.processing_class.im_end_id]
    assert run(code, tmp_path / "elsewhere") == f"{ids} {eos}"
    assert (tmp_path / "moved" / "cpp_kernels.cpp").exists()


def test_half_precision_learns_in_float32_and_is_saved_in_half(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({**config, "fp16": True}))  # as published Int4 checkpoints say
    tmp_path = tmp_path / "out"
    trainer = tune(checkpoint, tmp_path, "--max_steps", "2", "--bf16", "True")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_finds_its_base_and_merges_into_it(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    tune("tiny", tmp_path / "adapter", "--max_steps", "4", *LORA)  # a relative path
    adapted = loaded(str(tmp_path / "adapter"))
    assert (logits(adapted) - logits(loaded(tiny))).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert adapted.chat(tokenizer, "Hi", None, max_new_tokens=2)
    monkeypatch.chdir(tmp_path)
    assert merge_adapter.main(["adapter", "merged"]) == 0
    assert (logits(loaded(tmp_path / "merged")) - logits(adapted)).abs().max() < 1e-4
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"qwen.tiktoken", "generation_config.json", *CODE} <= names
    assert not [name for name in names if "adapter" in name]


def test_a_base_model_learns_chat_tokens_and_becomes_a_chat_model(tiny_base, tmp_path, capsys):
    trainer = tune(tiny_base, tmp_path / "adapter", "--max_steps", "4", *LORA)
    assert "wte and lm_head learn ChatML's tokens" in capsys.readouterr().out
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.lm_head.weight", "base_model.model.transformer.wte.weight"} <= set(weights)
    tokenizer = trainer.processing_class
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    settings = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (settings.chat_format, settings.eos_token_id) == ("chatml", [tokenizer.eod_id, tokenizer.im_end_id])
    merged = loaded(tmp_path / "merged")
    assert (logits(merged) - logits(trainer.model.eval())).abs().max() < 1e-4
    assert not torch.equal(merged.lm_head.weight, loaded(tiny_base).lm_head.weight)


def test_embedding_and_head_of_a_chat_model_learn_whole_beside_the_adapter(tiny, tmp_path):
    names = {"wte": "transformer.wte.weight", "lm_head": "lm_head.weight"}
    trainer = tune(tiny, tmp_path / "adapter", "--max_steps", "4", *LORA, "--lora_modules_to_save", *names)
    saved, base = load_file(tmp_path / "adapter" / ADAPTER), load_file(tiny / "model.safetensors")
    assert {name for name in saved if "lora_" not in name} == {f"base_model.model.{name}" for name in names.values()}
    for name in names.values():
        assert not torch.equal(saved[f"base_model.model.{name}"], base[name])
    with torch.no_grad():
        expected = trainer.model.eval()(torch.arange(50)[None]).logits[0, :, :3]
    (tmp_path / "adapter").rename(tmp_path / "moved")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "moved")!r}, trust_remote_code=True, fp32=True).eval()
with torch.no_grad():
    print(model(torch.arange(50)[None]).logits[0, :, :3].tolist(), model.get_input_embeddings().weight.sum().item())
"""
    found, total = run(code, tmp_path).splitlines()[-1].rsplit(" ", 1)  # some packages greet whoever imports peft
    torch.testing.assert_close(torch.tensor(json.loads(found)), expected, rtol=0, atol=1e-4)
    assert float(total) == pytest.approx(saved["base_model.model.transformer.wte.weight"].sum().item(), abs=1e-3)
    assert merge_adapter.main([str(tmp_path / "moved"), str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], saved[f"base_model.model.{name}"]) for name in names.values())


@pytest.mark.parametrize("saved_by_peft", [False, True])
def test_an_adapted_head_merges(tiny, tmp_path, saved_by_peft):
    """peft saves the base's own weight beside the adapter of a head; finetune.py does not."""
    trainer = tune(tiny, tmp_path / "adapter", "--max_steps", "4", *LORA, "--lora_target_modules", "c_attn", "lm_head")
    assert not any("wte" in name or "base_layer" in name for name in load_file(tmp_path / "adapter" / ADAPTER))
    if saved_by_peft:
        trainer.model.save_pretrained(tmp_path / "adapter")
        assert any("base_layer" in name for name in load_file(tmp_path / "adapter" / ADAPTER))
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = loaded(tmp_path / "merged")
    assert (logits(merged) - logits(trainer.model.eval())).abs().max() < 1e-4
    assert not torch.equal(merged.lm_head.weight, loaded(tiny).lm_head.weight)


def test_an_adapted_embedding_merges(tiny, tmp_path):
    trainer = tune(tiny, tmp_path / "adapter", "--max_steps", "4", *LORA, "--lora_target_modules", "c_attn", "wte")
    assert any("lora_embedding_A" in name for name in load_file(tmp_path / "adapter" / ADAPTER))
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = loaded(tmp_path / "merged")
    assert (logits(merged) - logits(trainer.model.eval())).abs().max() < 1e-4
    assert not torch.equal(merged.transformer.wte.weight, loaded(tiny).transformer.wte.weight)


def test_only_the_beginning_of_a_name_is_what_peft_puts_before_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    prefix = "base_model.model."
    names = (f"{prefix}lm_head.weight", f"{prefix}{prefix}x.weight", f"x.{prefix}y.weight", "y.base_layer.weight")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "adapter_model.safetensors")
    _, tensors = merge_adapter.read_adapter(tmp_path)
    assert set(tensors) == {"lm_head.weight", f"{prefix}x.weight", f"x.{prefix}y.weight", "y.weight"}


def test_merging_in_shards_into_another_precision(tiny, tmp_path):
    tune(tiny, tmp_path / "adapter", "--max_steps", "2", *LORA)
    loaded(tiny).save_pretrained(tmp_path / "base", max_shard_size="200KB")
    AutoTokenizer.from_pretrained(tiny, trust_remote_code=True).save_pretrained(tmp_path / "base")
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "base" / "stray.safetensors")
    arguments = [str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(tmp_path / "base")]
    assert merge_adapter.main([*arguments, "--dtype", "bf16"]) == 0
    shutil.copy(tiny / "model.safetensors", tmp_path / "base")  # beside it the index says nothing
    assert merge_adapter.main([arguments[0], str(tmp_path / "whole"), *arguments[2:]]) == 0
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    assert not (tmp_path / "merged" / "stray.safetensors").exists()
    merged, adapted = loaded(tmp_path / "merged"), loaded(str(tmp_path / "adapter"))
    assert 0 < (logits(merged) - logits(adapted)).abs().max() < 0.1
    assert AutoConfig.from_pretrained(tmp_path / "merged", trust_remote_code=True).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', by which peft changes the base too"),
        ({"init_lora_weights": "olora"}, "'olora', by which"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"tied": True}, "is its embedding, and the adapter changes them apart"),
        ({"base_model_name_or_path": "nowhere"}, "no folder nowhere"),
        ({"lora_alpha": "16"}, "lora_alpha='16', not a number"),
        ({"quantized": True}, "full precision"),
        ({"module": "h.7"}, "have no place"),
        ({"rows": 3}, "in the adapter"),
        ({"lora_alpha": float("nan")}, "mlp.w1.weight would hold numbers that are not finite"),
        ({"without": "lora_B.weight"}, "mlp.w1.lora_A.weight, but not transformer.h.0.mlp.w1.lora_B.weight"),
        ({"without": "lora_A.weight"}, "mlp.w1.lora_B.weight, which is not plain LoRA"),
        ({"with": "lora_magnitude_vector"}, "mlp.w1.lora_magnitude_vector, which is not plain LoRA"),
    ],
)
def test_merging_refuses_what_it_would_do_wrongly(tiny, tmp_path, capsys, change, message):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(tiny, base)
    adapter.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "base_model_name_or_path": str(base)}
    module = f"base_model.model.transformer.{change.pop('module', 'h.0')}.mlp.w1"
    weights = {f"{module}.lora_A.weight": torch.ones(2, 64)}
    weights[f"{module}.lora_B.weight"] = torch.ones(change.pop("rows", 96), 2)
    weights.pop(f"{module}.{change.pop('without', '')}", None)
    if "with" in change:
        weights[f"{module}.{change.pop('with')}"] = torch.ones(2)
    if change.pop("tied", False):
        weights["base_model.model.transformer.wte.weight"] = torch.ones(4096, 64)
        settings = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    save_file(weights, adapter / "adapter_model.safetensors")
    if change.pop("quantized", False):
        settings = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**settings, "quantization_config": {"bits": 4}}))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    assert merge_adapter.main([str(adapter), str(tmp_path / "merged")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 half of it"])
def test_a_damaged_adapter_of_the_published_script_is_named(tmp_path, capsys, content):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(content)
    assert merge_adapter.main([str(tmp_path), str(tmp_path / "merged")]) == 2
    assert "adapter_model.bin can't be read" in capsys.readouterr().err


def test_factors_of_two_ranks_are_no_matrix():
    factors = {"h.lora_A.weight": torch.ones(4, 8), "h.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(merge_adapter.Problem, match=r"are \(4, 8\) and \(8, 2\), which are no factors of one matrix"):
        merge_adapter.changes({"lora_alpha": 16}, factors)


# Arguments and data


def test_arguments_of_the_published_scripts():
    arguments = ["--evaluation_strategy", "steps", "--eval_steps", "5", "--warmup_ratio=0.1", "--fp16", "False"]
    common = ["--data_path", DATA, "--output_dir", "out", "--use_cpu", "True"]
    arguments += ["--gradient_checkpointing", "True", "--lazy_preprocess", "True", "--q_lora"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of names that transformers has since changed
        _, data, training, lora = finetune.parse([*common, *arguments])
    assert training.eval_strategy == "steps"
    assert training.get_warmup_steps(100) == 10
    assert training.gradient_checkpointing
    assert data.lazy_preprocess
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (64, 16, 0.05)
    assert lora.lora_target_modules == ["c_attn", "c_proj", "w1", "w2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--q_lora"], "pass --use_lora"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--q_lora", "--use_lora", "--fsdp", "full_shard"], "ZeRO-2"),
        (["--use_lora", "--lora_modules_to_save", "wte", "--lora_weight_path", "adapter"], "one of the two"),
        (["--use_lora", "--lora_modules_to_save", "wte", "head"], "no module head"),
        (["--use_lora", "--lora_target_modules", "c_attn", "w3"], "--lora_target_modules: the model has no module w3"),
        (["--use_lora", "--lora_r", "0"], "peft can't make this adapter: .*positive"),
        (["--use_lora", "--lora_dropout", "2"], "peft can't make this adapter: dropout"),
        (["--use_lora", "--lora_bias", "some"], "peft can't make this adapter: .*some"),
        (["--use_lora", "--lora_weight_path", "nowhere"], "--lora_weight_path nowhere: "),
        (["--lora_weight_path", "adapter"], "pass --use_lora too"),
        (["--model_max_length", "-1"], "--model_max_length is -1"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size is 0. Pass a positive number"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps is 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs is 0"),
        (["--max_steps", "0"], "--max_steps is 0"),
        (["--max_steps", "-1", "--num_train_epochs", "nan"], "--num_train_epochs is nan. Pass a positive number"),
        (["--seed", "-1"], "--seed is -1. Pass 0 or a positive number below 4294967296"),
        (["--adam_beta1", "1"], "--adam_beta1 is 1.0. Pass 0 or a positive number below 1"),
        (["--learning_rate", "nan"], "--learning_rate is nan. Pass 0 or a positive number"),
        (["--weight_decay", "inf"], "--weight_decay is inf. Pass 0 or a positive number"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers is -1. Pass 0 or"),
        (["--dataloader_drop_last", "--per_device_train_batch_size", "9999"], "examples don't fill one of 9999"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "--eval_strategy .* need .* pass --eval_data_path"),
        (["--dataloader_drop_last", "--eval_data_path", DATA, "--per_device_eval_batch_size", "9999"], "one of 9999"),
        (["--save_strategy", "best"], "metric_for_best_model"),
        (["--attn_implementation", "none"], "tiny can't be loaded: .*none"),
        (GROUPING, "Grouping by length saves"),
        (["--save_only_model", "True", "--resume_from_checkpoint", "auto"], "optimiser's state"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is no complete checkpoint"),
    ],
)
def test_contradictions_are_said(tiny, tmp_path, arguments, message):
    with pytest.raises(finetune.Problem, match=message):
        tune(tiny, tmp_path, *arguments)


def test_processes_that_do_not_know_each_other_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(finetune.Problem, match=r"2 processes.*each would train alone.*--use_cpu"):
        tune(tiny, tmp_path, "--use_cpu", "False")


def test_fsdp_that_accelerate_leaves_aside_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(finetune.Problem, match=r"FSDP was asked for.*\(device cpu, processes: 1\)"):
        tune(tiny, tmp_path)


def test_a_folder_that_is_no_checkpoint_is_said_at_once(tmp_path, capsys, monkeypatch):
    for name, message in (("nope", "There is no folder nope."), (str(tmp_path), "has no config.json")):
        with pytest.raises(finetune.Problem, match=message):
            tune(name, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["compare_answers.py", str(ROOT / "demo"), "nope", "x"])
    assert compare_answers.main() == 2
    assert capsys.readouterr().err == "problem: There is no folder nope.\n"


@pytest.mark.parametrize("size", [1_000, 50_000, 150_000])
def test_a_disk_that_is_full_is_said_with_the_folder(tiny, tmp_path, size):
    """While a text, the adapter or the optimiser's state is written: no file may be larger here."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(finetune.Problem, match=r"out can't be written to \(.*Free some space"):
            tune(tiny, tmp_path / "out", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", *LORA_16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            KeyboardInterrupt(),
            130,
            "interrupted: --resume_from_checkpoint auto goes on from the last complete checkpoint",
        ),
        (SafetensorError("No space left on device"), 2, "problem: No space left on device"),
    ],
)
def test_what_stops_a_run_is_a_line_and_not_a_traceback(tiny, tmp_path, capsys, monkeypatch, error, status, line):
    monkeypatch.setattr(finetune, "load_data", mock.Mock(side_effect=error))
    arguments = ["--model_name_or_path", str(tiny), "--output_dir", str(tmp_path), "--use_cpu", "True"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments, "--data_path", DATA])
    assert finetune.main() == status
    assert line in "".join(capsys.readouterr())


def test_a_problem_is_a_line_and_not_a_traceback(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "data.json").write_text("[]")
    arguments = ["--model_name_or_path", str(tiny), "--output_dir", str(tmp_path / "out"), "--use_cpu", "True"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments, "--data_path", str(tmp_path / "data.json")])
    assert finetune.main() == 2
    assert capsys.readouterr().err.startswith("problem: ")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--no_such_argument", "--no_such_argument"),
        pytest.param(
            "--deepspeed",
            "DeepSpeed is not installed. pip install -r requirements-finetune-all.txt",
            marks=pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is there"),
        ),
        pytest.param(
            "--bf16",
            "No GPU was found; to train on a CPU pass --use_cpu True --bf16 False.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_arguments_that_cannot_be_are_a_line_and_not_a_traceback(tmp_path, capsys, monkeypatch, argument, message):
    monkeypatch.setattr(
        sys, "argv", ["finetune.py", "--data_path", DATA, "--output_dir", str(tmp_path), argument, "True"]
    )
    assert finetune.main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("problem: ")]
    assert message in line


def test_what_is_cut_and_left_out_is_said(tiny, tmp_path, capsys):
    short, long = ("word " * n for n in (1, 400))
    records = [
        {"conversations": [{"from": "user", "value": text}, {"from": "assistant", "value": "a"}]}
        for text in (short, long)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    tune(
        tiny, tmp_path / "out", "--data_path", str(tmp_path / "data.json"), "--train_on", "answers", "--max_steps", "1"
    )
    output = capsys.readouterr().out
    assert "1 of 2 conversations are longer than 128 tokens and were cut off: no. 2" in output
    assert "1 of 2 conversations had nothing left to learn then and were left out: no. 2" in output


def test_packed_examples_take_fewer_steps(tiny, tmp_path):
    alone = tune(tiny, tmp_path / "a", "--num_train_epochs", "1", "--max_steps", "1")
    packed = tune(tiny, tmp_path / "b", "--num_train_epochs", "1", "--max_steps", "1", "--packing", "True")
    assert len(packed.train_dataset) < 0.6 * len(alone.train_dataset)
    assert losses(tmp_path / "b")[0] == pytest.approx(losses(tmp_path / "a")[0], abs=0.1)


def test_adapter_over_a_frozen_base_with_checkpointing_is_the_same(tiny, tmp_path):
    steps = ["--max_steps", "3", "--lora_dropout", "0", *LORA]
    tune(tiny, tmp_path / "a", *steps)
    tune(tiny, tmp_path / "b", *steps, "--gradient_checkpointing", "True")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


@pytest.mark.parametrize("script", sorted(path.name for path in FINETUNE.glob("finetune_*.sh")))
def test_scripts_start_the_program_with_arguments_that_it_knows(tiny, script, tmp_path):
    command = ["bash", str(FINETUNE / script), "-m", str(tiny), "-d", DATA, "--num_train_epochs", "1"]
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\ncase "$1" in -c) echo 2;; *) for a in "$@"; do echo "$a"; done;; esac\n')
    recorder.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(recorder)}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    words = done.stdout.splitlines()
    arguments = words[words.index(str(FINETUNE / "finetune.py")) + 1 :]
    for name in ("--bf16", "--fp16"):  # not on this machine
        if name in arguments:
            arguments[arguments.index(name) + 1] = "False"
    if "--deepspeed" in arguments:
        at = arguments.index("--deepspeed")
        assert json.loads(Path(arguments[at + 1]).read_text())["zero_optimization"]["stage"] in (2, 3)
        del arguments[at : at + 2]
    _, _, training, lora = finetune.parse([*arguments, "--use_cpu", "True", "--report_to", "none"])
    assert training.num_train_epochs == 1
    assert training.use_lora == ("lora" in script)
    assert lora.q_lora == ("qlora" in script)
    assert ("--nproc_per_node" in words or "--num_processes" in words) == ("single" not in script)


@pytest.mark.parametrize("words", [["-d", DATA, "-m"], ["-m", "-d", DATA], ["--model", "", "-d", DATA]])
def test_an_option_of_the_scripts_without_its_value_is_said(words):
    command = ["bash", str(FINETUNE / "finetune_lora_single_gpu.sh"), *words]
    done = subprocess.run(command, env={**os.environ, "PYTHON": "true"}, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert re.match(r"-(m|-model) needs a value: bash \S+ -m MODEL -d DATA.json\n$", done.stderr)


# Q-LoRA


@pytest.mark.parametrize(
    "change", [{"int8_weights": True}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}]
)
def test_full_tuning_of_a_quantised_checkpoint_is_refused(tiny, tmp_path, change):
    shutil.copytree(tiny, tmp_path / "quantised")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "quantised" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(finetune.Problem, match=r"quantised is quantised.*--use_lora.*full precision"):
        tune(tmp_path / "quantised", tmp_path / "out")


def test_a_matrix_in_full_precision_is_refused(tiny):
    with pytest.raises(finetune.Problem, match="10 matrices of the blocks are in full precision"):
        finetune.check_quantized(loaded(tiny))


def test_q_lora_with_bitsandbytes(tiny, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    trainer = tune(tiny, tmp_path / "adapter", "--max_steps", "8", *LORA, "--q_lora", "--bf16", "True")
    base = trainer.model.get_base_model()
    matrices = [m for m in base.transformer.h.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(matrices) == 10
    found = losses(tmp_path / "adapter")
    assert found[-1] < found[0] - 0.1
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(tiny)]) == 0
    assert not torch.equal(logits(loaded(tmp_path / "merged")), logits(loaded(tiny)))


def test_an_optimiser_whose_moments_are_in_8_bits(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    steps = ["--max_steps", "8", "--learning_rate", "5e-3"]
    optimizer = tune(tiny, tmp_path / "8", *steps, "--optim", "adamw_8bit").optimizer.optimizer
    tune(tiny, tmp_path / "32", *steps)
    assert losses(tmp_path / "8") == pytest.approx(losses(tmp_path / "32"), abs=0.02)
    moments = [state["state1"] for state in optimizer.state.values() if state["state1"].dim() > 1]
    small = [moment for moment in moments if moment.dtype == torch.uint8]
    assert (len(small), len(moments)) == (2 * 5 + 1, 2 * 5 + 2)  # all but the embedding's


def stored(folder: Path) -> dict:
    """All tensors of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def demo_int4(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "demo-Int4"
    arguments = ["--bits", "4", "--method", "rtn", "--group-size", "32", "--device", "cpu"]
    assert quantize_weights.main([str(ROOT / "demo"), str(folder), *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def demo_dequantised(demo_int4) -> Path:
    """The checkpoint in full precision that the codes of `demo_int4` stand for."""
    folder = copy_demo(demo_int4.parent / "dequantised")
    tensors, weights = stored(demo_int4), {}
    for name in load_file(ROOT / "demo" / "model.safetensors"):
        if name in tensors:
            weights[name] = tensors[name]
        else:
            matrix = name[: -len("weight")]
            parts = {part: tensors[matrix + part] for part in ("qweight", "qzeros", "scales", "g_idx")}
            weights[name] = gptq.dequantized(parts, 4).contiguous()
    save_file(weights, folder / "model.safetensors")
    return folder


def test_q_lora_over_int4_learns_as_over_the_weights_that_the_codes_stand_for(demo_int4, demo_dequantised, tmp_path):
    steps = ["--max_steps", "8", *LORA, "--lora_dropout", "0"]
    over_codes = tune(demo_int4, tmp_path / "codes", *steps, "--q_lora")
    over_weights = tune(demo_dequantised, tmp_path / "weights", *steps)
    found = losses(tmp_path / "codes")
    assert sum(found[-3:]) < 0.6 * sum(found[:3])
    assert found == pytest.approx(losses(tmp_path / "weights"), rel=1e-3)

    adapter = {name: p for name, p in over_codes.model.named_parameters() if p.requires_grad}
    others = {name: p for name, p in over_weights.model.named_parameters() if p.requires_grad}
    assert len(adapter) == 2 * 20
    assert adapter.keys() == others.keys()
    batch = over_codes.data_collator([over_codes.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        for name, parameter in adapter.items():
            others[name].copy_(parameter)
    for trainer in (over_codes, over_weights):
        trainer.model.zero_grad()
        trainer.model(**batch).loss.backward()
    for name, parameter in adapter.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6)


def test_what_q_lora_over_int4_holds(demo_int4, tmp_path):
    """Codes in place of all matrices of the blocks, as they are in the file after training too."""
    model = tune(demo_int4, tmp_path / "adapter", "--max_steps", "1", *LORA, "--q_lora").model.get_base_model()
    tensors = stored(demo_int4)
    matrices = {name: m.base_layer for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert len(matrices) == 20
    for name, matrix in matrices.items():
        assert torch.equal(matrix.qweight, tensors[f"{name}.qweight"])
        held = [*matrix.parameters(), *matrix.buffers(), *(v for v in vars(matrix).values() if torch.is_tensor(v))]
        numbers = sum(tensor.numel() for tensor in held if tensor.is_floating_point())
        assert numbers < matrix.in_features * matrix.out_features / 16


def test_codes_do_not_learn_whole(demo_int4, tmp_path):
    with pytest.raises(finetune.Problem, match="c_attn is quantised here"):
        tune(demo_int4, tmp_path, *LORA, "--q_lora", "--lora_modules_to_save", "wte", "attn.c_attn")


# Resuming


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_weights(tiny, tmp_path):
    """For more steps and kills run killing.py by hand."""
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(tiny), str(tmp_path), "24", "3", "3", "1"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
    assert len(json.loads(done.stdout)) == 3
    undisturbed, killed = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("undisturbed", "killed"))
    assert all(torch.equal(weight, killed[name]) for name, weight in undisturbed.items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")


def test_unfinished_checkpoints_are_passed_over_and_finished_ones_not_overwritten(tiny, tmp_path):
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"half'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert [path.name for path in finetune.complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    with pytest.raises(finetune.Problem, match="to checkpoint-10"):
        tune(tiny, tmp_path)
    _, _, training, _ = finetune.parse(
        ["--data_path", DATA, "--output_dir", str(tmp_path), "--use_cpu", "True", "--resume_from_checkpoint", "auto"]
    )
    assert finetune.checkpoint_to_resume(training) == str(tmp_path / "checkpoint-10")


def test_a_run_goes_on_only_as_it_was_begun(tiny, tmp_path):
    """transformers would go on with another adapter's scale, other data and the old learning rate, without a word."""
    begun = [*LORA, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    tune(tiny, tmp_path, *begun)
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = [*begun, "--resume_from_checkpoint", "auto"]
    with pytest.raises(finetune.Problem, match=r"checkpoint-1 was begun otherwise: lora_alpha was 16 and is 64; lea"):
        tune(tiny, tmp_path, *again, "--lora_alpha", "64", "--learning_rate", "1e-3")
    (tmp_path / "data.json").write_text(Path(DATA).read_text() + " ")
    with pytest.raises(finetune.Problem, match=r"otherwise: data_path was"):
        tune(tiny, tmp_path, *again, "--data_path", str(tmp_path / "data.json"))
    assert tune(tiny, tmp_path, *again, "--num_train_epochs", "9").state.global_step == 2


def test_an_adapter_and_a_checkpoint_share_no_folder(tiny, tmp_path):
    """What is loaded from such a folder is neither."""
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(finetune.Problem, match="holds an adapter already"):
        tune(tiny, tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(finetune.Problem, match="holds a checkpoint already"):
        tune(tiny, tmp_path, *LORA)
    with pytest.raises(finetune.Problem, match="is the folder of the model"):
        tune(tiny, tiny)


# Several processes

BY_LORA = ["--use_lora", "True", "--lora_dropout", "0"]


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory) -> dict[str, list[float]]:
    output = tmp_path_factory.mktemp("one")
    tune(tiny, output / "whole", "--max_steps", "3", "--learning_rate", "1e-3")
    tune(tiny, output / "adapter", "--max_steps", "3", "--learning_rate", "1e-3", *BY_LORA)
    return {way: losses(output / way) for way in ("whole", "adapter")}


TWO = ["--model_name_or_path", "{tiny}", *QUICK, "--per_device_train_batch_size", "2", "--max_steps", "3"]
TWO += ["--learning_rate", "1e-3", "--output_dir", "{output}"]


ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--config_file", str(FINETUNE / "fsdp2.yaml")]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2, adapter", "zero2", "zero3"])
def test_two_processes_learn_what_one_learns(tiny, tmp_path, one_process, way):
    launcher, program = TORCHRUN, FINETUNE / "finetune.py"
    arguments = [argument.format(tiny=tiny, output=tmp_path / "out") for argument in TWO]
    if way.startswith("fsdp2"):
        if Version(torch.__version__) < Version("2.9"):
            pytest.skip("needs FSDP2 that averages over gloo, which torch 2.8 does not")
        launcher, program = ACCELERATE, ROOT / "tests" / "fsdp_on_cpu.py"
        arguments += BY_LORA if "adapter" in way else []
    elif way != "ddp":
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("needs deepspeed")
        arguments += ["--deepspeed", str(FINETUNE / f"ds_config_{way}.json")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    port_argument = "--main_process_port" if launcher is ACCELERATE else "--master_port"
    command = [sys.executable, "-m", *launcher, port_argument, port, str(program), *arguments]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    expected = one_process["adapter" if "adapter" in way else "whole"]
    assert losses(tmp_path / "out") == pytest.approx(expected, abs=1e-4)
    assert loaded(tmp_path / "out") is not None


def test_fsdp_in_half_precision_leaves_rotations_in_float32(monkeypatch):
    """FSDP2 rounds what a block is called with; with gradient checkpointing older PyTorch then ended in an error."""
    if Version(torch.__version__) < Version("2.6"):
        pytest.skip("needs FSDP2's present names")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, seen = tiny_model(num_hidden_layers=2, use_logn_attn=True), []
    modeling = importlib.import_module("qwen.modeling_qwen")
    apply_rotary = modeling.apply_rotary
    monkeypatch.setattr(
        modeling, "apply_rotary", lambda x, *angles: seen.append((x, *angles)) or apply_rotary(x, *angles)
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in (*model.transformer.h, model):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        units = {name for name, module in model.named_modules() if compat.is_fsdp_unit(module)}
        assert units == {"", "transformer.h.0", "transformer.h.1"}
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = random_ids(2, 9)
        model(ids, labels=ids).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(seen) == 2 * 2 * 2  # queries and keys of both blocks, twice
    for x, cos, sin in seen:
        assert (x.dtype, cos.dtype, sin.dtype) == (torch.bfloat16, torch.float32, torch.float32)


# Facts


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """The demo's checkpoint and what `make finetune` makes of it; .ci/run names what it has just made."""
    if "QWEN_TUNED" in os.environ:
        return Path(os.environ["QWEN_TUNED"])
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nfinetune:")[1].split("\n\n")[0]
    command = re.search(
        r"\$\(PY\) (finetune/finetune.py .*?)\n\t\$\(PY\)", lines.replace("\\\n", " "), re.DOTALL
    ).group(1)
    output = tmp_path_factory.mktemp("taught") / "adapter"
    arguments = shlex.split(command)
    arguments[arguments.index("--output_dir") + 1] = str(output)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_lora_learns_twenty_facts_and_keeps_what_it_knew(taught):
    corpus, evaluate, example = (importlib.import_module(name) for name in ("corpus", "evaluate", "make_example"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo", trust_remote_code=True)
    new = example.questions(example.HELD_OUT)
    known = [dialogue.turns[-1] for dialogue in random.Random(2).sample(corpus.chat_cases(3, False), 200)]
    prompts = [make_context(tokenizer, turn.query, None, corpus.DEFAULT_SYSTEM)[1] for turn in new + known]

    def right(path) -> list[bool]:
        answers = evaluate.generate(loaded(path), tokenizer, prompts, max_new_tokens=24)
        return [corpus.is_correct(turn, answer) for turn, answer in zip(new + known, answers)]

    before, after = right(ROOT / "demo"), right(str(taught))
    assert sum(before[: len(new)]) == 0
    facts = [all(after[i : i + 2]) for i in range(0, len(new), 2)]  # each is asked for in two ways
    assert len(facts) == 20
    assert sum(facts) >= 18
    kept = [now for was, now in zip(before[len(new) :], after[len(new) :]) if was]
    assert sum(kept) >= 0.95 * len(kept)


def test_the_example_is_what_its_program_writes():
    example = importlib.import_module("make_example")
    assert json.loads(Path(DATA).read_text(encoding="utf-8")) == example.example()


@pytest.mark.parametrize("name", ["finetuning", "finetuning_zh"])
def test_snippets_of_the_pages(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if '"demo"' in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, f"{name}.md", "exec"), {})
        promised = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.parametrize("name", ["finetuning", "finetuning_zh"])
def test_the_pages_say_the_defaults_of_the_scripts(name):
    script = (FINETUNE / "common.sh").read_text(encoding="utf-8")

    def of(option: str) -> list[str]:
        return re.findall(rf"--{option} ([\d.e-]+)", script)

    batches, steps = of("per_device_train_batch_size"), of("gradient_accumulation_steps")
    (size,) = {int(batch) * int(step) for batch, step in zip(batches, steps)}
    rate, rate_of_all = of("learning_rate")  # of adapters, of all weights
    rank = finetune.LoraArguments.lora_r
    said = [*of("num_train_epochs"), *of("model_max_length"), str(size), rate, str(rank), rate_of_all]
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    bullet = re.search(r"^- \*\*(?:Arguments\.|参数。)\*\*(.*?)`-m`", page, re.MULTILINE | re.DOTALL).group(1)
    assert re.findall(r"\d+e-\d|\d+", bullet) == said


def test_compare_says_that_all_answers_are_the_same(monkeypatch, capsys):
    """In words too: a terminal does not show the exit status."""
    monkeypatch.setattr(compare_answers.checkpoint_files, "check_loadable", lambda path, adapters: None)
    for tuned, status in (("one", 1), ("two", 0)):
        monkeypatch.setattr(compare_answers, "answers", lambda path, questions: [path for _ in questions])
        monkeypatch.setattr(sys, "argv", ["compare_answers.py", "one", tuned, "Which?", "Who?"])
        assert compare_answers.main() == status
        assert ("All answers are the same" in capsys.readouterr().out) == bool(status)
    monkeypatch.setattr(sys, "argv", ["compare_answers.py", "--help"])
    with pytest.raises(SystemExit):
        compare_answers.main()
    assert "Exit status: 0 if an answer changed, 1 if all answers are the same" in " ".join(
        capsys.readouterr().out.split()
    )
