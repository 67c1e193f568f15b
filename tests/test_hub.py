"""Checkpoints in a hub cache, code and weights in two repositories, adapters of peft: what stands beside what."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from conftest import CODE, ROOT, publish, random_ids, run, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

TOKENIZER = ("tokenizer_config.json", "qwen.tiktoken")
REMOTE = {"trust_remote_code": True, "local_files_only": True}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hub"


def upload(cache, tmp_path, repository: str, seed: int = 0, revision: str = "main", code_in: str | None = None):
    """Publish a small model and a tokenizer; their code beside them, or in the repository `code_in`."""
    folder = tmp_path / f"{seed}"
    tiny_model(seed, vocab_size=4096).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(ROOT / "demo" / name, folder)
    for name in CODE if code_in else ():
        (folder / name).unlink(missing_ok=True)
    if code_in:
        for name in ("config.json", "tokenizer_config.json"):
            text = (folder / name).read_text()
            for module in ("configuration_qwen", "modeling_qwen", "tokenization_qwen"):
                text = text.replace(f'"{module}.', f'"{code_in}--{module}.')
            (folder / name).write_text(text)
    else:
        shutil.copy(ROOT / "tokenization_qwen.py", folder)
    return publish(cache, repository, {path.name: path for path in folder.iterdir()}, revision)


def logits(model):
    with torch.no_grad():
        return model.float()(random_ids(1, 10)).logits


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_by_repository_and_revision(cache, tmp_path, revision):
    upload(cache, tmp_path, "me/qwen", seed=0)
    upload(cache, tmp_path, "me/qwen", seed=1, revision="v2")
    model = AutoModelForCausalLM.from_pretrained("me/qwen", cache_dir=cache, revision=revision, **REMOTE)
    expected = tiny_model({"main": 0, "v2": 1}[revision], vocab_size=4096)
    torch.testing.assert_close(logits(model), logits(expected))
    base = AutoModel.from_pretrained("me/qwen", cache_dir=cache, revision=revision, **REMOTE)
    assert type(base).__name__ == "QWenModel"
    tokenizer = AutoTokenizer.from_pretrained("me/qwen", cache_dir=cache, revision=revision, **REMOTE)
    assert tokenizer.decode(tokenizer.encode("你好")) == "你好"


def test_code_and_weights_in_two_repositories(cache, tmp_path):
    """`auto_map` names the code's repository; `code_revision` its branch: on main there lies code that fails."""
    upload(cache, tmp_path, "me/weights", code_in="me/code")
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('the code of main')")
    publish(cache, "me/code", {name: broken for name in CODE})
    publish(cache, "me/code", {name: ROOT / name for name in CODE}, "works")
    with pytest.raises(RuntimeError, match="the code of main"):
        AutoModelForCausalLM.from_pretrained("me/weights", cache_dir=cache, **REMOTE)
    where = {"cache_dir": cache, "code_revision": "works", **REMOTE}
    config = AutoConfig.from_pretrained("me/weights", **where)
    tokenizer = AutoTokenizer.from_pretrained("me/weights", **where)
    model = AutoModelForCausalLM.from_pretrained("me/weights", **where)
    assert type(config).__name__ == "QWenConfig"
    assert type(tokenizer).__name__ == "QWenTokenizer"
    torch.testing.assert_close(logits(model), logits(tiny_model(vocab_size=4096)))

    # A saved copy needs neither repository any more.
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    shutil.rmtree(cache)
    for name in ("config.json", "tokenizer_config.json"):
        assert "--" not in json.dumps(json.loads((saved / name).read_text())["auto_map"])
    code = f"""
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
path = {str(saved)!r}
ids = torch.tensor([AutoTokenizer.from_pretrained(path, trust_remote_code=True).encode("法国的首都是")])
base = AutoModel.from_pretrained(path, trust_remote_code=True, fp32=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, fp32=True)
with torch.no_grad():
    print((model.lm_head(base(ids).last_hidden_state) - model(ids).logits).abs().max().item(), ids.tolist())
"""
    difference, ids = run(code, tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules")).split(" ", 1)
    assert float(difference) < 1e-5
    assert json.loads(ids) == [tokenizer.encode("法国的首都是")]


@pytest.mark.parametrize("code_in", [None, "me/code"])
def test_the_source_of_the_kernels_is_found_in_the_repository(cache, tmp_path, code_in):
    """transformers copies modules only; the C++ source is that of the code's repository, at the code's revision."""
    upload(cache, tmp_path, "me/qwen", code_in=code_in)
    if code_in:
        publish(cache, code_in, {name: ROOT / name for name in CODE})
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "empty")}
    code = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/qwen", cache_dir={cache!r}, trust_remote_code=True)
kernels = sys.modules[type(model).__module__.replace("modeling_qwen", "cpp_kernels")]
try:
    print(len(kernels._source()))
except kernels._Unavailable as error:
    print(error)
"""
    found = run(code.format(cache=str(cache)), tmp_path, **environment)
    assert found == str((ROOT / "cpp_kernels.cpp").stat().st_size)

    # Without it the model works all the same, and says what is missing.
    for link in cache.glob("**/snapshots/*/cpp_kernels.cpp"):
        link.unlink()
    assert "Copy it beside the model's other code." in run(code.format(cache=str(cache)), tmp_path, **environment)


def test_an_adapter_needs_its_folder_and_the_base_only(tmp_path):
    """LoRA: train a little, save with the tokenizer, load in a fresh process, and merge."""
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_model(vocab_size=4096).save_pretrained(base)
    for name in (*TOKENIZER, "tokenization_qwen.py"):
        shutil.copy(ROOT / "demo" / name, base)
    model = AutoModelForCausalLM.from_pretrained(base, fp32=True, **REMOTE)
    tokenizer = AutoTokenizer.from_pretrained(base, **REMOTE)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj", "w1", "w2"], lora_dropout=0.0),
    )
    ids = torch.tensor([tokenizer.encode("法国的首都是巴黎")])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    losses = []
    for _ in range(3):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    with torch.no_grad():
        expected = model(ids).logits[0, -1, :4].tolist()
        changed = (model(ids).logits - tiny_model(vocab_size=4096)(ids).logits).abs().max()
    assert changed > 0.01
    code = f"""
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(adapter)!r}, trust_remote_code=True)
model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r}, trust_remote_code=True, torch_dtype=torch.float32)
ids = torch.tensor([tokenizer.encode("法国的首都是巴黎")])
with torch.no_grad():
    before = model.eval()(ids).logits[0, -1, :4].tolist()
    merged = model.merge_and_unload()
    print([before, merged(ids).logits[0, -1, :4].tolist()])
merged.save_pretrained({str(tmp_path / "merged")!r})
"""
    before, after = json.loads(run(code, tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules")))
    torch.testing.assert_close(torch.tensor([before, after]), torch.tensor([expected, expected]), rtol=1e-4, atol=1e-4)
    assert set(CODE) - {"tokenization_qwen.py"} <= set(os.listdir(tmp_path / "merged"))
