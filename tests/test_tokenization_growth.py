"""Input that is made to be slow: time must not grow with the square of its length."""

from __future__ import annotations

import time

import pytest
from texts import TIKTOKEN_TAKES_LONG_PIECES

# Each takes longer the more of it there is in one piece; twice the text may take twice the time and a bit.
CHARACTERS = {
    **{"letter": "a", "other letter": "é", "digit": "1", "punctuation": "!", "apostrophe": "'", "Chinese": "中"},
    **{"space": " ", "tab": "\t", "newline": "\n", "ideographic space": "\u3000", "space and newline": " \n"},
    **{"mark": "\u0301", "marks out of order": "\u0301\u0327", "decomposing mark": "\u0301\u0f73", "jamo": "\u1112"},
    **{"NUL": "\0", "lone surrogate": "\ud800", "<": "<", "<|": "<|", "control token": "<|im_end|>", "emoji": "😀"},
}


def seconds(function, *args, **kwargs) -> float:
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


@pytest.mark.skipif(not TIKTOKEN_TAKES_LONG_PIECES, reason="tiktoken before 0.13 takes quadratic time")
@pytest.mark.parametrize("character", CHARACTERS.values(), ids=CHARACTERS)
def test_time_grows_no_worse_than_n_log_n(official_tokenizer, character):
    size = len(character.encode("utf-8", "surrogatepass"))
    large = character * (1_000_000 // size)
    small = large[: len(large) // 16]
    for arguments in ({}, {"allowed_special": set()}):
        grown = []
        while len(grown) < 5 and min(grown, default=999) > 120:
            base = min(seconds(official_tokenizer, small, **arguments) for _ in range(3))
            grown.append(seconds(official_tokenizer, large, **arguments) / base)
        # For 16 times as much n log n is 16 * 1.25 = 20 times the steps, and n * n 256; a step takes several times
        # longer when the memory that it needs no longer fits the processor's caches.
        assert min(grown) <= 120


@pytest.mark.skipif(not TIKTOKEN_TAKES_LONG_PIECES, reason="tiktoken before 0.13 takes quadratic time")
@pytest.mark.parametrize("character", ["<|im_end|>", "\ufdd0", "|", " ", "\u0301\u0327"])
def test_templates_take_no_longer_than_n_log_n(demo_tokenizer, character):
    messages = [{"role": "user", "content": character * (1_000_000 // len(character))}]
    assert seconds(demo_tokenizer.apply_chat_template, messages) < 20
