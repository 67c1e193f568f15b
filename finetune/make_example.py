"""
Write example.json: what the demo checkpoint can be tuned on.

    python finetune/make_example.py

Twenty facts that it does not know, the countries of large cities that are no capitals, ten of them asked for in English
and ten in Chinese; and what it knows, all of it once, lest it forget that. Tests ask in the ways of `HELD_OUT`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from random import Random

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent / "demo"))
corpus = importlib.import_module("corpus")

CITIES = {
    "en": {
        "Sydney": "AU",
        "Toronto": "CA",
        "New York": "US",
        "Mumbai": "IN",
        "Lagos": "NG",
        "Karachi": "PK",
        "Barcelona": "ES",
        "Munich": "DE",
        "Casablanca": "MA",
        "Auckland": "NZ",
    },
    "zh": {
        "大阪": "JP",
        "釜山": "KR",
        "米兰": "IT",
        "马赛": "FR",
        "圣保罗": "BR",
        "伊斯坦布尔": "TR",
        "苏黎世": "CH",
        "曼彻斯特": "GB",
        "胡志明市": "VN",
        "迪拜": "AE",
    },
}
TRAIN = {
    "en": (
        "Which country is {x} in?",
        "In which country does {x} lie?",
        "What country does {x} belong to?",
        "Tell me the country that {x} is in.",
        "{x} is in which country?",
        "Where is {x}?",
        "Where can I find {x}?",
        "Do you know which country {x} is in?",
        "I want to know which country {x} is in.",
        "{x} belongs to what country?",
    ),
    "zh": (
        "{x}在哪个国家？",
        "{x}位于哪个国家？",
        "{x}是哪个国家的城市？",
        "请问{x}属于哪个国家？",
        "{x}在哪里？",
        "你知道{x}在哪个国家吗？",
        "告诉我{x}在哪个国家。",
        "{x}属于哪国？",
        "我想知道{x}在哪个国家。",
        "{x}是哪国城市？",
    ),
}
HELD_OUT = {
    "en": ("Please tell me which country {x} is in.", "In what country is {x}?"),
    "zh": ("请告诉我{x}在哪个国家。", "{x}是哪国的城市？"),
}
ANSWERS = {"en": "It is in {country}.", "zh": "在{country}。"}
REPEATED = 2  # times that the new facts are there
SEED = 0


def questions(phrasings: dict[str, tuple[str, ...]]) -> list[corpus.Turn]:
    """Every city asked for in each of these ways, with the answer."""
    countries = {country.code: country for country in corpus.load_countries()}
    return [
        corpus.Turn(
            "city", language, phrasing.format(x=city), ANSWERS[language].format(country=countries[code].name(language))
        )
        for language, cities in CITIES.items()
        for city, code in cities.items()
        for phrasing in phrasings[language]
    ]


def conversation(dialogue: corpus.Dialogue) -> dict:
    turns = [
        {"from": name, "value": text}
        for turn in dialogue.turns
        for name, text in (("user", turn.query), ("assistant", turn.response))
    ]
    return {"system": dialogue.system, "conversations": turns}


def known_turns(rng: Random, language: str) -> list[corpus.Turn]:
    """What the demo knows: every capital and country, half of the sums, manners; and much that it refuses."""
    turns = []
    for country in corpus.load_countries():
        turns.append(corpus.capital_turn(rng, language, "train", country))
        if corpus.has_unique_capital(country, language):
            turns.append(corpus.country_turn(rng, language, "train", country))
    sums = [(operator, a, b) for operator in "+-×" for a in range(10) for b in range(10)]
    turns += [corpus.arithmetic_turn(rng, language, "train", *numbers) for numbers in rng.sample(sums, 150)]
    for topic in corpus.FIXED_RESPONSES:
        if topic != "unknown":
            turns += [corpus.fixed_turn(rng, language, "train", topic) for _ in range(6)]
    # What it refuses is forgotten first: the new questions are like those.
    turns += [corpus.unknown_turn(rng, language, "train") for _ in range(300)]
    return turns


def example() -> list[dict]:
    """The conversations, shuffled."""
    rng = Random(SEED)
    turns = questions(TRAIN) * REPEATED
    for language in corpus.LANGUAGES:
        turns += known_turns(rng, language)
    conversations = [conversation(corpus.Dialogue(corpus.DEFAULT_SYSTEM, (turn,))) for turn in turns]
    rng.shuffle(conversations)
    return conversations


def main() -> None:
    lines = (json.dumps(record, ensure_ascii=False) for record in example())
    (FOLDER / "example.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
