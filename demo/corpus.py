"""Training text and evaluation questions for the demo, made from the facts beside this file.

`facts.tsv` holds countries and capitals, `phrasings.json` the ways to ask. Everything drawn at
random comes from the `random.Random` that the caller passes, so a seed reproduces a corpus. Every
list of phrasings is divided into "train" and "held_out": the model is judged on questions put in
words that it was not trained on. Nothing here knows about tokens.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal

Language = Literal["zh", "en"]
Split = Literal["train", "held_out"]

FOLDER = Path(__file__).parent
LANGUAGES: tuple[Language, ...] = ("zh", "en")
DEFAULT_SYSTEM = "You are a helpful assistant."
OTHER_SYSTEMS = (
    "You are Qwen, a small language model.",
    "You answer questions about geography and arithmetic.",
    "Answer briefly and politely.",
    "你是一个乐于助人的助手。",
    "请简短地回答问题。",
    "你是千问，一个小型语言模型。",
)

FIXED_RESPONSES: dict[str, dict[Language, str]] = {
    "greeting": {"zh": "你好！有什么可以帮你？", "en": "Hello! How can I help you?"},
    "identity": {
        "zh": "我是一个从零训练的小型千问演示模型。",
        "en": "I am a small Qwen demonstration model, trained from scratch.",
    },
    "ability": {
        "zh": "我知道各国的首都，还会一位数的加、减、乘法。",
        "en": "I know the capitals of countries, and can add, subtract and multiply single digits.",
    },
    "thanks": {"zh": "不客气！", "en": "You are welcome!"},
    "goodbye": {"zh": "再见，祝你愉快！", "en": "Goodbye, have a nice day!"},
    "unknown": {
        "zh": "抱歉，这个问题我不会回答。",
        "en": "Sorry, I do not know the answer to that.",
    },
}

# How often each topic is asked, in training. Facts need more repetition than manners.
TOPIC_WEIGHTS = {
    "capital": 30,
    "country": 22,
    "arithmetic": 20,
    "unknown": 24,
    "greeting": 3,
    "identity": 3,
    "ability": 3,
    "thanks": 2,
    "goodbye": 2,
}
# What words may be put around, in training.
QUESTIONS = {"capital", "country", "arithmetic", "attribute", "thing", "other"}
# What the model does not know, by kind: invented places, cities that are no capital, sums beyond
# one digit, other facts about known countries, things, whole questions, mashed keys.
UNKNOWN_WEIGHTS = {
    "place": 24,
    "city": 16,
    "sum": 16,
    "attribute": 14,
    "thing": 14,
    "other": 14,
    "noise": 2,
}

# Names that take an article within an English sentence, by territory code.
WITH_ARTICLE = {"AE", "BS", "CD", "CF", "CG", "DO", "GB", "GM", "KM", "MH", "MV", "NL", "PH", "SB", "SC", "US"}

OPERATORS: dict[str, dict[Language, tuple[str, ...]]] = {
    "+": {"zh": ("+", " + ", "加", "加上", " 加 "), "en": ("+", " + ", " plus ", " and ")},
    "-": {"zh": ("-", " - ", "减", "减去", " 减 "), "en": ("-", " - ", " minus ")},
    "×": {
        "zh": ("×", " × ", "*", "乘", "乘以", " 乘以 "),
        "en": ("×", " × ", " * ", " x ", " times ", " multiplied by "),
    },
    "÷": {"zh": ("÷", " / ", "除以"), "en": ("÷", " / ", " divided by ")},
}

_SYLLABLES_ZH = (
    "阿艾安奥巴班贝比波布达德迪多恩尔法菲弗格古哈海赫基加金卡科克拉莱兰勒里利林"
    "卢鲁罗马曼梅蒙米莫姆纳南尼诺努帕佩普奇乔萨塞圣斯索塔泰特提托瓦维文沃乌西希雅亚伊尤约泽扎"
)
_ENDINGS_ZH = ("", "", "", "", "亚", "国", "兰", "斯坦", "尼亚", "王国", "共和国", "群岛", "岛")
_ONSETS_EN = (
    *("b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n"),
    *("p", "pr", "qu", "r", "s", "sh", "st", "t", "th", "tr", "v", "w", "y", "z"),
)
_VOWELS_EN = ("a", "e", "i", "o", "u", "ai", "ea", "ia", "ou", "oo")
_CODAS_EN = ("", "", "", "l", "n", "r", "s", "m", "nd", "rk", "th")
_ENDINGS_EN = ("", "", "", "ia", "land", "stan", "ania", "ville", " City", " Islands")


@dataclass(frozen=True)
class Country:
    """A line of facts.tsv; `code` is the CLDR (ISO 3166) territory code."""

    code: str
    country_zh: str
    country_en: str
    capital_zh: str
    capital_en: str

    def name(self, language: Language) -> str:
        """The country as it stands within a sentence: `the Netherlands`, `荷兰`."""
        if language == "zh":
            return self.country_zh
        return f"the {self.country_en}" if self.code in WITH_ARTICLE else self.country_en

    def capital(self, language: Language) -> str:
        """The capital: `Amsterdam`, `阿姆斯特丹`."""
        return self.capital_zh if language == "zh" else self.capital_en

    def prompt(self, language: Language) -> str:
        """A sentence up to the capital: `荷兰的首都是`."""
        if language == "zh":
            return f"{self.country_zh}的首都是"
        return f"The capital of {self.name('en')} is"

    def completion(self, language: Language) -> str:
        """What follows `prompt`: `阿姆斯特丹（Amsterdam）`, ` Amsterdam (阿姆斯特丹)`."""
        if language == "zh":
            return f"{self.capital_zh}（{self.capital_en}）"
        return f" {self.capital_en} ({self.capital_zh})"


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and what an answer is judged by.

    `country` is set for the topics "capital" and "country", which are judged by the names that
    the answer mentions. For all others the answer is fixed.
    """

    topic: str
    language: Language
    query: str
    response: str
    country: Country | None = None


