"""tools/quantize_weights.py --bits: GPTQ and rounding, what it writes, going on after a stop, what it refuses."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import pytest
import torch
from conftest import CODE, ROOT, modeling_qwen, random_ids, run, tiny_model, tokenization_qwen
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "tools"))
gptq = importlib.import_module("gptq")
tool = importlib.import_module("quantize_weights")
QWenLMHeadModel = modeling_qwen.QWenLMHeadModel


def correlated(inputs: int, seed: int = 0) -> torch.Tensor:
    """Activations (512, inputs) as networks have them: few directions carry most."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)[:, None]
    return torch.randn(512, inputs, generator=generator) @ mix


def error(x, weight, parts, bits) -> float:
    return float((x @ (gptq.dequantized(parts, bits) - weight).t()).norm() / (x @ weight.t()).norm())


@pytest.mark.parametrize(
    "options", [{}, {"group_size": 32}, {"sym": False}, {"desc_act": True}, {"group_size": -1}], ids=str
)
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_better_than_rounding_to_the_nearest(bits, options):
    x, weight = correlated(256), torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    rounding = {key: value for key, value in options.items() if key != "desc_act"}
    nearest = error(x, weight, gptq.quantize(weight, bits, **rounding), bits)
    best = error(x, weight, gptq.quantize(weight, bits, hessian=x.t() @ x, **options), bits)
    assert best < 0.75 * nearest
    assert nearest < (0.2 if bits == 4 else 0.02)


@pytest.mark.parametrize("sym", [True, False])
def test_rounding_is_within_half_a_step(sym):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    parts = gptq.quantize(weight, 4, 32, sym=sym)
    step = parts["scales"].float().t().repeat_interleave(32, 1)  # (out, in)
    miss = (gptq.dequantized(parts, 4) - weight).abs() / step
    top = weight == weight.unflatten(1, (2, 32)).amax(2).repeat_interleave(32, 1)
    assert miss[~top].max() < (0.51 if not sym else 0.55)
    assert miss.max() < 1.05  # symmetric codes reach 7 steps up and 8 down


