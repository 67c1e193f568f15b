"""Weights on several devices, in memory and on disk; and how they get there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from conftest import CODE, ROOT, compat, lacks, modeling_qwen, python, random_ids, static_cache, tiny_config, tiny_model
from qwen.qwen_cache import QWenCache, QWenQuantizedCache
from test_loading import MEASURE, sparse_safetensors
from torch.utils._pytree import tree_flatten
from transformers import GenerationConfig, GenerationMixin

CPU = torch.device("cpu")
TorchFunctionMode = getattr(torch.overrides, "TorchFunctionMode", None)
if not hasattr(TorchFunctionMode, "__enter__"):  # torch 1.12
    TorchFunctionMode = None
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
NTK_LOGN = {"use_dynamic_ntk": True, "use_logn_attn": True}


class PretendedDevices(TorchFunctionMode or object):
    """
    Computes on the CPU, and has tensors say that they are on other devices.

    Results are where the operands are; operands on different devices are an error, as on GPUs. `moves` lists what
    `.to` and `copy_` moved: (shape, from, to).
    """

    def __init__(self):
        super().__init__()
        self.moves = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self.device_of(args[0])
        if func == torch.Tensor.copy_:
            here, there = map(self.device_of, args[:2])
            if CPU not in (here, there) and here != there:
                self.moves.append((tuple(args[1].shape), str(there), str(here)))
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        devices = {self.device_of(t) for t in tensors if t.dim() or self.device_of(t) != CPU}
        assert len(devices) < 2, f"{func} of tensors on {devices}"
        here = next(iter(devices), CPU)
        target = kwargs.pop("device", None)
        if func == torch.Tensor.to:
            kwargs.pop("non_blocking", None)
            target = next((a for a in args[1:] if isinstance(a, (str, torch.device))), target)
            args = [a for a in args if not isinstance(a, (str, torch.device))]
        target = here if target is None else torch.device(target)
        if func == torch.Tensor.to and target != here:
            self.moves.append((tuple(args[0].shape), str(here), str(target)))
            args = [args[0].clone(), *args[1:]]
        if func == torch.Tensor.to and len(args) == 1 and not kwargs:
            return self.put(args[0], target)
        return self.put(func(*args, **kwargs), target)

    @staticmethod
    def device_of(tensor) -> torch.device:
        return getattr(tensor, "pretended_device", CPU)

    @staticmethod
    def put(value, device):
        for leaf in tree_flatten(value)[0]:
            if isinstance(leaf, torch.Tensor) and torch.device(device) != CPU:
                leaf.pretended_device = torch.device(device)
        return value


@pytest.fixture
def pretended(monkeypatch):
    if TorchFunctionMode is None:
        pytest.skip("needs the function modes of torch 1.13")
    mode = PretendedDevices()
    monkeypatch.setattr(torch.version, "cuda", None)  # PyTorch with CUDA would ask its driver about the devices
    monkeypatch.setattr(
        accelerate.hooks,
        "set_module_tensor_to_device",
        lambda module, name, device, **kwargs: mode.put(dict(module.named_parameters())[name], device),
    )
    return mode


def spread(model, mode, devices: int, head: int = -1, embedding: int = 0, main: str | None = None) -> list[str]:
    """
    Put a model's blocks on so many devices as `device_map` does, norm and head on that of block `head`, the embedding
    on that of block `embedding`, and what the model is called with on the device `main`; the device of every block.
    """
    number = len(model.transformer.h)
    of_block = [f"cuda:{i * devices // number}" for i in range(number)]
    first = dict.fromkeys(("transformer.wte", "transformer.drop", "transformer.rotary_emb"), of_block[embedding])
    device_map = {**first, **{f"transformer.h.{i}": device for i, device in enumerate(of_block)}}
    device_map.update(dict.fromkeys(("transformer.ln_f", "lm_head"), of_block[head]))
    skipped = model._skip_keys_device_placement
    with mode:
        accelerate.dispatch_model(model, device_map, main_device=main or of_block[0], skip_keys=skipped)
    model.hf_device_map = device_map
    return of_block


@pytest.mark.parametrize("layers", [3, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_what_blocks_share_crosses_each_boundary_once(pretended, layers, padded):
    """The number of transfers does not depend on the number of layers; what is computed does not on the devices."""
    model = tiny_model(num_hidden_layers=layers, **NTK_LOGN)
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, : 9 if padded else 0] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        spread(model, pretended, 3)
        with pretended:
            ids, mask = pretended.put((ids, mask), "cuda:0")
            output = model(ids, attention_mask=mask, use_cache=True)
            assert str(output.logits.device) == "cuda:0"
    assert torch.equal(output.logits, expected)
    # vmap, by which releases up to 4.57 make masks, hides what is pretended: they seem to come from the CPU.
    moved = Counter((source, target) for _, source, target in pretended.moves if "cpu" not in (source, target))
    assert set(moved) == {("cuda:0", "cuda:1"), ("cuda:1", "cuda:2"), ("cuda:2", "cuda:0")}
    assert moved[("cuda:2", "cuda:0")] == 1  # the logits
    shapes = [shape for shape, source, _ in pretended.moves if source == "cuda:0"]
    assert shapes.count((1, 71, 64) if padded and compat.HAS_SDPA else (2, 40, 64)) == 1
    # hidden states, mask, cosines, sines, LogN scale, positions, and where a release up to 4.57 writes in the cache
    assert moved[("cuda:0", "cuda:1")] == moved[("cuda:1", "cuda:2")] <= 7


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_over_devices(pretended, kind):
    """Keys and values are made and stay on the device of their layer, and a step costs its boundaries."""
    model = tiny_model(num_hidden_layers=6, **NTK_LOGN)
    ids = random_ids(1, 40)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    cache = compat.DynamicCache() if kind == "dynamic" else static_cache(model.config, 60)
    if kind == "static" and not hasattr(getattr(cache, "layers", [None])[0], "lazy_initialization"):
        pytest.skip("the static cache of this release is told its device when it is made")
    of_block = spread(model, pretended, 2)
    uncompiled = {"disable_compile": True} if hasattr(GenerationConfig(), "disable_compile") else {}
    with pretended:
        ids, mask = pretended.put((ids, mask), "cuda:0")
        output = model.generate(ids, attention_mask=mask, past_key_values=cache, **uncompiled, **GREEDY)
        if hasattr(cache, "layers") and hasattr(cache.layers[0], "keys"):
            assert [str(layer.keys.device) for layer in cache.layers] == of_block
            assert [str(layer.values.device) for layer in cache.layers] == of_block
    assert torch.equal(output, expected)
    crossed = [shape for shape, source, target in pretended.moves if (source, target) == ("cuda:0", "cuda:1")]
    assert len(crossed) <= 7 * GREEDY["max_new_tokens"]
    assert not any(shape[-2:] == (46, 16) for shape in crossed)  # no keys


@pytest.mark.parametrize(("main", "embedding"), [("cuda:1", 0), ("cuda:0", -1), ("cuda:1", -1)])
def test_main_device_embedding_and_first_block_may_be_three_places(pretended, main, embedding):
    """accelerate takes for the main device any of a map's, the first of a set."""
    model = tiny_model(num_hidden_layers=2, **NTK_LOGN)
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, **GREEDY)
    spread(model, pretended, 2, embedding=embedding, main=main)
    uncompiled = {"disable_compile": True} if hasattr(GenerationConfig(), "disable_compile") else {}
    cache, output = static_cache(model.config, 60), None
    with pretended, torch.no_grad():
        ids, mask = pretended.put((ids, mask), main)
        logits = model(ids, attention_mask=mask).logits
        if hasattr(getattr(cache, "layers", [None])[0], "lazy_initialization"):
            output = model.generate(ids, attention_mask=mask, past_key_values=cache, **uncompiled, **GREEDY)
    assert torch.equal(logits, expected)
    assert output is None or torch.equal(output, generated)


