"""The configuration: published keys, defaults, and values no Qwen has."""

from __future__ import annotations

import inspect
import json
import re

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from conftest import ROOT, configuration_qwen, golden_folder, modeling_qwen, random_ids, tiny_config
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
        ({"intermediate_size": 191}, "intermediate_size must be an even integer, both halves .* found 191"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, found 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive integer, found '3'"),
        ({"rotary_pct": 0.01}, "an even number of channels between 2 and 16"),
        ({"seq_length": 1}, "seq_length must be an integer of at least 2, found 1"),
        ({"rotary_emb_base": 0}, "rotary_emb_base must be a number above 0, found 0"),
        ({"rotary_emb_base": -1}, "rotary_emb_base must be a number above 0, found -1"),
        ({"rotary_emb_base": float("inf")}, "rotary_emb_base must be a number above 0, found inf"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon must be a number above 0, found -1"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a number above 0, found nan"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon must be a number above 0, found True"),
        ({"initializer_range": -0.1}, "initializer_range must be a number of at least 0, found -0.1"),
        ({"emb_dropout_prob": 1.5}, "emb_dropout_prob must be a number from 0 to 1, found 1.5"),
        ({"attn_dropout_prob": -0.1}, "attn_dropout_prob must be a number from 0 to 1, found -0.1"),
        ({"rotary_pct": 0}, "rotary_pct must be a number above 0, at most 1, found 0"),
        ({"rotary_pct": 1.5}, "rotary_pct must be a number above 0, at most 1, found 1.5"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive integer, found 64.0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, found True"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a positive integer, found 0"),
        ({"cache_bits": 2}, "cache_bits must be 8 or 4, found 2"),
        ({"bf16": "false"}, "bf16 must be true or false, found 'false'"),
        ({"no_bias": 1}, "no_bias must be true or false, found 1"),
        ({"use_cache": None}, "use_cache must be true or false, found None"),
        ({"use_flash_attn": 1}, "use_flash_attn must be 'auto', true or false, found 1"),
        ({"vocab_size": np.float32(320)}, "vocab_size must be a positive integer, found 320.0"),
        ({"vocab_size": np.array([320])}, r"vocab_size must be a positive integer, found array\(\[320\]\)"),
        ({"use_dynamic_ntk": True, "rotary_pct": 0.125}, r"needs at least 4 rotated channels, found 16 \* 0.125 = 2"),
        ({"int8_weights": 8}, "int8_weights must be true or false, found 8"),
        ({"use_flash_attn": "yes"}, "use_flash_attn must be 'auto', true or false, found 'yes'"),
        ({"tie_word_embeddings": True, "int8_weights": True}, "int8_weights needs tie_word_embeddings=False"),
        ({"tie_word_embeddings": True, "int8_lm_head": True}, "int8_lm_head needs tie_word_embeddings=False"),
        ({"int8_lm_head": "yes"}, "int8_lm_head must be true or false, found 'yes'"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


KEYS = sorted(set(inspect.signature(QWenConfig.__init__).parameters) - {"self", "kwargs"})


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", [str, lambda value: json.dumps(value), lambda value: "false", lambda value: [value]])
def test_no_key_takes_a_number_or_a_flag_in_quotes(key, change):
    config = tiny_config(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    value = change(getattr(config, key))
    if key == "eos_token_id" and isinstance(value, list):
        assert tiny_config(eos_token_id=value).eos_token_id == value
        return
    if (key, value) == ("use_flash_attn", "auto"):
        return
    with pytest.raises(ValueError, match=rf"config\.{key} must be .*, found {re.escape(repr(value))}\."):
        tiny_config(**{key: value})


def test_such_a_value_in_config_json_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_size": "64"}))
    with pytest.raises(ValueError, match=r"config\.hidden_size must be a positive integer, found '64'"):
        QWenConfig.from_pretrained(tmp_path)


def test_scalars_of_numpy_and_pytorch_become_pythons(tmp_path):
    config = tiny_config(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    types = {int: np.int64, float: np.float64, bool: np.bool_}
    changes = {key: types[type(getattr(config, key))](getattr(config, key)) for key in KEYS if key != "use_flash_attn"}
    numpy_config = tiny_config(**{**changes, "vocab_size": torch.tensor(320)})
    assert {key: type(getattr(numpy_config, key)) for key in KEYS} == {key: type(getattr(config, key)) for key in KEYS}
    assert numpy_config.to_dict() == config.to_dict()
    numpy_config.save_pretrained(tmp_path)
    assert QWenConfig.from_pretrained(tmp_path).to_dict() == numpy_config.to_dict()


def test_scalars_that_come_later_or_in_lists_are_saved_too(tmp_path):
    """Keywords of `from_pretrained`, attributes, keys of other software, several ends of a text."""
    tiny_config(use_flash_attn=np.bool_(False), eos_token_id=[np.int64(2), 3]).save_pretrained(tmp_path)
    config = QWenConfig.from_pretrained(tmp_path, use_cache=np.bool_(False), hidden_size=np.int64(64))
    assert (config.use_flash_attn, config.eos_token_id) == (False, [2, 3])
    config.rotary_emb_base = np.float32(5000.0)
    config.task_specific_params = {"chat": {"max_length": np.int64(5)}}
    config.update({"no_bias": torch.tensor(False)})
    config.save_pretrained(tmp_path)
    again = QWenConfig.from_pretrained(tmp_path)
    assert (again.use_cache, again.hidden_size, again.rotary_emb_base, again.no_bias) == (False, 64, 5000.0, False)
    assert again.task_specific_params == {"chat": {"max_length": 5}}
    modeling_qwen.QWenLMHeadModel(config).save_pretrained(tmp_path)
    ids = {"eos_token_id": np.int64(7), "pad_token_id": np.int64(8)}
    model = modeling_qwen.QWenLMHeadModel.from_pretrained(tmp_path, fp32=np.bool_(True), **ids)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 7


def test_two_rotated_channels_without_ntk():
    model = modeling_qwen.QWenLMHeadModel(tiny_config(use_dynamic_ntk=False, rotary_pct=0.125)).eval()
    ids = random_ids(1, 40)  # longer than seq_length
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


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


@pytest.mark.parametrize(
    "ids", [{}, {"pad_token_id": 7}, {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4}]
)
def test_ids_of_tokens_are_keys(tmp_path, ids):
    """What the published README passes to `from_pretrained`: found in the configuration, and used by generation."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(tiny_config(), name) for name in names] == [None] * 3
    model = modeling_qwen.QWenLMHeadModel(tiny_config())
    model.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        loaded = modeling_qwen.QWenLMHeadModel.from_pretrained(path, fp32=True, **ids)
        for name in names:
            assert getattr(loaded.config, name) == ids.get(name)
            assert getattr(loaded.generation_config, name) == ids.get(name)
    config = tiny_config(pad_token_id=9)
    loaded = modeling_qwen.QWenLMHeadModel.from_pretrained(tmp_path, config=config, **ids)
    assert loaded.config.pad_token_id == ids.get("pad_token_id", 9)
    assert modeling_qwen.QWenModel.from_pretrained(tmp_path, fp32=True, **ids).config.pad_token_id == ids.get(
        "pad_token_id"
    )
