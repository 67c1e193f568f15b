"""
The demo in the hands of other packages, beside transformers' Qwen2 with the same weights. `make conformance` runs this
file; pytest does not collect it by itself, for it needs packages that users bring:

    python -m pytest tests/conformance_ecosystem.py                     with what is installed
    LLAMA_CPP=FOLDER python -m pytest tests/conformance_ecosystem.py    and llama.cpp's converter of that checkout

Where a package quantises, as many matrices are quantised as of Qwen2, c_attn counting for three, and the logits are as
close to those in float32 as Qwen2's are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, lacks, modeling_qwen, official_vocabulary, run
from qwen.cpp_kernels import NAMESPACE
from reference import qwen2_of
from safetensors.torch import save_file
from serve_with_vllm import random_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it needs two, and makes one on a machine of two cores

DEMO = ROOT / "demo"
MATRICES = ("c_attn", "c_proj", "w1", "w2")
QWEN2_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SENTENCES = ("The capital of Iceland is Reykjavik", "冰岛的首都是雷克雅未克", "The capital of Peru is Lima")


def needs(*packages: str):
    """Skips without one of these packages."""
    # The head first: looking for a part of a package that is missing is an error.
    lacking = [name for name in packages if not all(map(importlib.util.find_spec, (name.partition(".")[0], name)))]
    return pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(lacking)}")


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO, trust_remote_code=True)


@pytest.fixture(scope="session")
def ids(tokenizer):
    """int64 (3, 8)"""
    return torch.tensor([tokenizer(text).input_ids[:8] for text in SENTENCES])


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory):
    """A folder with Qwen2 of the demo's weights."""
    folder = tmp_path_factory.mktemp("qwen2")
    qwen2_of(load(DEMO, dtype=torch.float32)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exact(ids):
    """The demo's logits in float32 (3, 8, vocab)."""
    return logits(load(DEMO, dtype=torch.float32), ids)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids.to(model.device)).logits.float().cpu()


