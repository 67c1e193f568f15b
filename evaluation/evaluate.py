"""
The model card's ten benchmarks for one checkpoint or several, with the published prompts and examples.

    pip install -r requirements-evaluation.txt
    python evaluation/evaluate.py PATH [PATH ...] [--tasks mmlu,gsm8k] [--limit N] [--data FOLDER] [--run-code]

Prints and writes (JSON, and Markdown beside it) the score in percent with its standard error, the card's for the model
of that size, and with several checkpoints the difference to the first, with the error of the difference on the same
questions. What is finished is kept in the file: the same command goes on where it was interrupted. docs/evaluation.md
tells what each benchmark is and where its data comes from.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Behind the installed packages, one of which has the name of this file.
sys.path = [path for path in sys.path if Path(path or ".").resolve() != HERE] + [str(HERE), str(HERE / "tasks")]
sys.path.append(str(HERE.parent / "tools"))
card, checkpoint_files = map(importlib.import_module, ("card", "checkpoint_files"))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """title, shots: the card's. tasks: of lm-eval, that make it up. The rest: how scores are averaged, and made."""

    title: str
    shots: int
    tasks: tuple[str, ...]
    by_subject: bool = False
    papers: bool = False
    runs_code: bool = False


BENCHMARKS = {
    "mmlu": Benchmark("MMLU", 5, ("qwen_mmlu",)),
    "ceval": Benchmark("C-Eval", 5, ("qwen_ceval",), by_subject=True),
    "gsm8k": Benchmark("GSM8K", 8, ("qwen_gsm8k",)),
    "math": Benchmark("MATH", 4, ("qwen_math",)),
    "humaneval": Benchmark("HumanEval", 0, ("qwen_humaneval",), runs_code=True),
    "mbpp": Benchmark("MBPP", 3, ("qwen_mbpp",), runs_code=True),
    "bbh": Benchmark("BBH", 3, ("qwen_bbh",), by_subject=True),
    "agieval": Benchmark("AGIEval", 0, ("qwen_agieval_choice", "qwen_agieval_cloze"), by_subject=True),
    "gaokao": Benchmark("GaokaoBench", 0, ("qwen_gaokao_choice", "qwen_gaokao_generate"), papers=True),
    "cmmlu": Benchmark("CMMLU", 5, ("qwen_cmmlu",), by_subject=True),
}


def averaging(name: str) -> dict:
    """How the scores of a benchmark are averaged: arguments of `scoring.estimate`."""
    from scoring import GAOKAO_WEIGHTS

    benchmark = BENCHMARKS[name]
    return {"weights": GAOKAO_WEIGHTS if benchmark.papers else None, "by_subject": benchmark.by_subject}


def load_tasks(names: list[str], data: str | None) -> dict[str, list]:
    """The tasks of each benchmark with their data; SystemExit names all that is missing and where to get it."""
    from data import SOURCES
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=HERE / "tasks",
        include_defaults=False,
        metadata={"data": str(Path(data).resolve())} if data else {},
    )
    tasks, problems = {}, []
    for name in names:
        try:
            tasks[name] = list(manager.load(list(BENCHMARKS[name].tasks))["tasks"].values())
        # No connection is an OSError, an unknown name a ValueError, a script that would have to run a RuntimeError.
        except (OSError, ValueError, RuntimeError) as error:
            files, source = SOURCES[name]
            hint = "" if isinstance(error, FileNotFoundError) else f" Or --data with {files} from {source}."
            problems.append(f"{name}: {error}{hint}")
    if problems:
        raise SystemExit("Data is missing:\n  " + "\n  ".join(problems))
    return tasks


def chosen(task, limit: int | None) -> list[int]:
    """Which documents of a task: the first `limit` of every subject."""
    seen: Counter = Counter()
    picked = []
    for i, doc in enumerate(task.eval_docs):
        seen[doc["subject"]] += 1
        if limit is None or seen[doc["subject"]] <= limit:
            picked.append(i)
    return picked


