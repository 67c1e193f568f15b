"""Byte pair encoding of one piece of text, step by step, for tools that look into it."""

from __future__ import annotations

from typing import Iterator

from tqdm import tqdm


def byte_alphabet() -> list[str]:
    """A printable character for each byte: itself where it is one, else the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


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


def recovered_pairs(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """
    The pairs that tokens are made of, in the order of the tokens' ranks, for programs that have a list of pairs.

    Merging the bytes of a token by itself gives its pair. A token that no merges lead to has none.

    Example:
        >>> list(recovered_pairs({b"a": 0, b"b": 1, b"ab": 2, b"aba": 3, b"bbb": 4}))
        [(b'a', b'b'), (b'ab', b'a')]
    """
    for token in tqdm(sorted(ranks, key=ranks.__getitem__), desc="recovering merges", unit="token", mininterval=1):
        parts, pair = [bytes([byte]) for byte in token], None
        for pair in merges(parts, ranks):  # noqa: B007 (the last one is wanted)
            pass
        if pair is not None and len(parts) == 1:
            yield pair