def error(model, ids: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of what is wrong with the logits, in parts of their own."""
    return float((logits(model, ids) - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


def count(model, is_quantised) -> int:
    """Matrices of the blocks that are quantised, c_attn for three."""
    return sum(
        3 if name.endswith("c_attn") else 1
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in (*MATRICES, *QWEN2_MATRICES) and is_quantised(module)
    )


def compare(ours, theirs, is_quantised, ids, exact) -> None:
    """The rule at the head of this file."""
    expected = count(theirs, is_quantised)
    assert expected == 7 * ours.config.num_hidden_layers
    assert count(ours, is_quantised) == expected
    wrong, allowed = error(ours, ids, exact), error(theirs, ids, exact)
    assert 0 < wrong < 0.5
    assert wrong <= 1.05 * allowed + 1e-4, f"{wrong:.4f} beside {allowed:.4f}"


def is_instance_of(module: str, *names: str):
    classes = tuple(getattr(importlib.import_module(module), name) for name in names)
    return lambda layer: isinstance(layer, classes)


# --- The network itself ------------------------------------------------------------------------------------------


def test_every_matrix_is_exactly_a_linear_layer_or_an_embedding():
    model = load(DEMO)
    kinds = {
        name.rpartition(".")[0]: type(model.get_submodule(name.rpartition(".")[0]))
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }
    assert len(kinds) == 5 * model.config.num_hidden_layers + 2
    assert {name for name, kind in kinds.items() if kind not in (nn.Linear, nn.Embedding)} == set()
    assert [name for name, kind in kinds.items() if kind is nn.Embedding] == ["transformer.wte"]


# --- Quantisers through transformers -----------------------------------------------------------------------------


@needs("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, qwen2, ids, exact):
    from transformers import BitsAndBytesConfig

    arguments = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    ours, theirs = (
        load(path, quantization_config=BitsAndBytesConfig(**arguments), dtype=torch.float32, device_map="cpu")
        for path in (DEMO, qwen2)
    )
    layer = is_instance_of("bitsandbytes.nn", "Linear4bit" if bits == 4 else "Linear8bitLt")
    compare(ours, theirs, layer, ids, exact)
    assert ours.get_memory_footprint() == pytest.approx(theirs.get_memory_footprint(), rel=0.02)


@needs("bitsandbytes")
def test_bitsandbytes_is_saved_and_loaded_again(tmp_path, ids):
    from transformers import BitsAndBytesConfig

    model = load(DEMO, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32, device_map="cpu")
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device_map="cpu")
    layer = is_instance_of("bitsandbytes.nn", "Linear4bit")
    assert count(again, layer) == count(model, layer) > 0
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


@needs("torchao")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(kind, qwen2, ids, exact):
    from torchao.quantization import quant_api
    from transformers import TorchAoConfig

    ours, theirs = (
        load(path, quantization_config=TorchAoConfig(getattr(quant_api, kind)()), dtype=torch.float32, device_map="cpu")
        for path in (DEMO, qwen2)
    )
    compare(ours, theirs, lambda layer: type(layer.weight).__module__.startswith("torchao"), ids, exact)


@needs("optimum.quanto")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quanto(weights, qwen2, ids, exact):
    from transformers import QuantoConfig

    ours, theirs = (
        load(path, quantization_config=QuantoConfig(weights=weights), dtype=torch.float32, device_map="cpu")
        for path in (DEMO, qwen2)
    )
    compare(ours, theirs, is_instance_of("optimum.quanto", "QLinear"), ids, exact)


def test_fp8_replaces_as_many_as_of_qwen2(qwen2):
    """Multiplying in it takes a GPU; which matrices it takes does not."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from transformers import FineGrainedFP8Config

    found = []
    for path in (DEMO, qwen2):
        config = load(path).config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        model = fp8.replace_with_fp8_linear(
            model, modules_to_not_convert=["lm_head"], quantization_config=FineGrainedFP8Config()
        )
        found.append(count(model, is_instance_of(fp8.__name__, "FP8Linear")))
    assert found == [28, 28]


def test_dynamic_quantisation_of_torch(qwen2, ids, exact):
    ours, theirs = (
        torch.ao.quantization.quantize_dynamic(load(path, dtype=torch.float32), {nn.Linear}, dtype=torch.qint8)
        for path in (DEMO, qwen2)
    )
    compare(ours, theirs, is_instance_of("torch.ao.nn.quantized.dynamic", "Linear"), ids, exact)


# --- GPTQ and AWQ ------------------------------------------------------------------------------------------------

GROUP = 64


def to_groups(weight: torch.Tensor, bits: int = 4):
    """
    A matrix, float32 (out, in), as integers with one scale and zero for `GROUP` inputs: q int32 (out, in), scales and
    zeros (out, groups). Rounds to the nearest; GPTQ rounds better, and is stored alike.
    """
    grouped = weight.view(weight.shape[0], -1, GROUP)  # (out, groups, GROUP)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)  # GPTQ stores zero - 1
    q = (grouped / scales[..., None]).round() + zeros[..., None]
    return q.clamp(0, 2**bits - 1).view_as(weight).int(), scales, zeros.int()


def from_groups(q, scales, zeros) -> torch.Tensor:
    q = q.view(q.shape[0], -1, GROUP)
    return ((q - zeros[..., None]) * scales[..., None]).flatten(1)


def pack(values: torch.Tensor, order=tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit values along the last dimension into each int32, the one at order[i] in bits 4 i; (.., n / 8)."""
    fields = values.unflatten(-1, (-1, 8)).long()[..., list(order)]
    packed = sum(fields[..., i] << (4 * i) for i in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def write_quantised(folder: Path, method: str):
    """
    The demo in 4 bits as AutoGPTQ ("gptq") or AutoAWQ ("awq") publish: its folder; the model that it stands for.

    GPTQ packs along the inputs and stores zero - 1; AWQ packs along the outputs, in an order of its own.
    """
    model = load(DEMO, dtype=torch.float32)
    state = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in MATRICES:
            continue
        q, scales, zeros = to_groups(module.weight.detach())
        if method == "gptq":
            tensors = {
                "qweight": pack(q).T,  # (in / 8, out)
                "qzeros": pack(zeros.T - 1),  # (groups, out / 8)
                "g_idx": torch.arange(q.shape[1], dtype=torch.int32) // GROUP,
            }
        else:
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            tensors = {"qweight": pack(q.T, order), "qzeros": pack(zeros.T, order)}  # (in, out / 8), (groups, out / 8)
        tensors["scales"] = scales.T.half()  # (groups, out)
        if module.bias is not None or method == "gptq":  # AutoGPTQ writes zeros where there is none
            tensors["bias"] = torch.zeros(q.shape[0]).half() if module.bias is None else module.bias.detach().half()
            module.bias = module.bias if module.bias is None else nn.Parameter(tensors["bias"].float())
        module.weight = nn.Parameter(from_groups(q, scales, zeros))
        state.update({f"{name}.{key}": value.contiguous() for key, value in tensors.items()})
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].rpartition(".")[2] not in MATRICES:
            parameter.data = parameter.data.half().float()
            state[name] = parameter.data.half().contiguous()
    for path in DEMO.glob("*"):
        if path.suffix in (".py", ".cpp", ".json", ".tiktoken") and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((DEMO / "config.json").read_text())
    common = {"bits": 4, "group_size": GROUP, "quant_method": method}
    config["quantization_config"] = (
        {**common, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": False}
        if method == "gptq"
        else {**common, "version": "gemm", "zero_point": True}
    )
    (folder / "config.json").write_text(json.dumps({**config, "fp16": False, "torch_dtype": "float16"}))
    return model


@pytest.fixture
def uncompiled():
    """gptqmodel compiles its kernels at first use, for minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def holds_integers(module) -> bool:
    return hasattr(module, "qweight")


@needs("gptqmodel", "optimum")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_published_4_bit_checkpoint(method, tmp_path, ids, uncompiled):
    from transformers import AwqConfig, GPTQConfig
    from transformers.utils import quantization_config

    if method == "awq" and "TORCH_AWQ" not in dir(getattr(quantization_config, "AwqBackend", None)):
        lacks("loads AWQ with a package that no longer exists for it")
    model = write_quantised(tmp_path, method)
    # Kernels in plain PyTorch; others would be built first.
    config, backend = {"gptq": (GPTQConfig, "torch"), "awq": (AwqConfig, "torch_awq")}[method]
    kernel = config(bits=4, backend=backend)
    quantised = load(tmp_path, dtype=torch.float32, device_map="cpu", quantization_config=kernel)
    assert count(quantised, holds_integers) == 28
    assert error(quantised, ids, logits(model, ids)) < 0.02  # scales and products in half precision


@needs("gptqmodel", "optimum")
def test_gptqmodel_quantises_the_demo_and_loads_it_again(tmp_path, tokenizer, ids, exact, uncompiled):
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import GPTQConfig

    model = GPTQModel.load(str(DEMO), QuantizeConfig(bits=4, group_size=GROUP), trust_remote_code=True, device="cpu")
    texts = ["\n".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]
    model.quantize(texts * 8, batch_size=1)
    model.save(str(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True).get_vocab() == tokenizer.get_vocab()
    backend = {"backend": BACKEND.TORCH, "device": "cpu", "trust_remote_code": True}
    again = GPTQModel.load(str(tmp_path), **backend).model
    kernel = GPTQConfig(bits=4, backend="torch")
    through_transformers = load(tmp_path, dtype=torch.float32, device_map="cpu", quantization_config=kernel)
    for quantised in (again, through_transformers):
        assert count(quantised, holds_integers) == 28
        assert error(quantised, ids, exact) < 0.3


# --- Export and transforms ---------------------------------------------------------------------------------------


class Logits(nn.Module):
    """ids (B, T) to logits, and nothing else: what traces want."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def foreign(graph_text: str) -> list[str]:
    """Operators that are not PyTorch's own, in the text of a graph."""
    return sorted(set(re.findall(rf"\b{NAMESPACE}(?:\.|::)\w+", graph_text)))


def test_torch_export(ids, exact):
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(
        Logits(load(DEMO, dtype=torch.float32)), (ids,), dynamic_shapes=({0: batch},), strict=False
    )
    assert foreign(str(program.graph)) == []
    torch.testing.assert_close(program.module()(ids[:2]), exact[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchscript_trace_loads_where_our_code_is_not(dtype, tmp_path, qwen2, ids):
    ids = ids[:1, :4]  # few rows, as in decoding
    try:
        torch.jit.trace(Logits(load(qwen2)), ids, check_trace=False)
    except RuntimeError:
        lacks("can't be traced to TorchScript with this torch, Qwen2 neither")
    # Not by an auto class: the folder of remote code may be named after a digit, which TorchScript can't read back.
    model = modeling_qwen.QWenLMHeadModel.from_pretrained(DEMO, dtype=dtype).eval()
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model), ids, check_trace=False)
    assert foreign(str(traced.inlined_graph)) == []
    traced.save(str(tmp_path / "demo.pt"))
    expected = logits(model, ids)
    torch.save((ids, expected), tmp_path / "expected.pt")
    code = (
        "import torch; ids, expected = torch.load('expected.pt'); y = torch.jit.load('demo.pt')(ids).float(); "
        "print(float((y - expected).abs().max()))"
    )
    assert float(run(code, tmp_path)) < (1e-3 if dtype == torch.float32 else 0.2)


@needs("onnx", "onnxscript", "onnxruntime")
def test_onnx(tmp_path, ids, exact):
    import onnxruntime

    path = tmp_path / "demo.onnx"
    torch.onnx.export(Logits(load(DEMO, dtype=torch.float32)), (ids,), path, dynamo=True, input_names=["ids"])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("trains", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_forward_mode_derivative_is_that_of_reverse_mode(dtype, trains, ids):
    model = load(DEMO, dtype=dtype, attn_implementation="eager").requires_grad_(trains)
    embeddings = model.get_input_embeddings()(ids).detach()  # (B, T, hidden)
    random = torch.Generator().manual_seed(0)
    direction = torch.randn(embeddings.shape, generator=random).to(dtype)

    def logits_of(x):
        return model(inputs_embeds=x, use_cache=False).logits

    y, along = torch.func.jvp(logits_of, (embeddings,), (direction,))
    weights = torch.randn(y.shape, generator=random).to(dtype)
    (gradient,) = torch.autograd.grad((logits_of(embeddings.requires_grad_()) * weights).sum(), embeddings)
    expected = float((gradient.double() * direction).sum())
    assert abs(expected) > 1
    rel = 1e-4 if dtype == torch.float64 else 0.05  # norms are taken in float32
    assert float((along.detach().double() * weights).sum()) == pytest.approx(expected, rel=rel)


def test_compiled_graph_is_one_of_plain_operators(ids, exact):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(Logits(load(DEMO, dtype=torch.float32)), fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled(ids)
    assert len(graphs) == 1
    assert foreign(str(graphs[0].graph)) == []
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)


# --- GGUF --------------------------------------------------------------------------------------------------------


@needs("gguf")
def test_llama_cpp_converts(tmp_path):
    folder, vocabulary = os.environ.get("LLAMA_CPP"), official_vocabulary()
    if not folder or vocabulary is None:
        pytest.skip("needs a checkout of llama.cpp (LLAMA_CPP), which knows the official vocabulary only (QWEN_VOCAB)")
    import gguf

    random_checkpoint(tmp_path, vocabulary)
    path = tmp_path / "model.gguf"
    command = [sys.executable, Path(folder) / "convert_hf_to_gguf.py", tmp_path, "--outfile", path, "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    tensors = {tensor.name: torch.from_numpy(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    model = load(tmp_path, dtype=torch.float32)
    names = {"c_attn": "attn_qkv", "w1": "ffn_up", "w2": "ffn_gate"}
    written = 0
    for i, block in enumerate(model.transformer.h):
        for name, module in block.named_modules():
            part = name.rpartition(".")[2]
            if part in MATRICES:
                theirs = names.get(part) or {"attn.c_proj": "attn_output", "mlp.c_proj": "ffn_down"}[name]
                assert torch.equal(tensors[f"blk.{i}.{theirs}.weight"].view_as(module.weight), module.weight)
                written += 1
    assert written == 5 * model.config.num_hidden_layers


# --- LangChain ---------------------------------------------------------------------------------------------------


def printed_by_snippet(code: str, names: dict, capsys) -> list[str]:
    exec(code, names)
    return capsys.readouterr().out.splitlines()


def promised_by_snippet(code: str) -> list[str]:
    return [line[2:] for line in code.splitlines() if line.startswith("# ")]


@needs("langchain", "langchain_openai", "langchain_huggingface")
def test_langchain(tmp_path, capsys, monkeypatch):
    """The snippets of docs/deployment.md; the agent's with a server whose model calls tools as it is written down."""
    from test_serving import PATH, SCRIPTED, serving

    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = page.split("\n## LangChain\n")[1].split("\n## ")[0]
    chat, agent, pipeline = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    chat = chat.replace("CHECKPOINT", "demo")
    monkeypatch.chdir(ROOT)
    assert printed_by_snippet(pipeline, {}, capsys) == promised_by_snippet(pipeline) != []
    with serving([ROOT / "tools" / "serve.py", PATH], tmp_path / "log") as address:
        here = chat.replace("http://127.0.0.1:8000", address)
        assert printed_by_snippet(here, {}, capsys) == promised_by_snippet(chat) != []
    with serving(["-c", SCRIPTED, "-c", PATH], tmp_path / "log") as address:
        names: dict = {}
        exec(chat.partition("print(")[0].replace("http://127.0.0.1:8000", address), names)
        assert printed_by_snippet(agent, names, capsys) == ["In Lima it is 22 °C,", "an Observation."]