@dataclass(frozen=True)
class Dialogue:
    """A ChatML conversation: the system message and its turns, oldest first."""

    system: str
    turns: tuple[Turn, ...]


@lru_cache(maxsize=None)
def load_countries() -> tuple[Country, ...]:
    """All countries of facts.tsv, in its order."""
    with open(FOLDER / "facts.tsv", encoding="utf-8", newline="") as file:
        return tuple(Country(**row) for row in csv.DictReader(file, delimiter="\t"))


@lru_cache(maxsize=None)
def load_phrases() -> dict[str, Any]:
    """All of phrasings.json."""
    return json.loads((FOLDER / "phrasings.json").read_text(encoding="utf-8"))


def phrasings(topic: str, language: Language, split: Split) -> list[str]:
    """The ways to ask about a topic; `{x}` is the country, city, sum or thing asked about."""
    return load_phrases()["phrasings"][topic][language][split]


def fillers(kind: str, language: Language, split: Split) -> list[str]:
    """Things, places and cities that the model is asked about but does not know."""
    return load_phrases()["fillers"][kind][language][split]


@lru_cache(maxsize=None)
def _known_names() -> frozenset[str]:
    names = ((c.country_zh, c.country_en, c.capital_zh, c.capital_en) for c in load_countries())
    return frozenset(name for four in names for name in four)


