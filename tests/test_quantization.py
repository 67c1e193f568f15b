"""Checkpoints in 4 and 8 bits: loading, computing, training on and saving them, and what is wrong with some."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import (
    CODE,
    ROOT,
    compat,
    modeling_qwen,
    needs_sdpa,
    python,
    random_ids,
    run,
    sampled,
    tiny_config,
    tiny_model,
    transformers,
)
from safetensors.torch import load_file, save_file
from torch import nn

quantization = importlib.import_module("qwen.qwen_quantization")
operations = importlib.import_module("qwen.qwen_ops")
building = importlib.import_module("qwen.cpp_kernels")
QWenConfig = modeling_qwen.QWenConfig
QWenLMHeadModel = modeling_qwen.QWenLMHeadModel
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 (rows, columns) below 2^bits, packed along the rows: int32 (rows * bits / 32, columns)."""
    n = 32 // bits
    words = sum(codes[j::n].long() << (bits * j) for j in range(n))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def random_matrix(inputs, outputs, bits, group_size=-1, sym=True, desc_act=False, v2=False, seed=0):
    """The tensors of a matrix as GPTQ stores them, and the weight that they stand for, float64 (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    group_size = inputs if group_size == -1 else group_size
    groups = -(-inputs // group_size)
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.full((groups, outputs), 2 ** (bits - 1))
    if not sym:
        zeros = torch.randint(0 if v2 else 1, 2**bits, zeros.shape, generator=generator)
    scales = ((torch.rand(groups, outputs, generator=generator) + 0.5) * 0.7 / 2**bits / inputs**0.25).half()
    g_idx = torch.arange(inputs) // group_size
    if desc_act:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    weight = (scales.double()[g_idx] * (codes - zeros[g_idx])).t()
    stored = packed((zeros - int(not v2)).t(), bits).t()
    return {
        "qweight": packed(codes, bits), "qzeros": stored.contiguous(), "scales": scales, "g_idx": g_idx.int(),
    }, weight  # fmt: skip


def matrices(model):
    return {name: module for name, module in model.named_modules() if ".h." in name and isinstance(module, nn.Linear)}


def with_codes(model, bits=4, group_size=32, **kind):
    """The model, its blocks with random codes for matrices; with `lm_head` its output layer, too."""
    format = quantization.check_quantization_config(
        {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": kind.get("desc_act", False)}
    )
    head = {"lm_head": model.lm_head} if kind.pop("lm_head", False) else {}
    for seed, (name, module) in enumerate({**matrices(model), **head}.items()):
        sizes = module.in_features, module.out_features
        new = quantization.QuantizedLinear(*sizes, format, device=module.weight.device, dtype=module.weight.dtype)
        parts, _ = random_matrix(*sizes, bits, group_size, seed=seed, **kind)
        with torch.no_grad():
            for part, tensor in parts.items():
                getattr(new, part).copy_(tensor)
        new.bias = module.bias
        new.set_order()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model


def make(folder, bits=4, group_size=32, biases="all", with_g_idx=True, files=1, sizes=None, **kind):
    """
    A checkpoint as published ones are, and the same network in float32 with the weights that it stands for.

    biases: "all" matrices have one, zeros where the network has none; "own": only those of the network.
    """
    plain = tiny_model(no_bias=kind.pop("no_bias", True), **(sizes or {}))
    tensors = {}
    for seed, (name, module) in enumerate(matrices(plain).items()):
        parts, weight = random_matrix(module.in_features, module.out_features, bits, group_size, seed=seed, **kind)
        if not with_g_idx:
            del parts["g_idx"]
        with torch.no_grad():
            module.weight.copy_(weight)
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        if module.bias is None and biases == "all":
            tensors[f"{name}.bias"] = torch.zeros(module.out_features, dtype=torch.float16)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if f"{name.rpartition('.')[0]}.qweight" not in tensors or name.endswith("bias"):
                parameter.copy_(parameter.half())
                tensors[name] = parameter.half()
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **plain.config.to_dict(), compat.DTYPE: "float16",
        "auto_map": json.loads((ROOT / "config.json").read_text())["auto_map"],
        "quantization_config": {
            "bits": bits, "group_size": group_size, "damp_percent": 0.01, "desc_act": kind.get("desc_act", False),
            "static_groups": False, "sym": kind.get("sym", True), "true_sequential": True, "quant_method": "gptq",
            **({"checkpoint_format": "gptq_v2"} if kind.get("v2") else {}),
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return plain
    places = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::files]}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names[i::files], file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return plain


def stored(folder) -> dict:
    """All tensors of a checkpoint."""
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def published(tmp_path):
    """A checkpoint of 4 bits; its folder and its network in float32."""
    return tmp_path / "int4", make(tmp_path / "int4")


# --- Loading and computing ----------------------------------------------------------------------------------------

KINDS = {
    "as published": {},
    "int8": {"bits": 8},
    "one group": {"group_size": -1},
    "int8 per channel": {"bits": 8, "group_size": -1},
    "groups of 64, the last one short": {"group_size": 64},
    "group larger than the matrix": {"group_size": 128},
    "groups of 16": {"group_size": 16},
    "asymmetric": {"sym": False},
    "asymmetric int8": {"bits": 8, "sym": False},
    "desc_act": {"desc_act": True},
    "desc_act, asymmetric int8": {"bits": 8, "desc_act": True, "sym": False},
    "version 2": {"v2": True, "sym": False},
    "without needless biases": {"biases": "own"},
    "biases": {"no_bias": False},
    "without g_idx": {"with_g_idx": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_with_the_weights_that_the_codes_stand_for(tmp_path, kind):
    plain = make(tmp_path, **KINDS[kind])
    model = QWenLMHeadModel.from_pretrained(tmp_path, fp32=True)
    replaced = matrices(model)
    assert len(replaced) == 5 * 3
    assert all(type(module) is quantization.QuantizedLinear for module in replaced.values())
    for shape in ((1, 1), (2, 3), (3, 20)):  # few rows and many
        ids = random_ids(*shape)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    kept = {"max_new_tokens": 12, "do_sample": False}
    assert model.generate(random_ids(1, 8), **kept).tolist() == plain.generate(random_ids(1, 8), **kept).tolist()


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_recorded_checkpoints(name):
    folder = Path(os.environ.get("QWEN_GPTQ", ROOT.parent / "shared" / "gptq")) / name
    if not folder.is_dir():
        pytest.skip("needs recorded checkpoints: set QWEN_GPTQ to their folder")
    expected = load_file(folder / "expected.safetensors")
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True)
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    assert (logits - expected["logits"]).norm() < 1e-4 * expected["logits"].norm()
    ids = expected["greedy_ids"]
    prompt = ids[:, :20]
    assert torch.equal(prompt, expected["ids"][:1, :20])
    assert torch.equal(model.generate(prompt, max_new_tokens=ids.shape[1] - 20, do_sample=False), ids)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16), ({"fp32": True}, torch.float32)],
    ids=["bf16", "fp16", "fp32"],
)
def test_every_precision_keeps_the_tensors_of_the_file(published, arguments, dtype):
    folder, plain = published
    model = QWenLMHeadModel.from_pretrained(folder, **arguments)
    assert model.dtype == dtype
    tensors, held = stored(folder), dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.endswith(PARTS):
            assert held[name].dtype == tensor.dtype, name
            assert torch.equal(held[name], tensor), name
        else:
            assert held[name].dtype == dtype, name
    with torch.no_grad():
        logits, wanted = model(random_ids(2, 20)).logits.float(), plain(random_ids(2, 20)).logits
    assert (logits - wanted).norm() < (1e-5 if dtype == torch.float32 else 0.05) * wanted.norm()


def test_without_a_precision_a_cpu_takes_one_that_is_fast(published):
    """config.json names float16, which CPUs have no fast code for; published ones twice, early ones in two files."""
    folder, _ = published
    assert QWenLMHeadModel.from_pretrained(folder, device_map="cpu").dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fp16": True}))
    assert QWenLMHeadModel.from_pretrained(folder, device_map="cpu").dtype == torch.bfloat16
    assert QWenLMHeadModel.from_pretrained(folder, device_map="cpu", fp16=True).dtype == torch.float16
    (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps({**config, "fp16": True}))
    assert QWenLMHeadModel.from_pretrained(folder, device_map="cpu").dtype == torch.bfloat16
    assert QWenLMHeadModel.from_pretrained(folder, device_map="cpu", fp16=True).dtype == torch.float16
    for damaged in ('{"bits": 4', "[1, 2]", "4"):
        (folder / "quantize_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"quantize_config\.json is no JSON object"):
            QWenLMHeadModel.from_pretrained(folder)


def test_the_memory_is_that_of_the_file(published):
    folder, _ = published
    model = QWenLMHeadModel.from_pretrained(folder, fp16=True)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert held == sum(tensor.numel() * tensor.element_size() for tensor in stored(folder).values())


@pytest.mark.parametrize("kind", ["as published", "desc_act, asymmetric int8", "version 2", "without needless biases"])
def test_it_is_saved_as_it_was(tmp_path, kind):
    make(tmp_path / "made", files=3, **KINDS[kind])
    settings = {"fp16": True, "attn_implementation": "eager"}  # 4.46 would choose anew for what it has saved
    model = QWenLMHeadModel.from_pretrained(tmp_path / "made", **settings)
    model(random_ids(1, 3)), model(random_ids(3, 20))  # nothing that they do may change what is saved
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    before, after = stored(tmp_path / "made"), stored(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("made", "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert not any(key.startswith("_gptq") for key in configs[1])
    again = QWenLMHeadModel.from_pretrained(tmp_path / "saved", **settings)
    with torch.no_grad():
        assert torch.equal(again(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


@pytest.mark.parametrize("kind", ["desc_act", "desc_act, asymmetric int8"])
def test_sorted_inputs(tmp_path, kind, monkeypatch):
    """What a GPU's kernels need, here on a CPU: it computes, learns, is saved, copied and loaded as if it were not."""
    plain = make(tmp_path / "made", files=3, **KINDS[kind])
    settings = {"fp32": True, "attn_implementation": "eager"}
    unsorted = QWenLMHeadModel.from_pretrained(tmp_path / "made", **settings)
    monkeypatch.setattr(quantization, "SORTED_ON", ("cpu",))
    monkeypatch.setattr(quantization, "REORDERED_CODES", 1000)  # several blocks, the last one short
    model = QWenLMHeadModel.from_pretrained(tmp_path / "made", **settings)
    ids = random_ids(3, 20)

    def close(model, expected=plain):
        for shape in ((1, 1), (2, 3), (3, 20)):
            with torch.no_grad():
                wanted = expected(random_ids(*shape)).logits
                torch.testing.assert_close(model(random_ids(*shape)).logits, wanted, rtol=1e-4, atol=1e-4)

    close(model)
    for name, module in matrices(model).items():
        assert not hasattr(module, "qweight")
        assert torch.equal(module.g_idx[module.order], module._ordered_groups())
        assert torch.equal(module.dequantize(), plain.get_submodule(name).weight)
    for network in (plain, model):
        network(ids, labels=ids).loss.backward()
    for name in ("wte.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.bias"):
        wanted = plain.transformer.get_parameter(name).grad
        torch.testing.assert_close(model.transformer.get_parameter(name).grad, wanted, rtol=1e-4, atol=1e-6)
    close(copy.deepcopy(model).double().float())
    model.save_pretrained(tmp_path / "saved")
    before, after = stored(tmp_path / "made"), stored(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].to(tensor.dtype), tensor) for name, tensor in before.items())
    for name, module in matrices(unsorted).items():  # other codes, and groups of other inputs
        module.qweight.data.copy_(module.qweight.roll(1, 0))
        module.g_idx.data.copy_(module.g_idx.roll(len(name), 0))
    model.load_state_dict(unsorted.state_dict())
    close(model, unsorted)


