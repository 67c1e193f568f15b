"""The loss of a language model that never holds the logits of all positions."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .transformers_compat import is_fsdp_unit

CHUNK_SIZE = 2**26  # logits held at a time: 256 MiB in float32, 441 positions of 151,936
SHARDED_CHUNKS = 8


def causal_lm_loss(
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int = CHUNK_SIZE,
    **kwargs,
) -> torch.Tensor:
    """
    Cross-entropy of the next token, the value of transformers' `ForCausalLMLoss` on `head(hidden_states)`.

    The logits are computed for `chunk_size // vocab_size` positions at a time, in the head's precision, and their
    softmax in float32 (float64 for a float64 head). Where gradients are wanted they are computed with the loss, chunk
    by chunk, and those of the head's parameters are summed in float32. Positions without a label are not computed.

    A head that is a unit of FSDP2 computes the loss in one call. One whose parameters are otherwise in pieces on
    several processes (ZeRO-3) is called the same number of times in each, SHARDED_CHUNKS, and once more in the backward
    pass.

    Args:
        head: maps (N, hidden) to (N, vocab); any module, an adapted or quantised one too.
        hidden_states: (B, T, hidden).
        labels: int64 (B, T), the ids themselves (they are shifted here), `ignore_index` where there is no loss.
        vocab_size: width of the logits.
        num_items_in_batch: divides the summed loss; by default the number of labels does.
        shift_labels: int64 (B, T), labels that are shifted already; they take the place of `labels`.
        kwargs: further arguments of transformers' loss functions, not used.

    Returns the loss, a float32 scalar (float64 for a float64 head). It has no second derivative.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    hidden_states = hidden_states.flatten(0, -2)  # (B T, hidden)
    targets = shift_labels.flatten().to(hidden_states.device)  # (B T,)
    number = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    if is_fsdp_unit(head):
        inside = functools.partial(_mean, head.forward, head, vocab_size, ignore_index, chunk_size)
        return _between_hooks(head, inside, hidden_states, targets, number)
    if any(map(_is_sharded, head.parameters())):
        learns = _learns(head, hidden_states)
        size = -(-targets.shape[0] // SHARDED_CHUNKS)
        chunks = [slice(i * size, (i + 1) * size) for i in range(SHARDED_CHUNKS)]
        summed = functools.partial(checkpoint, _sum, use_reentrant=False) if learns else _sum
        total = sum(summed(head, hidden_states[chunk], targets[chunk], ignore_index) for chunk in chunks)
        return total / (number.to(total.device) if torch.is_tensor(number) else number)
    return _mean(head, head, vocab_size, ignore_index, chunk_size, hidden_states, targets, number)


def _learns(head: nn.Module, hidden_states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in head.parameters()))


def _between_hooks(module: nn.Module, function, *args):
    """
    `function(*args)` as the module's forward pass, once: FSDP2 brings its parameters together before it and, in the
    backward pass, before its gradient. A second call would find them given back.
    """
    own = vars(module).get("forward")
    module.forward = function
    try:
        return module(*args)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _mean(forward, head, vocab_size, ignore_index, chunk_size, hidden_states, targets, number) -> torch.Tensor:
    """The loss of hidden states (N, hidden), with targets int64 (N,); `forward` maps some of them to logits."""
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    labelled = (targets != ignore_index).nonzero()[:, 0]
    learns = _learns(head, hidden_states)
    hidden_states, targets = hidden_states.index_select(0, labelled), targets[labelled]
    size = max(chunk_size // vocab_size, 1)
    if learns:
        total = _SummedLoss.apply(forward, size, hidden_states, targets, *parameters)
    else:
        chunks = zip(hidden_states.split(size), targets.split(size))
        total = sum(_sum(forward, *chunk, ignore_index) for chunk in chunks)
    return total / (number.to(total.device) if torch.is_tensor(number) else number)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Whether only the forward pass of its module brings it together: a DTensor, or a parameter of ZeRO-3."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def _sum(head: nn.Module, x: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Summed loss of one chunk: x (N, hidden), targets int64 (N,)."""
    logits = head(x)  # (N, vocab)
    targets = targets.to(logits.device)
    logits = logits.to(_at_least_float32(logits.dtype))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum").to(x.device)


class _SummedLoss(torch.autograd.Function):
    """The summed loss of labelled positions, (N, hidden) and int64 (N,); its forward pass computes its gradient."""

    @staticmethod
    def forward(ctx, head, size, hidden_states, targets, *parameters):
        total = hidden_states.new_zeros((), dtype=_at_least_float32(hidden_states.dtype))
        gradient = torch.empty_like(hidden_states)
        sums = [None] * len(parameters)
        for start in range(0, targets.shape[0], size):
            x = hidden_states[start : start + size].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(x)  # (n, vocab)
            loss, logits_gradient = _loss_and_gradient(logits.detach(), targets[start : start + size])
            total += loss.to(total.device)
            found = torch.autograd.grad(logits, [x, *parameters], logits_gradient, allow_unused=True)
            gradient[start : start + size] = found[0]
            for i, part in enumerate(found[1:]):
                if part is not None and sums[i] is None:
                    sums[i] = part.to(_at_least_float32(part.dtype))
                elif part is not None:
                    sums[i] += part
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.save_for_backward(gradient, *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        gradient, *sums = ctx.saved_tensors
        scaled = [
            total if total is None else torch.mul(total, factor.to(total.device), out=total.new_empty(0, dtype=dtype))
            for total, dtype in zip(sums, ctx.dtypes)
        ]
        return (None, None, gradient * factor, None, *scaled)


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of logits (n, vocab), and its gradient `softmax - one_hot` in their precision."""
    targets = targets.to(logits.device)[:, None]  # (n, 1)
    dtype, logits = logits.dtype, logits.to(_at_least_float32(logits.dtype), copy=True)
    normaliser = logits.logsumexp(-1, keepdim=True)  # (n, 1)
    loss = (normaliser - logits.gather(-1, targets)).sum()
    probabilities = logits.sub_(normaliser).exp_()
    probabilities.scatter_add_(-1, targets, -torch.ones_like(normaliser))
    return loss, probabilities.to(dtype)
