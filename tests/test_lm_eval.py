"""evaluation/evaluate.py: the ten benchmarks on small files of our own making, and the model class for lm-eval."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import logging
import math
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from evaluation_data import make

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm-eval: pip install -r requirements-evaluation.txt", allow_module_level=True)
os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path += [str(ROOT / "evaluation"), str(ROOT / "evaluation" / "tasks"), str(ROOT / "benchmarks")]
import run_code
import scoring
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from qwen_lm import QWenLM, common_prefix
from transformers import GPT2Config, GPT2LMHeadModel

import evaluation as benchmark

# There is a package of this name, too.
spec = importlib.util.spec_from_file_location("evaluate_py", ROOT / "evaluation" / "evaluate.py")
evaluate_py = importlib.util.module_from_spec(spec)
sys.modules["evaluate_py"] = evaluate_py
spec.loader.exec_module(evaluate_py)

DEMO = str(ROOT / "demo")
CHOICE = ["mmlu", "ceval", "cmmlu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def lm():
    return QWenLM(DEMO, dtype="float32", device="cpu", batch_size=8)


def test_quantised_weights_are_read_by_this_code(tmp_path):
    """Stock HFLM passes their description on, and so asks for other packages."""
    sys.path.append(str(ROOT / "tools"))
    tool = importlib.import_module("quantize_weights")
    assert tool.main([DEMO, str(tmp_path / "int4"), "--bits", "4", "--method", "rtn"]) == 0
    model = QWenLM(str(tmp_path / "int4"), dtype="float32", device="cpu").model
    held = [type(module).__name__ for module in model.transformer.h.modules() if hasattr(module, "qweight")]
    assert held == ["QuantizedLinear"] * 20


def command(monkeypatch, *arguments) -> None:
    """Run evaluate.py."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--dtype", "float32"])
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluate_py.main()


def likelihood(lm, context: str, continuation: str) -> float:
    """Sum of log-probabilities, without cache or batch."""
    before, whole = (lm.tokenizer.encode(text) for text in (context, context + continuation))
    with torch.no_grad():
        rows = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(rows[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


def prompts(name: str, data: Path) -> list[tuple[str, str]]:
    """(Prompt, right letter) of the lettered tasks, as the published programs write them."""
    written = []
    for subject in ("more_capitals", "world_capitals"):
        if name == "mmlu":
            begin = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
            files, words, mark = ("dev/{}_dev.csv", "test/{}_test.csv"), ("Question: ", "\nAnswer:"), " "
        else:
            begin, words, mark = "", ("问题：", "\n答案："), ""
            files = ("dev/{}_dev.csv", "val/{}_val.csv") if name == "ceval" else ("dev/{}.csv", "test/{}.csv")

        def rows(pattern, name=name, subject=subject):
            with (data / name / pattern.format(subject)).open(encoding="utf-8") as file:
                table = list(csv.reader(file))
            return [row[:6] if name == "mmlu" else row[1:7] for row in table[name != "mmlu" :]]

        def ask(row, words=words):
            choices = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row[1:5]))
            return f"{words[0]}{row[0]}{choices}{words[1]}"

        shots = begin + "".join(f"{ask(row)}{mark}{row[5]}\n\n" for row in rows(files[0]))
        written += [(shots + ask(row), row[5]) for row in rows(files[1])]
    return written