@pytest.mark.parametrize("way", ["cpu_offload", "buffers too", "disk_offload", "dispatch_model", "a hook of its own"])
@pytest.mark.parametrize("sorted_on", ["cpu", "cuda"])
def test_codes_that_are_offloaded_later(tmp_path, monkeypatch, way, sorted_on):
    """accelerate keeps codes as a state dict has them: as in the file."""
    accelerate, cpu = importlib.import_module("accelerate"), torch.device("cpu")
    monkeypatch.setattr(quantization, "SORTED_ON", (sorted_on,))
    plain = make(tmp_path / "made", **KINDS["desc_act"])
    model = QWenLMHeadModel.from_pretrained(tmp_path / "made", fp32=True)
    layer = model.transformer.h[1].mlp.w1
    assert hasattr(layer, "qweight") == (sorted_on == "cuda")
    if way in ("cpu_offload", "buffers too"):
        accelerate.cpu_offload(model, execution_device=cpu, offload_buffers=way == "buffers too")
    elif way == "disk_offload":
        accelerate.disk_offload(model, tmp_path / "offload", execution_device=cpu)
    elif way == "dispatch_model":
        accelerate.dispatch_model(model, ONE_BLOCK_ON_DISK, main_device="cpu", offload_dir=tmp_path / "offload")
    else:
        hook = accelerate.hooks.AlignDevicesHook(cpu, offload=True)
        accelerate.hooks.add_hook_to_module(layer, hook)
    assert layer.codes.device.type == "meta"
    ids = random_ids(2, 5)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert layer.codes.device.type == "cpu"
    with torch.no_grad():
        torch.testing.assert_close(model.to("cpu")(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_over_sorted_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "SORTED_ON", ("cpu",))
    plain = make(tmp_path, **KINDS["desc_act"])
    model = lora(QWenLMHeadModel.from_pretrained(tmp_path, fp32=True))
    ids = random_ids(1, 5)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


WIDE = {"hidden_size": 128, "num_attention_heads": 2, "kv_channels": 64, "intermediate_size": 512}


@pytest.mark.parametrize("kind", [{"group_size": 128}, {"group_size": 32, "sym": False}, {"bits": 8, "group_size": -1}])
def test_codes_of_an_output_lie_side_by_side(tmp_path, kind, monkeypatch):
    """What a CPU's kernels need: it computes, is saved, copied, moved and loaded as if they lay as in the file."""
    plain = make(tmp_path / "made", files=2, sizes=WIDE, **kind)
    model = QWenLMHeadModel.from_pretrained(tmp_path / "made", fp32=True)
    before = stored(tmp_path / "made")
    ids = random_ids(1, 12)

    def check(model, expected=plain):
        for name, module in matrices(model).items():
            assert module.qweight.shape == before[f"{name}.qweight"].shape
            assert module.qweight.t().is_contiguous()
            assert not module.qweight.is_contiguous()
        for shape in ((1, 1), (2, 3), (3, 20)):
            with torch.no_grad():
                wanted = expected(random_ids(*shape)).logits
                torch.testing.assert_close(model(random_ids(*shape)).logits, wanted, rtol=1e-4, atol=1e-4)

    check(model), check(copy.deepcopy(model))
    new = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **new), plain.generate(ids, **new))
    model.save_pretrained(tmp_path / "saved")
    for name, tensor in stored(tmp_path / "saved").items():
        assert torch.equal(tensor, before[name]), name
    # another state, read into it
    other = make(tmp_path / "other", sizes=WIDE, **{**kind, "sym": True})
    model.load_state_dict({**model.state_dict(), **{k: v for k, v in stored(tmp_path / "other").items() if ".h." in k}})
    check(model, other)
    # a device whose kernels read rows, and back
    monkeypatch.setattr(quantization, "SIDE_BY_SIDE_ON", ("meta",))
    assert all(m.qweight.t().is_contiguous() for m in matrices(copy.deepcopy(model).to("meta")).values())
    monkeypatch.setattr(quantization, "SIDE_BY_SIDE_ON", ("cpu",))
    assert all(m.qweight.is_contiguous() for m in matrices(model.to("meta")).values())


