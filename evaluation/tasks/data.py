"""
The ten data sets as lm-eval tasks take them: splits of documents, each with its `subject`.

`evaluate.py --data FOLDER` (or `lm_eval --metadata '{"data": "FOLDER"}'`) reads files in the layout that each data set
is published in, without network; otherwise they come from the hub. SOURCES says where to get the files.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from pathlib import Path

import yaml
from datasets import Dataset, get_dataset_config_names, load_dataset
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.samplers import ContextSampler

# name: (files below --data, where they are published)
SOURCES = {
    "mmlu": ("mmlu/{dev,test}/SUBJECT_{dev,test}.csv", "https://people.eecs.berkeley.edu/~hendrycks/data.tar"),
    "ceval": (
        "ceval/{dev,val}/SUBJECT_{dev,val}.csv",
        "https://huggingface.co/datasets/ceval/ceval-exam (ceval-exam.zip)",
    ),
    "cmmlu": (
        "cmmlu/{dev,test}/SUBJECT.csv",
        "https://huggingface.co/datasets/haonan-li/cmmlu (cmmlu_v1_0_1.zip)",
    ),
    "gsm8k": ("gsm8k/{train,test}.jsonl", "https://github.com/openai/grade-school-math (grade_school_math/data)"),
    "math": ("math/test/SUBJECT/NUMBER.json", "https://github.com/hendrycks/math (MATH.tar)"),
    "humaneval": ("humaneval/HumanEval.jsonl or .jsonl.gz", "https://github.com/openai/human-eval (data)"),
    "mbpp": ("mbpp/mbpp.jsonl", "https://github.com/google-research/google-research/tree/master/mbpp"),
    "bbh": ("bbh/TASK.json", "https://github.com/suzgunmirac/BIG-Bench-Hard (bbh)"),
    "agieval": ("agieval/TASK.jsonl", "https://github.com/ruixiangcui/AGIEval (data/v1)"),
    "gaokao": (
        "gaokao/KEYWORD.json",
        "https://github.com/OpenLMLab/GAOKAO-Bench (Data/Objective_Questions)",
    ),
}
LETTERS = "ABCDEFG"
# Rows of GSM8K's training set that are the published eight examples, in their order.
GSM8K_EXAMPLES = (4997, 4280, 3996, 1344, 6011, 328, 3809, 2053)
MATH_CONFIGS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)
AGIEVAL_ENGLISH = (
    *("aqua-rat", "gaokao-english", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-en-without-passage"),
    "sat-math",
)
AGIEVAL_CHINESE = (
    *("gaokao-biology", "gaokao-chemistry", "gaokao-chinese", "gaokao-geography", "gaokao-history", "gaokao-mathqa"),
    *("gaokao-physics", "jec-qa-ca", "jec-qa-kd", "logiqa-zh"),
)
AGIEVAL_CLOZE = ("math", "gaokao-mathcloze")


class OfSubject(ContextSampler):
    """The first n examples of the question's own subject, as the published programs take them."""

    def sample(self, n, eval_doc=None, df=None, **kwargs):
        if not hasattr(self, "by_subject"):
            self.by_subject = defaultdict(list)
            for doc in self.df:
                self.by_subject[doc["subject"]].append(doc)
        found = self.by_subject[eval_doc["subject"]]
        if len(found) < n:
            raise ValueError(f"The subject {eval_doc['subject']!r} has {len(found)} examples, {n} are asked for.")
        return found[:n]


class First(ContextSampler):
    """The first n examples."""

    def sample(self, n, eval_doc=None, df=None, **kwargs):
        return list(self.df)[:n]


def missing(name: str, found: str) -> FileNotFoundError:
    files, source = SOURCES[name]
    return FileNotFoundError(f"{found}. --data needs {files}: get it from {source}.")


def _files(name: str, folder: str, pattern: str) -> list[Path]:
    """The files of a data set below --data, in the order of their names; an error if there are none."""
    paths = sorted((Path(folder) / name).glob(pattern))
    if not paths:
        raise missing(name, f"{Path(folder) / name} has no {pattern}")
    return paths


def _jsonl(path: Path) -> list[dict]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _csv(path: Path, header: tuple[str, ...] | None = None) -> list[dict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, fieldnames=header))


def _choice(subject: str, question: str, choices: list[str], answer: int) -> dict:
    return {"subject": subject, "question": question, "choices": choices, "gold": answer}


def _letter_choice(subject: str, row: dict) -> dict:
    """A row of a table with the columns question, A, B, C, D, answer, whatever their capitals."""
    row = {key.lower(): value for key, value in row.items() if key}
    return _choice(subject, row["question"], [row[x] for x in "abcd"], LETTERS.index(row["answer"].strip()))


def _splits(**splits: list[dict]) -> dict[str, Dataset]:
    return {name: Dataset.from_list(docs) for name, docs in splits.items()}