@pytest.mark.parametrize("new", [1, 70])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_cache_of_ours_goes_on_where_it_is_when_the_model_has_moved(pretended, bits, new):
    """In a step, and in a prompt that is too long for one; a mask that 4.57 made would be of no device."""
    model, ids = tiny_model(**NTK_LOGN), random_ids(1, 30 + new)
    mask = torch.ones(new, 30 + new, dtype=torch.bool).tril(30)[None, None] if new > 1 else None

    def run(*devices):
        cache = QWenCache() if bits == 16 else QWenQuantizedCache(bits)
        for device, part, seen in zip(devices, (ids[:, :30], ids[:, 30:]), (None, mask)):
            pretended.put((list(model.parameters()), part, seen), device)
            logits = model(part, past_key_values=cache, attention_mask=seen).logits
        return logits, {str(t.device) for t in cache.storages()}

    with torch.no_grad(), pretended:
        expected, _ = run("cuda:0", "cuda:0")
        logits, stored = run("cuda:0", "cuda:1")
        assert (str(logits.device), stored) == ("cuda:1", {"cuda:0"})
    torch.testing.assert_close(logits, expected)


def test_continuous_batching_over_devices_is_refused(pretended):
    """transformers has all keys and values on one; its loop logs the error, and no prompt has an answer."""
    if not hasattr(GenerationMixin, "init_continuous_batching"):
        lacks("has no continuous batching")
    model = tiny_model()
    spread(model, pretended, 2)
    with pytest.raises(ValueError, match="one device, but this model is computed on cuda:0 and cuda:1"):
        model.generate_batch([[1, 2]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Several files of weights."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model(**NTK_LOGN).save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def load(folder, **kwargs):
    return modeling_qwen.QWenLMHeadModel.from_pretrained(folder, fp32=True, **kwargs)


def block_size(model) -> int:
    return sum(p.numel() * 4 for p in model.transformer.h[0].parameters())


EXPLICIT = {
    "transformer.wte": "cpu",
    "transformer.h.0": "disk",
    "transformer.h.1": "cpu",
    "transformer.h.2": "disk",
    "transformer.ln_f": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"device_map": "balanced"},
        {"device_map": "sequential"},
        {"device_map": EXPLICIT},
        {"device_map": "auto", "max_memory": {"cpu": "350KB"}},
        {"device_map": "sequential", "max_memory": {"cpu": "350KB"}},
    ],
    ids=str,
)
def test_placements_compute_the_same(checkpoint, tmp_path, arguments):
    if torch.cuda.is_available() and arguments.get("device_map") in ("auto", "balanced", "sequential"):
        pytest.skip("is about a machine without a GPU")
    ids = random_ids(2, 40)
    expected = tiny_model(**NTK_LOGN)
    model = load(checkpoint, offload_folder=tmp_path, **arguments)
    places = getattr(model, "hf_device_map", {"": "cpu"})
    offloaded = [name for name, place in places.items() if place == "disk"]
    assert bool(offloaded) == ("disk" in str(arguments) or "max_memory" in arguments)
    if offloaded:
        assert {p.device.type for p in model.get_submodule(offloaded[0]).parameters()} == {"meta"}
    for i in range(3):  # a block is never split
        assert not any(name.startswith(f"transformer.h.{i}.") for name in places)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    mask = torch.ones_like(ids)
    generated = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(generated, expected.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("strategy", ["auto", "balanced", "sequential"])
def test_blocks_are_dealt_out_whole_and_in_order(strategy):
    """What transformers plans for three GPUs and a CPU, of which the first GPU has the room of two blocks."""
    config = tiny_config(num_hidden_layers=8)
    with init_empty_weights():
        model = modeling_qwen.QWenLMHeadModel(config)
    size = block_size(model)
    memory = {0: 4 * size, 1: 4 * size, 2: 8 * size, "cpu": 100 * size}
    arguments = {"no_split_module_classes": list(model._no_split_modules)}
    if strategy != "sequential":
        memory = get_balanced_memory(model, max_memory=memory, low_zero=False, **arguments)
    places = infer_auto_device_map(model, max_memory=memory, **arguments)
    blocks = [places[f"transformer.h.{i}"] for i in range(8)]
    assert blocks == sorted(blocks)
    assert set(blocks) == {0, 1, 2}
    assert not any(name.count(".") > 2 for name in places)


def test_files_in_parallel(checkpoint, monkeypatch):
    """Up to 4.57 by this switch; newer releases always do."""
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "true")
    loaded, expected = load(checkpoint).state_dict(), tiny_model(**NTK_LOGN).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_files_are_loaded_one_after_another(tmp_path):
    """Beside the weights, memory holds at most about one of six files."""
    config = tiny_config(
        vocab_size=60000, hidden_size=512, num_hidden_layers=24, num_attention_heads=4, kv_channels=128,
        intermediate_size=2816,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    auto_map = json.loads((ROOT / "config.json").read_text())["auto_map"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    for name in CODE:
        shutil.copy(ROOT / name, tmp_path)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in modeling_qwen.QWenLMHeadModel(config).named_parameters()}
    sizes, index = [], {}
    names = list(shapes)
    for i in range(6):
        file = f"model-{i + 1:05d}-of-00006.safetensors"
        part = names[i * len(names) // 6 : (i + 1) * len(names) // 6]
        sizes.append(sparse_safetensors(tmp_path / file, {name: shapes[name] for name in part}))
        index.update(dict.fromkeys(part, file))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": index})
    )
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = subprocess.run(
        [*python(), "-W", "ignore", script, tmp_path, repr({"bf16": True})],
        capture_output=True, text=True, timeout=600, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    in_bf16, peak = done.stdout.split()
    assert in_bf16 == "True"
    assert int(peak) <= sum(sizes) + max(sizes)
