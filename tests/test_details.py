"""Details of the network and of generation that comparisons of whole models would not notice."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import compat, lacks, modeling_qwen, needs_sdpa, random_ids, tiny_config, tiny_model, transformers
from qwen import qwen_attention, qwen_ops
from qwen import qwen_generation_utils as utils
from qwen.qwen_cache import QWenCache, QWenQuantizedCache
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteriaList


class Softmaxes(TorchDispatchMode):
    """Notes the dtype that every softmax computes in."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "_softmax" in str(func):
            self.dtypes.append(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_attention_takes_the_softmax_in_float32(dtype):
    """On a CPU both give the same numbers; on a GPU and in gradients they do not."""
    config = tiny_config()
    config._attn_implementation = "eager"
    model = modeling_qwen.QWenLMHeadModel(config).eval().to(dtype)
    with Softmaxes() as found, torch.no_grad():
        logits = model(random_ids(2, 12)).logits
    assert logits.dtype == dtype
    assert found.dtypes == [torch.float32] * config.num_hidden_layers


@needs_sdpa
@pytest.mark.parametrize("threshold", [8, 10**6], ids=["long", "short"])
def test_dropout_in_padded_prompts(monkeypatch, threshold):
    """From so many tokens on, padded rows are attended to one by one; each of them has dropout too."""
    monkeypatch.setattr(qwen_attention, "LONG_PROMPT", threshold)
    model = tiny_model(attn_dropout_prob=0.5).train()
    ids, mask = random_ids(3, 16), torch.ones(3, 16, dtype=torch.long)
    mask[0, :5] = mask[1, 12:] = 0

    def logits(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(ids, attention_mask=mask, use_cache=False).logits

    one, same, other = logits(0), logits(0), logits(1)
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    changes = (one - other).abs().amax(-1) * mask  # (3, 16)
    assert changes.amax(1).min() > 0.1
    assert (changes > 1e-3).sum() >= mask.sum() - 3  # everywhere, but perhaps where few keys are seen
    model.eval()
    torch.testing.assert_close(logits(0), logits(1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (2, 20)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("which", ["bias", "ln_", "h.1.attn.c_attn.bias", "lm_head"])
def test_gradients_of_a_few_parameters_are_those_of_all(dtype, shape, which):
    """BitFit trains biases only: then neither a layer's input nor its weight has a gradient."""
    everything = tiny_model(no_bias=False).to(dtype)
    some = copy.deepcopy(everything)
    for name, parameter in some.named_parameters():
        parameter.requires_grad_(which in name)
    ids = random_ids(*shape)
    for model in (everything, some):
        model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in everything.named_parameters() if which in name}
    found = {name: p.grad for name, p in some.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        error = (found[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.05)


CACHES = {"ours": QWenCache, "int8": lambda: QWenQuantizedCache(8), "dynamic": compat.DynamicCache}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("surplus", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("hooked", [False, True])  # a step then goes through the layers
def test_a_mask_longer_than_the_keys(cache, surplus, padded, hooked):
    """Columns for tokens that are still to come mean nothing."""
    model = tiny_model(use_dynamic_ntk=True, use_logn_attn=True)
    if hooked:
        model.transformer.h[1].register_forward_hook(lambda *args: None)
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, :4] = 0

    def steps(extra):
        past, logits = CACHES[cache](), []
        for begin, end in ((0, 8), (8, 9), (9, 12)):
            longer = torch.cat((mask[:, :end], torch.full((2, extra), surplus, dtype=torch.long)), 1)
            with torch.no_grad():
                logits.append(model(ids[:, begin:end], attention_mask=longer, past_key_values=past).logits)
        return torch.cat(logits, 1)[mask.bool()]

    torch.testing.assert_close(steps(5), steps(0), rtol=1e-5, atol=1e-5)


def test_stop_texts_are_found_among_tokens_that_were_accepted_at_once(demo_tokenizer):
    """Prompt look-up can accept thirty tokens in a step: a stop text among the first of them ends the row."""
    if not hasattr(transformers.GenerationConfig(), "prompt_lookup_num_tokens"):
        lacks("has no prompt look-up decoding")
    model = tiny_model(vocab_size=len(demo_tokenizer))
    ids = [i for token, i in demo_tokenizer.mergeable_ranks.items() if token.isalpha() and len(token) == 3][:60]
    stop = demo_tokenizer.decode(ids[2:5])
    assert demo_tokenizer.decode(ids).count(stop) == 1
    with torch.no_grad():  # a model that says them in this order: each token is chosen by the one before alone
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[1:]] = model.transformer.wte.weight[ids[:-1]]
    prompt = torch.tensor([[*ids, ids[0]]])
    ends = {"pad_token_id": demo_tokenizer.eod_id, "eos_token_id": demo_tokenizer.im_end_id}
    settings = {"do_sample": False, "max_new_tokens": 57, **ends}
    free = model.generate(prompt, **settings, prompt_lookup_num_tokens=50)[0, prompt.shape[1] :].tolist()
    assert free[:57] == ids[1:58]  # some releases go on to the end of a draft
    criteria = StoppingCriteriaList([utils.StopAtText(demo_tokenizer, [stop], prompt.shape[1])])
    stopped = model.generate(prompt, **settings, prompt_lookup_num_tokens=50, stopping_criteria=criteria)
    stopped = stopped[0, prompt.shape[1] :].tolist()
    assert 4 <= len(stopped) <= 51  # of one step
    assert stopped == free[: len(stopped)]


def test_answers_with_stop_texts_and_prompt_look_up(demo_tokenizer):
    if not hasattr(transformers.GenerationConfig(), "prompt_lookup_num_tokens"):
        lacks("has no prompt look-up decoding")
    model = tiny_model(vocab_size=len(demo_tokenizer), seq_length=512)
    eod = demo_tokenizer.eod_id
    model.generation_config = transformers.GenerationConfig(
        chat_format="chatml", max_new_tokens=40, do_sample=False, eos_token_id=eod, pad_token_id=eod
    )
    whole = model.chat(demo_tokenizer, "hi", None)[0]
    for begin in (2, len(whole) // 3, len(whole) // 2):
        stop = whole[begin : begin + 3]
        expected = whole[: whole.index(stop)].strip()
        for drafts in (2, 10):
            answer, _ = model.chat(demo_tokenizer, "hi", None, stop=stop, prompt_lookup_num_tokens=drafts)
            assert answer == expected


@pytest.mark.parametrize("make", [None, compat.DynamicCache, QWenCache], ids=lambda make: getattr(make, "__name__", ""))
def test_an_input_without_tokens_says_so(demo_tokenizer, make):
    model = tiny_model()
    nothing = demo_tokenizer("", return_tensors="pt").input_ids
    assert nothing.shape == (1, 0)

    def arguments():
        if make is None:
            return {}
        cache = make()
        model(random_ids(1, 5), past_key_values=cache)
        return {"past_key_values": cache}

    with torch.no_grad():
        for ids in (nothing, nothing.long(), random_ids(0, 3), random_ids(4)):
            shape = re.escape(str(tuple(ids.shape)))
            for call in (model, model.transformer, model.generate):
                with pytest.raises(ValueError, match=f"no tokens: its shape is {shape}.*tokenizer.eod_id"):
                    call(ids, **arguments())
        with pytest.raises(ValueError, match="no tokens"):
            model(inputs_embeds=torch.zeros(1, 0, 64), **arguments())


def test_a_mask_of_four_dimensions_decides_alone_in_the_reference_too():
    """A new token may see a later one then."""
    q, k, v = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (3, 7, 8))
    v = v[:, :, :7]
    mask = torch.ones(1, 1, 3, 7, dtype=torch.bool)
    mask[..., 1, :2] = False
    scores = (q.double() @ k.double().transpose(2, 3) * 0.25).masked_fill(~mask, -float("inf"))
    expected = (scores.softmax(-1) @ v.double()).transpose(1, 2)  # (B, T, nh, hd)
    for attention in (qwen_ops.decode_attention, lambda *x: qwen_ops.decode_attention_reference(*x, causal=False)):
        torch.testing.assert_close(attention(q, k, v, mask, 0.25).double(), expected, rtol=1e-5, atol=1e-5)