def _together(examples: list[dict], questions: list[dict]) -> dict[str, Dataset]:
    """One split for both: lm-eval tells a sampler which question it is for only if they come from the same."""
    marked = [{**doc, "is_example": part is examples} for part in (examples, questions) for doc in part]
    return _splits(all=marked)


def _marked(split: Dataset, mark: bool) -> Dataset:
    return split.select([i for i, is_example in enumerate(split["is_example"]) if is_example == mark])


def examples(split: Dataset) -> Dataset:
    return _marked(split, True)


def questions(split: Dataset) -> Dataset:
    return _marked(split, False)


def _tables(name: str, folder: str, splits: tuple[str, str], pattern: str, header=None) -> dict[str, Dataset]:
    """Tables of examples and of questions, one file a subject."""
    docs = []
    for split in splits:
        paths = _files(name, folder, f"{split}/{pattern.format(split=split)}")
        ending = pattern.format(split=split)[1:]
        docs.append([_letter_choice(path.name[: -len(ending)], row) for path in paths for row in _csv(path, header)])
    return _together(*docs)


def _hub(path: str, configs: list[str], split: str):
    """(config, row) of several configurations on the hub."""
    for config in configs:
        for row in load_dataset(path, config, split=split):
            yield config, row


def mmlu(data: str | None = None, **_) -> dict[str, Dataset]:
    """57 subjects; dev: 5 examples each."""
    if data:
        return _tables("mmlu", data, ("dev", "test"), "*_{split}.csv", ("question", "A", "B", "C", "D", "answer"))
    return _together(
        *(
            [
                _choice(row["subject"], row["question"], row["choices"], row["answer"])
                for row in load_dataset("cais/mmlu", "all", split=split)
            ]
            for split in ("dev", "test")
        )
    )


def ceval(data: str | None = None, **_) -> dict[str, Dataset]:
    """52 subjects; the answers of the test set are not public, the published program takes val."""
    if data:
        return _tables("ceval", data, ("dev", "val"), "*_{split}.csv")
    configs = get_dataset_config_names("ceval/ceval-exam")
    return _together(
        *(
            [_letter_choice(config, row) for config, row in _hub("ceval/ceval-exam", configs, split)]
            for split in ("dev", "val")
        )
    )


def cmmlu(data: str | None = None, **_) -> dict[str, Dataset]:
    """67 subjects."""
    if data:
        return _tables("cmmlu", data, ("dev", "test"), "*.csv")
    configs = get_dataset_config_names("haonan-li/cmmlu")
    return _together(
        *(
            [_letter_choice(config, row) for config, row in _hub("haonan-li/cmmlu", configs, split)]
            for split in ("dev", "test")
        )
    )


def gsm8k(data: str | None = None, **_) -> dict[str, Dataset]:
    """The published eight examples (split `examples`) and the test set."""
    if data:
        train, test = (_jsonl(_files("gsm8k", data, f"{split}.jsonl")[0]) for split in ("train", "test"))
    else:
        train, test = (list(load_dataset("openai/gsm8k", "main", split=split)) for split in ("train", "test"))
    if len(train) <= max(GSM8K_EXAMPLES):
        raise missing("gsm8k", f"The training set has {len(train)} rows; the examples are rows of the whole one")
    docs = [{**row, "subject": "gsm8k"} for row in test]
    return _splits(examples=[{**train[i], "subject": "gsm8k"} for i in GSM8K_EXAMPLES], test=docs)


def math(data: str | None = None, **_) -> dict[str, Dataset]:
    """7 subjects, 5,000 problems."""
    if data:
        rows = [
            (path.parent.name, json.loads(path.read_text("utf-8"))) for path in _files("math", data, "test/*/*.json")
        ]
    else:
        rows = list(_hub("EleutherAI/hendrycks_math", list(MATH_CONFIGS), "test"))
    docs = [{"subject": subject, "problem": row["problem"], "solution": row["solution"]} for subject, row in rows]
    return _splits(test=docs)


def humaneval(data: str | None = None, **_) -> dict[str, Dataset]:
    """164 functions."""
    if data:
        rows = _jsonl(_files("humaneval", data, "HumanEval.jsonl*")[0])
    else:
        rows = load_dataset("openai/openai_humaneval", split="test")
    keys = ("task_id", "prompt", "entry_point", "test")
    return _splits(test=[{"subject": "humaneval", **{key: row[key] for key in keys}} for row in rows])


def mbpp(data: str | None = None, **_) -> dict[str, Dataset]:
    """Tasks 2, 3, 4 are the examples, 11 to 510 the test set."""
    if data:
        rows = _jsonl(_files("mbpp", data, "mbpp.jsonl")[0])
    else:
        rows = [row for split in ("prompt", "test") for row in load_dataset("mbpp", "full", split=split)]
    keys = ("task_id", "text", "code", "test_list", "test_setup_code")
    docs = [{"subject": "mbpp", **{key: row[key] for key in keys}} for row in rows]
    shots = [doc for doc in docs if doc["task_id"] in (2, 3, 4)]
    if len(shots) < 3:
        raise missing("mbpp", "Tasks 2, 3 and 4, which are the examples, are not all there")
    return _splits(examples=shots, test=[doc for doc in docs if 11 <= doc["task_id"] <= 510])