def test_all_ten_run_offline(data, lm, tmp_path, monkeypatch, capsys):
    if run_code.sandbox_problem():
        pytest.skip(f"no namespaces here: {run_code.sandbox_problem()}")
    runs = {}
    for batch_size in (1, 8):
        output = tmp_path / f"{batch_size}.json"
        arguments = (DEMO, "--data", data, "--run-code", "--batch-size", batch_size, "--limit", 2, "--output", output)
        command(monkeypatch, *arguments)
        runs[batch_size] = json.loads(output.read_text("utf-8"))["models"][DEMO]["results"]
    found = runs[8]
    assert set(found) == set(evaluate_py.BENCHMARKS)
    for name, result in found.items():
        assert runs[1][name]["points"] == result["points"], name
    asked = {name: result["questions"] for name, result in found.items()}
    assert asked == {
        **dict.fromkeys(CHOICE, 4),
        **{"gsm8k": 2, "math": 4, "humaneval": 2, "mbpp": 2, "bbh": 3, "agieval": 8, "gaokao": 6},
    }
    for name in CHOICE:  # limit 2 of the three questions of each subject
        mark = " " if name == "mmlu" else ""
        written = [pair for i, pair in enumerate(prompts(name, data)) if i % 3 < 2]
        points = []
        for prompt, right in written:
            values = [likelihood(lm, prompt, mark + letter) for letter in "ABCD"]
            points.append(float("ABCD"[values.index(max(values))] == right))
        assert [point for _, point, _ in found[name]["points"]] == points
        assert found[name]["score"] == pytest.approx(100 * sum(points) / len(points))
    table = (tmp_path / "8.md").read_text("utf-8")
    assert f"| C-Eval | 5 | 4 | {evaluate_py.percent(found['ceval']['score'], found['ceval']['stderr'])} |" in table
    assert table.strip() in capsys.readouterr().out


def requests() -> list[Instance]:
    """Five-shot questions with choices of one token and of several, some that begin alike, and odd ones."""
    asked = benchmark.multiple_choice(2)
    contexts = [request.args[0] for request in asked[::8]]
    pairs = [(context, text) for context in contexts for text in (" Lima is it", " Lima is not", " B", " Lima")]
    pairs += [("", "The capital of Peru is Lima"), ("The capital of Peru is", " Lima"), (contexts[0] * 6, " A")]
    pairs += [(contexts[1][:-60], contexts[1][-60:] + " A B")]  # to be predicted from where others share
    return asked + [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 8}, {"batch_size": 99, "tree_tokens": 64}])
def test_likelihoods_are_those_of_the_stock_class(options):
    asked = requests()
    stock = HFLM(DEMO, dtype="float32", device="cpu", batch_size=1, trust_remote_code=True)
    expected = stock.loglikelihood(asked, disable_tqdm=True)
    found = QWenLM(DEMO, dtype="float32", device="cpu", **options).loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    text = [Instance("loglikelihood_rolling", {}, (asked[0].args[0] * 6,), 0)]  # several windows
    ours = QWenLM(DEMO, dtype="float32", device="cpu", **options).loglikelihood_rolling(text, disable_tqdm=True)
    assert ours == pytest.approx(stock.loglikelihood_rolling(text, disable_tqdm=True), rel=1e-5)


def test_longer_than_the_training_length(lm):
    """Sequences beyond it have a rotation of their own; nothing is shared, and each is as it is alone."""
    long = QWenLM(lm.model, tokenizer=lm.tokenizer, max_length=2000, batch_size=8, tree_tokens=256)
    context = requests()[0].args[0] * 3
    assert len(lm.tokenizer.encode(context)) > lm.model.config.seq_length
    found = long.loglikelihood(
        [Instance("loglikelihood", {}, (context, f" {x}"), 0) for x in "ABCD"], disable_tqdm=True
    )
    assert [value for value, _ in found] == pytest.approx([likelihood(lm, context, f" {x}") for x in "ABCD"], abs=1e-3)


def generation(shots: int = 24, questions: int = 9) -> list[Instance]:
    """Two tasks, questions of several lengths behind the examples of each, and two questions that begin alone."""
    draw = random.Random(0)
    facts = [line.split("\t") for line in (ROOT / "demo" / "facts.tsv").read_text("utf-8").splitlines()[1:]]

    def fact() -> str:
        _, _, country, capital_in_chinese, capital = draw.choice(facts)
        return f"The capital of {country} is {capital} ({capital_in_chinese})\n"

    texts = ["The capital of Peru is", "法国的首都是巴黎（Paris）\n秘鲁的首都是"]
    for _ in range(2):
        examples = "".join(fact() for _ in range(shots))
        for _ in range(questions):
            more = "".join(fact() for _ in range(draw.randrange(4)))
            texts.append(f"{examples}{more}The capital of {draw.choice(facts)[2]} is")
    draw.shuffle(texts)
    asked = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    return [Instance("generate_until", {}, (text, asked), 0) for text in texts]


