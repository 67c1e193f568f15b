"""
Small files of our own making, in the layouts of the data sets that evaluation/evaluate.py reads.

    python tests/evaluation_data.py FOLDER
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

COUNTRIES = {
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "France": "Paris",
    "Iceland": "Reykjavik",
    "Mongolia": "Ulaanbaatar",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
}


def choices(i: int, shift: int) -> tuple[str, list[str], int]:
    """A question, four choices, and which is right."""
    names = list(COUNTRIES)
    country = names[i % len(names)]
    right = (i + shift) % 4
    picked = [COUNTRIES[names[(i + k) % len(names)]] for k in (1, 2, 3)]
    picked.insert(right, COUNTRIES[country])
    return f"What is the capital of {country}?", picked, right


def table(path: Path, rows: int, head: list[str] | None, shift: int, before=(), after=()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if head:
            writer.writerow(head)
        for i in range(rows):
            question, picked, right = choices(i + shift, shift)
            writer.writerow([*(str(i) for _ in before), question, *picked, "ABCD"[right], *("" for _ in after)])


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def sums(i: int) -> dict:
    a, b = i % 40 + 1, i % 17 + 1
    return {
        "question": f"Ann has {a} pens and buys {b} more. How many has she?",
        "answer": f"She has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}",
    }


def make(folder: Path) -> Path:
    """All ten data sets."""
    for shift, subject in enumerate(("world_capitals", "more_capitals")):
        for split, rows in (("dev", 5), ("test", 3)):
            table(folder / "mmlu" / split / f"{subject}_{split}.csv", rows, None, shift)
        head = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
        for split, rows in (("dev", 5), ("val", 3)):
            name = f"{subject}_{split}.csv"
            table(folder / "ceval" / split / name, rows, head, shift, before=("id",), after=("explanation",))
        for split, rows in (("dev", 5), ("test", 3)):
            table(
                folder / "cmmlu" / split / f"{subject}.csv",
                rows,
                ["", "Question", "A", "B", "C", "D", "Answer"],
                shift,
                before=("",),
            )
    jsonl(folder / "gsm8k" / "train.jsonl", [sums(i) for i in range(6012)])
    jsonl(folder / "gsm8k" / "test.jsonl", [sums(i) for i in range(100, 103)])
    for subject in ("algebra", "geometry"):
        for i in range(2):
            path = folder / "math" / "test" / subject / f"{i}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            solution = f"It is $\\boxed{{{i + 2}}}$."
            path.write_text(json.dumps({"problem": f"What is {i} + 2?", "level": "Level 1", "solution": solution}))
    jsonl(
        folder / "humaneval" / "HumanEval.jsonl",
        [
            {
                "task_id": f"own/{i}",
                "prompt": f'def add_{i}(x):\n    """Return x + {i}."""\n',
                "entry_point": f"add_{i}",
                "canonical_solution": f"    return x + {i}\n",
                "test": f"def check(candidate):\n    assert candidate(2) == {2 + i}\n",
            }
            for i in range(2)
        ],
    )
    jsonl(
        folder / "mbpp" / "mbpp.jsonl",
        [
            {
                "task_id": i,
                "text": f"Write a function that adds {i}.",
                "code": f"def add(x):\n    return x + {i}",
                "test_setup_code": "",
                "test_list": [f"assert add({x}) == {x + i}" for x in range(3)],
            }
            for i in range(1, 14)
        ],
    )
    for task, rows in {
        "boolean_expressions": [("not True is", "False"), ("True and True is", "True")],
        "navigate": [("Take 1 step. Turn around. Take 1 step.\nOptions:\n- Yes\n- No", "Yes")],
    }.items():
        path = folder / "bbh" / f"{task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"examples": [{"input": text, "target": target} for text, target in rows]}))
    for shift, task in enumerate(("aqua-rat", "gaokao-physics", "sat-math")):
        rows = []
        for i in range(2):
            question, picked, right = choices(i, shift)
            options = [f"({letter}){text}" for letter, text in zip("ABCD", picked)]
            label = ["A", "C"] if task == "gaokao-physics" else "ABCD"[right]
            rows.append({"passage": None, "question": question, "options": options, "label": label, "answer": None})
        jsonl(folder / "agieval" / f"{task}.jsonl", rows)
    cloze = {"passage": None, "question": "What is 1 + 1?", "options": None, "label": None, "answer": "2"}
    for task in ("math", "gaokao-mathcloze"):
        jsonl(folder / "agieval" / f"{task}.jsonl", [cloze])
    for keyword, answers in {
        "2010-2022_History_MCQs": [["A"], ["B"]],
        "2010-2013_English_MCQs": [["C"]],
        "2010-2022_Physics_MCQs": [["AB"]],
        "2010-2022_Geography_MCQs": [["A", "B", "C"]],
        "2012-2022_English_Cloze_Test": [["A", "B", "C", "D", "E"]],
    }.items():
        path = folder / "gaokao" / f"{keyword}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"year": "2020", "question": f"{i}. 首都？\nA. 北京 B. 东京 C. 利马 D. 巴黎", "answer": answer, "score": 4}
            for i, answer in enumerate(answers)
        ]
        path.write_text(json.dumps({"keywords": keyword, "example": rows}, ensure_ascii=False), "utf-8")
    return folder


if __name__ == "__main__":
    make(Path(sys.argv[1]))
