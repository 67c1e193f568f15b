"""The integration of flash attention 2, with a stand-in for the package that computes on the CPU and records calls."""

from __future__ import annotations

import json
import os

import pytest
from conftest import ROOT, lacks, run, tiny_model
from qwen.transformers_compat import FLASH_MIXES_ROWS, FLASH_TAKES_PACKED_ROWS, HAS_SDPA

# In a process of its own: a GPU is only pretended, before transformers looks for one.
SCRIPT = """
import json, sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
torch.cuda.get_device_name = lambda: "GPU"
torch.cuda.get_device_capability = lambda: (8, 0)
torch.version.cuda = torch.version.cuda or "12.4"
import flash_attn
from transformers import AutoModelForCausalLM
path, common = sys.argv[1], {"trust_remote_code": True, "device_map": "cpu"}
load = lambda **kwargs: AutoModelForCausalLM.from_pretrained(path, **{**common, **kwargs})
model, expected = load(use_flash_attn=True, bf16=True), load(attn_implementation="eager", fp32=True)
report = {"chosen": model.config._attn_implementation, "errors": {}, "calls": {}, "seen": {}}
auto = {"on a GPU": {"bf16": True}, "float32": {"fp32": True}, "False": {"bf16": True, "use_flash_attn": False}}
report["auto"] = {name: load(device_map=None, **how).config._attn_implementation for name, how in auto.items()}
report["auto"]["on a CPU"] = load(bf16=True).config._attn_implementation
torch.cuda.get_device_capability = lambda: (7, 5)
report["auto"]["old GPU"] = load(device_map=None, bf16=True).config._attn_implementation
try:
    load(use_flash_attn=True, fp32=True)
except ImportError as error:
    report["refused"] = str(error)
torch.cuda.get_device_capability = lambda: (8, 0)

modeling, shapes = sys.modules[type(model).__module__], []
rms_norm = modeling.rms_norm
modeling.rms_norm = lambda x, *args: shapes.append(x.shape[:-1]) or rms_norm(x, *args)

def compare(name, *args, **kwargs):
    flash_attn.calls.clear()
    shapes.clear()
    real = kwargs.pop("real", None)
    with torch.no_grad():
        ours = model(*args, **kwargs).logits.float()
        report["seen"][name] = shapes[0]
        theirs = expected(*args, **kwargs).logits
    real = torch.ones(ours.shape[:2], dtype=torch.bool) if real is None else real
    report["errors"][name] = ((ours - theirs)[real].norm() / theirs[real].norm()).item()
    report["calls"][name] = flash_attn.calls[:1] + [len(flash_attn.calls)]

ids = torch.arange(300).view(2, 150) % 320
compare("whole", ids)
mask = torch.ones_like(ids)
mask[0, :100] = 0
compare("left", ids, attention_mask=mask, real=mask.bool())
compare("right", ids, attention_mask=mask.flip(1), real=mask.flip(1).bool())

flash_attn.calls.clear()
greedy = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
model.generate(ids, attention_mask=mask, **greedy)
report["generate_calls"] = len(flash_attn.calls)

whole = expected.generate(ids, attention_mask=mask, **greedy)  # fed to both, a token at a time behind the prompt
steps = []
for m in (model, expected):
    seen, cache, logits = mask, None, []
    for token in (ids, *whole[:, 150:].split(1, 1)):
        with torch.no_grad():
            output = m(token, attention_mask=seen, past_key_values=cache, use_cache=True)
        seen, cache = torch.nn.functional.pad(seen, (0, 1), value=1), output.past_key_values
        logits.append(output.logits[:, -1].float())
    steps.append(torch.stack(logits))
report["errors"]["steps"] = ((steps[0] - steps[1]).norm() / steps[1].norm()).item()
model.train()
flash_attn.calls.clear()
model.config.attn_dropout_prob = 0.25
loss = model(ids, attention_mask=mask, labels=ids).loss
loss.backward()
report["train"] = flash_attn.calls[0]["p"], all(p.grad is not None for p in model.parameters())
print(json.dumps(report))
"""


def install_standin(folder) -> str:
    """Makes a package flash-attn in this folder; returns the PYTHONPATH with it."""
    metadata = folder / "flash_attn-2.8.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (metadata / "RECORD").write_text("flash_attn/__init__.py,,\n")
    (metadata / "top_level.txt").write_text("flash_attn\n")
    (folder / "flash_attn").symlink_to(ROOT / "tests" / "standins" / "flash_attn")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if FLASH_MIXES_ROWS:
        lacks("mixes up the rows of a batch with flash attention")
    folder = tmp_path_factory.mktemp("flash")
    tiny_model(use_dynamic_ntk=True, use_logn_attn=True).save_pretrained(folder / "checkpoint")
    path = install_standin(folder)
    code = SCRIPT.replace("sys.argv[1]", repr(str(folder / "checkpoint")))
    output = run(code, folder, PYTHONPATH=path, HF_MODULES_CACHE=str(folder / "modules"))
    return json.loads(output.splitlines()[-1])


def test_it_is_chosen_and_every_layer_calls_it(report):
    assert report["chosen"] == "flash_attention_2"
    assert [number for _, number in report["calls"].values()] == [3] * 3  # layers
    assert report["generate_calls"] == 3 * 12


def test_automatic_choice(report):
    others = dict.fromkeys(("float32", "False", "on a CPU", "old GPU"), "sdpa" if HAS_SDPA else "eager")
    assert report["auto"] == {"on a GPU": "flash_attention_2", **others}
    assert "compute capability 8.0 or higher (found 7.5) and half precision" in report["refused"]


def test_arguments(report):
    (whole, _), (left, _), (right, _) = (report["calls"][name] for name in ("whole", "left", "right"))
    assert (whole["name"], whole["shape"]) == ("func", [2, 150, 4, 16])
    assert (left["name"], left["starts"]) == ("varlen", [0, 50, 200])
    assert (right["name"], right["starts"]) == ("varlen", [0, 50, 200])
    packed = [1, 200] if FLASH_TAKES_PACKED_ROWS else [2, 150]  # the layers get no padding, and none is taken out
    assert report["seen"] == {"whole": [2, 150], "left": packed, "right": packed}
    for call in (whole, left, right):
        assert call["causal"]
        assert call["scale"] == pytest.approx(16**-0.5)
        assert call["p"] == 0


def test_results_are_those_of_eager_attention(report):
    """In bfloat16 beside float32: an error in a mask or in a scale is far larger than the rounding."""
    assert set(report["errors"]) == {"whole", "left", "right", "steps"}
    for name, error in report["errors"].items():
        assert error < 0.05, name


def test_training(report):
    dropout, all_have_gradients = report["train"]
    assert dropout == 0.25
    assert all_have_gradients