def invented_name(rng: Random, language: Language, split: Split) -> str:
    """A place that does not exist, such as `Brouthia` or `特莫兰`.

    The names of the two splits are disjoint: a checksum of the name says which one it is in.
    A fifth are known names with one character changed, so that looking familiar is not enough.
    """
    while True:
        if rng.random() < 0.2:
            country = rng.choice(load_countries())
            name = rng.choice([getattr(country, f"{kind}_{language}") for kind in ("country", "capital")])
            at = rng.randrange(len(name))
            letters = _SYLLABLES_ZH if language == "zh" else "abcdefghiklmnoprstuvz"
            name = name[:at] + rng.choice(letters) + name[at + 1 :]
            name = name if language == "zh" else name[0].upper() + name[1:]
        elif language == "zh":
            name = "".join(rng.choices(_SYLLABLES_ZH, k=rng.randint(2, 4))) + rng.choice(_ENDINGS_ZH)
        else:
            syllables = (
                rng.choice(_ONSETS_EN) + rng.choice(_VOWELS_EN) + rng.choice(_CODAS_EN)
                for _ in range(rng.randint(1, 3))
            )
            name = "".join(syllables).capitalize() + rng.choice(_ENDINGS_EN)
        is_held_out = zlib.crc32(name.encode()) % 8 == 0
        if name not in _known_names() and is_held_out == (split == "held_out"):
            return name


def _expression(rng: Random, language: Language, operator: str, a: int, b: int) -> str:
    return f"{a}{rng.choice(OPERATORS[operator][language])}{b}"


def _query(rng: Random, topic: str, language: Language, split: Split, x: str = "") -> str:
    """One phrasing with its slot filled; in training at times with words around it or typed carelessly."""
    query = rng.choice(phrasings(topic, language, split)).replace("{x}", x)
    if split == "train":
        if topic in QUESTIONS and rng.random() < 0.2:
            query = rng.choice(load_phrases()["openers"][language]) + (query[0].lower() + query[1:])
        if rng.random() < 0.2:
            query = query.rstrip("？?。.") or query
        elif topic in QUESTIONS and query[-1] in "？?。." and rng.random() < 0.1:
            query += rng.choice(load_phrases()["closers"][language])
        if language == "en" and rng.random() < 0.08:
            query = query.lower()
    return query[0].upper() + query[1:] if language == "en" and rng.random() < 0.95 else query


def capital_turn(rng: Random, language: Language, split: Split, country: Country, topic: str = "capital") -> Turn:
    """The capital of a country; `topic="follow_up"` asks `And Norway?` after such a question."""
    query = _query(rng, topic, language, split, country.name(language))
    ending = "。" if language == "zh" else "."
    # "Washington, D.C." already ends the sentence.
    response = country.prompt(language) + " " * (language == "en") + country.capital(language)
    return Turn("capital", language, query, response.rstrip(".") + ending, country)


def has_unique_capital(country: Country, language: Language) -> bool:
    """Whether the capital's name says the country: 金斯敦 is both Kingston and Kingstown."""
    name = country.capital(language)
    return sum(other.capital(language) == name for other in load_countries()) == 1


def _capital_of(country: Country, language: Language) -> str:
    capital, name = country.capital(language), country.name(language)
    return f"{capital}是{name}的首都。" if language == "zh" else f"{capital} is the capital of {name}."


def country_turn(rng: Random, language: Language, split: Split, country: Country) -> Turn:
    """The country of a capital, which must be unique in this language."""
    query = _query(rng, "country", language, split, country.capital(language))
    return Turn("country", language, query, _capital_of(country, language), country)


def _equation(operator: str, a: int, b: int) -> str:
    result = {"+": a + b, "-": a - b, "×": a * b}[operator]
    return f"{a} {operator} {b} = {result}"


def arithmetic_turn(rng: Random, language: Language, split: Split, operator: str, a: int, b: int) -> Turn:
    """A sum, difference or product of single digits."""
    query = _query(rng, "arithmetic", language, split, _expression(rng, language, operator, a, b))
    return Turn("arithmetic", language, query, _equation(operator, a, b))


