"""tools/export_gguf.py: the file's weights, vocabulary and settings, what llama.cpp makes of it, what is refused."""

from __future__ import annotations

import collections
import ctypes
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from conftest import ROOT, modeling_qwen, official_vocabulary, python, random_ids, tiny_model, tokenization_qwen
from qwen.qwen_generation_utils import make_context
from safetensors.torch import load_file, save_file
from texts import KNOWN, generated_texts, without_surrogates
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

sys.path.insert(0, str(ROOT / "tools"))
tool, gptq, quantize_weights = map(importlib.import_module, ("export_gguf", "gptq", "quantize_weights"))
gguf, QWenLMHeadModel, QWenTokenizer = tool.gguf, modeling_qwen.QWenLMHeadModel, tokenization_qwen.QWenTokenizer

needs_gguf = pytest.mark.skipif(gguf is None, reason="needs the package gguf")
HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None
needs_llama = pytest.mark.skipif(gguf is None or not HAS_LLAMA, reason="needs the packages gguf and llama-cpp-python")

DEMO = ROOT / "demo"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NAMES = {
    **{"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_1": "attn_norm", "ln_2": "ffn_norm"},
    **{"mlp.w1": "ffn_up", "mlp.w2": "ffn_gate", "mlp.c_proj": "ffn_down"},
}


def theirs(name: str) -> str:
    """What llama.cpp calls a parameter of ours."""
    for ours, other in (("transformer.wte", "token_embd"), ("transformer.ln_f", "output_norm"), ("lm_head", "output")):
        name = name.replace(ours, other)
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", name)
    return f"blk.{found[1]}.{NAMES[found[2]]}.{found[3]}" if found else name


def weights_of(path) -> dict[str, torch.Tensor]:
    """The weights of a GGUF file in float32, as gguf reads them."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def types_of(path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def settings_of(path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random checkpoint in several files with the demo's vocabulary."""
    folder = tmp_path_factory.mktemp("gguf") / "whole"
    tiny_model(vocab_size=4096, initializer_range=0.1).save_pretrained(folder, max_shard_size="400KB")
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def changed(source, target, weights=lambda state: None, **config):
    """A copy of a checkpoint in one file, with other weights and another configuration."""
    target.mkdir()
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, target)
    values = {**json.loads((source / "config.json").read_text()), **config}
    (target / "config.json").write_text(json.dumps(values))
    state = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights(state)
    save_file(state, target / "model.safetensors")
    return target


def quantised(source, target, *arguments):
    assert quantize_weights.main([str(source), str(target), *arguments]) == 0
    return target


def matrices_of(model) -> list:
    """The quantised modules of a small model, with their names."""
    found = [(name, module) for name, module in model.named_modules() if getattr(module, "HOLDS_CODES", False)]
    assert len(found) in (15, 16)
    return found


RTN = ("--method", "rtn", "--group-size", "32")


# --- Weights ------------------------------------------------------------------------------------------------------