def generated(model, asked: list[Instance]) -> tuple[list[str], int]:
    """The answers, and how many tokens the model computed for them, padding included."""
    computed = []

    def count(module, args, kwargs):
        computed.append((args[0] if args else kwargs["input_ids"]).numel())

    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        return model.generate_until(asked, disable_tqdm=True), sum(computed)
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_generated_answers_are_those_of_the_stock_class(batch_size, lm):
    asked = generation()
    stock = HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, max_length=1000)
    ours = QWenLM(lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, max_length=1000)
    expected, most = generated(stock, asked)
    found, computed = generated(ours, asked)
    assert found == expected
    assert len(set(found)) > 4  # not the same word throughout
    lengths = [len(lm.tokenizer.encode(request.args[0])) for request in asked]
    assert min(length for length in lengths if length > 100) > 200  # the examples are most of a prompt
    assert computed < most / 2


def test_answers_by_several_beams(lm):
    """Which transformers makes rows of; a cache for the prompts would have too few."""
    one, two = (
        [
            Instance("generate_until", {}, (request.args[0], {**request.args[1], **more}), 0)
            for request in generation()[:4]
        ]
        for more in ({}, {"num_beams": 2})
    )
    stock = HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=1, max_length=1000)
    ours = QWenLM(lm.model, tokenizer=lm.tokenizer, batch_size=1, max_length=1000)
    assert generated(ours, two) == generated(stock, two)
    assert generated(ours, two)[1] > generated(ours, one)[1]


def test_prompts_beyond_the_training_length_share_nothing(lm):
    """Their rotation is their own; one of a batch is enough, and the rest of a batch that may share is as alone."""
    asked = generation(shots=45, questions=8)
    lengths = [len(lm.tokenizer.encode(request.args[0])) for request in asked]
    limit = lm.model.config.seq_length
    assert max(lengths) > limit
    alone = QWenLM(lm.model, tokenizer=lm.tokenizer, batch_size=1, max_length=2000)
    together = QWenLM(lm.model, tokenizer=lm.tokenizer, batch_size=2, max_length=2000)
    expected = [alone.generate_until([request], disable_tqdm=True)[0] for request in asked]
    assert together.generate_until(asked, disable_tqdm=True) == expected
    long = [request for request, length in zip(asked, lengths) if length > limit]
    long = [request for request in long if request.args[0][:100] == long[0].args[0][:100]]  # of one task
    stock = HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=2, max_length=2000)
    assert len(long) > 1
    assert generated(together, long) == generated(stock, long)
    short = [request for request, length in zip(asked, lengths) if length <= limit]
    assert len(short) > 10
    assert generated(together, short)[0] == [answer for answer, n in zip(expected, lengths) if n <= limit]


def test_it_computes_half_the_tokens_of_the_stock_class():
    """What the time of multiple choice goes with; benchmarks/evaluation.py measures that."""
    stock = HFLM(DEMO, dtype="float32", device="cpu", batch_size=8, trust_remote_code=True)
    ours = QWenLM(stock.model, tokenizer=stock.tokenizer, batch_size=8)
    tokens = {"stock": 0, "ours": 0}
    for name, model in (("stock", stock), ("ours", ours)):

        def count(module, args, output, name=name):
            tokens[name] += args[0].numel()

        hook = stock.model.get_input_embeddings().register_forward_hook(count)
        benchmark.measure({name: model}, benchmark.multiple_choice(8), rounds=1)
        hook.remove()
    assert 0 < tokens["ours"] <= 0.5 * tokens["stock"], tokens


