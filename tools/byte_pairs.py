"""Byte pair encoding of one piece of text, step by step, for tools that look into it."""

from __future__ import annotations

from typing import Iterator


def merges(parts: list[bytes], ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """
    Merge `parts` in place as tiktoken does, and yield each pair of neighbours before it is merged.

    Of all neighbours whose concatenation is a token, those come first that give the token of the lowest rank; of equal
    ones the leftmost. Takes quadratic time in the number of parts, which is small for words.

    Example:
        >>> parts = [b"a", b"b", b"a", b"b"]
        >>> list(merges(parts, {b"a": 0, b"b": 1, b"ab": 2, b"aba": 3})), parts
        ([(b'a', b'b'), (b'a', b'b')], [b'ab', b'ab'])
    """
    while len(parts) > 1:
        candidates = [(ranks[pair], i) for i, pair in enumerate(map(bytes.__add__, parts, parts[1:])) if pair in ranks]
        if not candidates:
            return
        _, i = min(candidates)
        yield parts[i], parts[i + 1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
