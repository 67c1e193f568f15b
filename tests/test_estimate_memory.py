"""What tools/estimate_memory.py says, against models and caches that are there."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import weakref

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import ROOT, compat, modeling_qwen, needs_sdpa, random_ids, tiny_config, tiny_model
from qwen.transformers_compat import ALL_ATTENTION_FUNCTIONS
from test_quantization import quantization, with_codes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

sys.path.insert(0, str(ROOT / "tools"))
import estimate_memory as tool

GB = tool.GB
WIDE = {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 352}


def published(size: str, matrices: str = "full"):
    config = tool.QWenConfig(**dict(zip(tool.SHAPE, tool.SIZES[size])), int8_weights=matrices == "int8")
    if matrices in ("Int4", "Int8"):
        config.quantization_config = {"quant_method": "gptq", "bits": int(matrices[-1]), "group_size": 128}
    return config


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("key", ["int8_weights", "int8_lm_head"])
def test_bytes_of_int8_weights_are_those_of_the_model(dtype, key):
    config = tiny_config(no_bias=False, **WIDE, **{key: True})
    with init_empty_weights():
        model = modeling_qwen.QWenLMHeadModel(config)
    size = sum(
        t.numel()
        * (
            torch.empty(0, dtype=tool.DTYPES[dtype]).element_size()
            if t.is_floating_point() and "scale" not in name
            else t.element_size()
        )
        for name, t in model.state_dict().items()
    )
    assert tool.memory(config, dtype)["weights"] == size


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, -1), (4, 128)])
@pytest.mark.parametrize("lm_head", [False, True, "int8"])
def test_bytes_of_gptq_weights_are_those_of_the_model(dtype, bits, group_size, lm_head):
    int8, lm_head = {"int8_lm_head": lm_head == "int8"}, lm_head is True
    config = tiny_config(**WIDE, **int8)
    config.quantization_config = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "lm_head": lm_head
    }  # fmt: skip
    built = tiny_config(**WIDE, **int8)
    setattr(built, tool.quantization.HELD, config.quantization_config)
    with init_empty_weights():
        model = modeling_qwen.QWenLMHeadModel(built).to(tool.DTYPES[dtype])
    assert type(model.transformer.h[0].mlp.w1).__name__ == "QuantizedLinear"
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    need = tool.memory(config, dtype)
    assert need["weights"] == size
    _, used = tool.place(config, dtype, need, [80 * GB])
    assert used == {0: sum(need.values())}


@pytest.mark.parametrize(
    "config",
    [
        *map(published, tool.SIZES),
        tiny_config(),
        tiny_config(no_bias=False),
        tiny_config(**WIDE),
        tiny_config(kv_channels=32),
    ],
)
def test_parameters_are_those_of_the_model(config):
    with init_empty_weights():
        model = modeling_qwen.QWenLMHeadModel(config)
    assert tool.parameters(config) == sum(p.numel() for p in model.parameters())
    for name in tool.DTYPES:
        held = sum(p.numel() * p.element_size() for p in model.to(tool.DTYPES[name]).parameters())
        assert tool.memory(config, name)["weights"] == held


@pytest.mark.parametrize("kv_channels", [16, 32])
@pytest.mark.parametrize("context", [1, 256, 300])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cache_is_what_caches_hold(dtype, context, kv_channels):
    model = tiny_model(kv_channels=kv_channels).to(tool.DTYPES[dtype])
    caches = {"full": modeling_qwen.QWenCache()}
    caches.update({f"int{bits}": modeling_qwen.QWenQuantizedCache(bits) for bits in (8, 4)})
    for name, cache in caches.items():
        with torch.no_grad():
            model(random_ids(2, context), past_key_values=cache)
        assert tool.memory(model.config, dtype, context, 2, name)["cache"] == cache.nbytes


def test_a_dynamic_cache_has_no_blocks():
    model = tiny_model()
    with torch.no_grad():
        cache = model(random_ids(2, 256), past_key_values=compat.DynamicCache()).past_key_values
    tensors = [t for i in range(3) for t in (layer_of(cache, i))]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert tool.memory(model.config, "fp32", 256, 2)["cache"] == held


def layer_of(cache, i: int):
    layers = getattr(cache, "layers", None)
    if layers is not None and hasattr(layers[i], "keys"):
        return layers[i].keys, layers[i].values
    return cache[i]


class Live(TorchDispatchMode):
    """The bytes of tensors that were made and are still there, and the most that there were."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        for tensor in tree_flatten(output)[0]:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self.known or storage._cdata in given:
                continue
            self.known.add(storage._cdata)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return output

    def gone(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.held -= nbytes


SHAPES = {
    "MLP": {"intermediate_size": 1024},
    "attention": {"intermediate_size": 64},
    "heads": {"kv_channels": 64, "intermediate_size": 256},
    "vocabulary": {"vocab_size": 400_000},
}


@needs_sdpa
@pytest.mark.parametrize("cache", ["full", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_peak_of_a_prefill(shape, dtype, cache):
    changes = {"num_hidden_layers": 4, "hidden_size": 128, "kv_channels": 32, **SHAPES[shape]}
    model = tiny_model(use_logn_attn=True, attn_implementation="sdpa", **changes).to(tool.DTYPES[dtype])
    ids = random_ids(2, 512)
    store = modeling_qwen.QWenCache() if cache == "full" else modeling_qwen.QWenQuantizedCache(8)
    with torch.no_grad(), Live() as live:
        logits = model(ids, past_key_values=store, logits_to_keep=1).logits[:, -1]
        logits.to(copy=True, dtype=torch.float32)  # as `generate` does
    need = tool.memory(model.config, dtype, 512, 2, cache)
    floor, limit = 0.97, 1.03
    if not hasattr(transformers.modeling_utils, "ALL_ATTENTION_FUNCTIONS"):
        # Up to 4.47 the projection of attention's output has one more copy of it beside it; with torch 2.4 it has not.
        h, p = model.config.hidden_size, model.config.num_attention_heads * model.config.kv_channels
        copied = 2 * 512 * (2 * h + 8 * p) * model.lm_head.weight.element_size()
        if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 4):
            need["activations"] = max(need["activations"], copied)
        floor, limit = 0.96, 1.05
    elif "key.contiguous()" in inspect.getsource(ALL_ATTENTION_FUNCTIONS["sdpa"]):
        limit = 1.2  # up to 4.55 keys and values are copied
    assert floor < live.peak / (need["cache"] + need["activations"]) < limit


@needs_sdpa
def test_a_prefill_with_codes_takes_no_more(monkeypatch):
    """As a GPU computes it: by blocks of the matrices, whose products lie nowhere but in the whole."""
    pytest.importorskip("triton")
    monkeypatch.setattr(quantization, "gptq_linear", importlib.import_module("qwen.triton_kernels").gptq_linear)
    monkeypatch.setattr(importlib.import_module("qwen.qwen_ops"), "BLOCK_WEIGHTS", 1 << 12)
    changes = {"hidden_size": 128, "kv_channels": 32, "no_bias": False, **SHAPES["MLP"]}  # as GPTQ's checkpoints have
    peaks, ids = [], random_ids(2, 512)
    for make in (lambda model: model, with_codes):
        model = make(tiny_model(attn_implementation="sdpa", **changes).bfloat16())
        with torch.no_grad(), Live() as live:
            model(ids, past_key_values=modeling_qwen.QWenCache(), logits_to_keep=1)
        peaks.append(live.peak)
    assert peaks[1] < 1.03 * peaks[0]


def test_the_peak_of_72b_in_4_bits_on_a_gpu():
    """On an H100, behind 32,768 tokens with an int4 cache, benchmarks/RESULTS.md."""
    need = tool.memory(published("72B", "Int4"), "bf16", 32768, cache="int4")
    assert sum(need.values()) == pytest.approx(73.47 * GB, rel=0.005)


@pytest.mark.parametrize(("context", "peak"), [(2048, 16.74), (8192, 20.52), (32000, 35.17)])
def test_peaks_recorded_on_a_gpu(context, peak):
    """Of Qwen-7B in bfloat16 on an H100, benchmarks/RESULTS.md."""
    assert sum(tool.memory(published("7B"), "bf16", context).values()) == pytest.approx(peak * GB, rel=0.005)


def test_places_hold_all_there_is():
    """Layers, and what belongs to them, lie on the devices in equal numbers; what has no room is on the CPU."""
    config = published("72B")
    need = tool.memory(config, "bf16", 8192)
    _, used = tool.place(config, "bf16", need, [80 * GB] * 3)
    assert set(used) == {0, 1, 2}
    assert sum(used.values()) == pytest.approx(need["weights"] + need["cache"] + 3 * need["activations"], abs=100)
    assert max(used.values()) < 1.05 * min(used.values())
    assert tool.fits(config, "bf16", 8192, 1, "full", [80 * GB] * 3)
    limits, used = tool.place(config, "bf16", need, [80 * GB])
    assert used["cpu"] + used[0] == pytest.approx(sum(need.values()), abs=100)
    assert limits[0] + need["cache"] + need["activations"] == 79 * GB
    assert used[0] <= 79 * GB  # the cache of all layers included
    assert not tool.fits(config, "bf16", 8192, 1, "full", [80 * GB])


def test_a_device_that_just_fits():
    config = published("7B")
    whole = sum(tool.memory(config, "bf16", 8192).values()) + tool.RESERVE
    assert tool.fits(config, "bf16", 8192, 1, "full", [whole])
    assert not tool.fits(config, "bf16", 8192, 1, "full", [whole - 10**6])


def test_what_it_advises_fits_and_no_more_does():
    config, devices = published("7B"), [24 * GB]
    found = tool.advice(config, "fp32", 4096, 1, "full", devices)
    assert found[0].startswith("bf16=True")
    assert found[-1] == "2 such devices"
    advice = tool.advice(config, "bf16", 32768, 1, "full", devices)
    longest = int(re.search(r"a context of ([\d,]+) tokens", str(advice)).group(1).replace(",", ""))
    assert tool.fits(config, "bf16", longest, 1, "full", devices)
    assert not tool.fits(config, "bf16", longest + 256, 1, "full", devices)
    assert "cache_bits=4" in "".join(tool.advice(config, "bf16", 16384, 1, "full", [21 * GB]))


def test_the_command(capsys):
    assert tool.main(["--size", "7B"]) == 0
    assert tool.main([str(ROOT / "demo"), "--devices", "2GB"]) == 0
    printed = capsys.readouterr().out
    assert "7.72 billion parameters in bf16; 1 x 8,192 tokens" in printed
    assert "15.44 GB" in printed
    assert printed.endswith("It fits.\n")
    assert tool.main([str(ROOT / "config.json"), "--devices", "80 GB x 2", "--dtype", "fp16"]) == 1
    printed = capsys.readouterr().out
    assert "72.29 billion parameters in fp16" in printed
    assert tool.main(["--size", "72B", "--bits", "4"]) == 0
    assert "72.29 billion parameters in 4 bits and bf16;" in capsys.readouterr().out
    assert tool.main(["--size", "72B", "--bits", "4", "--int8-lm-head"]) == 0
    assert "40.03 GB" in capsys.readouterr().out
    assert "It does not fit." in printed
    assert "device cpu" in printed


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("24GB", [24 * GB]),
        ("24G", [24 * GB]),
        ("24gb x 2", [24 * GB] * 2),
        ("24GiB", [24 * 2**30]),
        ("24564MiB", [24564 * 2**20]),  # as nvidia-smi shows it
        ("24000MBx3", [24 * GB] * 3),
    ],
)
def test_devices_in_the_units_that_people_write(text, sizes):
    assert tool.read_devices(text) == sizes