def test_the_model_class_is_registered():
    model = get_model("qwen").create_from_arg_string(f"pretrained={DEMO},dtype=float32", {"device": "cpu"})
    assert type(model) is QWenLM
    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=4096, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match=r"first-generation Qwen.*'gpt2'.*Use --model hf"):
        QWenLM(other, tokenizer=model.tokenizer)


def test_generation_is_greedy_whatever_the_checkpoint_says(tmp_path):
    for path in (ROOT / "demo").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings.update(do_sample=True, temperature=9.0, repetition_penalty=9.0, max_new_tokens=1)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model = QWenLM(str(tmp_path), dtype="float32", device="cpu", batch_size=2)
    asked = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    texts = [
        "The capital of Kenya is Nairobi (内罗毕)\nThe capital of Peru is",
        "法国的首都是巴黎（Paris）\n秘鲁的首都是",
    ]
    found = model.generate_until(
        [Instance("generate_until", {}, (text, asked), 0) for text in texts], disable_tqdm=True
    )
    assert found == [" Lima (利马)", "利马（Lima）"]


def test_it_goes_on_where_it_was(data, tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    arguments = (DEMO, "--data", data, "--limit", 1, "--output", output, "--tasks", "mmlu,cmmlu")
    run, done = evaluate_py.run, []

    def once(lm, name, *rest):
        if done:
            raise RuntimeError("interrupted")
        done.append(name)
        return run(lm, name, *rest)

    monkeypatch.setattr(evaluate_py, "run", once)
    with pytest.raises(RuntimeError, match="interrupted"):
        command(monkeypatch, *arguments)
    before = json.loads(output.read_text("utf-8"))["models"][DEMO]["results"]
    assert list(before) == ["mmlu"]
    done.clear()
    command(monkeypatch, *arguments)
    assert done == ["cmmlu"]
    after = json.loads(output.read_text("utf-8"))["models"][DEMO]["results"]
    assert after["mmlu"] == before["mmlu"]
    done.clear()
    command(monkeypatch, *arguments)
    assert done == []
    with pytest.raises(SystemExit, match="other settings"):
        command(monkeypatch, *arguments, "--limit", 2)


def test_several_checkpoints_are_compared(data, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "demo", other)
    arguments = (DEMO, other, "--data", data, "--limit", 3, "--output", tmp_path / "r.json", "--tasks", "mmlu")
    command(monkeypatch, *arguments)
    table = capsys.readouterr().out
    assert "| other − demo |" in table
    assert "| +0.0 ± 0.0 |" in table
    results = json.loads((tmp_path / "r.json").read_text("utf-8"))
    first, second = (model["results"]["mmlu"] for model in results["models"].values())
    assert first["points"] == second["points"]
    for i, point in enumerate(second["points"]):  # two of six are right in the other one only
        point[1], first["points"][i][1] = float(i < 3), float(i < 1)
    results["models"][DEMO]["card"] = "Qwen-72B"
    table = evaluate_py.table(results, ["mmlu"])
    assert "| card: Qwen-72B |" in table
    assert "| 77.4 | +33.3 ± 21.1 |" in table  # sqrt(var / n): 1/3 * 2/3 / 5


def test_missing_data_is_named_with_its_source(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as error:
        command(monkeypatch, DEMO, "--data", tmp_path, "--tasks", "mmlu,gaokao", "--output", tmp_path / "r.json")
    for part in ("mmlu/{dev,test}/SUBJECT", "hendrycks/data.tar", "gaokao/KEYWORD.json", "OpenLMLab/GAOKAO-Bench"):
        assert part in str(error.value)


def test_a_data_set_that_datasets_no_longer_reads_is_named_with_its_source(monkeypatch):
    def refuse(self, names):
        raise RuntimeError("Dataset scripts are no longer supported, but found cmmlu.py")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", refuse)
    with pytest.raises(SystemExit, match=r"cmmlu: Dataset scripts .* Or --data with cmmlu/.*haonan-li/cmmlu"):
        evaluate_py.load_tasks(["cmmlu"], None)


def test_programs_run_only_when_asked_for(data, tmp_path, monkeypatch, capsys):
    arguments = (DEMO, "--data", data, "--output", tmp_path / "r.json")
    with pytest.raises(SystemExit):
        command(monkeypatch, *arguments, "--tasks", "humaneval")
    assert "only with --run-code" in capsys.readouterr().err
    monkeypatch.setattr(run_code, "sandbox_problem", lambda: "it is not Linux")
    with pytest.raises(SystemExit, match="not Linux"):
        command(monkeypatch, *arguments, "--tasks", "humaneval", "--run-code")


def test_programs_are_judged_and_the_run_goes_on(data):
    if run_code.sandbox_problem():
        pytest.skip(f"no namespaces here: {run_code.sandbox_problem()}")
    tasks = evaluate_py.load_tasks(["humaneval", "mbpp"], str(data))
    doc = dict(tasks["humaneval"][0].eval_docs[1])
    answers = [
        "    return x + 1\n",
        "    return x\n",
        "    import os\n    os.kill(os.getppid(), 9)\n",
        "    return x + 1",
    ]
    found = scoring.run_humaneval([[answer] for answer in answers], [doc] * 4)
    assert [scoring.program(doc, [reason])["score"][1] for reason in found] == [1, 0, 0, 1]
    doc = dict(tasks["mbpp"][0].eval_docs[0])
    assert doc["task_id"] == 11
    found = scoring.run_mbpp([["def add(x):\n    return x + 11\n"], ["def add(x):\n    return x"]], [doc] * 2)
    assert [reason == "passed" for reason in found] == [True, False]


def context(task, i: int = 0, **kwargs) -> str:
    return task.fewshot_context(task.eval_docs[i], task.config.num_fewshot or 0, **kwargs)


def test_prompts(data):
    tasks = evaluate_py.load_tasks(list(evaluate_py.BENCHMARKS), str(data))
    for name in CHOICE:
        assert [context(tasks[name][0], i) for i in range(6)] == [prompt for prompt, _ in prompts(name, data)]
    prompt = context(tasks["gsm8k"][0])
    shots = prompt.split("\n\n")
    assert len(shots) == 9
    a, b = 4997 % 40 + 1, 4997 % 17 + 1  # the first example is row 4,997 of the training set
    question = f"Question: Ann has {a} pens and buys {b} more. How many has she?\nLet's think step by step\n"
    assert shots[0] == f"{question}She has {a}+{b}={a + b} pens.\nThe answer is {a + b}"
    assert shots[8].endswith("How many has she?\nLet's think step by step\n")
    assert context(tasks["humaneval"][0]) == 'def add_0(x):\n    """Return x + 0."""\n'
    shots = context(tasks["mbpp"][0]).split("[DONE]\n\n")
    tests = "assert add(0) == 2\nassert add(1) == 3\nassert add(2) == 4"
    begin = "You are an expert Python programmer, and here is your task: Write a function that adds 2. Your code should"
    assert shots[0] == f"{begin} pass these tests:\n\n{tests}\n[BEGIN]\ndef add(x):\n    return x + 2\n"
    assert len(shots) == 4
    assert shots[3].endswith("assert add(2) == 13\n[BEGIN]\n")
    shots = context(tasks["math"][0], 1).split("Problem:\n")
    assert len(shots) == 6
    assert shots[5] == "What is 1 + 2?\n\nSolution:"
    assert "Final Answer: The final answer is $24$. I hope it is correct.\n\n" in shots[2]
    shots = context(tasks["bbh"][0]).split("Q: ")
    assert len(shots) == 5
    assert shots[4] == "not True is\nA: Let's think step by step.\n"
    assert "So the answer is False." in shots[1]
    assert [shot.count("return to the starting point") for shot in context(tasks["bbh"][0], 2).split("Q: ")[1:4]] == [
        1
    ] * 3
    choices = "(A)Nairobi (B)Lima (C)Paris (D)Reykjavik"
    assert context(tasks["agieval"][0]) == (
        f"Q: What is the capital of Kenya? Answer Choices: {choices}\nA: Among A through D, the answer is"
    )
    by_name = {doc["subject"]: doc["query"] for task in tasks["agieval"] for doc in task.eval_docs}
    assert by_name["gaokao-physics"].endswith("\n答案：从A到D, 我们应选择")
    assert by_name["math"] == "Q: What is 1 + 1?\nA: The answer is"
    prompt = context(tasks["gaokao"][0])
    assert prompt.startswith("请你做一道历史选择题\n请你一步一步思考")
    assert prompt.endswith("题目如下：0. 首都？\nA. 北京 B. 东京 C. 利马 D. 巴黎")


def test_chat_prompts_are_turns(data, lm):
    task = evaluate_py.load_tasks(["mmlu"], str(data))["mmlu"][0]
    prompt = context(task, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=lm.apply_chat_template)
    assert prompt.count("<|im_start|>user\nQuestion: ") == 6
    assert prompt.count("<|im_start|>assistant\n") == 6
    assert prompt.endswith("\nAnswer:<|im_end|>\n<|im_start|>assistant\n")


# Reading answers: written-down outputs, and what the published programs read in them.
GSM8K = [
    ("She has 3+4=7 pens.\nThe answer is 7", 7),
    ("The answer is 18.", 18),
    ("The answer is $42", 42),
    ("The answer is 3.5", 5),
    ("The answer is 1,000", 0),
    ("The answer is 20800\n", 20800),
    ("So 12 of 15", 15),
    ("The answer is -8", 8),
    ("The answer is 007", 7),
    ("no number at all", None),
    ("", None),
    ("42", 42),
    ("He pays 5 dollars for 2 apples", 2),
    ("The answer is 50%", 50),
    ("1/2", 2),
    ("The answer is 60 kids", 60),
    ("The answer is 7 pens, 8 pencils", 8),
    ("two", None),
    ("9 - 4 = 5. Then 5 * 2 = 10", 10),
    ("The answer is 12345678901", 12345678901),
    ("Answer: 6\nLet's check: 3", 3),
    ("答案是 17", 17),
    ("x=4", 4),
    ("The answer is 0", 0),
    ("8:30", 30),
]
MATH = [
    ("Final Answer: The final answer is $4$. I hope it is correct.", "4", True),
    ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}", True),
    ("Final Answer: The final answer is $\\frac12$. I hope it is correct.", "\\frac{1}{2}", True),
    ("Final Answer: The final answer is $0.5$. I hope it is correct.", "\\frac{1}{2}", True),
    ("Final Answer: The final answer is $\\frac{2}{4}$. I hope it is correct.", "\\frac{1}{2}", True),
    ("Final Answer: The final answer is $x+1$. I hope it is correct.", "1+x", True),
    ("Final Answer: The final answer is $10{,}000$. I hope it is correct.", "10000", True),
    ("Final Answer: The final answer is $5$ dollars. I hope it is correct.", "5", True),
    ("Final Answer: The final answer is $\\sqrt{4}$. I hope it is correct.", "2", True),
    ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)", True),
    ("Final Answer: The final answer is $\\text{east}$. I hope it is correct.", "\\text{east}", True),
    ("Final Answer: The final answer is $x=3$. I hope it is correct.", "3", True),
    ("Final Answer: The final answer is $-7$. I hope it is correct.", "-7", True),
    ("Final Answer: The final answer is $90^\\circ$. I hope it is correct.", "90", True),
    ("So it is 8.\nFinal Answer: The final answer is $8$. I hope it is correct.\nmore", "8", True),
    ("Final Answer: The final answer is $2\\pi$. I hope it is correct.", "2\\pi", True),
    ("Final Answer: The final answer is $\\boxed{6}$. I hope it is correct.", "6", True),
    ("Final Answer: The final answer is $5$. I hope it is correct.", "4", False),
    ("Final Answer: The final answer is $\\frac{1}{3}$. I hope it is correct.", "\\frac{1}{2}", False),
    ("The final answer is $4$. I hope it is correct.", "4", False),
    ("It is $\\boxed{4}$.", "4", False),
    ("", "4", False),
    ("Final Answer: The final answer is $(1,2)$. I hope it is correct.", "(2,1)", False),
    ("Final Answer: The final answer is $-4$. I hope it is correct.", "4", False),
    ("Final Answer: The final answer is $x$. I hope it is correct.", "y", False),
]


