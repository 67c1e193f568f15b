"""
Let a chat model call tools: it thinks, names a tool and its arguments, reads the result, and goes on until it answers.

    python examples/tool_use.py CHECKPOINT "What is 17 * 23?" "And the day of the year today, times that?"

Several questions are one conversation. The prompt is the published one (ReAct, https://arxiv.org/abs/2210.03629), as in
the published react_demo.py. The demo checkpoint is too small to call tools; take Qwen-7B-Chat or larger.
"""

from __future__ import annotations

import argparse

import torch
from checkpoint import load
from toolbox import FUNCTIONS, TOOLS, call
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def answer(complete, parse, question: str, functions: dict, max_steps: int = 8, earlier: list | None = None):
    """
    Ask until there is an answer.

    complete: messages to the model's next words; parse: `parse_react`; functions: the tools by their names; earlier:
    the messages of the conversation so far. Returns the answer, and the conversation with the question, what led to
    the answer, and the answer.
    Raises RuntimeError if there is no answer after `max_steps` calls.
    """
    messages = [*(earlier or []), {"role": "user", "content": question}]
    for _ in range(max_steps):
        step = parse(complete(messages))
        if step.answer is not None:
            return step.answer, [*messages, {"role": "assistant", "content": step.answer}]
        made = {"name": step.action, "arguments": step.written}
        messages.append({"role": "assistant", "content": step.thought, "function_call": made})
        result = step.error or call(step.action, step.arguments, functions)
        messages.append({"role": "function", "name": step.action, "content": result})
    raise RuntimeError(f"There was no answer after {max_steps} calls of tools.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a chat model call a calculator and a calendar.")
    parser.add_argument("checkpoint")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument("--cpu-only", action="store_true", help="use no GPU")
    arguments = parser.parse_args()
    path = arguments.checkpoint
    model, tokenizer = load(path, arguments.cpu_only)
    make_tool_context, parse_react, StopAtText = (
        get_class_from_dynamic_module(f"qwen_generation_utils.{name}", path)
        for name in ("make_tool_context", "parse_react", "StopAtText")
    )
    window = getattr(model.generation_config, "max_window_size", 6144)

    def complete(messages: list) -> str:
        _, tokens = make_tool_context(tokenizer, messages, TOOLS, max_window_size=window)
        ids = torch.tensor([tokens], device=model.device)  # (1, T)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=[tokenizer.eod_id, tokenizer.im_end_id],  # published chat checkpoints name only the first
            pad_token_id=tokenizer.eod_id,
            stopping_criteria=[StopAtText(tokenizer, ["Observation:"], prompt_length=len(tokens))],
        )
        return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)

    messages: list = []
    for question in arguments.questions:
        known = len(messages)
        print("user:     ", question)
        _, messages = answer(complete, parse_react, question, FUNCTIONS, earlier=messages)
        for message in messages[known + 1 :]:
            made = message.get("function_call")
            said = f"{message['content']} [{made['name']} {made['arguments']}]" if made else message["content"]
            print(f"{message['role'] + ':':10} {said}")


if __name__ == "__main__":
    main()
