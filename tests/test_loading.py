"""Checkpoints: the round trip of code, weights and vocabulary, precision, damaged weights, memory."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from conftest import (
    CODE,
    ROOT,
    compat,
    lacks,
    modeling_qwen,
    python,
    qwen_loading,
    random_ids,
    run,
    sampled,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

QWenLMHeadModel = modeling_qwen.QWenLMHeadModel


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as a user has it: our files beside a small random model's weights, and a vocabulary."""
    folder = tmp_path / "checkpoint"
    tiny_model(vocab_size=4096).save_pretrained(folder)
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    for name in ("tokenizer_config.json", "qwen.tiktoken"):
        shutil.copy(ROOT / "demo" / name, folder)
    edit(folder, auto_map=json.loads((ROOT / "config.json").read_text())["auto_map"])
    return folder


def edit(folder: Path, **changes):
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def test_auto_classes(checkpoint):
    ids = random_ids(1, 10)
    model = load(checkpoint, fp32=True)
    assert type(AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)).__name__ == "QWenConfig"
    base = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, fp32=True)
    assert type(base).__name__ == "QWenModel"
    assert not model.training
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(model.lm_head(base(ids).last_hidden_state), logits)
        torch.testing.assert_close(tiny_model(vocab_size=4096)(ids).logits, logits)


def test_a_generation_configuration_that_is_no_json_is_named(checkpoint):
    """transformers would load the model without it, and a chat model would be taken for a base model."""
    (checkpoint / "generation_config.json").write_text('{"chat_format": ')
    with pytest.raises(OSError, match=r"generation_config\.json"):
        load(checkpoint)


