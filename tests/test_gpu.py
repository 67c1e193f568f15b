"""What only a GPU can show: half precision on it, compiled generation, caches on several calls."""

from __future__ import annotations

import pytest
import torch
from conftest import random_ids, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model():
    if torch.cuda.is_available():
        return tiny_model(use_dynamic_ntk=True, use_logn_attn=True).cuda()


def generate(model, ids, **kwargs):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **kwargs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_equal_those_on_the_cpu(model, dtype):
    ids = random_ids(2, 100)
    with torch.no_grad():
        expected = tiny_model(use_dynamic_ntk=True, use_logn_attn=True)(ids).logits
        logits = tiny_model(use_dynamic_ntk=True, use_logn_attn=True).cuda().to(dtype)(ids.cuda()).logits.float().cpu()
    error = (logits - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]


def test_compiled_static_cache_gives_the_same_ids_for_prompts_of_any_length(model):
    """transformers compiles decoding with CUDA graphs here; the NTK scale of each prompt must reach them."""
    for length in (20, 40, 100, 40, 20):
        ids = random_ids(2, length).cuda()
        assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))


def test_a_left_padded_batch_equals_its_rows(model):
    rows = [random_ids(1, length, seed=length).cuda() for length in (5, 45, 140)]
    ids = torch.cat([torch.nn.functional.pad(row, (140 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (140 - row.shape[1], 0)) for row in rows])
    batch = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, output in zip(rows, batch):
        assert output[140:].tolist() == generate(model, row)[0, row.shape[1] :].tolist()


def test_bad_ids_do_not_reach_the_device(model):
    with pytest.raises(IndexError, match="hold 999"):
        generate(model, torch.tensor([[1, 999]]).cuda())
    assert generate(model, torch.tensor([[1, 2]]).cuda()).shape == (1, 26)