def run(lm, name: str, tasks: list, limit: int | None, chat: bool) -> dict:
    """One benchmark: score and stderr in percent, the points of every question, what it took."""
    from lm_eval.evaluator import evaluate
    from scoring import estimate

    for task in tasks:
        asked = task.config.generation_kwargs or {}
        if "max_gen_toks" in asked:  # a small model has room for less
            asked["max_gen_toks"] = min(asked["max_gen_toks"], lm.max_length // 2)
    began = time.perf_counter()
    done = evaluate(
        lm=lm,
        task_dict={"tasks": {task.task_name: task for task in tasks}, "groups": {}, "group_map": {}},
        samples={task.task_name: chosen(task, limit) for task in tasks} if limit else None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
        confirm_run_unsafe_code=BENCHMARKS[name].runs_code,
    )
    scores = [
        list(sample["score"])
        for task in tasks
        for sample in sorted(done["samples"][task.task_name], key=lambda sample: sample["doc_id"])
    ]
    mean, error = estimate(scores, **averaging(name))
    return {
        "score": 100 * mean,
        "stderr": 100 * error,
        "questions": len(scores),
        "seconds": time.perf_counter() - began,
        "points": scores,
    }


def percent(value: float, error: float, sign: str = "") -> str:
    return f"{value:{sign}.1f} ± {error:.1f}" if error == error else f"{value:{sign}.1f}"


def table(results: dict, names: list[str]) -> str:
    """Markdown: a row for each benchmark, a column for each checkpoint and the card's model of its size."""
    from scoring import estimate

    models = results["models"]
    paths = list(models)
    cards = list(dict.fromkeys(model["card"] for model in models.values() if model["card"]))
    head = ["", "shots", "questions", *map(label, paths), *(f"card: {of}" for of in cards)]
    head += [f"{label(path)} − {label(paths[0])}" for path in paths[1:]]
    rows = []
    for name in names:
        found = [models[path]["results"].get(name) for path in paths]
        first = next((result for result in found if result), None)
        row = [BENCHMARKS[name].title, str(BENCHMARKS[name].shots), str(first["questions"]) if first else ""]
        row += [percent(result["score"], result["stderr"]) if result else "" for result in found]
        row += [f"{card.BENCHMARKS[of][name]:.1f}" for of in cards]
        for result in found[1:]:
            if not (result and found[0]):
                row.append("")
                continue
            pairs = zip(found[0]["points"], result["points"])
            change = [(subject, after - before, n) for (subject, before, n), (_, after, _) in pairs]
            mean, error = estimate(change, **averaging(name))
            row.append(percent(100 * mean, 100 * error, "+"))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def label(path: str) -> str:
    return Path(path).name or path


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Output:
    """What is finished, in a file that is replaced as a whole, and a table beside it."""

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.results = {"settings": settings, "models": {}}
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            if found.get("settings") != settings:
                raise SystemExit(
                    f"{path} holds results with other settings ({found.get('settings')}, now {settings}). Pass another "
                    f"--output, or delete it."
                )
            self.results = found

    def of(self, path: str, of_card: str | None) -> dict:
        return self.results["models"].setdefault(path, {"card": of_card, "results": {}})["results"]

    def write(self, names: list[str]) -> None:
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(json.dumps(self.results, ensure_ascii=False), "utf-8")
        os.replace(beside, self.path)
        self.path.with_suffix(".md").write_text(table(self.results, names) + "\n", "utf-8")


def time_left(output: Output, ahead: list[tuple[str, str, int]]) -> float:
    """Seconds for (checkpoint, benchmark, questions): as another checkpoint took, or a question on average."""
    finished = {
        name: result["seconds"]
        for model in output.results["models"].values()
        for name, result in model["results"].items()
    }
    everything = [result for model in output.results["models"].values() for result in model["results"].values()]
    rate = sum(result["seconds"] for result in everything) / sum(result["questions"] for result in everything)
    return sum(finished.get(name, questions * rate) for _, name, questions in ahead)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The model card's ten benchmarks for one checkpoint or several.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="checkpoints; differences are to the first")
    parser.add_argument("--tasks", default="all", help="all, or some of " + ",".join(BENCHMARKS))
    parser.add_argument("--limit", type=int, help="questions of every subject; default: all")
    parser.add_argument("--batch-size", default="auto" if _has_gpu() else "8", help="auto, or a number")
    parser.add_argument("--data", metavar="FOLDER", help="files in their published layout; default: from the hub")
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"), help="results, and a table as .md")
    parser.add_argument("--chat", action="store_true", help="for chat models: the template, examples as turns")
    parser.add_argument("--run-code", action="store_true", help="run the programs that answer HumanEval and MBPP")
    parser.add_argument("--no-sandbox", action="store_true", help="run them with your rights, network and files")
    parser.add_argument(
        "--dtype",
        default="auto",
        type=checkpoint_files.precision,
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights",
    )
    args = parser.parse_args()
    args.names = list(BENCHMARKS) if args.tasks == "all" else args.tasks.split(",")
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown tasks {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1, found {args.limit}")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size)):
        parser.error(f"--batch-size must be auto or a positive number, found {args.batch_size!r}")
    for path in args.paths:
        try:
            checkpoint_files.check_loadable(path, adapters=True)
        except checkpoint_files.Problem as problem:
            parser.error(str(problem))
    programs = [name for name in args.names if BENCHMARKS[name].runs_code]
    if programs and not args.run_code:
        message = f"{', '.join(programs)}: answers are programs, which run only with --run-code"
        if args.tasks != "all":
            parser.error(message)
        print(f"Left out: {message}.", file=sys.stderr)
        args.names = [name for name in args.names if name not in programs]
    return args


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def load(path: str, args: argparse.Namespace):
    """The checkpoint as a model of lm-eval; an adapter's folder with the model that it belongs to."""
    import torch
    from qwen_lm import QWenLM

    adapter = Path(path) / "adapter_config.json"
    base = json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"] if adapter.exists() else path
    return QWenLM(
        base,
        peft=path if adapter.exists() else None,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device="cuda" if _has_gpu() else "cpu",
        parallelize=torch.cuda.device_count() > 1,
        softmax_dtype="float32",
    )


def main() -> None:
    args = arguments()
    if importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("This needs lm-eval: pip install -r requirements-evaluation.txt")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if args.run_code:
        import run_code

        if args.no_sandbox:
            run_code.allow_unsafe()
        elif run_code.sandbox_problem():
            raise SystemExit(
                f"Answers of HumanEval and MBPP can't be run apart from this system: {run_code.sandbox_problem()}. "
                f"--no-sandbox runs them with your rights, network and files; or leave out --run-code."
            )
    tasks = load_tasks(args.names, args.data)
    counts = {name: sum(len(chosen(task, args.limit)) for task in tasks[name]) for name in args.names}
    output = Output(args.output, {"limit": args.limit, "chat": args.chat, "dtype": args.dtype})
    ahead = [
        (path, name, counts[name])
        for path in args.paths
        for name in args.names
        if name not in output.results["models"].get(path, {"results": {}})["results"]
    ]
    total, lm, loaded = len(ahead), None, None
    while ahead:
        path, name, _ = ahead[0]
        if path != loaded:
            del lm  # before the next is there
            lm, loaded = load(path, args), path
        results = output.of(path, None if args.chat else card.of_card(lm.model.config))
        with checkpoint_files.going_on(args.output):
            results[name] = run(lm, name, tasks[name], args.limit, args.chat)
        ahead.pop(0)
        output.write(args.names)
        result = results[name]
        left = f", about {minutes(time_left(output, ahead))} left" if ahead else ""
        print(
            f"[{total - len(ahead)}/{total}] {label(path)}, {BENCHMARKS[name].title}: "
            f"{percent(result['score'], result['stderr'])} in {minutes(result['seconds'])}{left}",
            flush=True,
        )
    output.write(args.names)
    print("\n" + table(output.results, args.names))
    print(f"\n{args.output} has every question's points.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(checkpoint_files.exit_status(main))