@needs_gguf
@pytest.mark.parametrize("type", [None, "f32", "f16", "bf16"])
@pytest.mark.parametrize("step", [1 << 22, 700])
def test_every_weight_is_there(source, tmp_path, monkeypatch, type, step):
    monkeypatch.setattr(tool, "ROWS_AT_ONCE", step)
    arguments = [] if type is None else ["--type", type]
    assert tool.main([str(source), str(tmp_path / "model.gguf"), *arguments]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    found, types = weights_of(tmp_path / "model.gguf"), types_of(tmp_path / "model.gguf")
    expected = QWenLMHeadModel.from_pretrained(source).state_dict()
    assert len(found) == len(expected)
    for name, weight in expected.items():
        kept = DTYPES[type or "f32"] if weight.dim() == 2 else torch.float32
        assert torch.equal(found[theirs(name)], weight.to(kept).float()), name
        assert types[theirs(name)] == (type or "f32").upper() if weight.dim() == 2 else "F32"


@needs_gguf
def test_q8_0_rounds_to_half_a_step(source, tmp_path):
    assert tool.main([str(source), str(tmp_path / "model.gguf"), "--type", "q8_0"]) == 0
    found = weights_of(tmp_path / "model.gguf")
    for name, weight in QWenLMHeadModel.from_pretrained(source).state_dict().items():
        if weight.dim() == 2:
            blocks, got = weight.double().unflatten(1, (-1, 32)), found[theirs(name)].double().unflatten(1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            assert ((blocks - got).abs() <= step * (0.5 + 127 * 2**-11)).all()  # the scale is rounded too
            assert not torch.equal(blocks, got)


@needs_gguf
@pytest.mark.parametrize(
    ("bits", "kind", "group_size", "step"),
    [(4, "Q4_0", 32, 700), (4, "Q4_0", -1, 1 << 22), (8, "Q8_0", -1, 700), (8, "Q8_0", 32, 1 << 22)],
)
def test_gptq_is_not_rounded_again(source, tmp_path, monkeypatch, capsys, bits, kind, group_size, step):
    monkeypatch.setattr(tool, "ROWS_AT_ONCE", step)
    options = ("--bits", str(bits), "--method", "rtn", "--group-size", str(group_size))
    small = quantised(source, tmp_path / "small", *options)
    assert tool.main([str(small), str(tmp_path / "model.gguf")]) == 0
    assert "were rounded" not in capsys.readouterr().out
    found, types = weights_of(tmp_path / "model.gguf"), types_of(tmp_path / "model.gguf")
    model = QWenLMHeadModel.from_pretrained(small, fp32=True)
    for name, module in matrices_of(model):
        assert types[theirs(f"{name}.weight")] == kind
        assert torch.equal(found[theirs(f"{name}.weight")], module.dequantize())
    assert types["token_embd.weight"] == types["output.weight"] == "F16"
    assert torch.equal(found["output.weight"], model.lm_head.weight.float())
    assert torch.equal(found["blk.1.attn_qkv.bias"], model.transformer.h[1].attn.c_attn.bias.float())
    assert settings_of(tmp_path / "model.gguf")["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]


@needs_gguf
def test_zeros_of_their_own_become_minima(source, tmp_path, capsys, monkeypatch):
    """Only the minimum is rounded, to float16, by what the tool says."""
    monkeypatch.setattr(tool, "ROWS_AT_ONCE", 700)
    small = quantised(source, tmp_path / "small", "--bits", "4", "--asymmetric", *RTN)
    assert tool.main([str(small), str(tmp_path / "model.gguf")]) == 0
    said = float(re.search(r"minima of 4-bit weights .* at most ([\d.]+)% of a step", capsys.readouterr().out)[1])
    found, types = weights_of(tmp_path / "model.gguf"), types_of(tmp_path / "model.gguf")
    model = QWenLMHeadModel.from_pretrained(small, fp32=True)
    largest = 0.0
    for name, module in matrices_of(model):
        assert types[theirs(f"{name}.weight")] == "Q4_1"
        step = module.scales.float().t().repeat_interleave(32, 1)
        change = (found[theirs(f"{name}.weight")] - module.dequantize()).abs() / step
        largest = max(largest, float(change.max()))
    assert 0 < largest < 15 * 2**-11
    assert largest * 100 == pytest.approx(said, abs=0.01)


@needs_gguf
def test_int8_weights_keep_their_codes(source, tmp_path, capsys):
    small = quantised(source, tmp_path / "small")
    assert tool.main([str(small), str(tmp_path / "model.gguf")]) == 0
    said = float(re.search(r"scales of int8 weights .* at most ([\d.]+)% of their", capsys.readouterr().out)[1])
    assert 0 < said <= 0.05
    state = QWenLMHeadModel.from_pretrained(small, fp32=True).state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    count = 0
    for name, codes in state.items():
        if codes.dtype == torch.int8:
            blocks = torch.from_numpy(tensors[theirs(name)].data.copy()).unflatten(1, (-1, 34))
            assert torch.equal(blocks[..., 2:].contiguous().view(torch.int8).flatten(1), codes)
            scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
            assert torch.equal(scale, state[f"{name}_scale"].half()[:, None].expand_as(scale))
            count += 1
    assert count == 16
    assert types_of(tmp_path / "model.gguf")["token_embd.weight"] == "F32"


@needs_gguf
@pytest.mark.parametrize("options", [("--bits", "4", "--asymmetric", *RTN), ("--bits", "8", *RTN), ()])
def test_quantised_weights_in_another_type(source, tmp_path, options):
    small = quantised(source, tmp_path / "small", *options)
    assert tool.main([str(small), str(tmp_path / "model.gguf"), "--type", "float32"]) == 0
    found = weights_of(tmp_path / "model.gguf")
    for name, module in matrices_of(QWenLMHeadModel.from_pretrained(small, fp32=True)):
        is_int8 = hasattr(module, "weight_scale")
        weight = module.codes.float() * module.weight_scale[:, None] if is_int8 else module.dequantize()
        assert torch.equal(found[theirs(f"{name}.weight")], weight)


@needs_gguf
def test_inputs_in_an_order_of_their_own(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "facts.tsv").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    options = ("--bits", "4", "--group-size", "32", "--desc-act", "--calibration", str(text), "--samples", "2")
    small = quantised(source, tmp_path / "small", *options, "--length", "24", "--device", "cpu")
    assert tool.main([str(small), str(tmp_path / "model.gguf")]) == 2
    assert "was quantised with desc_act" in capsys.readouterr().err
    assert tool.main([str(small), str(tmp_path / "model.gguf"), "--type", "f32"]) == 0
    found = weights_of(tmp_path / "model.gguf")
    for name, module in matrices_of(QWenLMHeadModel.from_pretrained(small, fp32=True)):
        assert torch.equal(found[theirs(f"{name}.weight")], module.dequantize())


@needs_gguf
def test_the_other_layout_of_zeros(source, tmp_path):
    """gptq_v2 stores a zero itself, not one less; then g_idx may be missing, and biases that are zero."""
    small = quantised(source, tmp_path / "small", "--bits", "4", *RTN)
    quantization = json.loads((small / "config.json").read_text())["quantization_config"]

    def change(state):
        for name in list(state):
            if name.endswith("qzeros"):
                state[name] = state[name] + 0x11111111
            if name.endswith(("g_idx", "c_proj.bias", "w1.bias", "w2.bias")):
                del state[name]

    other = changed(
        small, tmp_path / "v2", change, quantization_config={**quantization, "checkpoint_format": "gptq_v2"}
    )
    for folder in (small, other):
        assert tool.main([str(folder), str(folder) + ".gguf"]) == 0
    first, second = weights_of(f"{small}.gguf"), weights_of(f"{other}.gguf")
    assert all(torch.equal(first[name], second[name]) for name in first)
    # an early checkpoint has its format in a file of its own
    values = json.loads((small / "config.json").read_text())
    del values["quantization_config"]
    (small / "config.json").write_text(json.dumps(values))
    (small / "quantize_config.json").write_text(json.dumps({key: quantization[key] for key in ("bits", "group_size")}))
    assert tool.main([str(small), str(tmp_path / "early.gguf")]) == 0
    assert types_of(tmp_path / "early.gguf") == types_of(f"{small}.gguf")


@needs_gguf
def test_tied_embeddings_and_what_the_published_code_computes(source, tmp_path):
    def change(state):
        state.pop("lm_head.weight")
        state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        state["transformer.rotary_emb.inv_freq"] = torch.ones(8)

    folder = changed(source, tmp_path / "tied", change, tie_word_embeddings=True)
    assert tool.main([str(folder), str(tmp_path / "model.gguf")]) == 0
    found = weights_of(tmp_path / "model.gguf")
    assert torch.equal(found["output.weight"], found["token_embd.weight"])


# --- Settings and vocabulary --------------------------------------------------------------------------------------


@needs_gguf
def test_settings(source, tmp_path, capsys):
    folder = changed(source, tmp_path / "one", use_dynamic_ntk=False, use_logn_attn=False, max_position_embeddings=777)
    assert tool.main([str(folder), str(tmp_path / "model.gguf")]) == 0
    assert "LogN" not in capsys.readouterr().out
    tokenizer = QWenTokenizer.from_pretrained(folder)
    found = settings_of(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "qwen",
        "general.name": "one",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "qwen.context_length": 777,
        "qwen.block_count": 3,
        "qwen.embedding_length": 64,
        "qwen.feed_forward_length": 192,
        "qwen.attention.head_count": 4,
        "qwen.rope.freq_base": 10000.0,
        "qwen.rope.dimension_count": 16,
        "qwen.vocab_size": 4096,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": tokenizer.eod_id,
        "tokenizer.ggml.eot_token_id": tokenizer.im_end_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.bos_token_id": tokenizer.eod_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["qwen.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    # with NTK or LogN the context ends where they begin; a base model has no template
    for name, (flag, settings) in {"ntk": ("use_dynamic_ntk", "{}"), "logn": ("use_logn_attn", None)}.items():
        folder = changed(source, tmp_path / name, **{"use_dynamic_ntk": False, "use_logn_attn": False, flag: True})
        (folder / "generation_config.json").unlink()
        if settings:
            (folder / "generation_config.json").write_text(settings)
        assert tool.main([str(folder), str(tmp_path / f"{name}.gguf")]) == 0
        assert "no dynamic NTK and no LogN; the context ends where they would begin, at 32" in capsys.readouterr().out
        found = settings_of(tmp_path / f"{name}.gguf")
        assert found["qwen.context_length"] == 32
        assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eod_id
        assert not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & set(found)


@needs_gguf
def test_the_chat_template(source, tmp_path, demo_tokenizer):
    """As a program renders it that knows Jinja and nothing of transformers."""
    jinja2 = pytest.importorskip("jinja2")
    assert tool.main([str(source), str(tmp_path / "model.gguf")]) == 0
    template = jinja2.Template(settings_of(tmp_path / "model.gguf")["tokenizer.chat_template"])
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    messages.append({"role": "user", "content": "你好"})
    text = template.render(messages=messages, add_generation_prompt=True)
    system = "You are a helpful assistant."
    _, ids = make_context(demo_tokenizer, "你好", history=[("1+1=?", "2")], system=system)
    assert demo_tokenizer.encode(text) == ids


def vocabularies():
    yield "demo"
    yield "extended"
    yield "official"


@pytest.fixture(scope="module", params=vocabularies())
def vocabulary(request, tmp_path_factory, source):
    """A tokenizer of ours, and the file that the tool makes of a small model with it."""
    if gguf is None:
        pytest.skip("needs the package gguf")
    folder = tmp_path_factory.mktemp(request.param) / "model"
    path, rows = official_vocabulary() if request.param == "official" else DEMO / "qwen.tiktoken", 4096
    if path is None:
        pytest.skip("needs the official qwen.tiktoken: set QWEN_VOCAB to it, or install dashscope")
    if request.param == "official":
        rows = 151936
    if request.param == "extended":
        rows = 4200
    tiny_model(vocab_size=rows, num_hidden_layers=1, hidden_size=32, kv_channels=8).save_pretrained(folder)
    shutil.copy(path, folder / "qwen.tiktoken")
    (folder / "tokenizer_config.json").write_text("{}")
    if request.param == "extended":
        words = folder / "words.tsv"
        words.write_text("我是一只猫\t20\n一只猫\t100\n首都\t200\n", encoding="utf-8")
        extend = importlib.import_module("extend_vocabulary")
        output = folder / "qwen_extra.tiktoken"
        assert extend.main([str(path), str(words), str(output), "--start-id", "4100"]) == 0
    assert tool.main([str(folder), str(folder.parent / "model.gguf"), "--type", "f16"]) == 0
    return QWenTokenizer.from_pretrained(folder), folder.parent / "model.gguf"


def texts() -> list[str]:
    """Every line of the demo's facts and generated texts, in NFC, which llama.cpp does not make of them."""
    facts = (DEMO / "facts.tsv").read_text(encoding="utf-8").splitlines()
    generated = [without_surrogates(text) for seed in range(4) for text in generated_texts(200, seed)]
    return [unicodedata.normalize("NFC", text) for text in facts + generated]


def test_the_vocabulary(vocabulary):
    """The file's tokens and merges, in the hands of the library `tokenizers`, make the same ids of texts."""
    ours, path = vocabulary
    found = settings_of(path)
    names, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(names) == len(types) == found["qwen.vocab_size"]
    counts = collections.Counter(types)
    assert counts[gguf.TokenType.NORMAL] == len(ours.mergeable_ranks)
    assert counts[gguf.TokenType.CONTROL] == 208
    assert counts[gguf.TokenType.UNUSED] == len(names) - len(ours.decoder)
    assert [names[index] for index in ours.special_tokens.values()] == list(ours.special_tokens)
    alphabet = ByteLevel.alphabet()
    merges = [tuple(merge.split(" ")) for merge in found["tokenizer.ggml.merges"]]
    model = BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges)
    assert all(set(name) <= set(alphabet) for name, kind in zip(names, types) if kind == gguf.TokenType.NORMAL)
    theirs = Tokenizer(model)
    split = Split(Regex(tokenization_qwen.PAT_STR), "isolated")
    theirs.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    some = texts()
    assert len(some) > 900
    expected = ours(some, allowed_special=set())["input_ids"]
    assert [encoding.ids for encoding in theirs.encode_batch(some)] == expected


@needs_gguf
def test_tokens_that_no_merges_lead_to_are_mentioned(source, tmp_path, capsys):
    folder = changed(source, tmp_path / "extra", vocab_size=4096)
    (folder / "config.json").write_text((source / "config.json").read_text())
    ranks = QWenTokenizer.from_pretrained(folder).mergeable_ranks
    assert b"xqzjv" not in ranks
    (folder / "qwen_extra.tiktoken").write_bytes(tokenization_qwen.format_tiktoken_bpe({b"xqzjv": 4096}))
    assert tool.main([str(folder), str(tmp_path / "model.gguf")]) == 2
    assert "has the id 4096, and the model only 4096 embeddings" in capsys.readouterr().err

    def more(state):
        for name in ("transformer.wte.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], state[name][:4]])

    folder = changed(source, tmp_path / "more", more, vocab_size=4100)
    (folder / "qwen_extra.tiktoken").write_bytes(tokenization_qwen.format_tiktoken_bpe({b"xqzjv": 4097}))
    assert tool.main([str(folder), str(tmp_path / "model.gguf")]) == 0
    assert "no merges lead to 1 of the tokens" in capsys.readouterr().out
    tokens = settings_of(tmp_path / "model.gguf")["tokenizer.ggml.tokens"]
    assert tokens[4096:] == ["[PAD4096]", "xqzjv", "[PAD4098]", "[PAD4099]"]


# --- llama.cpp ----------------------------------------------------------------------------------------------------


class Llama:
    """llama.cpp on a file, with keys and values in float32."""

    def __init__(self, path, vocabulary_only=False):
        self.api = api = importlib.import_module("llama_cpp")
        self.silent = api.llama_log_callback(lambda *_: None)  # it would be collected
        api.llama_log_set(self.silent, ctypes.c_void_p(0))
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.vocab_only = vocabulary_only
        self.model = api.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, "llama.cpp does not load the file"
        self.vocabulary = api.llama_model_get_vocab(self.model)
        self.context = None
        if not vocabulary_only:
            parameters = api.llama_context_default_params()
            parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 512, 1, 1
            parameters.type_k = parameters.type_v = 0  # float32
            parameters.flash_attn_type = 0  # off: it approximates
            self.context = api.llama_init_from_model(self.model, parameters)

    def __del__(self):
        if self.context:
            self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def encode(self, text: str, special: bool = True) -> list[int]:
        data = text.encode()
        found = (self.api.llama_token * (len(data) + 8))()
        count = self.api.llama_tokenize(self.vocabulary, data, len(data), found, len(found), True, special)
        assert count >= 0
        return list(found[:count])

    def is_end(self, token: int) -> bool:
        return self.api.llama_vocab_is_eog(self.vocabulary, token)

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Behind further tokens: (vocabulary,)."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        assert self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))) == 0
        size = self.api.llama_vocab_n_tokens(self.vocabulary)
        found = self.api.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(found, (size,)).copy())

    def start(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Up to `count` ids, and none behind one that ends the text."""
        self.start()
        new = [int(self.logits(ids).argmax())]
        while len(new) < count and not self.is_end(new[-1]):
            new.append(int(self.logits(new[-1:]).argmax()))
        return new


@needs_llama
def test_llama_cpp_makes_the_same_tokens(vocabulary):
    """Special tokens too, and none where they are text."""
    ours, path = vocabulary
    llama = Llama(path, vocabulary_only=True)
    some = texts()
    different = [text for text in some if llama.encode(text) != ours.encode(text)]
    assert different == []
    different = [t for t in some if llama.encode(t, special=False) != ours.encode(t, allowed_special=set())]
    assert different == []
    assert llama.is_end(ours.eod_id)
    assert llama.is_end(ours.im_end_id)
    assert not llama.is_end(ours.im_start_id)


@needs_llama
def test_llama_cpp_does_not_normalise(vocabulary):
    """What docs/gguf.md says: the same text in another form has other tokens there, and the same ones with ours."""
    ours, path = vocabulary
    llama = Llama(path, vocabulary_only=True)
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert ours.encode(decomposed) == ours.encode(composed) == llama.encode(composed)
    assert llama.encode(decomposed) != ours.encode(decomposed)
    assert llama.encode(unicodedata.normalize("NFC", decomposed)) == ours.encode(decomposed)


@needs_llama
def test_llama_cpp_knows_every_character_as_ours_does(tmp_path, demo_tokenizer):
    """Letter, digit, white space, mark or neither: it has tables and a pattern of its own."""
    assert tool.main([str(DEMO), str(tmp_path / "model.gguf"), "--type", "f16"]) == 0
    llama = Llama(tmp_path / "model.gguf", vocabulary_only=True)
    some = [unicodedata.normalize("NFC", f"{c}{c}a {c}1{c}\n'{c}!{c} <{c}") for c in KNOWN]
    together = ["|".join(some[i : i + 40]) for i in range(0, len(some), 40)]
    assert [llama.encode(text) for text in together] == demo_tokenizer(together)["input_ids"]


def demo_prompts(tokenizer) -> list[list[int]]:
    card = "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是雷克雅未克（Reykjavik）\n埃塞俄比亚的首都是"
    system = "You are a helpful assistant."
    asked = ("What is the capital of Kenya?", "法国的首都是哪里？", "你好", "Which country is Lima in?")
    return [tokenizer.encode(card), *(make_context(tokenizer, query, system=system)[1] for query in asked)]


@needs_llama
@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0"])
def test_llama_cpp_answers_as_ours(tmp_path, demo_tokenizer, type):
    assert tool.main([str(DEMO), str(tmp_path / "model.gguf"), "--type", type]) == 0
    model = QWenLMHeadModel.from_pretrained(DEMO, fp32=True).eval()
    llama = Llama(tmp_path / "model.gguf")
    for ids in demo_prompts(demo_tokenizer):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1]
        llama.start()
        error = (llama.logits(ids) - expected).norm() / expected.norm()
        assert error < {"f32": 1e-5, "f16": 5e-3, "bf16": 2e-2, "q8_0": 8e-2}[type]
        output = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
        assert llama.greedy(ids, 24) == output[0, len(ids) :].tolist()


@needs_llama
@pytest.mark.parametrize("options", [("--bits", "4", "--method", "rtn"), ("--bits", "8", "--method", "rtn"), ()])
def test_llama_cpp_computes_with_the_same_codes(tmp_path, demo_tokenizer, options):
    """It rounds activations to 8 bits, which ours does not: logits differ by that."""
    small = quantised(DEMO, tmp_path / "small", *options)
    assert tool.main([str(small), str(tmp_path / "model.gguf")]) == 0
    model = QWenLMHeadModel.from_pretrained(small, fp32=True).eval()
    llama = Llama(tmp_path / "model.gguf")
    for ids in demo_prompts(demo_tokenizer):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1]
        llama.start()
        assert (llama.logits(ids) - expected).norm() / expected.norm() < 0.08
        output = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
        assert llama.greedy(ids, 24) == output[0, len(ids) :].tolist()


@needs_llama
def test_rotating_a_part_of_each_head(source, tmp_path):
    model = tiny_model(vocab_size=4096, rotary_pct=0.5, initializer_range=0.1)
    model.save_pretrained(tmp_path / "part")
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "part")
    assert tool.main([str(tmp_path / "part"), str(tmp_path / "model.gguf")]) == 0
    ids = random_ids(20, vocab_size=4096)
    with torch.no_grad():
        expected = model(ids[None]).logits[0, -1]
    found = Llama(tmp_path / "model.gguf").logits(ids.tolist())
    assert (found - expected).norm() / expected.norm() < 1e-4


# --- What is refused ----------------------------------------------------------------------------------------------


def test_without_the_package(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "gguf", None)
    assert tool.main([str(source), str(tmp_path / "model.gguf")]) == 2
    assert "pip install gguf" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def biased(state):
    state["transformer.h.1.mlp.w1.bias"] = torch.tensor([0.0] * 95 + [1e-6])


def without_bias(state):
    del state["transformer.h.1.attn.c_attn.bias"]


def large(state):
    state["lm_head.weight"][3, 5] = 7e4


def damaged(state):
    state["transformer.wte.weight"][3, 5] = torch.nan


@needs_gguf
@pytest.mark.parametrize(
    ("weights", "config", "options", "message"),
    [
        (biased, {}, [], r"h\.1\.mlp\.w1\.bias is not zero, and llama\.cpp adds no bias"),
        (without_bias, {}, [], r"h\.1\.attn\.c_attn\.bias is missing"),
        (lambda state: state.update(more=torch.ones(1)), {}, [], "1 weights have no place in the model, such as more"),
        (large, {}, ["--type", "f16"], "lm_head.weight has values that float16 can't hold"),
        (damaged, {}, ["--type", "q8_0"], "wte.weight has values that q8_0 can't hold"),
        (lambda state: None, {"hidden_size": 32, "kv_channels": 8}, [], r"is \(4096, 64\), where config.json says"),
        (lambda state: None, {"kv_channels": 8}, [], "4 heads of 8 channels are not hidden_size"),
        (lambda state: None, {"scale_attn_weights": False}, [], "scale_attn_weights"),
        (lambda state: None, {"no_bias": False}, [], r"attn\.c_proj\.bias is missing"),
        (lambda state: None, {"vocab_size": "many"}, [], "config.json: config.vocab_size must be"),
        (lambda state: None, {"quantization_config": {"quant_method": "none"}}, [], "method 'none'"),
        (lambda state: None, {"quantization_config": {"load_in_8bit": True}}, [], "quantised by bitsandbytes"),
    ],
)
def test_it_refuses(source, tmp_path, capsys, weights, config, options, message):
    folder = changed(source, tmp_path / "other", weights, **config)
    assert tool.main([str(folder), str(tmp_path / "model.gguf"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@needs_gguf
def test_it_refuses_sizes_and_files(source, tmp_path, capsys):
    narrow = tmp_path / "narrow"
    tiny_model(vocab_size=4096, intermediate_size=176).save_pretrained(narrow)
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copy(source / name, narrow)
    small = quantised(source, tmp_path / "small", "--bits", "4", "--method", "rtn", "--group-size", "16")
    asymmetric = quantised(source, tmp_path / "asymmetric", "--bits", "8", "--asymmetric", *RTN)
    (tmp_path / "there.gguf").write_text("mine")
    empty = changed(source, tmp_path / "empty")
    (empty / "qwen.tiktoken").unlink()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    for folder, name, options, message in (
        (narrow, "model.gguf", ["--type", "q8_0"], "mlp.c_proj.weight has 88 inputs, and q8_0 holds blocks of 32"),
        (small, "model.gguf", [], "groups of 16, which blocks of 32 do not fit"),
        (asymmetric, "model.gguf", [], "zeros other than 128"),
        (source, "there.gguf", [], "exists. Name a file that does not exist yet"),
        (tmp_path / "none", "model.gguf", [], "There is no folder"),
        (tmp_path / "adapter", "model.gguf", [], "is an adapter, not a checkpoint: merge it first"),
        (empty, "model.gguf", [], "qwen.tiktoken"),
    ):
        assert tool.main([str(folder), str(tmp_path / name), *options]) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.gguf").read_text() == "mine"


@needs_gguf
def test_a_full_disk_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    stored = tool.stored

    def full(name, weight, type):
        if "h.1." in name:
            raise OSError(28, "No space left on device")
        return stored(name, weight, type)

    monkeypatch.setattr(tool, "stored", full)
    assert tool.main([str(source), str(tmp_path / "model.gguf")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    usage = collections.namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: usage)
    assert tool.main([str(source), str(tmp_path / "model.gguf")]) == 2
    assert "has 0.0 GB of room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_gguf
def test_two_runs_with_one_target(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl")
    stored, codes = tool.stored, []

    def during(name, weight, type):
        if not codes:
            codes.append(None)
            codes.append(tool.main([str(source), str(tmp_path / "model.gguf"), "--type", "q8_0"]))
        return stored(name, weight, type)

    monkeypatch.setattr(tool, "stored", during)
    assert tool.main([str(source), str(tmp_path / "model.gguf")]) == 0
    assert codes == [None, 2]
    assert "Another run is making" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert set(types_of(tmp_path / "model.gguf").values()) == {"F32"}


@needs_gguf
def test_as_a_command_after_a_run_that_was_killed(tmp_path):
    (tmp_path / ".model.gguf.new").write_text("left by a killed run")
    command = [*python(), ROOT / "tools" / "export_gguf.py", DEMO, tmp_path / "model.gguf"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "no dynamic NTK" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert set(types_of(tmp_path / "model.gguf").values()) == {"BF16", "F32"}


def test_the_help_says_what_llama_cpp_does_not_do(capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "does not normalise text to NFC" in " ".join(capsys.readouterr().out.split())