def test_without_correlations_it_is_rounding():
    """A Hessian that is the identity: no weight can make up for another."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    plain, found = (gptq.quantize(weight, 4, 32, hessian=h) for h in (None, torch.eye(64)))
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_inputs_that_are_never_used_cost_nothing():
    x = correlated(64)
    x[:, 5] = 0
    parts = gptq.quantize(torch.randn(16, 64), 4, 32, hessian=x.t() @ x)
    assert torch.equal(gptq.dequantized(parts, 4)[:, 5], torch.zeros(16))


def test_what_cannot_be_quantised():
    with pytest.raises(ValueError, match="12 outputs and 64 inputs can't be"):
        gptq.quantize(torch.randn(12, 64), 4)
    with pytest.raises(ValueError, match="not finite"):
        gptq.quantize(torch.randn(16, 64), 4, hessian=torch.full((64, 64), torch.nan))


@pytest.mark.parametrize("hessian", [None, torch.eye(64)])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_damaged_matrix_is_not_quantised(wrong, sym, hessian):
    weight = torch.randn(16, 64)
    weight[3, 40] = wrong
    with pytest.raises(ValueError, match="a matrix holds numbers that are not finite"):
        gptq.quantize(weight, 4, 32, sym=sym, hessian=hessian)


# --- Whole checkpoints --------------------------------------------------------------------------------------------

SMALL = ("--samples", "6", "--length", "24", "--group-size", "32", "--device", "cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "whole"
    tiny_model(vocab_size=4096, no_bias=False).save_pretrained(folder, max_shard_size="400KB")
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "demo" / name, folder)
    text = "".join((ROOT / "demo" / "facts.tsv").read_text(encoding="utf-8").splitlines(True)[:60])
    (folder.parent / "text.txt").write_text(text, encoding="utf-8")
    conversation = {"conversations": [{"from": "user", "value": "你好"}, {"from": "assistant", "value": "<|im_end|>!"}]}
    (folder.parent / "chat.json").write_text(json.dumps([conversation] * 3))
    return folder


def quantised(source, target, *arguments, calibration="text.txt"):
    status = tool.main(
        [str(source), str(target), "--calibration", str(source.parent / calibration), *SMALL, *arguments]
    )
    return status


@pytest.mark.parametrize("bits", [4, 8])
def test_it_loads_and_computes_nearly_the_same(source, tmp_path, bits):
    assert quantised(source, tmp_path / "small", "--bits", str(bits)) == 0
    model = QWenLMHeadModel.from_pretrained(tmp_path / "small", fp32=True)
    plain = QWenLMHeadModel.from_pretrained(source, fp32=True)
    assert model.config.quantization_config["bits"] == bits
    ids = torch.tensor([gptq.calibration_samples(tokenizer(source), source.parent / "text.txt", 1, 24)[0]])
    with torch.no_grad():
        found, expected = model(ids).logits, plain(ids).logits
    assert 1e-5 < (found - expected).norm() / expected.norm() < (0.5 if bits == 4 else 0.03)
    assert all((tmp_path / "small" / name).exists() for name in (*CODE, "qwen.tiktoken", "generation_config.json"))
    assert len(list((tmp_path / "small").glob("*.safetensors"))) == 4
    assert not list(tmp_path.glob("quantizing_*"))
    # what is not quantised is what it was
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight.half().float())
    assert torch.equal(model.transformer.h[1].attn.c_attn.bias, plain.transformer.h[1].attn.c_attn.bias.half().float())


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_output_layer_too(source, tmp_path, method, monkeypatch):
    monkeypatch.setattr(gptq, "HEAD_ROWS", 1000)
    settings = ["--bits", "4", "--method", method]
    for name, more in (("without", []), ("with", ["--lm-head"])):
        assert quantised(source, tmp_path / name, *settings, *more) == 0
    plain, model = (QWenLMHeadModel.from_pretrained(tmp_path / name, fp32=True) for name in ("without", "with"))
    assert model.config.quantization_config["lm_head"] is True
    assert "lm_head" not in plain.config.quantization_config
    assert type(model.lm_head).__name__ == "QuantizedLinear"
    ids = torch.tensor([gptq.calibration_samples(tokenizer(source), source.parent / "text.txt", 1, 24)[0]])
    with torch.no_grad():
        hidden = plain.transformer(ids).last_hidden_state
        assert torch.equal(model.transformer(ids).last_hidden_state, hidden)
        found, expected = model(ids).logits, plain.lm_head(hidden)
        weight = QWenLMHeadModel.from_pretrained(source, fp32=True).lm_head.weight.detach()
        nearest = gptq.dequantized(gptq.quantize(weight, 4, 32), 4)
        of_nearest = (hidden @ nearest.T - expected).norm()
    error = (found - expected).norm()
    assert 0 < error < 0.2 * expected.norm()
    if method == "rtn":
        torch.testing.assert_close(found, hidden @ nearest.T, rtol=1e-4, atol=1e-4)
    else:  # it is the calibration text
        assert error < 0.8 * of_nearest
        samples = gptq.calibration_samples(tokenizer(source), source.parent / "text.txt", 6, 24)
        with torch.no_grad():
            inputs = torch.cat([plain.transformer(torch.tensor([ids])).last_hidden_state[0] for ids in samples])
        best = gptq.dequantized(gptq.quantize(weight, 4, 32, hessian=inputs.T @ inputs), 4)
        assert (model.lm_head.dequantize() == best).float().mean() > 0.9
    assert torch.equal(
        model.generate(ids[:, :9], max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False),
        model.generate(ids[:, :9], max_new_tokens=6, do_sample=False, pad_token_id=0),
    )


def tokenizer(folder):
    return tokenization_qwen.QWenTokenizer.from_pretrained(folder)


def test_conversations_are_chatml_and_contents_are_text(source):
    found = gptq.calibration_samples(tokenizer(source), source.parent / "chat.json", 128, 2048)
    assert len(found) == 3
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    one = tokenizer(source)
    begin = one(text)["input_ids"]
    assert found[0][: len(begin)] == begin
    assert one.decode(found[0][len(begin) :]) == "<|im_end|>!<|im_end|>\n"
    assert found[0].count(one.im_end_id) == 3  # not the one that is part of the answer


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.json", "list.json"])
def test_files_of_conversations_are_read_as_for_finetuning(source, tmp_path, name):
    """With a byte order mark, lines without anything, CR LF, and what str.splitlines takes for the end of a line."""
    records = [{"text": "a\u2028b\x85c"}, {"conversations": [{"from": "user", "value": "你好"}]}]
    written = [json.dumps(record, ensure_ascii=False) for record in records]
    content = f"[{','.join(written)}]" if name == "list.json" else "\r\n \r\n".join(written) + "\r\n"
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    found = gptq.calibration_samples(tokenizer(source), tmp_path / name, 128, 2048)
    assert [tokenizer(source).decode(found[0]), len(found)] == ["a\u2028b\x85c", 2]


def test_conversations_with_a_system_prompt_are_what_finetuning_reads(source, tmp_path):
    said = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "!"}]
    turns = [{"from": message["role"], "value": message["content"]} for message in said]
    records = [
        {"messages": [{"role": "system", "content": "S"}, *said]},
        {"conversations": turns, "system": "S"},
        {"conversations": [{"from": "system", "value": "S"}, *turns]},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    found = gptq.calibration_samples(tokenizer(source), tmp_path / "chat.json", 128, 2048)
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n!<|im_end|>\n"
    assert [tokenizer(source).decode(ids) for ids in found] == [text] * 3


def test_a_stopped_run_goes_on_and_ends_the_same(source, tmp_path, monkeypatch, capsys):
    assert quantised(source, tmp_path / "at_once", "--bits", "4") == 0
    calls, original = [], gptq.quantize_block

    def stop_in_the_third(model, block, *args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(model, block, *args)

    monkeypatch.setattr(gptq, "quantize_block", stop_in_the_third)
    assert quantised(source, tmp_path / "small", "--bits", "4") == 130
    (partial,) = tmp_path.glob("quantizing_*")
    assert f"interrupted: the same command goes on from what is in {partial}\n" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    assert not (partial / "config.json").exists()  # nothing that loads
    assert quantised(source, tmp_path / "small", "--bits", "4") == 0
    assert len(calls) == 4
    for file in (tmp_path / "at_once").glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "small" / file.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_was_made_of_other_weights_is_not_gone_on_with(source, tmp_path, monkeypatch):
    """Another checkpoint in the same folder, such as one tuned anew: its files have the same names and sizes."""
    folder = tmp_path / "tuned"
    shutil.copytree(source, folder)
    original = gptq.quantize_block

    def stop_in_the_second(model, block, settings, hidden, device, dtype):
        if list(tmp_path.glob("quantizing_*/model-00002-*")):
            raise KeyboardInterrupt
        return original(model, block, settings, hidden, device, dtype)

    monkeypatch.setattr(gptq, "quantize_block", stop_in_the_second)
    text = ("--calibration", str(source.parent / "text.txt"))
    assert tool.main([str(folder), str(tmp_path / "small"), "--bits", "4", *SMALL, *text]) == 130
    monkeypatch.undo()
    for file in folder.glob("*.safetensors"):
        weights = {name: tensor * 1.5 if "c_proj" in name else tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    for target in ("small", "at_once"):
        assert tool.main([str(folder), str(tmp_path / target), "--bits", "4", *SMALL, *text]) == 0
    for file in (tmp_path / "at_once").glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "small" / file.name)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_runs_with_one_target(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl")
    original, codes = gptq.finish, []

    def finish(*arguments):
        if not codes:
            codes.append(None)
            codes.append(quantised(source, tmp_path / "small", "--bits", "4", "--method", "rtn"))
        original(*arguments)

    monkeypatch.setattr(gptq, "finish", finish)
    assert quantised(source, tmp_path / "small", "--bits", "4", "--method", "rtn") == 0
    assert codes == [None, 2]
    assert "Another run is making" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_it_refuses(source, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "config.json").write_text('{"quantization_config": {}, "int8_weights": true}')
    (tmp_path / "tied").mkdir()
    (tmp_path / "tied" / "config.json").write_text('{"tie_word_embeddings": true}')
    (tmp_path / "bad.json").write_text("[{}]")
    (tmp_path / "texts.json").write_text('[{"text": ["a", "b"]}]')
    (tmp_path / "empty.txt").write_text("")
    text = source.parent / "text.txt"
    for folder, target, arguments, message in (
        (source, "new", ["--bits", "4"], "--method rtn"),
        (source, "new", ["--bits", "4", "--calibration", str(tmp_path / "none.txt")], "no calibration text"),
        (source, "new", ["--bits", "4", "--calibration", str(tmp_path / "bad.json")], "not a list of texts"),
        (source, "new", ["--bits", "4", "--calibration", str(tmp_path / "empty.txt")], "has no text"),
        (source, "new", ["--bits", "4", "--calibration", str(tmp_path / "texts.json")], "a text is a list"),
        (source, "new", ["--bits", "4", "--method", "rtn", "--device", "fast"], "--device fast: "),
        (
            source,
            "new",
            ["--bits", "4", "--method", "rtn", "--device", "meta"],
            "--device meta: blocks are quantised on",
        ),
        (tmp_path / "tied", "new", [], "is its embedding, which int8 does not go with"),
        (source, "new", ["--bits", "4", "--method", "rtn", "--desc-act"], "--desc-act"),
        (tmp_path / "tied", "new", ["--bits", "4", "--calibration", str(text), "--lm-head"], "is its embedding"),
        (source, "taken", ["--bits", "4", "--calibration", str(text)], "taken exists"),
        (tmp_path / "quantised", "new", ["--bits", "4", "--calibration", str(text)], "quantised already"),
    ):
        assert tool.main([str(folder), str(tmp_path / target), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "bad.json",
            "empty.txt",
            "quantised",
            "taken",
            "texts.json",
            "tied",
        ]
    for arguments in (["--desc-act"], ["--bits", "3"], ["--bits", "4", "--group-size", "0"]):
        with pytest.raises(SystemExit):
            tool.main([str(source), str(tmp_path / "new"), *arguments])


def test_an_output_layer_that_is_the_embedding_stays_it(source, tmp_path):
    model = tiny_model(vocab_size=4096, no_bias=False, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "demo" / name, tmp_path / "tied")
    arguments = ["--bits", "8", "--method", "rtn", "--group-size", "32"]
    assert tool.main([str(tmp_path / "tied"), str(tmp_path / "small"), *arguments]) == 0
    small = modeling_qwen.QWenLMHeadModel.from_pretrained(tmp_path / "small", fp32=True)
    assert small.lm_head.weight is small.transformer.wte.weight
    with torch.no_grad():
        found, expected = (m(random_ids(1, 9)).logits for m in (small.eval(), model))
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_it_loads_as_a_user_loads_it(source, tmp_path):
    assert quantised(source, tmp_path / "small", "--bits", "4", "--method", "rtn", "--asymmetric") == 0
    printed = run(
        "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T;"
        "m = A.from_pretrained('small', trust_remote_code=True); T.from_pretrained('small', trust_remote_code=True);"
        "print(type(m.transformer.h[0].mlp.w1).__name__)",
        tmp_path,
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert printed == "QuantizedLinear"


def test_a_configuration_without_quantisation_is_named(source, tmp_path):
    """`quantization_config=None` has transformers drop what config.json says."""
    assert quantised(source, tmp_path / "small", "--bits", "4", "--method", "rtn") == 0
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    message = r"holds quantised weights \(qweight, .*names no quantisation\. Don't pass quantization_config=None"
    with pytest.raises(RuntimeError, match=message):
        modeling_qwen.QWenLMHeadModel.from_pretrained(tmp_path / "small")


def test_files_that_the_index_does_not_name_are_left_out(source, tmp_path):
    """Some folders hold the weights twice, or those of something else."""
    shutil.copytree(source, tmp_path / "whole")
    (tmp_path / "whole" / "other.safetensors").write_bytes(b"not weights")
    assert set(gptq.weight_shapes(tmp_path / "whole")) == {p.name for p in source.glob("*.safetensors")}
    assert tool.main([str(tmp_path / "whole"), str(tmp_path / "int8")]) == 0
    assert not (tmp_path / "int8" / "other.safetensors").exists()