@pytest.mark.parametrize(("name", "short"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32")])
def test_precisions_by_both_names(name, short, capsys):
    printed = []
    for dtype in (name, short):
        assert tool.main(["--size", "1.8B", "--dtype", dtype]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert f"in {short};" in printed[0]


def test_it_advises_fewer_bits_where_they_fit(capsys):
    """14B does not fit on a card of 24 GB; in 8 and in 4 bits it does, with the figures of README.md's table."""
    assert tool.main(["--size", "14B", "--context", "2048", "--devices", "24GB"]) == 1
    printed = capsys.readouterr().out
    assert "  the Int8 checkpoint (17.94 GB)\n  the Int4 checkpoint (11.58 GB)\n  2 such devices\n" in printed
    assert tool.advice(published("72B"), "bf16", 2048, 1, "full", [48 * GB])[0] == "4 such devices"  # Int4: 47.05 GB
    assert tool.advice(published("72B"), "bf16", 2048, 1, "full", [49 * GB])[0] == "the Int4 checkpoint (47.05 GB)"
    for config in (published("14B", "Int8"), published("14B", "int8")):
        found = tool.advice(config, "bf16", 2048, 1, "full", [14 * GB])
        assert found == ["the Int4 checkpoint (11.58 GB)", "2 such devices"]
    assert "checkpoint" not in str(tool.advice(published("14B", "Int4"), "bf16", 2048, 1, "full", [12 * GB]))


def test_where_what_does_not_fit_is_placed(capsys):
    assert tool.main(["--size", "14B", "--context", "32768", "--devices", "24GB x 2"]) == 1
    printed = capsys.readouterr().out
    assert "Weights, keys, values and activations with device_map=" in printed
    (over,) = [line for line in printed.splitlines() if "device 0" in line]
    assert over.partition(" of ")[2] == "24, which is too much: the keys and values of the layers on cpu are here too"
    assert "device 1        23.22 GB of 24\n" in printed
    assert "max_memory={0: '9911MB', 1: '9911MB'}" in printed
    # Keys, values and activations fill the card.
    assert tool.main(["--size", "72B", "--bits", "4", "--devices", "24GB"]) == 1
    printed = capsys.readouterr().out
    assert "max_memory" not in printed
    assert "0MB" not in printed
    assert "No weights have room" in printed


def test_what_help_says(capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("GB is 10^9 bytes", "24564MiB", "default: 8,192", "bits of each weight", "bfloat16"):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments"),
        (["nowhere"], "There is no folder nowhere"),
        (["nowhere.json"], "There is no file nowhere.json"),
        (["{bare}"], "bare has no config.json"),
        (["{llama}"], 'no "model_type": "qwen"'),
        (["{broken}"], "is not the config.json"),
        (["{odd}"], "intermediate_size"),
        (["{narrow}", "--cache", "int4"], "4 bits need a head of a multiple of 16"),
        (["--size", "3B"], "invalid choice"),
        (["--size", "7B", "--dtype", "int8"], "invalid choice"),
        (["--size", "7B", "--context", "0"], "a number of at least 1 is wanted, found '0'"),
        (["--size", "7B", "--batch", "-1"], "at least 1 is wanted, found '-1'"),
        (["--size", "7B", "--int8"], "unrecognized arguments: --int8"),
        (["{head}", "--int8-lm-head"], "output layer in GPTQ's format already"),
        (["--size", "7B", "--devices", "80"], "80 lacks its unit: write 80GB"),
        (["--size", "7B", "--devices", "80 x 2"], "80 x 2 lacks its unit: write 80GB x 2"),
        (["--size", "7B", "--devices", "80KB"], 'devices are given as "80GB" or "80GB x 2", found'),
        (["--size", "7B", "--devices", "80GB x 0"], "devices are given as"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    files = {
        "llama": {"model_type": "llama"},
        "odd": {"model_type": "qwen", "intermediate_size": 7},
        "narrow": {"model_type": "qwen", "kv_channels": 8},
        "head": {"model_type": "qwen", "quantization_config": {"quant_method": "gptq", "bits": 4, "lm_head": True}},
    }
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    (tmp_path / "broken").write_text("{")
    (tmp_path / "bare").mkdir()
    with pytest.raises(SystemExit) as stopped:
        tool.main([re.sub(r"\{(.*)\}", rf"{tmp_path}/\1", argument) for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_figures_of_the_page():
    """docs/loading.md: the table of memory, and which devices are enough."""
    page = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    columns = [(2048, "full"), (8192, "full"), (32768, "full"), (32768, "int8")]
    for size in tool.SIZES:
        needs = [tool.memory(published(size), "bf16", context, 1, cache) for context, cache in columns]
        figures = [needs[0]["weights"], *(sum(need.values()) for need in needs)]
        assert f"| Qwen-{size} | " + " | ".join(f"{n / GB:.2f}" for n in figures) + " |" in page

    def fitting(
        size: str, gigabytes: int, number: int = 1, context: int = 8192, cache: str = "full", matrices: str = "full"
    ) -> bool:
        return tool.fits(published(size, matrices), "bf16", context, 1, cache, [gigabytes * GB] * number)

    def together(size: str, matrices: str, dtype: str = "bf16", context: int = 8192) -> str:
        return f"{sum(tool.memory(published(size, matrices), dtype, context, 1).values()) / GB:.1f}"

    assert fitting("14B", 80, context=32768)
    assert fitting("1.8B", 16, context=32768)
    assert fitting("1.8B", 24, context=32768)
    assert fitting("7B", 24)
    assert not fitting("7B", 24, context=32768, cache="int4")
    assert not fitting("14B", 24, context=256, cache="int4")
    for matrices in ("int8", "Int4"):
        assert fitting("14B", 24, matrices=matrices)
    assert not fitting("72B", 24, context=256, cache="int4", matrices="Int4")
    assert fitting("14B", 24, 8)
    assert not fitting("7B", 16, context=256, cache="int4")
    assert [number for number in (1, 2, 3) if fitting("72B", 80, number)] == [3]
    assert [cache for cache in tool.CACHES if fitting("72B", 80, 2, cache=cache)] == ["int4"]
    assert [cache for cache in tool.CACHES if fitting("72B", 24, 8, cache=cache)] == ["int8", "int4"]
    assert fitting("72B", 80, 2, context=2048)
    assert fitting("72B", 24, 8, context=2048)
    for context, cache in ((13312, "full"), (32768, "int4")):
        assert fitting("72B", 80, context=context, cache=cache, matrices="Int4")
    assert not fitting("72B", 80, context=32768, cache="int8", matrices="Int4")
    assert fitting("1.8B", 12)
    for gigabytes, matrices, contexts in ((16, "Int4", [2048, 8192]), (16, "int8", [2048, 8192]), (12, "int8", [2048])):
        found = [n for n in (2048, 8192) if fitting("7B", gigabytes, context=n, matrices=matrices)]
        assert found == contexts
    assert fitting("7B", 12, matrices="Int4")
    assert fitting("14B", 16, cache="int8", matrices="Int4")
    assert [n for n in (2048, 8192) if fitting("14B", 12, context=n, cache="int8", matrices="Int4")] == [2048]
    cells = [[together(size, matrices) for matrices in ("full", "int8", "Int4")] for size in ("1.8B", "7B", "14B")]
    assert cells == [["5.7", "4.1", "3.9"], ["20.5", "13.4", "10.9"], ["36.0", "22.6", "17.3"]]
    assert "5.7 GB of memory, 4.1 in int8, 3.9 in Int4 | 20.5 GB; 13.4; 10.9 | 36.0 GB; 22.6; 17.3 |" in page
    assert [together("7B", matrices, "fp32", 2048) for matrices in ("int8", "Int4")] == ["12.1", "10.9"]
