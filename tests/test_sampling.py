"""The next token on a GPU is the one that transformers' processors and torch.multinomial give."""

from __future__ import annotations

import math

import pytest
import torch
from qwen import qwen_sampling
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def some_scores(kind: str, vocab: int = 3000) -> torch.Tensor:
    """float32 (3, vocab)"""
    torch.manual_seed(hash_of(kind))
    scores = torch.randn(3, vocab) * 4
    if kind == "ties":  # as bfloat16 has them
        scores = (scores * 2).round() / 2
    elif kind == "all equal":
        scores[:] = 1.5
    elif kind == "few finite":
        scores[:, 7:] = -math.inf
    elif kind == "one":
        scores[:, 5] = 200
    return scores.to(DEVICE)


def hash_of(text: str) -> int:
    return sum(map(ord, text))


KINDS = ("spread", "ties", "all equal", "few finite", "one")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(50, 0.8, 1), (5, 0.1, 1), (4000, 0.95, 3), (20, 0.0, 4), (3, 1.0, 1)]
)
def test_one_sort_removes_what_two_processors_remove(kind, top_k, top_p, kept):
    two = LogitsProcessorList(
        [TopKLogitsWarper(top_k, min_tokens_to_keep=kept), TopPLogitsWarper(top_p, min_tokens_to_keep=kept)]
    )
    one = qwen_sampling.in_fewer_passes(two)
    assert [type(processor).__name__ for processor in one] == ["TopKThenTopP"]
    scores = some_scores(kind)
    found, expected = (processors(None, scores.clone()) for processors in (one, two))
    if DEVICE == "cpu":  # whose sort is not stable: which of equal scores goes may differ
        found, expected = found.sort(-1)[0], expected.sort(-1)[0]
    assert torch.equal(found, expected)


def test_only_the_two_as_they_are_become_one():
    """In their order, removing by -inf, of exactly these classes; everything else stays, and in its place."""

    class Mine(TopPLogitsWarper):
        pass

    k, p, penalty = TopKLogitsWarper(5), TopPLogitsWarper(0.5), RepetitionPenaltyLogitsProcessor(1.2)
    for processors in ([p, k], [k, penalty, p], [k, Mine(0.5)], [TopKLogitsWarper(5, filter_value=-1e9), p], [k], []):
        found = qwen_sampling.in_fewer_passes(LogitsProcessorList(processors))
        assert list(found) == processors
    found = qwen_sampling.in_fewer_passes(LogitsProcessorList([penalty, k, p, penalty]))
    assert [type(each).__name__ for each in found] == [
        *("RepetitionPenaltyLogitsProcessor", "TopKThenTopP", "RepetitionPenaltyLogitsProcessor"),
    ]
    own = [k, p]  # not transformers' list
    assert qwen_sampling.in_fewer_passes(own) is own


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_multinomial(kind):
    scores = some_scores(kind)
    for seed in range(50):
        torch.manual_seed(seed)
        expected = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        after = torch.rand((), device=DEVICE)
        torch.manual_seed(seed)
        tokens, possible = qwen_sampling.draw(scores)
        assert torch.equal(tokens, expected)
        assert bool(possible.all())
        assert torch.rand((), device=DEVICE) == after, "other random numbers afterwards"


@pytest.mark.parametrize("wrong", [math.nan, math.inf, "all -inf"])
def test_a_row_that_nothing_can_be_drawn_from_is_said(wrong):
    scores = some_scores("spread")
    if wrong == "all -inf":
        scores[1] = -math.inf
    else:
        scores[1, 17] = wrong
    assert qwen_sampling.draw(scores)[1].tolist() == [True, False, True]
