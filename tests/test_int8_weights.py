"""Checkpoints with int8 weights: tools/quantize_weights.py, loading what it writes, and what it refuses."""

from __future__ import annotations

import copy
import doctest
import functools
import importlib
import inspect
import json
import pickle
import shutil
import sys

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import CODE, ROOT, compat, lacks, modeling_qwen, random_ids, run, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "tools"))
tool = importlib.import_module("quantize_weights")
QWenLMHeadModel = modeling_qwen.QWenLMHeadModel


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A random checkpoint in three files, and what the tool makes of it."""
    folder = tmp_path_factory.mktemp("int8")
    model = tiny_model(no_bias=False)
    with torch.no_grad():
        model.lm_head.weight[3] = 0  # a channel without a step
    model.save_pretrained(folder / "whole", max_shard_size="200KB")
    shutil.copy(ROOT / "demo" / "qwen.tiktoken", folder / "whole")
    shutil.copy(ROOT / "tokenizer_config.json", folder / "whole")
    assert len(list((folder / "whole").glob("*.safetensors"))) > 1
    tool.make(folder / "whole", folder / "int8")
    return model, folder


def dequantised(model):
    """The same network with the weights that int8 stands for, by the definition in float64."""
    copy = QWenLMHeadModel(tiny_config(no_bias=False)).eval()
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for name, weight in state.items():
        if weight.dim() == 2 and "wte" not in name:
            step = weight.abs().max(1, keepdim=True).values / 127
            step[step == 0] = 1
            state[name] = (weight / step).round() * step
    copy.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return copy


def test_the_example_in_the_docstring():
    assert doctest.testmod(importlib.import_module("qwen.qwen_quantization")).failed == 0


def test_it_computes_with_the_weights_that_int8_stands_for(checkpoints):
    model, folder = checkpoints
    ours = QWenLMHeadModel.from_pretrained(folder / "int8", fp32=True).eval()
    expected = dequantised(model)
    for shape in ((1, 1), (2, 3), (3, 20)):  # few rows, which the native kernel takes, and many
        ids = random_ids(*shape)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        error = (ours(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert 1e-4 < error < 0.05
    prompt = random_ids(1, 8)
    kept = {"max_new_tokens": 12, "do_sample": False}
    assert ours.generate(prompt, **kept).tolist() == expected.generate(prompt, **kept).tolist()


def test_matrices_are_int8_and_the_rest_is_as_it_was(checkpoints):
    model, folder = checkpoints
    ours = QWenLMHeadModel.from_pretrained(folder / "int8", dtype=torch.bfloat16)
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2 and "wte" not in name}
    assert {name for name, p in ours.named_parameters() if p.dtype == torch.int8} == matrices
    assert ours.dtype == torch.bfloat16
    assert ours.lm_head.weight_scale.dtype == torch.float32
    assert ours(random_ids(1, 4)).logits.isfinite().all()


def test_it_is_saved_and_loaded_as_it_is(checkpoints, tmp_path):
    _, folder = checkpoints
    ours = QWenLMHeadModel.from_pretrained(folder / "int8", fp32=True).eval()
    ours.save_pretrained(tmp_path)
    again = QWenLMHeadModel.from_pretrained(tmp_path, fp32=True).eval()
    with torch.no_grad():
        assert torch.equal(again(random_ids(1, 5)).logits, ours(random_ids(1, 5)).logits)


def test_it_loads_as_a_user_loads_it(checkpoints):
    """With the code in the folder, which the tool has put there."""
    _, folder = checkpoints
    assert all((folder / "int8" / name).exists() for name in CODE)
    printed = run(
        "from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained('int8', trust_remote_code=True);"
        "print(m.lm_head.weight.dtype, m.config.int8_weights)",
        folder,
        HF_MODULES_CACHE=str(folder / "modules"),
    )
    assert printed == "torch.int8 True"


def test_gradients_reach_what_is_before_int8_weights(checkpoints):
    _, folder = checkpoints
    ours = QWenLMHeadModel.from_pretrained(folder / "int8", fp32=True)
    ids = random_ids(1, 6)
    ours(ids, labels=ids).loss.backward()
    assert ours.transformer.wte.weight.grad.abs().sum() > 0
    assert ours.lm_head.weight.grad is None


@pytest.mark.skipif(not hasattr(torch, "compiler"), reason="needs torch 2.1 to know that it compiles")
def test_it_compiles(checkpoints):
    _, folder = checkpoints
    ours = QWenLMHeadModel.from_pretrained(folder / "int8", fp32=True).eval()
    layer = ours.transformer.h[0].mlp
    x = torch.randn(1, 2, 64)
    whole = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 4)  # which breaks the graph at a kind of parameter
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=whole, backend="eager")(x), layer(x))


def test_what_does_not_go_with_it_says_so(checkpoints):
    _, folder = checkpoints
    ours = QWenLMHeadModel.from_pretrained(folder / "int8", fp32=True)
    with pytest.raises(ValueError, match=r"resize.*before tools/quantize_weights.py"):
        ours.resize_token_embeddings(400)
    assert ours.resize_token_embeddings() is ours.get_input_embeddings()
    with pytest.raises(ValueError, match="int8_weights does not go with the method that the call names"):
        QWenLMHeadModel.from_pretrained(
            folder / "int8", quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)
        )


@pytest.mark.parametrize("arguments", [{}, {"strict": False}], ids=str)
def test_codes_and_weights_are_not_taken_for_each_other(checkpoints, tmp_path, arguments):
    _, folder = checkpoints
    load = functools.partial(QWenLMHeadModel.from_pretrained, fp32=True, **arguments)
    with pytest.raises(RuntimeError, match=r"no matrices in int8.*Leave int8_weights out"):
        load(folder / "whole", int8_weights=True)
    load(folder / "whole", int8_lm_head=True).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"no matrices in int8.*Leave int8_weights out"):
        load(tmp_path, int8_weights=True)
    stops = r"|loading state_dict for Linear"  # 4.53 to 4.57 stop at the codes, in words of PyTorch's
    with pytest.raises(RuntimeError, match=r"has its matrices in int8.*Leave out int8_weights=False" + stops):
        load(folder / "int8", int8_weights=False)
    with pytest.raises(RuntimeError, match=r"has its output layer in int8.*Leave out int8_lm_head=False" + stops):
        load(tmp_path, int8_lm_head=False)
    assert modeling_qwen.QWenModel.from_pretrained(tmp_path, fp32=True, int8_lm_head=False).wte.weight.isfinite().all()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_the_other_kind_is_refused(checkpoints, assign):
    """PyTorch casts weights into codes, and codes into weights; strict=False says nothing of it."""
    plain, folder = checkpoints
    ours = QWenLMHeadModel.from_pretrained(folder / "int8", fp32=True)
    kept = {"strict": False, **({"assign": True} if assign else {})}
    if assign and "assign" not in inspect.signature(torch.nn.Module.load_state_dict).parameters:
        pytest.skip("needs torch 2.1")
    codes = codes_of(ours)
    for network, state, name in (
        (ours, plain.state_dict(), "lm_head.weight"),
        (ours.transformer, plain.transformer.state_dict(), "h.0.attn.c_attn.weight"),
        (ours.lm_head, plain.lm_head.state_dict(), "weight"),
        (torch.nn.ModuleDict({"wrapped": ours}), {"wrapped.lm_head.weight": plain.lm_head.weight}, "wrapped.lm_head"),
        (ours, {"lm_head.weight": torch.zeros(320, 64, dtype=torch.int32)}, "lm_head.weight is torch.int32"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}.*but the model has codes there.*tools/quantize_weights.py"):
            network.load_state_dict(state, **kept)
    assert all(map(torch.equal, codes_of(ours), codes))
    network = copy.deepcopy(plain)
    for quantised in (ours, QWenLMHeadModel.from_pretrained(folder / "whole", fp32=True, int8_lm_head=True)):
        with pytest.raises(RuntimeError, match=r"has codes for .*\(weight_scale\), but the model has a weight there"):
            network.load_state_dict(quantised.state_dict(), **kept)
        assert torch.equal(network.lm_head.weight, plain.lm_head.weight)
        quantised.load_state_dict({name: t.clone() for name, t in quantised.state_dict().items()}, **kept)
    with init_empty_weights():
        empty = QWenLMHeadModel(tiny_config(no_bias=False, int8_weights=True))
    with pytest.raises(RuntimeError, match="but the model has codes there"):
        empty.load_state_dict(plain.state_dict(), **kept)


@pytest.mark.parametrize("key", ["int8_weights", "int8_lm_head"])
@pytest.mark.parametrize("make", [QWenLMHeadModel._from_config, QWenLMHeadModel], ids=["from_config", "the class"])
def test_a_new_model_has_random_weights_rounded(monkeypatch, tmp_path, key, make):
    monkeypatch.setattr(importlib.import_module("qwen.qwen_quantization"), "REORDERED_CODES", 64 * 100)  # several parts
    config = tiny_config(no_bias=False, **{key: True})
    torch.manual_seed(0)
    model = make(config)
    found = {name: m for name, m in model.named_modules() if type(m).__name__ == "Int8Linear"}
    assert len(found) == {"int8_weights": 16, "int8_lm_head": 1}[key]
    for name, module in found.items():
        std = config.initializer_range / (6**0.5 if name.endswith("c_proj") else 1)
        weight = module.codes * module.weight_scale[:, None]
        assert weight.std() == pytest.approx(std, rel=0.05)
        assert (module.codes.abs().amax(1) == 127).all()
        assert module.bias is None or not module.bias.any()
    model.eval().save_pretrained(tmp_path)
    again = QWenLMHeadModel.from_pretrained(tmp_path, fp32=True).eval()
    with torch.no_grad():
        assert torch.equal(again(random_ids(1, 5)).logits, model(random_ids(1, 5)).logits)


@pytest.mark.skipif(
    not compat.REPORTS_MISMATCHES, reason="needs a release that makes room of zeros for what is missing"
)
def test_new_values_for_codes_that_are_missing(checkpoints, tmp_path):
    shutil.copytree(checkpoints[1] / "int8", tmp_path / "int8")
    for file in (tmp_path / "int8").glob("*.safetensors"):
        tensors = {name: t for name, t in load_file(file).items() if "h.1.mlp.w1.weight" not in name}
        save_file(tensors, file, metadata={"format": "pt"})
    index = tmp_path / "int8" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"] = {k: v for k, v in places["weight_map"].items() if "h.1.mlp.w1.weight" not in k}
    index.write_text(json.dumps(places))
    model = QWenLMHeadModel.from_pretrained(tmp_path / "int8", fp32=True, strict=False)
    module, whole = model.transformer.h[1].mlp.w1, QWenLMHeadModel.from_pretrained(checkpoints[1] / "int8", fp32=True)
    assert (module.codes * module.weight_scale[:, None]).std() == pytest.approx(0.2, rel=0.05)
    for name, tensor in whole.state_dict().items():
        assert "h.1.mlp.w1" in name or torch.equal(tensor, model.state_dict()[name])


def test_a_matrix_that_is_not_finite_is_not_rounded(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.w1.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "whole")
    for file in (ROOT / "demo" / "qwen.tiktoken", ROOT / "tokenizer_config.json"):
        shutil.copy(file, tmp_path / "whole")
    with pytest.raises(tool.Problem, match=r"h.1.mlp.w1.weight can't be rounded: it holds numbers that are not finite"):
        tool.make(tmp_path / "whole", tmp_path / "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_scales_that_are_not_finite_are_named(checkpoints, tmp_path):
    shutil.copytree(checkpoints[1] / "int8", tmp_path / "int8")
    name = "transformer.h.1.mlp.w1.weight_scale"
    places = json.loads((tmp_path / "int8" / "model.safetensors.index.json").read_text())
    file = tmp_path / "int8" / places["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        RuntimeError, match=r"int8 is damaged: transformer.h.1.mlp.w1: some of its scales are not finite"
    ):
        QWenLMHeadModel.from_pretrained(tmp_path / "int8")


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.1.mlp.w1.weight", "lm_head.weight_scale"])
def test_a_tensor_that_the_checkpoint_lacks_is_missed(checkpoints, tmp_path, name):
    shutil.copytree(checkpoints[1] / "int8", tmp_path / "int8")
    index = tmp_path / "int8" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    file = tmp_path / "int8" / places["weight_map"].pop(name)
    index.write_text(json.dumps(places))
    save_file({key: t for key, t in load_file(file).items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=rf"1 weights missing from it \({name}"):
        QWenLMHeadModel.from_pretrained(tmp_path / "int8", fp32=True)


# --- Adapters, and what can't learn --------------------------------------------------------------------------------

MATRICES = ["c_attn", "c_proj", "w1", "w2", "lm_head"]
FULL_PRECISION = "in full precision that this one was made from"


@pytest.fixture
def int8(checkpoints):
    _, folder = checkpoints
    return QWenLMHeadModel.from_pretrained(folder / "int8", fp32=True).eval()


def codes_of(model) -> list[torch.Tensor]:
    codes = [parameter.clone() for parameter in model.parameters() if parameter.dtype == torch.int8]
    assert len(codes) == 5 * 3 + 1
    return codes


def lora(model, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "target_modules": MATRICES, "init_lora_weights": False, **settings})
    return peft.get_peft_model(model, config)


def test_lora_is_trained_and_taken_off_again(int8):
    ids = random_ids(4, 16)
    with torch.no_grad():
        before = int8(ids).logits
    codes = codes_of(int8)
    torch.manual_seed(0)
    adapted = lora(int8, init_lora_weights=True).train()
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(map(torch.equal, codes_of(int8), codes))
    restored = adapted.unload().eval()
    with torch.no_grad():
        assert torch.equal(restored(ids).logits, before)


def ia3(model):
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(
        target_modules=MATRICES, feedforward_modules=["w1", "w2"], init_ia3_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


WRITERS = {
    "LoRA": lambda model: lora(model).merge_and_unload(),
    "LoRA, safely": lambda model: lora(model).merge_and_unload(safe_merge=True),
    "LoRA, for a while": lambda model: lora(model).merge_adapter(),
    "DoRA": lambda model: lora(model, use_dora=True).merge_and_unload(),
    "IA3": lambda model: ia3(model).merge_and_unload(),
    "IA3, safely": lambda model: ia3(model).merge_and_unload(safe_merge=True),
    "modules_to_save": lambda model: lora(model, target_modules=["c_attn"], modules_to_save=["lm_head"]),
    "requires_grad_": lambda model: model.requires_grad_(True),
    "data": lambda model: model.lm_head.weight.data.zero_(),
    "in place": lambda model: model.lm_head.weight.add_(1),
    "product": lambda model: model.lm_head.weight @ torch.ones(64),
    "a cast": lambda model: model.lm_head.weight.to(torch.float32),
    "another weight": lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(torch.ones(320, 64))),
}


@pytest.mark.parametrize("way", WRITERS)
def test_who_wants_weights_is_told_which_checkpoint_has_them(int8, way):
    codes = codes_of(int8)
    with pytest.raises(ValueError, match=FULL_PRECISION):
        WRITERS[way](int8)
    assert all(map(torch.equal, codes_of(int8), codes))


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_a_copy_says_the_same(int8, tmp_path, way):
    if way == "pickle":
        model = pickle.loads(pickle.dumps(int8))
    elif way == "torch.save":
        torch.save(int8, tmp_path / "model.pt")
        safe = "weights_only" in inspect.signature(torch.load).parameters
        model = torch.load(tmp_path / "model.pt", **({"weights_only": False} if safe else {}))
    else:
        model = copy.deepcopy(int8)
    ids = random_ids(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, int8(ids).logits)
    for part in (model, model.lm_head, model.lm_head._parameters["weight"]):
        with pytest.raises(ValueError, match=FULL_PRECISION):
            part.requires_grad_(True)
    torch.save(model.state_dict(keep_vars=True), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert {type(tensor) for tensor in state.values()} <= {torch.Tensor, torch.nn.Parameter}


def test_what_there_is_to_know_about_a_weight(int8):
    weight = int8.lm_head.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((320, 64), torch.int8, "cpu")
    assert not weight.requires_grad
    assert "torch.int8 codes for (320, 64) on cpu" in repr(weight)
    assert "Int8Linear" in repr(int8.lm_head)


def test_loading_to_a_gpu_may_ask_for_the_bytes(int8):
    """As transformers does there before it loads, to have the memory in one piece."""
    count = getattr(transformers.modeling_utils, "get_total_byte_count", None)
    if count is None:
        pytest.skip("needs transformers 4.55 or so")
    names = [name for name in int8.state_dict() if not name.endswith("lm_head.weight")]
    tensors = [int8.get_parameter_or_buffer(name) for name in names]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert count(int8, dict.fromkeys(names, torch.device("cpu"))) == {torch.device("cpu"): held}
    weight = int8.transformer.h[0].mlp.w1.weight
    assert weight.element_size() == weight.stride()[1] == 1


def test_training_all_of_it_is_refused(int8):
    ids = random_ids(2, 6)
    int8.train()
    for network in (int8, int8.transformer):
        with pytest.raises(ValueError, match=f"nothing is frozen.*{FULL_PRECISION}"):
            network(ids)
        with torch.no_grad():
            network(ids)
    int8.requires_grad_(False)
    int8.get_input_embeddings().requires_grad_(True)
    int8(ids, labels=ids).loss.backward()
    assert int8.get_input_embeddings().weight.grad.abs().sum() > 0


def test_codes_that_are_offloaded(int8, tmp_path):
    accelerate = importlib.import_module("accelerate")
    ids = random_ids(1, 5)
    with torch.no_grad():
        expected = int8(ids).logits
        for offloaded in (
            accelerate.cpu_offload(copy.deepcopy(int8), execution_device=torch.device("cpu")),
            accelerate.disk_offload(copy.deepcopy(int8), tmp_path, execution_device=torch.device("cpu")),
        ):
            assert offloaded.lm_head.weight.device.type == "meta"
            assert torch.equal(offloaded(ids).logits, expected)


def test_a_model_that_is_partly_on_a_disk_is_saved(checkpoints, int8, tmp_path):
    """Its weights there are not one and the same."""
    pytest.importorskip("accelerate")
    if int(transformers.__version__.partition(".")[0]) < 5:
        lacks("saves no buffers that lie on a disk, as int8's scales do")
    places = {"transformer.wte": "cpu", "transformer.rotary_emb": "cpu", "transformer.drop": "cpu"}
    places.update({f"transformer.h.{i}": "disk" if i else "cpu" for i in range(3)})
    places.update({"transformer.ln_f": "cpu", "lm_head": "disk"})
    model = QWenLMHeadModel.from_pretrained(
        checkpoints[1] / "int8", fp32=True, device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    model.save_pretrained(tmp_path / "saved")
    again = QWenLMHeadModel.from_pretrained(tmp_path / "saved", fp32=True)
    for name, tensor in int8.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_cast_of_everything_leaves_codes_and_scales_alone(int8):
    before = [*codes_of(int8), int8.lm_head.weight_scale.clone()]
    int8.type(torch.float16)
    assert int8.dtype == torch.float16
    assert int8.lm_head.weight_scale.dtype == torch.float32
    assert all(map(torch.equal, [*codes_of(int8), int8.lm_head.weight_scale], before))


# --- The tool -----------------------------------------------------------------------------------------------------


def test_the_index_and_the_configuration(checkpoints):
    _, folder = checkpoints
    index = json.loads((folder / "int8" / tool.INDEX).read_text())
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(folder / "int8" / file, framework="pt") as weights:
            tensor = weights.get_tensor(name)
        total += tensor.numel() * tensor.element_size()
    assert index["metadata"]["total_size"] == total
    before = json.loads((folder / "whole" / "config.json").read_text())
    after = json.loads((folder / "int8" / "config.json").read_text())
    assert after == {**before, "int8_weights": True}
    assert not list(folder.glob("quantizing_*"))


def test_it_refuses(checkpoints, tmp_path, capsys):
    _, folder = checkpoints
    (tmp_path / "taken").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    for name, file in (("gptq", "config.json"), ("early gptq", "quantize_config.json")):
        shutil.copytree(folder / "whole", tmp_path / name)
        described = {"quantization_config": {"bits": 4, "quant_method": "gptq"}}
        (tmp_path / name / file).write_text(json.dumps(described))
    for source, target, message in (
        (tmp_path / "nothing", tmp_path / "new", "There is no folder"),
        (folder / "whole", tmp_path / "taken", "taken exists"),
        (folder / "int8", tmp_path / "new", "is quantised already"),
        (tmp_path / "gptq", tmp_path / "new", "is quantised already"),
        (tmp_path / "early gptq", tmp_path / "new", "is quantised already"),
        (tmp_path / "empty", tmp_path / "new", "There are no weights"),
    ):
        assert tool.main([str(source), str(target)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_weights_of_other_formats_are_not_copied(checkpoints, tmp_path):
    _, folder = checkpoints
    shutil.copytree(folder / "whole", tmp_path / "whole")
    others = "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "model.pth"
    for name in (*others, "notes.txt"):
        (tmp_path / "whole" / name).write_text("{}")
    assert tool.main([str(tmp_path / "whole"), str(tmp_path / "int8")]) == 0
    assert {path.name for path in (tmp_path / "int8").iterdir()}.isdisjoint(others)
    assert (tmp_path / "int8" / "notes.txt").exists()


def test_a_broken_file_leaves_nothing(checkpoints, tmp_path, capsys, monkeypatch):
    _, folder = checkpoints

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(tool, "save_weights", full)
    assert tool.main([str(folder / "whole"), str(tmp_path / "new")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_one_file_without_an_index(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(ROOT / "demo" / "qwen.tiktoken", tmp_path / "whole")
    shutil.copy(ROOT / "tokenizer_config.json", tmp_path / "whole")
    assert tool.main([str(tmp_path / "whole"), str(tmp_path / "int8")]) == 0
    assert not (tmp_path / "int8" / tool.INDEX).exists()
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.int8
    assert torch.equal(stored["transformer.wte.weight"], model.transformer.wte.weight)
