"""Several processes, on a CPU over gloo, against one; what they run is in parallel.py."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import types
from pathlib import Path

import pytest
import torch
from conftest import compat, lacks, modeling_qwen, python, random_ids, tiny_config, tiny_model
from qwen.qwen_quantization import Int8Linear
from safetensors.torch import load_file
from test_quantization import with_codes
from torch import nn

try:
    import parallel
except ImportError:
    pytest.skip("needs FSDP, of newer PyTorch and accelerate", allow_module_level=True)

# That of torch up to 2.6 asks a CPU for streams, that of 2.8 averages nothing over gloo.
HAS_FSDP2 = (
    hasattr(parallel.fsdp, "fully_shard")
    and hasattr(parallel.fsdp_utils, "fsdp2_prepare_auto_wrap_policy")
    and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
)
SHARDS_AT_LOADING = hasattr(compat.PreTrainedModel, "fsdp_plan")
HAS_GRAPHS = compat.KEEPS_FUSED_HEADS and importlib.util.find_spec("triton") is not None


def new_model(**changes):
    """Every linear layer has a bias: one that is split or added twice shows."""
    return tiny_model(no_bias=False, initializer_range=0.1, use_dynamic_ntk=True, use_logn_attn=True, **changes)


def wide_model():
    """Of heads as wide as kernels for GPUs take them."""
    return new_model(kv_channels=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where every process has left what it found, one start of Python for all of them."""
    folder = tmp_path_factory.mktemp("parallel")
    new_model().save_pretrained(folder / "checkpoint")
    tasks = ["sharded", "2", "sharded_with_head", "2"] if HAS_FSDP2 else []
    if compat.HAS_TENSOR_PARALLEL:
        tasks += ["tensor", "2", "tensor", "4"]
    if HAS_FSDP2 and SHARDS_AT_LOADING:
        tasks += ["sharded_at_loading", "2"]
    compute(folder, "checkpoint", *tasks)
    return folder


