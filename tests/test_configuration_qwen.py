"""The configuration: published keys, defaults, and values no Qwen has."""

from __future__ import annotations

import json

import pytest
from accelerate import init_empty_weights
from conftest import ROOT, configuration_qwen, golden_folder, modeling_qwen, tiny_config
from transformers import AutoConfig

QWenConfig = configuration_qwen.QWenConfig


def test_the_repository_root_is_qwen_72b():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    assert type(config).__name__ == "QWenConfig"
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert sizes == (8192, 80, 64, 49152)
    assert (config.vocab_size, config.seq_length, config.rotary_emb_base) == (152064, 32768, 1000000)
    assert (config.use_dynamic_ntk, config.use_logn_attn, config.no_bias) == (False, False, True)
    assert (config.kv_channels, config.head_dim, config.num_key_value_heads) == (128, 128, 64)


def test_every_published_key_is_kept_and_72b_has_the_published_weights():
    folder = golden_folder()
    if folder is None:
        pytest.skip("needs the published config.json: set QWEN_GOLDEN to its folder")
    published = json.loads((folder / "qwen-72b.config.json").read_text())
    ours = json.loads((ROOT / "config.json").read_text())
    changed = {key for key in published if published[key] != ours.get(key)}
    assert changed == {"auto_map", "max_position_embeddings", "seq_length"}
    assert published["auto_map"].items() <= ours["auto_map"].items()

    index = json.loads((folder / "qwen-72b.safetensors.index.json").read_text())
    with init_empty_weights():
        model = modeling_qwen.QWenLMHeadModel(QWenConfig(**{**published, "seq_length": 32768}))
    assert set(model.state_dict()) == set(index["weight_map"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16": True, "fp16": True}, "At most one of bf16, fp16 and fp32 may be true, found bf16 and fp16"),
        ({"fp16": True, "fp32": True}, "found fp16 and fp32"),
        ({"hidden_size": 65}, r"hidden_size \(65\) must be a multiple of config.num_attention_heads \(4\)"),
        ({"intermediate_size": 191}, "intermediate_size counts both halves"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, found 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive integer, found '3'"),
        ({"rotary_pct": 0.01}, "an even number of channels between 2 and 16"),
        ({"seq_length": 1}, "seq_length must be at least 2"),
        ({"int8_weights": 8}, "int8_weights must be true or false, found 8"),
        ({"use_flash_attn": "yes"}, "use_flash_attn must be 'auto', true or false, found 'yes'"),
        ({"tie_word_embeddings": True, "int8_weights": True}, "needs tie_word_embeddings=False"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_values_set_after_construction_are_checked_when_a_model_is_built():
    config = tiny_config()
    config.bf16 = config.fp32 = True
    with pytest.raises(ValueError, match="found bf16 and fp32"):
        modeling_qwen.QWenLMHeadModel(config)


def test_seq_length_defaults_to_max_position_embeddings():
    assert QWenConfig(max_position_embeddings=2048).seq_length == 2048
    assert QWenConfig(max_position_embeddings=2048, seq_length=1024).seq_length == 1024


def test_saved_and_loaded_configuration_is_the_same(tmp_path):
    config = tiny_config(bf16=True, rotary_pct=0.5, use_flash_attn=False)
    config.save_pretrained(tmp_path)
    assert QWenConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