def test_preparing_the_codes_of_a_large_model_shows_progress(published, monkeypatch):
    shown, real = [], quantization.logging.tqdm

    def tqdm(*items, **settings):
        if settings.get("desc") == "Preparing codes":
            shown.append((len(items[0]), settings["delay"]))
        return real(*items, **settings)

    monkeypatch.setattr(quantization.logging, "tqdm", tqdm)
    QWenLMHeadModel.from_pretrained(published[0], fp32=True)
    assert shown == [(5 * 3, 2)]


def test_a_state_dict_of_the_caller_stays_as_it_is(tmp_path):
    make(tmp_path, group_size=128, sizes=WIDE)
    state, before = stored(tmp_path), stored(tmp_path)
    config = QWenConfig.from_pretrained(tmp_path)
    model = QWenLMHeadModel.from_pretrained(None, config=config, state_dict=state)
    for name, module in matrices(model).items():
        assert torch.equal(module.qweight, before[f"{name}.qweight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_may_have_its_inputs_in_another_order(assign):
    ids, kind = random_ids(1, 5), {"bits": 4, "group_size": 32}
    with torch.no_grad():
        one, other = (with_codes(tiny_model(i, **WIDE), desc_act=bool(i), **kind) for i in range(2))
        for module in matrices(one).values():
            module.put_side_by_side()
        states = [{name: t.clone() for name, t in model.state_dict().items()} for model in (one, other)]
        expected = [model(ids).logits for model in (one, other)]
        for i in (1, 0):
            one.load_state_dict(states[i], assign=assign)
            assert all(module.is_ordered == (i == 0) for module in matrices(one).values())
            torch.testing.assert_close(one(ids).logits, expected[i])


def test_the_embeddings_of_a_quantised_output_layer_are_not_resized():
    """Nor one of them alone."""
    model = with_codes(tiny_model(), lm_head=True)
    with pytest.raises(ValueError, match=r"a quantised output layer can't get other embeddings: resize"):
        model.resize_token_embeddings(340)
    assert model.get_input_embeddings().num_embeddings == 320
    assert with_codes(tiny_model()).resize_token_embeddings(340).num_embeddings == 340


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_does_not_bring_groups_that_there_are_not(strict):
    """Whose scales and zeros the kernels would read far behind those of the matrix."""
    model = with_codes(tiny_model(), desc_act=True)
    state = {name: t + 10**8 if name.endswith("w1.g_idx") else t for name, t in model.state_dict().items()}
    before = model.transformer.h[0].mlp.w1.g_idx.clone()
    with pytest.raises(RuntimeError, match=r"h\.0\.mlp\.w1\.g_idx names the groups 100000000 to .*, but there are 2"):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(model.transformer.h[0].mlp.w1.g_idx, before)


def test_groups_of_several_sizes_stay_as_they_are():
    format = quantization.check_quantization_config({"quant_method": "gptq", "bits": 4, "group_size": 32})
    module = quantization.QuantizedLinear(64, 8, format)
    module.g_idx.data.copy_(torch.arange(64) % 3 == 0)
    module.set_order()
    module.sort_inputs()
    assert module.order is None
    assert torch.equal(module.dequantize(), torch.zeros(8, 64))


def test_a_cast_leaves_the_scales_alone(published):
    folder, _ = published
    model = QWenLMHeadModel.from_pretrained(folder, fp16=True)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.float()):
        model = cast(model)
        scales = {p.dtype for name, p in model.named_parameters() if name.endswith("scales")}
        assert scales == {torch.float16}
    assert model.dtype == torch.float32
    name, module = next(iter(matrices(model).items()))
    assert torch.equal(module.scales, stored(folder)[f"{name}.scales"])


ONE_BLOCK_ON_DISK = {
    **dict.fromkeys(("transformer.wte", "transformer.drop", "transformer.rotary_emb", "transformer.h.0"), "cpu"),
    "transformer.h.1": "disk",
    **dict.fromkeys(("transformer.h.2", "transformer.ln_f", "lm_head"), "cpu"),
}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, ONE_BLOCK_ON_DISK], ids=["cpu", "dict", "disk"])
@pytest.mark.parametrize("kind", ["as published", "desc_act", "without g_idx"])
def test_placements(tmp_path, device_map, kind):
    plain = make(tmp_path / "made", **KINDS[kind])
    arguments = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    model = QWenLMHeadModel.from_pretrained(tmp_path / "made", fp32=True, **arguments)
    with torch.no_grad():
        for shape in ((1, 1), (2, 20)):
            logits = model(random_ids(*shape)).logits
            torch.testing.assert_close(logits, plain(random_ids(*shape)).logits, rtol=1e-4, atol=1e-4)