def test_answers_are_read_as_published():
    assert len(GSM8K) + len(MATH) == 50
    for text, number in GSM8K:
        assert scoring.gsm8k_number(text) == number, text
    for text, gold, right in MATH:
        doc = {"subject": "algebra", "solution": f"Thus $\\boxed{{{gold}}}$."}
        assert scoring.math(doc, [text])["score"] == ("algebra", float(right), 1.0), text
    assert scoring.gsm8k({"subject": "gsm8k", "answer": "x\n#### 1,234"}, ["1234"])["score"][1] == 1
    for text, points in (("So the answer is (B).", 1), ("So the answer is (B)", 0), ("(B).", 0)):
        assert scoring.bbh({"subject": "s", "target": "(B)"}, [text])["score"][1] == points
    for text, points in ((" 2.", 1), (" $2$", 1), ("3", 0)):
        assert scoring.agieval_cloze({"subject": "math", "answer": "2"}, [text])["score"][1] == points


def test_gaokao_answers_are_read_as_opencompass_does():
    several = {"subject": "p", "kind": "multi_choice", "answer": ["AB"]}
    for text, points in (
        ("【解析】 C <eoe>\n【答案】 AB <eoa>", 1),
        ("x【答案】 A <eoa>", 0.5),
        ("x【答案】ABC", 0),
        ("所以选 AB", 1),
        ("不知道", 0),
    ):
        assert scoring.gaokao(several, [text])["score"] == ("p", points, 1), text
    questions = {"subject": "p", "kind": "multi_question_choice", "answer": ["A", "B", "C"]}
    for text, points in (("（1）【答案】 A <eoa>\n（2）【答案】：B\n（3）【答案】D", 2), ("A B C D", 3), ("A", 0)):
        assert scoring.gaokao(questions, [text])["score"] == ("p", points, 3), text
    five = {"subject": "p", "kind": "five_out_of_seven", "answer": list("ABCDE")}
    assert scoring.gaokao(five, ["【答案】 A B C D G <eoa>"])["score"] == ("p", 4, 5)


def test_means_and_errors():
    rows = [("a", 1, 1), ("a", 0, 1), ("a", 0, 1), ("b", 1, 1), ("b", 1, 1), ("b", 0, 1)]
    values = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    mean, error = scoring.estimate(rows)
    assert (mean, error) == pytest.approx((0.5, (values.std() / math.sqrt(6)).item()))
    mean, error = scoring.estimate([*rows[:3], *rows[3:], ("b", 0, 1)], by_subject=True)
    parts = values[:3], torch.cat((values[3:], torch.zeros(1)))
    assert mean == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert error == pytest.approx(math.sqrt(sum(part.var() / len(part) for part in parts)) / 2)
    mean, error = scoring.estimate(rows, {"a": 3, "b": 1})
    assert mean == pytest.approx(0.75 / 3 + 0.25 * 2 / 3)
    assert math.isnan(scoring.estimate(rows[:1])[1])


def test_common_prefix():
    random.seed(1)
    for _ in range(200):
        a, b = ([random.choice((0, 0, 0, 1)) for _ in range(random.randrange(12))] for _ in range(2))
        shared = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        assert common_prefix(tuple(a), tuple(b)) == shared