def test_saved_folder_loads_in_a_fresh_process_elsewhere(checkpoint, tmp_path):
    model = load(checkpoint, fp32=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    for name in CODE:
        assert (saved / name).read_text() == (ROOT / name).read_text()
    shutil.rmtree(checkpoint)  # nothing may still come from there
    ids = tokenizer("法国的首都是")["input_ids"]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(saved)!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({str(saved)!r}, trust_remote_code=True)
ids = tokenizer("法国的首都是", return_tensors="pt")
print(model.dtype, model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist())
"""
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert run(code, other, HF_MODULES_CACHE=str(tmp_path / "modules")) == f"torch.float32 {expected}"


def test_import_touches_no_device_and_no_network(checkpoint, tmp_path):
    code = f"""
import socket, torch, transformers.modeling_utils  # what transformers itself looks at is not ours
def refuse(*a, **k): raise AssertionError("touched")
socket.socket.connect = refuse
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
from transformers.dynamic_module_utils import get_class_from_dynamic_module
for name in ("modeling_qwen.QWenLMHeadModel", "tokenization_qwen.QWenTokenizer"):
    print(get_class_from_dynamic_module(name, {str(checkpoint)!r}).__name__)
print(torch.get_default_dtype())
"""
    output = run(code, tmp_path, fresh=True, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert output.split() == ["QWenLMHeadModel", "QWenTokenizer", "torch.float32"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"bf16": True}, torch.bfloat16),
        ({"fp16": True}, torch.float16),
        ({"fp32": True}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"dtype": "auto"}, torch.float32),  # that of the weights
        ({"bf16": True, "dtype": "auto"}, torch.bfloat16),
        ({"bf16": True, "torch_dtype": torch.bfloat16}, torch.bfloat16),
    ],
    ids=str,
)
def test_precision_by_every_route(checkpoint, arguments, expected):
    ours = QWenLMHeadModel.from_pretrained(checkpoint, **arguments)
    auto = load(checkpoint, **arguments)
    for model in (ours, auto):
        assert {p.dtype for p in model.parameters()} == {expected}
    if "bf16" in arguments:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True, bf16=True)
        assert AutoModelForCausalLM.from_config(config, trust_remote_code=True).dtype == torch.bfloat16


def test_automatic_precision(checkpoint, monkeypatch):
    """Of a CPU with and without instructions for bfloat16."""
    assert load(checkpoint).dtype == torch.float32  # config.json says so
    for names in ({"dtype": None, "torch_dtype": None}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}):
        edit(checkpoint, **names)
        for supported in (True, False):
            check = "_is_mkldnn_bf16_supported"
            monkeypatch.setattr(torch.ops.mkldnn, check, lambda supported=supported: supported, raising=False)
            assert load(checkpoint).dtype == torch.bfloat16
            assert load(checkpoint, device_map="cpu").dtype == torch.bfloat16


def test_the_class_itself_takes_an_argument_of_auto_classes_without_a_warning(checkpoint, monkeypatch):
    """As `transformers serve` passes it to every class."""
    warnings = []
    monkeypatch.setattr(transformers_logging.get_logger("transformers.configuration_utils"), "warning", warnings.append)
    QWenLMHeadModel.from_pretrained(checkpoint, trust_remote_code=True)
    assert warnings == []


def test_contradictions_in_precision(checkpoint):
    with pytest.raises(ValueError, match="found bf16 and fp16"):
        load(checkpoint, bf16=True, fp16=True)
    with pytest.raises(ValueError, match=r"bf16=True contradicts dtype=torch.float16"):
        load(checkpoint, bf16=True, dtype=torch.float16)
    with pytest.raises(ValueError, match="'bfloat' is not a torch data type"):
        QWenLMHeadModel.from_pretrained(checkpoint, dtype="bfloat")
    for name in ("dtype", "torch_dtype"):
        with pytest.raises(ValueError, match=r"'bf16' is not a torch data type; pass .*dtype='bfloat16', or bf16=True"):
            load(checkpoint, **{name: "bf16"})


def test_a_saved_precision_does_not_stand_in_the_way(checkpoint, tmp_path):
    edit(checkpoint, bf16=True)  # as published code leaves it
    for arguments, expected in (
        ({}, torch.bfloat16),
        ({"fp32": True}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
    ):
        assert load(checkpoint, **arguments).dtype == expected
        assert QWenLMHeadModel.from_pretrained(checkpoint, **arguments).dtype == expected
    model = load(checkpoint).float()
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").dtype == torch.float32
    assert load(tmp_path / "saved", bf16=True).dtype == torch.bfloat16


def test_a_precision_that_the_device_lacks(checkpoint, monkeypatch, caplog):
    def supported(name: str, value: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: value, raising=False)

    transformers_logging.warning_once.cache_clear()
    supported("bf16", True)
    supported("fp16", False)
    load(checkpoint, bf16=True)
    load(checkpoint, fp32=True)
    assert "has no instructions" not in caplog.text
    for _ in range(2):
        load(checkpoint, fp16=True)
    message = "This CPU has no instructions for torch.float16, which will be slow. Faster is bf16=True or fp32=True."
    assert caplog.text.count(message) == 1
    supported("bf16", False)  # of which products are float32's then
    load(checkpoint, dtype=torch.bfloat16)
    assert "torch.bfloat16" not in caplog.text


@pytest.mark.parametrize(("dtype", "slow"), [(torch.float16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_a_precision_that_a_gpu_lacks(monkeypatch, caplog, dtype, slow):
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An old GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    QWenLMHeadModel._warn_of_precision(dtype, on_accelerator=True)
    message = "An old GPU has no instructions for torch.bfloat16, which will be slow. Faster is fp16=True or fp32=True."
    assert caplog.text.count(message) == slow
    assert bool(caplog.text) == slow


def test_flash_attention_asked_for_but_not_there(checkpoint):
    there = importlib.util.find_spec("flash_attn") is not None
    if there or torch.cuda.is_available():
        pytest.skip("something of what is to be missing is there")
    with pytest.raises(ImportError, match=r"needs the package flash-attn .* and a GPU and half precision"):
        load(checkpoint, use_flash_attn=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "automatic"),
        ({"use_flash_attn": "auto"}, "automatic"),
        ({"use_flash_attn": False}, "automatic"),
        ({"attn_implementation": "eager"}, "eager"),
        ({"use_flash_attn": False, "attn_implementation": "eager"}, "eager"),
        ({"use_flash_attn": "auto", "attn_implementation": "eager"}, "eager"),
    ],
    ids=str,
)
def test_attention_by_every_route(checkpoint, arguments, expected, caplog):
    if expected == "automatic":
        expected = "sdpa" if compat.HAS_SDPA else "eager"
    caplog.set_level("INFO", "transformers")
    model = load(checkpoint, **arguments)
    assert model.config._attn_implementation == expected
    lines = [record.message for record in caplog.records if "attention by" in record.message]
    assert len(lines) == 1
    assert f"attention by {expected}" in lines[0]


def test_a_named_attention_overrules_the_saved_flag(checkpoint):
    edit(checkpoint, use_flash_attn=True)
    if not torch.cuda.is_available():
        with pytest.raises(ImportError, match="use_flash_attn=True needs"):
            load(checkpoint)
    assert load(checkpoint, attn_implementation="eager").config._attn_implementation == "eager"


def test_flash_attention_that_mixes_up_rows_is_refused(checkpoint, monkeypatch):
    """As transformers 4.54 has it; by every way to ask for it."""
    config = tiny_config()
    assert (version("transformers").startswith("4.54.")) == compat.FLASH_MIXES_ROWS
    monkeypatch.setattr(compat, "FLASH_MIXES_ROWS", True)
    monkeypatch.setattr(qwen_loading, "FLASH_MIXES_ROWS", True)
    assert any("another release of transformers" in what for what in qwen_loading.flash_attention_lacks(torch.float16))
    with pytest.raises(ImportError, match="mixes up the rows of a batch"):
        QWenLMHeadModel.from_pretrained(checkpoint, attn_implementation="flash_attention_2", bf16=True)
    compat.set_attention(config, {}, "sdpa")


def test_contradictions_in_attention(checkpoint):
    with pytest.raises(ValueError, match="use_flash_attn=True contradicts attn_implementation='sdpa'"):
        load(checkpoint, use_flash_attn=True, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="use_flash_attn=False contradicts attn_implementation='flash_attention_2'"):
        load(checkpoint, use_flash_attn=False, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="must be 'auto', true or false, found 'yes'"):
        load(checkpoint, use_flash_attn="yes")


def change_weights(folder: Path, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight(checkpoint):
    change_weights(checkpoint, lambda weights: weights.pop("transformer.h.1.mlp.w2.weight"))
    with pytest.raises(
        RuntimeError, match=r"1 weights missing from it \(transformer.h.1.mlp.w2.weight\).*strict=False"
    ):
        load(checkpoint)
    assert load(checkpoint, strict=False).transformer.h[1].mlp.w2.weight.std() > 0


def test_unexpected_weights(checkpoint):
    change_weights(checkpoint, lambda weights: weights.update({"transformer.h.0.mlp.w1.bias": torch.zeros(96)}))
    with pytest.raises(RuntimeError, match=r"1 weights in it without a place .*mlp.w1.bias.*no_bias"):
        load(checkpoint)
    load(checkpoint, strict=False)


def test_fewer_layers_than_the_checkpoint_has(checkpoint):
    with pytest.raises(RuntimeError, match="num_hidden_layers"):
        load(checkpoint, num_hidden_layers=2)
    assert len(load(checkpoint, num_hidden_layers=2, strict=False).transformer.h) == 2


def test_weights_of_other_projects_and_old_tables_are_left_alone(checkpoint):
    more = {"v_head.weight": torch.zeros(1), "transformer.rotary_emb.inv_freq": torch.zeros(8)}
    change_weights(checkpoint, lambda weights: weights.update(more))
    load(checkpoint)


def test_a_truncated_weight_file(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)incomplete|corrupt|invalid|header"):
        load(checkpoint)


def test_loading_information(checkpoint):
    model, info = load(checkpoint, output_loading_info=True)
    assert type(model).__name__ == "QWenLMHeadModel"
    assert not info["missing_keys"]
    assert type(info["missing_keys"]) is type(info["unexpected_keys"])  # as transformers has it
    change_weights(checkpoint, lambda weights: weights.pop("lm_head.weight"))
    assert set(load(checkpoint, output_loading_info=True)[1]["missing_keys"]) == {"lm_head.weight"}


def test_weights_given_as_a_state_dict_keep_their_precision():
    model = tiny_model()
    for dtype in (torch.float32, torch.bfloat16):
        state = {name: p.to(dtype) for name, p in model.state_dict().items()}
        loaded = QWenLMHeadModel.from_pretrained(None, config=tiny_config(), state_dict=state)
        assert loaded.dtype == dtype


def sparse_safetensors(path: Path, shapes: dict[str, torch.Size]) -> int:
    """A bf16 safetensors file of zeros that takes no space on disk; returns the bytes of its tensors."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


MEASURE = """
import sys, threading, torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
def held():  # memory of this process that is not merely a view of the file
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
get_class_from_dynamic_module("modeling_qwen.QWenLMHeadModel", sys.argv[1])  # imports are not counted
before, peak, done = held(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())
thread = threading.Thread(target=watch, daemon=True)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **eval(sys.argv[2]))
for p in model.parameters():
    p.view(torch.uint8).view(-1)[::4096].sum()  # a byte of every page: whatever is loaded lazily is loaded now
done.set()
thread.join()
print({p.dtype for p in model.parameters()} == {torch.bfloat16}, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("arguments", sampled([{"device_map": "auto", "bf16": True}, {"bf16": True}]), ids=str)
def test_a_bf16_checkpoint_never_passes_through_float32(tmp_path, arguments):
    """Eight blocks of Qwen-1.8B: the peak is at most 1.15 times the weights, plus what a file view may hold."""
    config = tiny_config(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=8, num_attention_heads=16, kv_channels=128,
        intermediate_size=11008, seq_length=8192, max_position_embeddings=8192,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    edit(tmp_path, auto_map=json.loads((ROOT / "config.json").read_text())["auto_map"])
    for name in CODE:
        shutil.copy(ROOT / name, tmp_path)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in QWenLMHeadModel(config).named_parameters()}
    size = sparse_safetensors(tmp_path / "model.safetensors", shapes)
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = subprocess.run(
        [*python(), "-W", "ignore", script, tmp_path, repr(arguments)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    in_bf16, peak = done.stdout.split()
    assert in_bf16 == "True"
    assert int(peak) <= 1.15 * size, f"peak {int(peak) / size:.2f} times the weights"


def test_arguments_that_transformers_dropped_are_taken(checkpoint):
    assert load(checkpoint, resume_download=True, fp32=True).dtype == torch.float32


def test_a_precision_beside_a_configuration_with_a_flag_wins(checkpoint):
    config = modeling_qwen.QWenConfig.from_pretrained(checkpoint, bf16=True)
    load_class = QWenLMHeadModel.from_pretrained
    assert load_class(checkpoint, config=config, **{compat.DTYPE: torch.float32}).dtype == torch.float32
    assert config.bf16
    assert load_class(checkpoint, config=config).dtype == torch.bfloat16


def test_values_beside_a_configuration_replace_its_own(checkpoint):
    """That of AutoConfig, too, whose class transformers may have from another copy of the code."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True, bf16=True)
    own = modeling_qwen.QWenConfig.from_pretrained(checkpoint, bf16=True)
    for given, from_pretrained in ((config, load), (own, QWenLMHeadModel.from_pretrained)):
        model = from_pretrained(checkpoint, config=given, fp32=True, use_cache_quantization=True)
        assert (model.dtype, model.config.use_cache_quantization) == (torch.float32, True)
        assert (given.bf16, given.fp32, given.use_cache_quantization) == (True, False, False)
        assert from_pretrained(checkpoint, config=given, **{compat.DTYPE: torch.float32}).dtype == torch.float32
        with pytest.raises(ValueError, match=r"fp16=True contradicts dtype=torch\.float32"):
            from_pretrained(checkpoint, config=given, fp16=True, **{compat.DTYPE: torch.float32})
        with pytest.raises(ValueError, match="cache_bits must be 8 or 4, found 2"):
            from_pretrained(checkpoint, config=given, cache_bits=2)


def test_a_dictionary_of_precisions(checkpoint):
    if compat.masking_utils is None or compat.DTYPE != "dtype":
        lacks("takes no dictionary of precisions")
    assert load(checkpoint, dtype={"": torch.float16}).dtype == torch.float16


def test_half_precision_where_accelerate_places_a_model_on_a_mac(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there in (False, True):
        monkeypatch.setattr(qwen_loading, "has_mps", lambda there=there: there)
        for device_map in ("auto", None):
            assert qwen_loading._goes_to_accelerator(device_map) is there
        assert qwen_loading._goes_to_accelerator("mps")
        assert not qwen_loading._goes_to_accelerator("cpu")


def test_the_source_is_saved_by_the_main_process_only(tmp_path):
    """The others would write the same file at the same time."""
    for is_main in (False, True):
        tiny_model().save_pretrained(tmp_path, is_main_process=is_main)
        assert (tmp_path / "cpp_kernels.cpp").exists() == is_main


def test_the_folder_of_an_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base", "peft_type": "LORA"}))
    with pytest.raises(ValueError, match=r"holds an adapter, and no model\. .*AutoModelForCausalLM"):
        modeling_qwen.QWenLMHeadModel.from_pretrained(tmp_path)
