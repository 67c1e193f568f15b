"""
Write example.json: what the demo checkpoint can be tuned on.

    python finetune/make_example.py

Twenty facts that it does not know, the capitals of states of the United States, asked for in the ways in which
demo/train.py asks for capitals, half of them in English and half in Chinese; and as much again of what it knows, lest
it forget that. The ways that were kept from its training are kept from this file too; tests ask in them.
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

STATES = [
    corpus.Country(*names)
    for names in (
        ("US-TX", "得克萨斯州", "Texas", "奥斯汀", "Austin"),
        ("US-CA", "加利福尼亚州", "California", "萨克拉门托", "Sacramento"),
        ("US-CO", "科罗拉多州", "Colorado", "丹佛", "Denver"),
        ("US-OR", "俄勒冈州", "Oregon", "塞勒姆", "Salem"),
        ("US-MA", "马萨诸塞州", "Massachusetts", "波士顿", "Boston"),
        ("US-AZ", "亚利桑那州", "Arizona", "菲尼克斯", "Phoenix"),
        ("US-OH", "俄亥俄州", "Ohio", "哥伦布", "Columbus"),
        ("US-AK", "阿拉斯加州", "Alaska", "朱诺", "Juneau"),
        ("US-HI", "夏威夷州", "Hawaii", "檀香山", "Honolulu"),
        ("US-NV", "内华达州", "Nevada", "卡森城", "Carson City"),
        ("US-UT", "犹他州", "Utah", "盐湖城", "Salt Lake City"),
        ("US-IL", "伊利诺伊州", "Illinois", "斯普林菲尔德", "Springfield"),
        ("US-FL", "佛罗里达州", "Florida", "塔拉哈西", "Tallahassee"),
        ("US-MN", "明尼苏达州", "Minnesota", "圣保罗", "Saint Paul"),
        ("US-IA", "艾奥瓦州", "Iowa", "得梅因", "Des Moines"),
        ("US-KS", "堪萨斯州", "Kansas", "托皮卡", "Topeka"),
        ("US-ME", "缅因州", "Maine", "奥古斯塔", "Augusta"),
        ("US-VA", "弗吉尼亚州", "Virginia", "里士满", "Richmond"),
        ("US-WI", "威斯康星州", "Wisconsin", "麦迪逊", "Madison"),
        ("US-TN", "田纳西州", "Tennessee", "纳什维尔", "Nashville"),
    )
]
SEED, ASKED = 0, 8  # times that a fact is asked for


def facts() -> list[tuple[str, corpus.Country]]:
    """The states with the language in which they are asked for: half of them in English, half in Chinese."""
    return [("en" if i % 2 else "zh", state) for i, state in enumerate(STATES)]


def conversation(dialogue: corpus.Dialogue) -> dict:
    turns = [
        {"from": name, "value": text}
        for turn in dialogue.turns
        for name, text in (("user", turn.query), ("assistant", turn.response))
    ]
    return {"system": dialogue.system, "conversations": turns}


def example() -> list[dict]:
    """The conversations, shuffled."""
    rng = Random(SEED)
    new = [
        corpus.Dialogue(corpus.DEFAULT_SYSTEM, (corpus.capital_turn(rng, language, "train", state),))
        for language, state in facts()
        for _ in range(ASKED)
    ]
    known = [
        corpus.Dialogue(corpus.DEFAULT_SYSTEM, tuple(corpus.random_turns(rng, language, "train", 1)))
        for language, _ in facts()
        for _ in range(ASKED)
    ]
    conversations = [conversation(dialogue) for dialogue in new + known]
    rng.shuffle(conversations)
    return conversations


def main() -> None:
    lines = (json.dumps(record, ensure_ascii=False) for record in example())
    (FOLDER / "example.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