def bbh(data: str | None = None, **_) -> dict[str, Dataset]:
    """27 tasks; descriptions and three examples with their reasoning are those that lm-eval has."""
    folder = Path(lm_eval_tasks.__file__).parent / "bbh" / "cot_fewshot"
    configs = {path.stem: path for path in folder.glob("[!_]*.yaml")}
    if data:
        paths = _files("bbh", data, "*.json")
        rows = [(path.stem, row) for path in paths for row in json.loads(path.read_text("utf-8"))["examples"]]
    else:
        rows = list(_hub("SaylorTwift/bbh", sorted(configs), "test"))
    subjects = dict.fromkeys(subject for subject, _ in rows)
    unknown = [subject for subject in subjects if subject not in configs]
    if unknown:
        raise missing("bbh", f"{unknown} is no task of BIG-Bench Hard")
    tasks = {subject: yaml.safe_load(configs[subject].read_text("utf-8")) for subject in subjects}

    def doc(subject: str, row: dict) -> dict:
        return {
            "subject": subject,
            "description": tasks[subject]["description"],
            "input": row["input"],
            "target": row["target"],
        }

    shots = [doc(name, row) for name, task in tasks.items() for row in task["fewshot_config"]["samples"]]
    return _together(shots, [doc(subject, row) for subject, row in rows])


def _agieval(names: tuple[str, ...], data: str | None):
    for name in names:
        if data:
            path = Path(data) / "agieval" / f"{name}.jsonl"
            if path.exists():  # a folder may have some of the tasks
                yield from ((name, row) for row in _jsonl(path))
        else:
            yield from ((name, row) for row in load_dataset(f"hails/agieval-{name}", split="test"))


def agieval_choice(data: str | None = None, **_) -> dict[str, Dataset]:
    """19 tasks; some questions have several right choices."""
    docs = []
    for name, row in _agieval((*AGIEVAL_ENGLISH, *AGIEVAL_CHINESE), data):
        doc = {"subject": name, "choices": row.get("options") or row["choices"]}
        doc["gold"] = row["gold"] if "gold" in row else [LETTERS.index(letter) for letter in row["label"]]
        doc["query"] = row["query"] if "query" in row else agieval_query(name, row)
        docs.append(doc)
    if not docs:
        raise missing("agieval", f"{data}/agieval has no multiple-choice task")
    return _splits(test=docs)


def agieval_cloze(data: str | None = None, **_) -> dict[str, Dataset]:
    """The two tasks with answers of their own."""
    docs = [
        {
            "subject": name,
            "query": row["query"] if "query" in row else agieval_query(name, row),
            "answer": row["answer"],
        }
        for name, row in _agieval(AGIEVAL_CLOZE, data)
    ]
    if not docs:
        raise missing("agieval", f"{data}/agieval has no {' or '.join(AGIEVAL_CLOZE)}")
    return _splits(test=docs)


def agieval_query(name: str, row: dict) -> str:
    """The published prompt without examples."""
    passage, question = row.get("passage") or "", row["question"]
    if name == "math":
        return f"{passage}Q: {question}\nA: The answer is"
    if name == "gaokao-mathcloze":
        return f"{passage}问题：{question}\n答案："
    options = " ".join(row["options"])
    last = LETTERS[len(row["options"]) - 1]
    if name in AGIEVAL_ENGLISH:
        return f"{passage}Q: {question} Answer Choices: {options}\nA: Among A through {last}, the answer is"
    return f"{passage}问题：{question} 选项：{options}\n答案：从A到{last}, 我们应选择"


def _gaokao(data: str | None, papers: dict, single: bool) -> dict[str, Dataset]:
    """
    Questions with one right letter, or the others.

    papers: keyword of a file: its kind and prompt. They have no home on the hub that the authors name.
    """
    if not data:
        raise missing("gaokao", "GAOKAO-Bench is not on the hub")
    docs = []
    for keyword, paper in papers.items():
        path = Path(data) / "gaokao" / f"{keyword}.json"
        if (paper["kind"] == "single_choice") == single and path.exists():
            for row in json.loads(path.read_text("utf-8"))["example"]:
                answer = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
                doc = {"subject": keyword, "kind": paper["kind"], "question": row["question"], "answer": answer}
                docs.append({**doc, "prompt": paper["prompt"]})
    if not docs:
        kind = "with one right letter" if single else "other than those with one right letter"
        raise missing("gaokao", f"{Path(data) / 'gaokao'} has no paper {kind}")
    return _splits(test=docs)


def gaokao_choice(data: str | None = None, *, papers: dict, **_) -> dict[str, Dataset]:
    return _gaokao(data, papers, True)


def gaokao_generate(data: str | None = None, *, papers: dict, **_) -> dict[str, Dataset]:
    return _gaokao(data, papers, False)
