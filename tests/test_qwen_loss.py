"""The loss without the logits: PyTorch's cross-entropy of all logits, gradients in float64, memory, modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, tiny_model
from qwen.qwen_loss import SHARDED_CHUNKS, causal_lm_loss
from torch import nn

WIDTH, VOCAB = 16, 97


def example(dtype=torch.float64, bias=True, B=2, T=23):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias).to(dtype)
    hidden = torch.randn(B, T, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCAB, (B, T))
    labels[0, 5:11] = -100
    return head, hidden, labels


def plain(head, hidden, labels, items=None):
    """All logits at once, by PyTorch alone."""
    logits = head(hidden)[:, :-1].reshape(-1, VOCAB)
    total = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if items is None else items)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def are_close(found, expected, bound=1e-5):
    """Whether every tensor differs from its counterpart by less than `bound` of its norm."""
    return all((a - b).norm() <= bound * b.norm() for a, b in zip(found, expected))


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("items", [None, 57, torch.tensor(57)])
def test_value_and_gradients_are_those_of_all_logits(rows, items):
    head, hidden, labels = example()
    ours = causal_lm_loss(head, hidden, labels, VOCAB, items, chunk_size=rows * VOCAB)
    theirs = plain(head, hidden, labels, items)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, theirs, rtol=1e-13)
    found = gradients(3 * ours, hidden, *head.parameters())
    expected = gradients(3 * theirs, hidden, *head.parameters())
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(found, expected))


def test_gradients_are_differences_of_the_loss():
    head, hidden, labels = example(B=1, T=5)
    assert torch.autograd.gradcheck(lambda x: causal_lm_loss(head, x, labels, VOCAB, chunk_size=2 * VOCAB), hidden)


def test_labels_that_are_shifted_already():
    head, hidden, labels = example()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    loss = causal_lm_loss(head, hidden, None, VOCAB, shift_labels=shifted)
    assert loss == causal_lm_loss(head, hidden, labels, VOCAB)


def test_no_label_gives_what_transformers_gives():
    head, hidden, labels = example()
    loss = causal_lm_loss(head, hidden, torch.full_like(labels, -100), VOCAB)
    assert math.isnan(loss.item())
    loss = causal_lm_loss(head, hidden, torch.full_like(labels, -100), VOCAB, num_items_in_batch=4)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden))


def test_without_gradients_it_is_the_same():
    head, hidden, labels = example()
    with torch.no_grad():
        loss = causal_lm_loss(head, hidden, labels, VOCAB, chunk_size=3 * VOCAB)
    assert not loss.requires_grad
    assert torch.allclose(loss, plain(head, hidden, labels), rtol=1e-13)


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_differentiated_where_nothing_learns(frozen):
    """The gradient of a large head is as large as the head."""
    head, hidden, labels = example()
    inputs = []
    head.register_forward_hook(lambda module, args, output: inputs.append(output.requires_grad))
    if frozen:
        head.requires_grad_(False)
    with torch.set_grad_enabled(frozen):
        causal_lm_loss(head, hidden.detach() if frozen else hidden, labels, VOCAB)
    assert not any(inputs)


def test_only_what_learns_has_a_gradient():
    head, hidden, labels = example()
    head.weight.requires_grad_(False)
    causal_lm_loss(head, hidden, labels, VOCAB, chunk_size=5 * VOCAB).backward()
    expected = gradients(plain(head, hidden.detach(), labels), head.bias)[0]
    assert head.weight.grad is None
    assert torch.allclose(head.bias.grad, expected, rtol=1e-12)
    assert torch.allclose(hidden.grad, gradients(plain(head, hidden, labels), hidden)[0], rtol=1e-12)


def test_the_gradient_of_a_half_precision_head_is_summed_in_float32():
    """600 chunks summed in bfloat16 lose what is smaller than 1/256 of the sum; float32 keeps it."""
    head, hidden, labels = example(torch.bfloat16, bias=False, B=2, T=601)
    labels[labels == -100] = 1
    causal_lm_loss(head, hidden, labels, VOCAB, chunk_size=2 * VOCAB).backward()
    exact = copy.deepcopy(head).double()
    expected = gradients(plain(exact, hidden.detach().double(), labels), exact.weight)[0]
    at_once = gradients(plain(head, hidden.detach(), labels), head.weight)[0]
    error, error_at_once = ((x - expected).norm() / expected.norm() for x in (head.weight.grad, at_once))
    assert error < 2 * error_at_once


def test_it_never_holds_more_logits_than_a_chunk():
    head, hidden, labels = example(torch.float32, B=4, T=100)
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    causal_lm_loss(head, hidden, labels, VOCAB, chunk_size=8 * VOCAB + 5).backward()
    number = int((labels[:, 1:] != -100).sum())
    assert max(sizes) == 8
    assert sum(sizes) == number  # and none for positions without a label


class Sharded(nn.Parameter):
    """Looks like a parameter of ZeRO-3, of which every process must ask for the whole as often as the others."""

    ds_id = 0


def test_a_sharded_head_is_called_equally_often_for_any_labels():
    head, hidden, labels = example()
    expected = gradients(plain(head, hidden, labels), hidden, *head.parameters())
    head.weight = Sharded(head.weight.detach())
    calls = []
    head.register_forward_hook(lambda *args: calls.append(1))
    loss = causal_lm_loss(head, hidden, labels, VOCAB)
    found = gradients(loss, hidden, *head.parameters())
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(found, expected))
    assert len(calls) == 2 * SHARDED_CHUNKS
    calls.clear()
    with torch.no_grad():
        few = causal_lm_loss(head, hidden[:, :2], labels[:, :2], VOCAB)
    assert len(calls) == SHARDED_CHUNKS
    assert torch.allclose(few, plain(head, hidden[:, :2], labels[:, :2]))


@pytest.mark.parametrize("training", [True, False])
def test_model_gives_the_same_loss_without_logits(training):
    model, ids = tiny_model().train(training), random_ids(2, 24)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    whole = model(ids, labels=labels)
    loss_only = model(ids, labels=labels, skip_logits=True)
    assert whole.logits is not None
    assert loss_only.logits is None
    assert torch.allclose(whole.loss, loss_only.loss, rtol=1e-6)
    expected = gradients(whole.loss, *model.parameters())
    found = gradients(loss_only.loss, *model.parameters())
    assert are_close(found, expected)
    items = model(ids, labels=labels, skip_logits=True, num_items_in_batch=100).loss
    assert torch.allclose(items, whole.loss * (labels[:, 1:] != -100).sum() / 100, rtol=1e-6)


def test_without_labels_there_are_logits():
    assert tiny_model()(random_ids(1, 4), skip_logits=True).logits is not None


def test_adapted_head():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    model, ids = peft.get_peft_model(tiny_model(), config), random_ids(2, 24)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = gradients(model(ids, labels=ids).loss, *learned)
    found = gradients(model(ids, labels=ids, skip_logits=True).loss, *learned)
    assert are_close(found, expected)
