"""Texts to try a tokenizer on: generated, of every kind that is likely to go wrong."""

from __future__ import annotations

import random
import unicodedata
from importlib.metadata import version

# Older ones take quadratic time for a long piece, such as a word of a million letters.
TIKTOKEN_TAKES_LONG_PIECES = tuple(map(int, version("tiktoken").split(".")[:2])) >= (0, 13)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
PREFIXES = sorted({token[:end] for token in SPECIAL for end in range(1, len(token))})

# Characters that every library and release here has known for long: about newer ones they may know different things.
KNOWN = [chr(code) for code in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs", "Co")]
MARKS = [character for character in KNOWN if unicodedata.combining(character)]
SURROGATES = ["\ud800", "\udbff", "\udc00", "\udfff", "\ud83d\ude00", "\ude00\ud83d"]

FRAGMENTS = [
    *("the", " capital", " of", "France", "don't", "WE'LL", "it'S", "'ſ", "'Re", "I'm", "x'd", "'", "''", "naïve"),
    *(
        "def f(x):",
        "\n    return x + 1",
        "if (a<=b) {",
        "};\n",
        "//",
        "#!/usr/bin",
        "https://a.b/c?d=e&f",
        "\t\t",
        "<|",
    ),
    *("0", "1234567890", "3.14", "１２", "½", "²", "Ⅷ", "一", "〇", "①", "٣"),
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        " \n",
        "\n ",
        "\r\n",
        "\r",
        "\t",
        " \t \n\n  ",
        "\u3000",
        "\xa0",
        "\u2028",
        "\x85",
    ),
    *("\x0b", "\x0c", "\x1c", "\u200b", "\u1680", "\u180e", "\ufeff", "\0", "\0\0", "\x01", "\x7f"),
    *(
        "首都",
        "的",
        "你好，世界！",
        "一只猫",
        "龘",
        "鿕",
        "「」",
        "。\n",
        "中文English混排",
        "日本語の",
        "が",
        "か\u3099",
    ),
    *(
        "한국어",
        "\u1112\u1161\u11ab",
        "가\u11a8",
        "русский",
        "ΑΒΓ",
        "ελληνικά",
        "שָׁלוֹם",
        "مرحبا",
        "हिन्दी",
        "ไทย",
        "தமிழ்",
    ),
    *(
        "é",
        "e\u0301",
        "e\u0327\u0301",
        "e\u0301\u0327",
        "\u0301",
        "\u0344",
        "\u0f73",
        "\u212a",
        "\u2126",
        "Å",
        "\u212b",
    ),
    *("ﬁ", "\uf900", "\U0002f800", "\u0958", "ǅ", "İ", "ß", "\u0338", "<\u0338", "|>\u0338", "=\u0338"),
    *(
        "😀",
        "👨‍👩‍👧",
        "🇫🇷",
        "👍🏽",
        "❤️",
        "𝔘",
        "𠀀",
        "🀄",
        "…",
        "—",
        "“”",
        "€",
        "°C",
        "!!!",
        "----",
        "====",
        "<<<",
        "|||",
    ),
]


def generated_text(choice: random.Random, surrogates: bool = True) -> str:
    """A text of up to some dozen fragments, most of them short."""
    kinds = [
        lambda: choice.choice(FRAGMENTS),
        lambda: choice.choice(FRAGMENTS),
        lambda: choice.choice(SPECIAL[:4] if choice.random() < 0.7 else SPECIAL),
        lambda: choice.choice(PREFIXES),
        lambda: choice.choice(KNOWN) * choice.choice((1, 1, 1, 2, 7)),
        lambda: "".join(choice.choices(MARKS, k=choice.randint(1, 6))),
        lambda: "".join(chr(choice.randint(32, 126)) for _ in range(choice.randint(1, 12))),
        lambda: "".join(chr(choice.randint(0x4E00, 0x9FA5)) for _ in range(choice.randint(1, 12))),
        lambda: choice.choice(FRAGMENTS) * choice.randint(2, 40),
        lambda: choice.choice(SURROGATES) if surrogates else "",
    ]
    return "".join(choice.choices(kinds)[0]() for _ in range(choice.randint(0, 14)))


def generated_texts(count: int, seed: int) -> list[str]:
    """`count` texts, the same for the same seed; one in eight may have lone surrogates."""
    choice = random.Random(seed)
    return [generated_text(choice, surrogates=choice.random() < 0.125) for _ in range(count)]


def without_surrogates(text: str) -> str:
    """The text as tiktoken takes it: pairs of surrogates as the character that they stand for, lone ones replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
