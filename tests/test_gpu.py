"""What only a GPU can show: half precision on it, compiled generation, caches on several calls."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import compat, random_ids, tiny_model
from qwen import qwen_attention
from qwen.modeling_qwen import QWenCache

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_tokens_alone_give_what_padded_rows_give(monkeypatch, dtype, width):
    """The layers get no padding; in half precision all rows are attended to in one call of PyTorch's."""
    shape = {"hidden_size": 2 * width, "num_attention_heads": 2, "kv_channels": width}
    model = tiny_model(attn_implementation="sdpa", use_dynamic_ntk=True, use_logn_attn=True, **shape).cuda()
    lengths = torch.tensor([5, 45, 140, 90])
    ids, mask = random_ids(4, 140).cuda(), (torch.arange(140) >= 140 - lengths[:, None]).long().cuda()
    with torch.no_grad():
        exact = torch.cat([model(ids[i : i + 1, 140 - length :]).logits[0] for i, length in enumerate(lengths)])
    model, calls, logits = model.to(dtype), [], {}
    attend = qwen_attention.varlen_attention
    monkeypatch.setattr(qwen_attention, "varlen_attention", lambda *args: calls.append(args) or attend(*args))
    for name, threshold in (("alone", 16), ("padded", 10**9)):
        monkeypatch.setattr(qwen_attention, "PACKED_PROMPT", threshold)
        cache = QWenCache()
        with torch.no_grad():
            prompt = model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
            longer = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = model(ids[:, :1], attention_mask=longer, past_key_values=cache).logits[:, 0]
        logits[name] = prompt.float(), step.float()
    has_kernel = compat.has_varlen_attention(ids.device, dtype, width)
    assert has_kernel or dtype == torch.float32 or compat._varlen is None or torch.cuda.get_device_capability() < (8, 0)
    assert len(calls) == (3 if has_kernel else 0)  # layers
    errors = {name: (prompt - exact).norm() / exact.norm() for name, (prompt, _) in logits.items()}
    assert errors["alone"] < 2 * errors["padded"] + 1e-4
    difference = (logits["alone"][1] - logits["padded"][1]).norm() / logits["padded"][1].norm()
    assert difference < {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]


def test_bad_ids_do_not_reach_the_device(model):
    with pytest.raises(IndexError, match="hold 999"):
        generate(model, torch.tensor([[1, 999]]).cuda())
    assert generate(model, torch.tensor([[1, 2]]).cuda()).shape == (1, 26)


@pytest.mark.parametrize(
    "settings", [None, {}, {"device": "cpu"}, {"bits": 8}, {"bits": 4}, {"bits": 8, "device": "cpu"}]
)
def test_caches_compute_what_they_do_on_the_cpu(settings):
    """Also where keys and values stay in the memory of the CPU; None is transformers' own."""
    caches, kernels = (importlib.import_module(f"qwen.{name}") for name in ("qwen_cache", "qwen_ops"))
    ids = random_ids(2, 60)

    def logits(model, settings):
        if settings is None:
            cache = importlib.import_module("transformers").DynamicCache()
        else:
            cache = (caches.QWenQuantizedCache if "bits" in settings else caches.QWenCache)(**settings)
        parts = [ids[:, :50], ids[:, 50:53], *ids[:, 53:].split(1, 1)]
        with torch.no_grad():
            return torch.cat([model(part.to(model.device), past_key_values=cache).logits.cpu() for part in parts], 1)

    model = tiny_model(kv_channels=32, use_dynamic_ntk=True, use_logn_attn=True)
    expected = logits(model, settings and {name: value for name, value in settings.items() if name == "bits"})
    found = logits(model.cuda(), settings)
    assert (found - expected).norm() < 5e-3 * expected.norm()
    assert kernels.implementation("cuda").startswith("Triton")


def test_generate_takes_the_cache_that_has_kernels():
    settings = {"return_dict_in_generate": True}
    model = tiny_model(kv_channels=32).cuda().bfloat16()
    taken = generate(model, random_ids(1, 9).cuda(), **settings).past_key_values
    assert type(taken).__name__ == "QWenCache"
    assert taken.get_seq_length() == 9 + 23
    other = tiny_model().cuda().bfloat16()  # heads of 16 channels
    assert type(generate(other, random_ids(1, 9).cuda(), **settings).past_key_values).__name__ == "DynamicCache"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_continuous_batching_attends_to_each_sequence(dtype):
    """By PyTorch's kernel for sequences of all lengths, that of SDPA with a mask."""
    if not compat.has_varlen_attention(torch.device("cuda"), dtype, 64):
        pytest.skip("this PyTorch, or this GPU, has no such kernel")
    lengths, key_lengths = torch.tensor([1, 7, 40, 1]), torch.tensor([90, 7, 64, 1])
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, int(n.sum()), 64, generator=draw) for n in (lengths, key_lengths, key_lengths))
    mask = torch.block_diag(*(torch.ones(m, n).tril(n - m) for m, n in zip(lengths.tolist(), key_lengths.tolist())))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.bool(), scale=0.1).transpose(1, 2)
    starts = {
        f"cu_seq_lens_{x}": torch.nn.functional.pad(n.cumsum(0), (1, 0)).cuda()
        for x, n in (("q", lengths), ("k", key_lengths))
    }
    where = {**starts, "max_seqlen_q": 40, "max_seqlen_k": 90}
    found = compat._attend_to_sequences(*(x.to("cuda", dtype) for x in (q, k, v)), 0.1, where)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=0.02)
