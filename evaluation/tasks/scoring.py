"""
How answers become scores: (subject, points, points to be had) for each question, and their mean with its error.

Answers are read as the published programs do it (https://github.com/QwenLM/Qwen, eval/); where there is none, as
lm-eval does, and GAOKAO-Bench as OpenCompass does (https://github.com/open-compass/opencompass).
"""

from __future__ import annotations

import math as mathematics
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from run_code import run_program

Score = tuple  # (subject, points, points to be had)

# OpenCompass's weights of the papers of GAOKAO-Bench: the points to be had in them.
GAOKAO_WEIGHTS = {
    "2010-2022_Math_II_MCQs": 1090,
    "2010-2022_Math_I_MCQs": 1070,
    "2010-2022_History_MCQs": 1148,
    "2010-2022_Biology_MCQs": 900,
    "2010-2022_Political_Science_MCQs": 1280,
    "2010-2022_Physics_MCQs": 384,
    "2010-2022_Chemistry_MCQs": 744,
    "2010-2013_English_MCQs": 105,
    "2010-2022_Chinese_Modern_Lit": 261,
    "2010-2022_English_Fill_in_Blanks": 900,
    "2012-2022_English_Cloze_Test": 260,
    "2010-2022_Geography_MCQs": 380,
    "2010-2022_English_Reading_Comp": 940,
    "2010-2022_Chinese_Lang_and_Usage_MCQs": 240,
}


def estimate(scores: list[Score], weights: dict[str, float] | None = None, by_subject: bool = False):
    """
    Mean score and its standard error, both between 0 and 1.

    weights: of the subjects; by_subject: all subjects weigh the same. Otherwise all questions do. The error is that of
    a stratified sample; NaN where a subject has a single question.
    """
    groups = defaultdict(list)
    for subject, points, out_of in scores:
        groups[subject if weights or by_subject else ""].append((points, out_of))
    total = sum(weights[name] for name in groups) if weights else len(groups)
    mean, variance = 0.0, 0.0
    for name, rows in groups.items():
        share = (weights[name] if weights else 1) / total
        out_of = sum(row[1] for row in rows)
        rate = sum(row[0] for row in rows) / out_of
        mean += share * rate
        if len(rows) == 1:
            variance = mathematics.nan
        else:
            spread = sum((points - rate * n) ** 2 for points, n in rows) / out_of**2
            variance += share**2 * spread * len(rows) / (len(rows) - 1)
    return mean, mathematics.sqrt(variance)


def mean(scores: list[Score]) -> float:
    return estimate(scores)[0]


def mean_of_subjects(scores: list[Score]) -> float:
    return estimate(scores, by_subject=True)[0]


def mean_of_papers(scores: list[Score]) -> float:
    return estimate(scores, GAOKAO_WEIGHTS)[0]


def _score(doc: dict, points: float, out_of: float = 1) -> dict[str, Score]:
    return {"score": (doc["subject"], float(points), float(out_of))}


def choice(doc: dict, results: list) -> dict[str, Score]:
    """The most likely choice; the first of equals."""
    likelihoods = [result[0] for result in results]
    picked = likelihoods.index(max(likelihoods))
    gold = doc["gold"] if isinstance(doc["gold"], list) else [doc["gold"]]
    return _score(doc, picked in gold)


def gsm8k_reasoning(doc: dict) -> str:
    """An answer of the data set as the published examples have it: without calculator marks."""
    reasoning, answer = re.sub(r"<<.*?>>", "", doc["answer"]).split("\n#### ")
    return f"{reasoning}\nThe answer is {answer.strip()}"


def gsm8k_number(text: str) -> float | None:
    """The last digits of an answer, as the published program reads them: without sign, point or comma."""
    found = re.findall(r"[0-9]+", text)
    return float(found[-1]) if found else None


def gsm8k(doc: dict, results: list[str]) -> dict[str, Score]:
    gold = float(doc["answer"].rpartition("#### ")[2].strip().replace(",", ""))
    return _score(doc, gsm8k_number(results[0]) == gold)


def math(doc: dict, results: list[str]) -> dict[str, Score]:
    from lm_eval.tasks.minerva_math import utils

    gold = utils.normalize_final_answer(utils.remove_boxed(utils.last_boxed_only_string(doc["solution"])))
    answer = utils.normalize_final_answer(utils.get_unnormalized_answer(results[0]))
    return _score(doc, utils.is_equiv(answer, gold))


def bbh(doc: dict, results: list[str]) -> dict[str, Score]:
    """What follows `the answer is`, without the full stop."""
    found = re.search(r"(?<=the answer is )(.*)(?=.)", results[0])
    return _score(doc, found is not None and found.group(1) == doc["target"])


def agieval_cloze(doc: dict, results: list[str]) -> dict[str, Score]:
    from lm_eval.tasks.agieval import utils

    return _score(doc, utils.is_equiv(results[0], doc["answer"]))


def gaokao_letters(kind: str, text: str, questions: int) -> list[str]:
    """The letters that an answer gives to each of its questions; one string of letters where several are right."""
    if kind == "multi_question_choice":
        marked = re.findall(r"【答案】\s*[:：]*\s*([A-Z])", text)
        return marked if len(marked) == questions else re.findall(r"[A-Z]", text)[:questions]
    if kind == "multi_choice":
        text = re.sub(r"\s+", "", text)
        start = text.find("【答案】")
        letters = "".join(re.findall(r"[A-D]", text[start:] if start > 0 else text[-10:]))
        return [letters] if letters else []
    if kind == "five_out_of_seven":
        return re.findall(r"[A-G]", text)[:5]
    raise ValueError(f"GAOKAO-Bench has no questions of the kind {kind!r}.")


def gaokao(doc: dict, results: list[str]) -> dict[str, Score]:
    """A letter that is right is a point; with several right, half a point for some of them and no wrong one."""
    gold = doc["answer"]
    answer = gaokao_letters(doc["kind"], results[0], len(gold))
    if len(answer) != len(gold):
        return _score(doc, 0, len(gold))
    points = sum(
        1 if a == g else 0.5 * (doc["kind"] == "multi_choice" and set(a) <= set(g)) for a, g in zip(answer, gold)
    )
    return _score(doc, points, len(gold))


def gaokao_gold(doc: dict) -> int:
    return "ABCD".index(doc["answer"][0])


def gaokao_choice(doc: dict, results: list) -> dict[str, Score]:
    return choice({**doc, "gold": gaokao_gold(doc)}, results)


def _run_all(programs: list[str]) -> list[str]:
    """Run programs, several at once: "passed" or what went wrong, in their order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: run_program(program).reason, programs))


def run_humaneval(responses: list[list[str]], docs: list[dict]) -> list[str]:
    return _run_all(
        [
            f"{doc['prompt']}{response[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
            for response, doc in zip(responses, docs)
        ]
    )


def run_mbpp(responses: list[list[str]], docs: list[dict]) -> list[str]:
    return _run_all(
        ["\n".join([doc["test_setup_code"], response[0], *doc["test_list"]]) for response, doc in zip(responses, docs)]
    )


def program(doc: dict, results: list[str]) -> dict[str, Score]:
    return _score(doc, results[0] == "passed")