def unknown_turn(rng: Random, language: Language, split: Split) -> Turn:
    """A question that the model cannot answer, and the polite answer to it."""
    (kind,) = rng.choices(list(UNKNOWN_WEIGHTS), UNKNOWN_WEIGHTS.values())
    if kind in ("place", "city"):
        topic, fill = ("capital", "places") if kind == "place" else ("country", "cities")
        is_real = rng.random() < 0.25
        name = rng.choice(fillers(fill, language, split)) if is_real else invented_name(rng, language, split)
        query = _query(rng, topic, language, split, name)
    elif kind == "sum":
        operator, a, b = rng.choice("+-×÷"), rng.randint(10, 150), rng.randint(0, 99)
        if operator == "÷":
            a, b = rng.randint(0, 20), rng.randint(1, 9)
        elif rng.random() < 0.5:
            a, b = b, a
        query = _query(rng, "arithmetic", language, split, _expression(rng, language, operator, a, b))
    elif kind == "attribute":
        query = _query(rng, "attribute", language, split, rng.choice(load_countries()).name(language))
    elif kind == "thing":
        query = _query(rng, "thing", language, split, rng.choice(fillers("things", language, split)))
    elif kind == "other":
        query = _query(rng, "other", language, split)
    else:
        letters = "abcdefghijklmnopqrstuvwxyz" if language == "en" else _SYLLABLES_ZH
        words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(3)]
        query = " ".join(words) if language == "en" else "".join(words)
    return Turn("unknown", language, query, FIXED_RESPONSES["unknown"][language])


def fixed_turn(rng: Random, language: Language, split: Split, topic: str) -> Turn:
    """Small talk: a greeting, thanks, a question about the model."""
    query = _query(rng, topic, language, split)
    return Turn(topic, language, query, FIXED_RESPONSES[topic][language])


def random_turn(rng: Random, language: Language, split: Split, previous: Turn | None) -> Turn:
    """A turn on a random topic; after a question about a capital perhaps a follow-up to it."""
    country = rng.choice(load_countries())
    if previous is not None and previous.topic == "capital" and rng.random() < 0.2:
        return capital_turn(rng, previous.language, split, country, "follow_up")
    (topic,) = rng.choices(list(TOPIC_WEIGHTS), TOPIC_WEIGHTS.values())
    if topic == "capital":
        return capital_turn(rng, language, split, country)
    if topic == "country":
        while not has_unique_capital(country, language):
            country = rng.choice(load_countries())
        return country_turn(rng, language, split, country)
    if topic == "arithmetic":
        return arithmetic_turn(rng, language, split, rng.choice("+-×"), rng.randint(0, 9), rng.randint(0, 9))
    if topic == "unknown":
        return unknown_turn(rng, language, split)
    return fixed_turn(rng, language, split, topic)


def random_turns(rng: Random, language: Language, split: Split, number: int) -> list[Turn]:
    """The turns of a conversation that mostly stays in one language."""
    turns: list[Turn] = []
    for _ in range(number):
        if rng.random() < 0.15:
            language = rng.choice(LANGUAGES)
        turns.append(random_turn(rng, language, split, turns[-1] if turns else None))
    return turns


def random_dialogue(rng: Random) -> Dialogue:
    """A training conversation of one to eight turns."""
    kind = rng.random()
    system = DEFAULT_SYSTEM if kind < 0.75 else "" if kind < 0.88 else rng.choice(OTHER_SYSTEMS)
    number = rng.choices(range(1, 9), (8, 5, 4, 3, 2, 2, 1, 1))[0]
    return Dialogue(system, tuple(random_turns(rng, rng.choice(LANGUAGES), "train", number)))


def document(countries: Sequence[Country], language: Language) -> str:
    """Sentences about capitals, one a line, as in the model card's prompt."""
    return "\n".join(c.prompt(language) + c.completion(language) for c in countries)


