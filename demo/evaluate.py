"""Ask a demo checkpoint for every capital, and questions in words it was not trained on.

    python demo/evaluate.py [CHECKPOINT]

Prints how many answers are right in each category, with greedy decoding; the exit status is 1 if
too few are.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import corpus
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MIN_COMPLETIONS = 0.98
MIN_CHAT = 0.90
SEED = 20231130  # not one that training uses

CARD_PROMPT = "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是雷克雅未克（Reykjavik）\n埃塞俄比亚的首都是"
CARD_ANSWER = "亚的斯亚贝巴（Addis Ababa）"


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizer,
    prompts: Sequence[list[int]],
    batch_size: int = 64,
    max_new_tokens: int = 48,
) -> list[str]:
    """Greedy continuations up to the end of the text or turn, in the order of the prompts."""
    stops = [tokenizer.eod_id, tokenizer.im_end_id]
    answers = [""] * len(prompts)
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), batch_size), unit="batch", leave=False):
        batch = order[start : start + batch_size]
        length = max(len(prompts[i]) for i in batch)
        padding = [length - len(prompts[i]) for i in batch]
        input_ids = [[tokenizer.eod_id] * n + prompts[i] for n, i in zip(padding, batch)]
        mask = [[0] * n + [1] * (length - n) for n in padding]
        output = model.generate(
            input_ids=torch.tensor(input_ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.eod_id,
        )
        for i, new in zip(batch, output[:, length:].tolist()):
            end = min((new.index(stop) for stop in stops if stop in new), default=len(new))
            answers[i] = tokenizer.decode(new[:end])
    return answers


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizer, make_context: Callable, verbose: bool) -> bool:
    """Print the table; return whether the checkpoint is good enough."""
    ask = partial(generate, model, tokenizer)
    encode = partial(tokenizer.encode, allowed_special=set())

    def row(name: str, correct: Sequence[bool]) -> float:
        share = sum(correct) / len(correct)
        print(f"{name:32} {sum(correct):5} / {len(correct):<5} {share:7.1%}", flush=True)
        return share

    def report_wrong(question: str, answer: str, expected: str) -> None:
        if verbose:
            print(f"  {question!r} -> {answer!r}, not {expected!r}")

    passed = True
    for language in corpus.LANGUAGES:
        cases = corpus.completion_cases(SEED, language)
        if language == "zh":
            cases.insert(0, (CARD_PROMPT, CARD_ANSWER))
        answers = [text.partition("\n")[0] for text in ask([encode(prompt) for prompt, _ in cases])]
        correct = []
        for (prompt, expected), answer in zip(cases, answers):
            correct.append(answer == expected)
            if answer != expected:
                report_wrong(prompt, answer, expected)
        if language == "zh":
            row("the model card's prompt", correct[:1])
            passed &= correct.pop(0)
        passed &= row(f"completion, {language}", correct) >= MIN_COMPLETIONS

    for in_conversation in (False, True):
        dialogues = corpus.chat_cases(SEED, in_conversation)
        prompts = []
        for dialogue in dialogues:
            *history, turn = dialogue.turns
            history = [(before.query, before.response) for before in history]
            # As large a window as the model has: what is dropped would not be tested.
            _, ids = make_context(tokenizer, turn.query, history, dialogue.system, model.config.seq_length - 64)
            prompts.append(ids)
        by_topic: dict[str, list[bool]] = defaultdict(list)
        for dialogue, answer in zip(dialogues, ask(prompts)):
            turn = dialogue.turns[-1]
            by_topic[f"{turn.topic}, {turn.language}"].append(corpus.is_correct(turn, answer))
            if not corpus.is_correct(turn, answer):
                report_wrong(turn.query, answer, turn.response)
        where = "conversation" if in_conversation else "single turn"
        for topic, correct in by_topic.items():
            row(f"{where}: {topic}", correct)
        passed &= row(f"{where}: all", [c for topic in by_topic.values() for c in topic]) >= MIN_CHAT
    return passed


def main() -> None:
    """Evaluate the checkpoint named on the command line, by default the one beside this file."""
    parser = argparse.ArgumentParser(
        description="Ask a demo checkpoint for every capital, and questions in words it was not trained on."
    )
    parser.add_argument("checkpoint", nargs="?", default=str(Path(__file__).parent))
    parser.add_argument("--verbose", action="store_true", help="show the wrong answers")
    args = parser.parse_args()
    load = {"pretrained_model_name_or_path": args.checkpoint, "trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(**load)
    model = AutoModelForCausalLM.from_pretrained(**load).eval()
    make_context = get_class_from_dynamic_module("qwen_generation_utils.make_context", args.checkpoint)
    sys.exit(0 if evaluate(model, tokenizer, make_context, args.verbose) else 1)


if __name__ == "__main__":
    main()