def test_it_loads_as_a_user_loads_it(published, tmp_path):
    """With the code in the folder and by the auto classes, in a process that knows nothing else."""
    folder, plain = published
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    ids = random_ids(1, 6)
    code = f"""
import torch
from transformers import AutoModelForCausalLM as A
m = A.from_pretrained({str(folder)!r}, trust_remote_code=True, fp32=True)
m.save_pretrained('again')
m = A.from_pretrained('again', trust_remote_code=True, fp32=True)
ids = m.generate(torch.tensor({ids.tolist()}), max_new_tokens=8, do_sample=False)
print(m.config.quantization_config['bits'], ids[0].tolist())
"""
    printed = run(code, tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert printed == f"4 {plain.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()}"


def test_the_bare_model(published):
    folder, plain = published
    base = modeling_qwen.QWenModel.from_pretrained(folder, fp32=True)
    assert type(base.h[0].mlp.w1) is quantization.QuantizedLinear
    with torch.no_grad():
        torch.testing.assert_close(
            base(random_ids(1, 9)).last_hidden_state, plain.transformer(random_ids(1, 9)).last_hidden_state
        )


def test_a_configuration_beside_the_weights(published):
    """Early checkpoints say how they are quantised in a file of its own."""
    folder, plain = published
    config = json.loads((folder / "config.json").read_text())
    beside = {k: v for k, v in config.pop("quantization_config").items() if k != "quant_method"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(beside))
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True)
    assert model.config.quantization_config["quant_method"] == "gptq"
    with torch.no_grad():
        torch.testing.assert_close(model(random_ids(1, 9)).logits, plain(random_ids(1, 9)).logits, rtol=1e-4, atol=1e-4)


def test_the_callers_configuration_stays_as_it_is(published):
    folder, _ = published
    config = modeling_qwen.QWenConfig.from_pretrained(folder)
    before = dict(config.quantization_config)
    model = QWenLMHeadModel.from_pretrained(folder, config=config, dtype=torch.float32)
    assert config.quantization_config == before == model.config.quantization_config
    # Software that brings its own matrices (vLLM) makes the network from the configuration, and must find nn.Linear.
    built = QWenLMHeadModel(config)
    assert not any(isinstance(module, quantization.QuantizedLinear) for module in built.modules())


def test_a_quantization_config_of_the_caller_goes_to_transformers(published):
    """It asks for packages, which are not installed here, rather than being passed over."""
    folder, _ = published
    with pytest.raises((ImportError, RuntimeError), match=r"(?i)gptq|optimum|GPU"):
        QWenLMHeadModel.from_pretrained(folder, quantization_config=transformers.GPTQConfig(bits=4))


@pytest.mark.skipif(not hasattr(torch, "compiler"), reason="needs torch 2.1 to know that it compiles")
def test_it_compiles(published):
    folder, _ = published
    block = QWenLMHeadModel.from_pretrained(folder, fp32=True).transformer.h[0].mlp
    x = torch.randn(1, 2, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))


# --- The output layer in int8 -------------------------------------------------------------------------------------


def rounded(head, weight: torch.Tensor) -> torch.Tensor:
    """The weight, float64, that an output layer stands for, which must be this one in int8."""
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    assert type(head) is quantization.Int8Linear
    assert head.weight_scale.dtype == torch.float32
    torch.testing.assert_close(head.weight_scale.double()[:, None], scale, rtol=1e-6, atol=0)
    found = head.codes * scale
    assert ((found - weight).abs() <= scale * 0.50001).all()
    return found