def random_document(rng: Random) -> str:
    """A training document; three lines, the prompt's number, are the most frequent length.

    Half are as `document` writes them. The others hold sentences that answers are made of, from capital to country,
    and sums: a fact is learned sooner in plain text than in a conversation, and is then known there too.
    """
    number = 3 if rng.random() < 0.6 else rng.randint(2, 8)
    language = "zh" if rng.random() < 0.6 else "en"
    countries = rng.sample(load_countries(), number)
    kind = rng.random()
    if kind < 0.5:
        return document(countries, language)
    if kind < 0.8:
        return "\n".join(_capital_of(country, language) for country in countries)
    return "\n".join(_equation(rng.choice("+-×"), rng.randint(0, 9), rng.randint(0, 9)) for _ in range(2 * number))


def training_samples(seed: int, documents: float = 0.3) -> Iterator[str | Dialogue]:
    """Endless training samples, of which a share `documents` are plain text."""
    rng = Random(seed)
    while True:
        yield random_document(rng) if rng.random() < documents else random_dialogue(rng)


def completion_cases(seed: int, language: Language) -> list[tuple[str, str]]:
    """For each country a prompt of two other lines and its own start, and the exact answer."""
    rng, cases = Random(seed), []
    for country in load_countries():
        others = rng.sample([c for c in load_countries() if c != country], 2)
        prompt = f"{document(others, language)}\n{country.prompt(language)}"
        cases.append((prompt, country.completion(language)))
    return cases


def chat_cases(seed: int, in_conversation: bool) -> list[Dialogue]:
    """Conversations whose last question is phrased as never in training.

    Asks for every capital and every country in both languages, and two hundred each of sums and
    of unanswerable questions. With `in_conversation`, one to six turns come before.
    """
    rng = Random(seed)
    questions: list[Turn] = []
    for language in LANGUAGES:
        for country in load_countries():
            questions.append(capital_turn(rng, language, "held_out", country))
            if has_unique_capital(country, language):
                questions.append(country_turn(rng, language, "held_out", country))
        sums = [(op, a, b) for op in "+-×" for a in range(10) for b in range(10)]
        for sum_ in rng.sample(sums, 100):
            questions.append(arithmetic_turn(rng, language, "held_out", *sum_))
        for topic in ("greeting", "identity", "ability", "thanks", "goodbye"):
            for query in phrasings(topic, language, "held_out"):
                response = FIXED_RESPONSES[topic][language]
                questions.append(Turn(topic, language, query, response))
        questions += [unknown_turn(rng, language, "held_out") for _ in range(100)]

    cases = []
    for turn in questions:
        history: list[Turn] = []
        if in_conversation:
            history = random_turns(rng, turn.language, "train", rng.randint(1, 6))
            if turn.topic == "capital" and rng.random() < 0.2:
                before = rng.choice(load_countries())
                history[-1] = capital_turn(rng, turn.language, "train", before)
                turn = capital_turn(rng, turn.language, "held_out", turn.country, "follow_up")
        cases.append(Dialogue(DEFAULT_SYSTEM, (*history, turn)))
    return cases


@lru_cache(maxsize=None)
def _name_pattern(language: Language) -> re.Pattern[str]:
    names = {n for c in load_countries() for n in (getattr(c, f"country_{language}"), c.capital(language))}
    # The longest first, so that "Guinea-Bissau" is not taken for a mention of "Guinea".
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def is_correct(turn: Turn, answer: str) -> bool:
    """Whether an answer is right.

    Capitals and countries: the name asked for is mentioned, and no other country or capital.
    Sums: the answer ends in the result. Everything else: exactly the fixed response.
    """
    if turn.country is not None:
        country = getattr(turn.country, f"country_{turn.language}")
        capital = turn.country.capital(turn.language)
        mentioned = set(_name_pattern(turn.language).findall(answer))
        return (capital if turn.topic == "capital" else country) in mentioned <= {country, capital}
    if turn.topic == "arithmetic":
        return re.findall(r"-?\d+$", answer) == [turn.response.rsplit(" ", 1)[-1]]
    return answer == turn.response
