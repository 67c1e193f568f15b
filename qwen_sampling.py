"""
Choosing the next token on a GPU: what transformers' processors and `torch.multinomial` choose, in fewer passes over the
vocabulary.

Knows scores and the state of random numbers, not the network.
"""

from __future__ import annotations

import math

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper


class TopKThenTopP(LogitsProcessor):
    """`TopKLogitsWarper` and `TopPLogitsWarper` behind it, whose removed scores are -inf, with one sort for both."""

    def __init__(self, top_k: TopKLogitsWarper, top_p: TopPLogitsWarper):
        self.top_k = top_k.top_k
        self.top_p = top_p.top_p
        self.min_tokens_to_keep = top_p.min_tokens_to_keep

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        input_ids: int64 (B, T). scores: float32 (B, vocab), and so are those returned.

        Which of equal scores goes is decided as by the two, because a GPU sorts long rows by a stable radix sort.
        """
        ordered, order = scores.sort(-1)
        least = ordered[:, -min(self.top_k, ordered.shape[-1]), None]
        beyond_k = ordered < least
        shares = ordered.masked_fill(beyond_k, -math.inf).softmax(-1).cumsum(-1)
        beyond_p = shares <= 1 - self.top_p
        beyond_p[:, -self.min_tokens_to_keep :] = False
        removed = beyond_k | beyond_p
        return scores.masked_fill(removed.scatter(1, order, removed), -math.inf)


def in_fewer_passes(processors):
    """The same processors in their order, `TopKThenTopP` in place of the two where one follows the other."""
    if type(processors) is not LogitsProcessorList:
        return processors
    found = LogitsProcessorList()
    for processor in processors:
        before = found[-1] if found else None
        if (
            type(processor) is TopPLogitsWarper
            and type(before) is TopKLogitsWarper
            and processor.filter_value == before.filter_value == -math.inf
        ):
            found[-1] = TopKThenTopP(before, processor)
        else:
            found.append(processor)
    return found


def draw(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A token of each row, int64 (B), drawn with the probabilities `scores.softmax(-1)`, and whether that was possible.

    scores: float32 (B, vocab). It is possible, bool (B), unless a score is infinity or not a number, or all are
    -infinity; which `torch.multinomial` finds out by looking at everything three times more. The random numbers are
    used as it uses them, for an exponential race (https://en.wikipedia.org/wiki/Exponential_distribution, "Distribution
    of the minimum of exponential random variables"): the tokens are the same, unless two are equal to the last bit.
    """
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    best, tokens = weights.div_(torch.empty_like(weights).exponential_()).max(-1)
    return tokens, best > 0