@pytest.mark.parametrize("arguments", [{"fp32": True}, {"bf16": True}, {"device_map": "cpu", "fp32": True}], ids=str)
def test_loading_rounds_the_output_layer(tmp_path, arguments):
    """Of the float16 that the file has, whatever the model's precision; and saves it as it is then."""
    plain = make(tmp_path / "int4", files=3)
    arguments = {"attn_implementation": "eager", **arguments}  # 4.46 would choose anew for what it has saved
    model = QWenLMHeadModel.from_pretrained(tmp_path / "int4", int8_lm_head=True, **arguments)
    weight = rounded(model.lm_head, stored(tmp_path / "int4")["lm_head.weight"])
    assert all(type(module) is quantization.QuantizedLinear for module in matrices(model).values())
    with torch.no_grad():
        plain.lm_head.weight.copy_(weight)
        ids, close = random_ids(2, 9), {"rtol": 1e-4, "atol": 1e-4} if "fp32" in arguments else {"rtol": 0, "atol": 0.3}
        torch.testing.assert_close(model(ids).logits.float(), plain(ids).logits, **close)
    kept = {"max_new_tokens": 12, "do_sample": False}
    if "fp32" in arguments:
        assert model.generate(random_ids(1, 8), **kept).tolist() == plain.generate(random_ids(1, 8), **kept).tolist()
    model.save_pretrained(tmp_path / "saved")
    files = stored(tmp_path / "saved")
    assert torch.equal(files["lm_head.weight"], model.lm_head.codes)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["int8_lm_head"] is True
    again = QWenLMHeadModel.from_pretrained(tmp_path / "saved", **arguments)
    with torch.no_grad():
        assert torch.equal(again(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


def test_the_output_layer_of_a_model_in_full_precision(tmp_path):
    plain = tiny_model(no_bias=False)
    plain.save_pretrained(tmp_path / "whole")
    shutil.copy(ROOT / "cpp_kernels.cpp", tmp_path / "whole")
    code = """
from transformers import AutoModelForCausalLM as A
m = A.from_pretrained('whole', trust_remote_code=True, fp32=True, int8_lm_head=True)
m.save_pretrained('int8')
m = A.from_pretrained('int8', trust_remote_code=True, fp32=True)
print(m.lm_head.weight.dtype, m.transformer.h[0].mlp.w1.weight.dtype, m.config.int8_lm_head)
"""
    printed = run(code, tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert printed == "torch.int8 torch.float32 True"
    model = QWenLMHeadModel.from_pretrained(tmp_path / "int8", fp32=True)
    with torch.no_grad():
        plain.lm_head.weight.copy_(rounded(model.lm_head, plain.lm_head.weight))
        for shape in ((1, 1), (3, 20)):
            ids = random_ids(*shape)
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_bare_model_has_no_output_layer_to_round(published):
    folder, _ = published
    assert modeling_qwen.QWenModel.from_pretrained(folder, fp32=True, int8_lm_head=True).config.int8_lm_head


def test_a_tensor_that_an_int8_output_layer_lacks_is_missed(published, tmp_path):
    folder, _ = published
    QWenLMHeadModel.from_pretrained(folder, fp32=True, int8_lm_head=True).save_pretrained(tmp_path / "saved")
    edit_tensors(tmp_path / "saved", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(RuntimeError, match=r"missing from it \(lm_head.weight"):
        QWenLMHeadModel.from_pretrained(tmp_path / "saved", fp32=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_weights_are_not_gptq(tmp_path, bits):
    make(tmp_path, bits=bits)
    message = rf"tools/quantize_weights.py.*GPTQ checkpoint of {bits} bits. Leave int8_weights out.*int8_lm_head=True"
    with pytest.raises(ValueError, match=message):
        QWenLMHeadModel.from_pretrained(tmp_path, int8_weights=True)


def test_where_the_output_layer_can_not_be_in_int8(published, tmp_path):
    folder, _ = published
    on_disk = {"transformer": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="left on the disk"):
        QWenLMHeadModel.from_pretrained(
            folder, fp32=True, int8_lm_head=True, device_map=on_disk, offload_folder=str(tmp_path / "offload")
        )
    with pytest.raises(ValueError, match="does not go with the method that the call names"):
        QWenLMHeadModel.from_pretrained(
            folder, int8_lm_head=True, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)
        )
    with pytest.raises(ValueError, match="needs tie_word_embeddings=False"):
        QWenLMHeadModel.from_pretrained(folder, int8_lm_head=True, tie_word_embeddings=True)
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True, int8_lm_head=True)
    for arguments in ({"new_num_tokens": 400}, {"pad_to_multiple_of": 1000}):
        with pytest.raises(ValueError, match="can't get other embeddings"):
            model.resize_token_embeddings(**arguments)
    edit_config(folder, lm_head=True)
    with pytest.raises(ValueError, match="which has the output layer in it"):
        QWenLMHeadModel.from_pretrained(folder, int8_lm_head=True)


def test_new_values_for_an_output_layer_that_is_missing_are_rounded(published):
    folder, plain = published
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(RuntimeError, match=r"1 weights missing from it \(lm_head.weight\)"):
        QWenLMHeadModel.from_pretrained(folder, fp32=True, int8_lm_head=True)
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True, int8_lm_head=True, strict=False)
    weight = model.lm_head.codes * model.lm_head.weight_scale[:, None]
    assert 0.9 < weight.std() / plain.config.initializer_range < 1.1


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_output_layer_that_is_not_finite_is_not_rounded(published, number):
    folder, _ = published

    def damage(tensors):
        tensors["lm_head.weight"][5, 7] = number

    edit_tensors(folder, damage)
    with pytest.raises(RuntimeError, match=r"\(lm_head\) can't be rounded to int8, as torch.float16: it holds numbers"):
        QWenLMHeadModel.from_pretrained(folder, fp32=True, int8_lm_head=True)


def test_an_output_layer_of_another_shape_is_named(published):
    folder, _ = published

    def cut(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-8].clone()

    edit_tensors(folder, cut)
    named = "lm_head.weight is" if compat.REPORTS_MISMATCHES else "tensor of shape"
    with pytest.raises(RuntimeError, match=f"other shapes than its config.json says: .*{named}"):
        QWenLMHeadModel.from_pretrained(folder, fp32=True, int8_lm_head=True)


def test_an_int8_output_layer_does_not_become_one_of_floats(published, tmp_path):
    folder, _ = published
    QWenLMHeadModel.from_pretrained(folder, fp32=True, int8_lm_head=True).save_pretrained(tmp_path / "saved")
    # 4.53 to 4.57 stop at the codes, in words of PyTorch's.
    refused = r"has its output layer in int8, but its configuration does not say so|loading state_dict for Linear"
    with pytest.raises(RuntimeError, match=refused):
        QWenLMHeadModel.from_pretrained(tmp_path / "saved", fp32=True, int8_lm_head=False)


def test_a_model_with_an_int8_output_layer_is_not_trained_whole(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = QWenLMHeadModel.from_pretrained(tmp_path, fp32=True, int8_lm_head=True).train()
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match="can't learn"):
        model(ids, labels=ids)
    model.transformer.wte.requires_grad_(False)
    model(ids, labels=ids).loss.backward()
    assert model.transformer.h[0].mlp.w1.weight.grad.abs().sum() > 0


MEASURE = """
import gc, sys, threading, torch
from transformers import AutoModelForCausalLM
def held():
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
def load():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, fp16=True)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim():
            tensor.reshape(-1).view(torch.uint8)[::4096].sum()  # a byte of every page: files are mapped, and read now
    return model
load()  # imports, some of which transformers makes when it loads, are not counted
gc.collect()
before, peak, done = held(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())
thread = threading.Thread(target=watch, daemon=True)
thread.start()
model = load()
done.set()
thread.join()
print(max(peak, held()) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_loading_takes_little_more_than_the_file(tmp_path):
    """Twelve blocks of Qwen-1.8B's width in six files: the peak is at most 1.15 times the tensors."""
    config = tiny_config(hidden_size=2048, num_hidden_layers=12, num_attention_heads=16, kv_channels=128,
                         intermediate_size=11008, vocab_size=32000)  # fmt: skip
    files = [{} for _ in range(6)]
    for layer in range(12):
        for name, inputs, outputs in (
            *(("attn.c_attn", 2048, 6144), ("attn.c_proj", 2048, 2048)),
            *(("mlp.w1", 2048, 5504), ("mlp.w2", 2048, 5504), ("mlp.c_proj", 5504, 2048)),
        ):
            parts = {
                "qweight": torch.ones(inputs // 8, outputs, dtype=torch.int32),
                "qzeros": torch.ones(inputs // 128, outputs // 8, dtype=torch.int32),
                "scales": torch.ones(inputs // 128, outputs, dtype=torch.float16),
                "g_idx": torch.arange(inputs, dtype=torch.int32) // 128,
                "bias": torch.ones(outputs, dtype=torch.float16),
            }
            files[layer // 2].update({f"transformer.h.{layer}.{name}.{part}": t for part, t in parts.items()})
        for name in ("ln_1", "ln_2"):
            files[layer // 2][f"transformer.h.{layer}.{name}.weight"] = torch.ones(2048, dtype=torch.float16)
    for name, rows in (("transformer.wte", 32000), ("lm_head", 32000), ("transformer.ln_f", None)):
        files[0][f"{name}.weight"] = torch.ones(*([rows] if rows else []), 2048, dtype=torch.float16)
    quantized = {"bits": 4, "group_size": 128, "quant_method": "gptq"}
    values = {**config.to_dict(), "quantization_config": quantized}
    values["auto_map"] = json.loads((ROOT / "config.json").read_text())["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    places = {name: f"{i}.safetensors" for i, tensors in enumerate(files) for name in tensors}
    size = sum(tensor.numel() * tensor.element_size() for tensors in files for tensor in tensors.values())
    for i in range(6):
        save_file(files[i], tmp_path / f"{i}.safetensors", metadata={"format": "pt"})
    del files
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name in CODE:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "measure.py").write_text(MEASURE)
    done = subprocess.run(
        [*python(), "-W", "ignore", tmp_path / "measure.py", tmp_path],
        capture_output=True, text=True, timeout=600, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.15 * size, f"peak {int(done.stdout) / size:.2f} times the tensors"


@pytest.mark.parametrize("form", [".safetensors", ".bin", "shards", "tensors"])
@pytest.mark.parametrize("bare", [False, True], ids=["with a head", "bare"])
def test_nobody_misses_what_a_file_may_leave_out(tmp_path, caplog, form, bare):
    """gptqmodel writes no biases where the network has none; others wrote no g_idx where it says nothing."""
    make(tmp_path, biases="own", with_g_idx=False, files=3 if form == "shards" else 1)
    source, given = tmp_path, {compat.DTYPE: torch.float32}
    model_class = modeling_qwen.QWenModel if bare else QWenLMHeadModel
    if form == ".bin":
        torch.save(stored(tmp_path), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    elif form == "tensors":
        config = QWenConfig.from_pretrained(tmp_path)
        source, given = None, {**given, "state_dict": stored(tmp_path), "config": config}
    model, info = model_class.from_pretrained(source, output_loading_info=True, **given)
    assert not info["missing_keys"]
    for record in caplog.records:
        assert not re.search(r"newly initialized|g_idx|bias", record.getMessage()), record.getMessage()
    biases = {name.rpartition(".")[0][-6:] for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert biases == {"c_attn"}


@pytest.mark.skipif(not compat.REPORTS_MISMATCHES, reason="needs a release that hands an adapter to the model's class")
def test_an_adapter_is_loaded_over_a_file_that_leaves_out_what_it_may(tmp_path):
    """transformers 5 gives what it found missing of the adapter, not of the file below it."""
    peft = pytest.importorskip("peft")
    make(tmp_path / "base", biases="own", with_g_idx=False)
    base = QWenLMHeadModel.from_pretrained(tmp_path / "base", fp32=True)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "w1"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = QWenLMHeadModel.from_pretrained(
        tmp_path / "base", fp32=True, adapter_kwargs={"_adapter_model_path": str(tmp_path / "adapter")}
    )
    with torch.no_grad():
        assert torch.equal(loaded(random_ids(1, 9)).logits, adapted(random_ids(1, 9)).logits)


def test_a_bias_that_the_network_has_is_missed_and_begins_at_zero(tmp_path, caplog):
    make(tmp_path)
    edit_tensors(tmp_path, without("attn.c_attn.bias"))
    model = QWenLMHeadModel.from_pretrained(tmp_path, fp32=True, strict=False)
    assert "attn.c_attn.bias" in caplog.text
    for block in model.transformer.h:
        assert torch.equal(block.attn.c_attn.bias, torch.zeros(3 * 64))


# --- What is wrong with some --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, r"bits must be 4 or 8, found 3.*gptqmodel"),
        ({"bits": None}, r"bits must be 4 or 8, found None"),
        ({"bits": 4.0}, r"bits must be 4 or 8, found 4\.0"),
        ({"quant_method": "exl2"}, r"of the method 'exl2'.*GPTQ checkpoint"),
        ({"quant_method": None}, r"of the method None"),
        ({"group_size": 0}, r"group_size must be -1 or positive, found 0"),
        ({"group_size": "128"}, r"group_size must be -1 or positive, found '128'"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format.*found 'marlin'"),
        ({"dynamic": {"-:mlp": {}}}, r"dynamic is .*gptqmodel"),
        ({"pack_dtype": "int16"}, r"pack_dtype is 'int16'"),
    ],
    ids=str,
)
def test_configurations_that_say_what_nobody_reads(published, changes, message):
    folder, _ = published
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        QWenLMHeadModel.from_pretrained(folder, fp32=True)


def test_other_methods_are_transformers_own():
    for method in quantization.quantization_methods() - {"gptq"}:
        assert quantization.check_quantization_config({"quant_method": method}) is None
    assert quantization.check_quantization_config({"load_in_4bit": True}) is None


def scales_of_other_groups(tensors):
    for name in list(tensors):
        if name.endswith(("scales", "qzeros")):
            tensors[name] = tensors[name][:1].contiguous()


def codes_of_other_inputs(tensors):
    tensors["transformer.h.1.mlp.w1.qweight"] = tensors["transformer.h.1.mlp.w1.qweight"][:-1].contiguous()


def without(ending):
    def change(tensors):
        for name in list(tensors):
            if name.endswith(ending):
                del tensors[name]

    return change


def groups_that_are_not_there(tensors):
    tensors["transformer.h.2.attn.c_proj.g_idx"][5] = 7


def a_scale_that_is_not_a_number(tensors):
    tensors["transformer.h.1.mlp.w2.scales"][1, 3] = torch.nan


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ({}, scales_of_other_groups, r"other shapes.*(?:qzeros|scales).*group_size"),
        ({}, codes_of_other_inputs, r"other shapes.*qweight"),
        ({"desc_act": True}, without("h.0.mlp.w1.g_idx"), r"desc_act, but lacks .*h\.0\.mlp\.w1\.g_idx"),
        ({}, without("mlp.w2.scales"), r"3 weights missing.*mlp\.w2\.scales"),
        ({}, without("attn.c_attn.bias"), r"3 weights missing.*attn\.c_attn\.bias"),
        ({}, a_scale_that_is_not_a_number, r"damaged.*h\.1\.mlp\.w2: some of its scales are not finite"),
        ({}, groups_that_are_not_there, r"damaged.*h\.2\.attn\.c_proj.*groups 0 to 7, but there are 2"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_tensors_that_do_not_fit(tmp_path, kind, change, message):
    make(tmp_path, **kind)
    edit_tensors(tmp_path, change)
    with pytest.raises(RuntimeError, match=message):
        QWenLMHeadModel.from_pretrained(tmp_path, fp32=True)


def test_codes_of_another_number_of_bits(published):
    folder, _ = published
    edit_config(folder, bits=8)
    with pytest.raises(RuntimeError, match=r"other shapes.*qweight.*bits and group_size") as error:
        QWenLMHeadModel.from_pretrained(folder, fp32=True)
    both = r"c_attn\.qweight is (?:\(\d+, \d+\) instead of|not) \(\d+, \d+\)"
    assert re.search(both if compat.REPORTS_MISMATCHES else r"torch\.Size\(.*torch\.Size\(", str(error.value))


def test_sizes_that_cannot_be_packed():
    format = quantization.check_quantization_config({"quant_method": "gptq", "bits": 4, "group_size": 4})
    with pytest.raises(ValueError, match=r"4 bits are packed 8 to an integer.*12 inputs and 16 outputs"):
        quantization.QuantizedLinear(12, 16, format)


def test_tensor_parallelism_is_refused(published):
    folder, _ = published
    with pytest.raises(ValueError, match=r"tp_plan.*device_map"):
        QWenLMHeadModel.from_pretrained(folder, tp_plan="auto")


# --- Training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["as published", "desc_act, asymmetric int8"])
def test_gradients_go_through_the_weight_to_the_inputs(tmp_path, kind):
    plain = make(tmp_path, **KINDS[kind])
    model = QWenLMHeadModel.from_pretrained(tmp_path, fp32=True)
    ids = random_ids(2, 7)
    for network in (plain, model):
        network(ids, labels=ids).loss.backward()
    for name in ("wte.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.bias"):
        torch.testing.assert_close(
            model.transformer.get_parameter(name).grad, plain.transformer.get_parameter(name).grad, rtol=1e-4, atol=1e-6
        )
    held = [p for name, p in model.named_parameters() if name.endswith(PARTS)]
    assert held
    assert all(p.grad is None for p in held)


@needs_sdpa
@pytest.mark.parametrize("kind", ["gptq", "gptq, any order", "int8"])
def test_derivatives_in_forward_mode_and_of_functions_go_through_the_weight(kind):
    """`torch.func`: kernels know nothing of them, and would give none."""
    torch.manual_seed(0)
    module = nn.Linear(64, 32, bias=False)
    if kind == "int8":
        module = quantization.Int8Linear.rounded(module, torch.float32)
    else:
        model = with_codes(tiny_model(), desc_act="order" in kind)
        module = model.transformer.h[0].mlp.w1
    with torch.no_grad():
        weight = module(torch.eye(64)) - module(torch.zeros(1, 64))  # (in, out)
    x, tangent = torch.randn(2, 3, 64)
    _, derivative = torch.func.jvp(module, (x,), (tangent,))
    torch.testing.assert_close(derivative, tangent @ weight, rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda x: module(x).sum())(x)
    torch.testing.assert_close(gradient, weight.sum(1).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_gradients_where_only_biases_learn(published):
    """BitFit: the first layer's input has no gradient then."""
    folder, _ = published
    everything, some = (QWenLMHeadModel.from_pretrained(folder, fp32=True) for _ in range(2))
    some.requires_grad_(False)
    names = [name for name, p in some.named_parameters() if name.endswith("bias")]
    for name in names:
        some.get_parameter(name).requires_grad_(True)
    ids = random_ids(1, 4)
    for model in (everything, some):
        model(ids, labels=ids).loss.backward()
    for name in names:
        torch.testing.assert_close(some.get_parameter(name).grad, everything.get_parameter(name).grad)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "w1", "w2"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def test_adapters_train_and_merging_says_what_to_do_instead(published):
    folder, _ = published
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    adapted = lora(model).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 5 * 3
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids, losses = random_ids(4, 16), []
    for _ in range(12):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = {name.replace("base_layer.", ""): p for name, p in adapted.get_base_model().named_parameters()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match=r"codes in place of a weight.*the checkpoint in full precision"):
        adapted.merge_and_unload()
    restored = adapted.unload()
    assert all(torch.equal(p, before[name]) for name, p in restored.named_parameters())


def test_adapters_that_want_the_weight_are_told_where_it_is(published):
    folder, _ = published
    peft = pytest.importorskip("peft")
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True)
    with pytest.raises(ValueError, match="the checkpoint in full precision"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], use_dora=True))


def test_a_weight_is_not_loaded_over_codes(published):
    folder, plain = published
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True)
    with pytest.raises(RuntimeError, match=r"h.0.attn.c_attn.weight is torch.float32, but the model has codes there"):
        model.load_state_dict(plain.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"has codes for .*\(qweight\), but the model has a weight there"):
        plain.load_state_dict(model.state_dict(), strict=False)


def test_learning_all_of_it_is_refused(published):
    model = QWenLMHeadModel.from_pretrained(published[0], fp32=True)
    for network in (model, model.transformer, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="in full precision that this one was made from"):
            network.requires_grad_(True)
        network.requires_grad_(False)


def test_training_all_but_the_matrices_is_refused(published):
    folder, _ = published
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True).train()
    with pytest.raises(ValueError, match=r"nothing is frozen.*the checkpoint in full precision"):
        model(random_ids(2, 6))


# --- The kernels --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512", "avx512_bf16"])
def instructions(request):
    if not building.load():
        pytest.skip(f"no native kernels: {building.kernels_in_use()['reason']}")
    before = building.kernels_in_use()["instructions"]
    try:
        building.set_instructions(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    building.set_instructions(before)


SHAPES = {  # inputs, outputs, then how they are quantised
    "whole tiles": (256, 192, {"bits": 4, "group_size": 128}),
    "a group of two segments": (512, 64, {"bits": 4, "group_size": 256, "sym": False}),
    "one group": (320, 72, {"bits": 4, "sym": False, "v2": True}),
    "short groups": (96, 40, {"bits": 4, "group_size": 32, "sym": False}),
    "a last group that is short": (200, 104, {"bits": 4, "group_size": 64, "sym": False}),
    "groups that fill no integer": (48, 16, {"bits": 4, "group_size": 12, "sym": False}),
    "groups of 32": (384, 72, {"bits": 4, "group_size": 32, "sym": False}),
    "groups of 64": (256, 40, {"bits": 4, "group_size": 64, "sym": False, "v2": True}),
    "one group of segments": (384, 40, {"bits": 4}),
    "int8": (256, 100, {"bits": 8, "group_size": 128, "sym": False}),
    "int8 in groups of 32": (256, 44, {"bits": 8, "group_size": 32, "sym": False}),
    "int8 per channel": (132, 68, {"bits": 8}),
    "more than a tile": (160, 1112, {"bits": 4, "group_size": 80, "sym": False}),
    "any order": (256, 104, {"bits": 4, "group_size": 64, "desc_act": True, "sym": False}),
    "any order, int8": (96, 36, {"bits": 8, "group_size": 32, "desc_act": True}),
}


def in_memory(qweight, side_by_side: bool):
    return qweight.t().contiguous().t() if side_by_side else qweight


def wants_side_by_side(inputs, outputs, kind):
    return not kind.get("desc_act") and operations.gptq_wants_side_by_side(inputs, kind.get("group_size", inputs))


LAYOUTS = [(shape, False) for shape in SHAPES] + [(name, True) for name in SHAPES if wants_side_by_side(*SHAPES[name])]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 40])
@pytest.mark.parametrize(("shape", "side_by_side"), LAYOUTS)
@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float32, torch.float16]), ids=str)
def test_products(instructions, shape, rows, dtype, side_by_side):
    inputs, outputs, kind = SHAPES[shape]
    parts, weight = random_matrix(inputs, outputs, **kind)
    x = torch.randn(2, rows, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)[1:]
    bias = torch.randn(outputs).to(dtype)
    group_size = kind.get("group_size", inputs)
    g_idx = parts["g_idx"] if kind.get("desc_act") else None
    tensors = (
        in_memory(parts["qweight"], side_by_side),
        parts["qzeros"],
        parts["scales"],
        g_idx,
        kind["bits"],
        group_size,
        int(not kind.get("v2")),
    )
    y = operations.gptq_linear(x, *tensors, bias)
    assert y.dtype == dtype
    assert y.shape == (1, rows, outputs)
    expected = x.double() @ weight.t() + bias.double()
    exact = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=exact, atol=exact * float(expected.abs().max()))


@pytest.mark.parametrize("x", [0.0, 1e-38, 1e30, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_extreme_numbers(instructions, dtype, x):
    """In fixed point: what is not finite, and what is large or small beside the rest, as in floating point."""
    parts, weight = random_matrix(256, 16, group_size=128, bits=4)
    row = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    row[0, :128] = 0
    row[0, 5] = x
    qweight = in_memory(parts["qweight"], True)
    y = operations.gptq_linear(row, qweight, parts["qzeros"], parts["scales"], None, 4, 128, 1)
    expected = (row.double() @ weight.t()).to(dtype)
    assert torch.equal(y.isfinite(), expected.isfinite())
    atol = 1e-6 * max(1.0, float(expected.abs().max())) if math.isfinite(x) else 0
    torch.testing.assert_close(y[y.isfinite()], expected[y.isfinite()], rtol=2.0**-7, atol=atol)


@pytest.mark.parametrize(("shape", "side_by_side"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dequantised_matrix(instructions, shape, dtype, side_by_side):
    inputs, outputs, kind = SHAPES[shape]
    parts, weight = random_matrix(inputs, outputs, **kind)
    group_size = kind.get("group_size", inputs)
    g_idx = parts["g_idx"] if kind.get("desc_act") else None
    tensors = (
        in_memory(parts["qweight"], side_by_side),
        parts["qzeros"],
        parts["scales"],
        g_idx,
        kind["bits"],
        group_size,
        int(not kind.get("v2")),
    )
    found = operations.gptq_dequantize(*tensors, dtype=dtype)
    assert torch.equal(found, weight.t().to(torch.float32).to(dtype))
    assert torch.equal(operations.gptq_dequantize_reference(*tensors, dtype=dtype), found)
    n = 32 // kind["bits"]  # a block of outputs is a view into the whole
    some = (tensors[0][:, n : 3 * n], tensors[1][:, 1:3], tensors[2][:, n : 3 * n], *tensors[3:])
    assert torch.equal(operations.gptq_dequantize(*some, dtype=dtype), found[:, n : 3 * n])


def test_blocks_are_the_whole(monkeypatch):
    parts, weight = random_matrix(64, 96, 4, 32)
    monkeypatch.setattr(operations, "BLOCK_WEIGHTS", 64 * 40)
    tensors = *(parts[name] for name in PARTS[:3]), None, 4, 32, 1
    found = list(operations.gptq_blocks(*tensors, dtype=torch.float32))
    assert [where.start for where, _ in found] == [0, 40, 80]
    x = torch.randn(20, 64)
    y = operations.gptq_linear_reference(x, *tensors)
    torch.testing.assert_close(y.double(), x.double() @ weight.t(), rtol=1e-5, atol=1e-5)