def compute(folder, checkpoint: str, *tasks: str) -> None:
    done = subprocess.run(
        [*python(), "-W", "ignore", Path(parallel.__file__), folder / checkpoint, folder, *tasks],
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "TRITON_INTERPRET": "1"},
        capture_output=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def found(folder, task: str, processes: int) -> list[dict]:
    """What each process found."""
    return [torch.load(folder / f"{task}-{processes}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module", params=[2, 4])
def tensor(request, folder):
    if not compat.HAS_TENSOR_PARALLEL:
        lacks("has no tensor parallelism that takes other styles than its own")
    return found(folder, "tensor", request.param)


def test_tensor_parallel_logits_and_greedy_ids_are_those_of_one_process(tensor):
    expected = parallel.results(new_model())
    real = parallel.MASK.bool()
    for result in tensor:
        torch.testing.assert_close(result["logits"][real], expected["logits"][real], rtol=0, atol=1e-4)
        assert torch.equal(result["ids"], expected["ids"])
        if parallel.HAS_LAZY_STATIC_CACHE:
            assert torch.equal(result["static ids"], expected["ids"])
        assert ("batch ids" in result) == compat.KEEPS_FUSED_HEADS
        if compat.KEEPS_FUSED_HEADS:
            assert result["batch ids"] == expected["ids"][:, 40:].tolist()


def test_every_process_has_its_heads_of_queries_keys_and_values_and_its_share_of_the_rest(tensor):
    block = new_model().transformer.h[0]
    heads = 4 // len(tensor)
    for rank, result in enumerate(tensor):
        rows = slice(16 * heads * rank, 16 * heads * (rank + 1))
        for name, fused in (("c_attn", block.attn.c_attn.weight), ("c_attn bias", block.attn.c_attn.bias)):
            assert torch.equal(result[name], torch.cat([part[rows] for part in fused.detach().chunk(3)]))
        assert torch.equal(result["c_proj"], block.attn.c_proj.weight.detach()[:, rows])
        assert torch.equal(result["gate"], block.mlp.w2.weight.detach().chunk(len(tensor))[rank])
        if "key shape" in result:
            assert result["key shape"] == (2, heads, 40, 16)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    if not HAS_GRAPHS:
        lacks("splits no matrices that the steps of graphs can be computed from")
    folder = tmp_path_factory.mktemp("graphs")
    wide_model().save_pretrained(folder / "checkpoint")
    compute(folder, "checkpoint", "graphs", "2")
    return found(folder, "graphs", 2)


@pytest.mark.slow
def test_steps_of_graphs_are_those_of_the_network_in_every_process(graphs):
    """The kernels and sums of a graph, uncaptured, with a share of the weights each."""
    expected = wide_model().generate(parallel.IDS, attention_mask=parallel.MASK, **parallel.GREEDY)
    for result in graphs:
        assert result["plain"] == [True, False]
        assert result["steps"] == 3 + 3 + 2 + 3 + 5  # one too many where only a criterion knows the end
        for name in ("rows", "row", "int8"):
            ours, theirs = result[name]
            assert torch.equal(ours["ids"], theirs["ids"])
            torch.testing.assert_close(ours["logits"], theirs["logits"], rtol=0, atol=1e-4)
        assert torch.equal(result["rows"][0]["ids"], expected[:, :44])


@pytest.mark.slow
def test_processes_draw_the_same_and_end_together(graphs):
    """Though each has another random state, and another opinion of the end: the first of them decides."""
    first, second = graphs
    assert torch.equal(first["drawn"], second["drawn"])
    assert not torch.equal(first["drawn"], first["rows"][0]["ids"])
    assert first["ended"].shape == second["ended"].shape == (2, 45)
    assert torch.equal(first["ended"], second["ended"])


def test_tensor_parallel_training_and_saving(tensor, folder):
    if not compat.KEEPS_FUSED_HEADS:
        assert all("Save from a model loaded without tp_plan" in result["not saved"] for result in tensor)
        lacks("gives no gradients, or files, of fused projections under tensor parallelism")
    expected = parallel.training(new_model())
    for result in tensor:
        torch.testing.assert_close(result["loss"], expected["loss"])
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
    saved = load_file(folder / f"tensor-{len(tensor)}-saved" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in new_model().state_dict().items())


def test_heads_that_do_not_divide_are_refused():
    if not compat.HAS_TENSOR_PARALLEL:
        lacks("has no tensor parallelism that takes other styles than its own")
    c_attn = new_model().transformer.h[0].attn.c_attn
    style, three = compat._FusedHeads(), types.SimpleNamespace(size=lambda: 3)
    with pytest.raises(ValueError, match="4 attention heads can't be shared out evenly to 3 processes"):
        style.shard_param(c_attn, "weight", three) if compat.KEEPS_FUSED_HEADS else style.prepare_module_tp(
            c_attn, three
        )


@pytest.mark.parametrize("task", ["sharded", "sharded_with_head", "sharded_at_loading"])
def test_fsdp2_wraps_blocks_and_gives_the_same_loss_and_gradients(task, folder):
    if not HAS_FSDP2:
        pytest.skip("needs FSDP2 that averages over gloo, which torch 2.8 does not")
    if task == "sharded_at_loading" and not SHARDS_AT_LOADING:
        lacks("has no FSDP plans")
    results = found(folder, task, 2)
    expected = parallel.training(new_model(), mask=torch.ones_like(parallel.IDS))
    torch.testing.assert_close((results[0]["loss"] + results[1]["loss"]) / 2, expected["loss"])
    for result in results:
        assert {"", *(f"transformer.h.{i}" for i in range(3))} <= set(result["wrapped"])
        assert result["share"] == pytest.approx(0.5, abs=0.01)
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


def test_what_fsdp2_has_divided_is_saved_as_the_model_it_was(folder):
    if not HAS_FSDP2:
        pytest.skip("needs FSDP2 that averages over gloo, which torch 2.8 does not")
    saved, checkpoint = folder / "sharded_with_head-2-saved", folder / "checkpoint"
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in checkpoint.glob("*.py")}
    model = parallel.load(saved)
    assert model.config.architectures == ["QWenLMHeadModel"]
    for name, weight in parallel.load(checkpoint).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_the_pipeline_plan_cuts_the_network_anywhere():
    """As vLLM uses it: a stage has some blocks, and in place of what others have, modules that pass on their input."""

    class Elsewhere(nn.Module):
        def forward(self, x, *args, **kwargs):
            return x

    whole = new_model()
    embedding, blocks, norm = whole.config.base_model_pp_plan
    assert [name for name, m in whole.transformer.named_children() if [*m.parameters()]] == [embedding, blocks, norm]
    ids = random_ids(2, 40)
    for first in range(4):
        stages = new_model().transformer, new_model().transformer
        for stage, own in zip(stages, (range(first), range(first, 3))):
            for i in set(range(3)) - set(own):
                getattr(stage, blocks)[i] = Elsewhere()
        setattr(stages[0], norm, Elsewhere())
        setattr(stages[1], embedding, Elsewhere())
        with torch.no_grad():
            x = stages[0](ids, use_cache=False).last_hidden_state
            x = stages[1](inputs_embeds=x, use_cache=False).last_hidden_state
            torch.testing.assert_close(whole.lm_head(x), whole(ids).logits)


@pytest.mark.parametrize("kind", ["float", "gptq", "int8"])
def test_a_copy_of_data_parallel_computes_what_the_model_does(kind, monkeypatch):
    """It has no parameters, but tensors in their places."""
    model = new_model()
    if kind == "gptq":
        model = with_codes(model)
    elif kind == "int8":
        for block in model.transformer.h:
            block.mlp.w1 = Int8Linear.rounded(block.mlp.w1, torch.float32)
    module = importlib.import_module("torch.nn.parallel.replicate")
    copied = lambda tensors, *args, **kwargs: [[t.detach() for t in tensors]]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copied)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *args: device)
    (copy,) = module.replicate(model, [0])
    assert not any(p.is_floating_point() for p in copy.parameters())
    ids = random_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(copy(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_no_module_looks_at_parameters_when_it_is_made(monkeypatch):
    """DeepSpeed ZeRO-3 takes a module's parameters away at the end of its `__init__`, before its parents go on."""
    for cls in (nn.Linear, nn.Embedding, modeling_qwen.RMSNorm):

        def make(self, *args, _init=cls.__init__, **kwargs):
            _init(self, *args, **kwargs)
            for p in self.parameters(recurse=False):
                p.data = p.data.new_empty(0)

        monkeypatch.setattr(cls, "__init__", make)
    model = modeling_qwen.QWenLMHeadModel(tiny_config(no_bias=False))
    assert {p.numel() for p in model.parameters()} == {0}
    assert set(model._no_split_modules) == {type(model.transformer.h[0]).__name__}
