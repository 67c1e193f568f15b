"""
Let a chat model call tools: it thinks, names a tool and its arguments, reads the result, and goes on until it answers.

    python examples/tool_use.py CHECKPOINT "What is 17 * 23?"

The demo checkpoint is too small to call tools; take Qwen-7B-Chat or larger.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import operator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

TOOLS = [
    {
        "name": "calculator",
        "description": "Computes with numbers, + - * / ** and parentheses. Format the arguments as a JSON object.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
    {
        "name": "today",
        "description": "Tells today's date. Format the arguments as a JSON object.",
        "parameters": {"type": "object", "properties": {}},
    },
]
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


def calculator(expression: str) -> str:
    """The value of an arithmetic expression; nothing but arithmetic is executed."""

    def value(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 100:
                raise ValueError("the exponent is too large")
            return OPERATORS[type(node.op)](left, right)
        raise ValueError(f"{ast.dump(node)} is not arithmetic")

    return str(value(ast.parse(expression, mode="eval").body))


FUNCTIONS = {"calculator": calculator, "today": lambda: datetime.date.today().isoformat()}


def answer(complete, parse, question: str, functions: dict, max_steps: int = 8):
    """
    Ask until there is an answer.

    complete: messages to the model's next words; parse: `parse_react`; functions: the tools by their names.
    Returns the answer and the messages that led to it. A call that fails is told to the model, which may mend it.
    Raises RuntimeError if there is no answer after `max_steps` calls.
    """
    messages = [{"role": "user", "content": question}]
    for _ in range(max_steps):
        step = parse(complete(messages))
        if step.answer is not None:
            return step.answer, messages
        result = step.error
        if result is None and step.action not in functions:
            result = f"There is no tool {step.action!r}; there are {', '.join(functions)}."
        if result is None:
            try:
                result = functions[step.action](**step.arguments)
            except Exception as error:  # noqa: BLE001 (whatever a tool does wrong, the model is told)
                result = f"{type(error).__name__}: {error}"
        call = {"name": step.action, "arguments": step.written}
        messages.append({"role": "assistant", "content": step.thought, "function_call": call})
        messages.append({"role": "function", "name": step.action, "content": result})
    raise RuntimeError(f"There was no answer after {max_steps} calls of tools.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a chat model call a calculator and a calendar.")
    parser.add_argument("checkpoint")
    parser.add_argument("question")
    arguments = parser.parse_args()
    path = arguments.checkpoint
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True).eval()
    make_tool_context, parse_react, StopAtText = (
        get_class_from_dynamic_module(f"qwen_generation_utils.{name}", path)
        for name in ("make_tool_context", "parse_react", "StopAtText")
    )

    def complete(messages: list) -> str:
        _, tokens = make_tool_context(tokenizer, messages, TOOLS)
        ids = torch.tensor([tokens], device=model.device)  # (1, T)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=[StopAtText(tokenizer, ["Observation:"], prompt_length=len(tokens))],
        )
        return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)

    text, messages = answer(complete, parse_react, arguments.question, FUNCTIONS)
    for message in messages[1:]:
        call = message.get("function_call")
        print(f"{message['content']} [{call['name']} {call['arguments']}]" if call else f"  -> {message['content']}")
    print(text)


if __name__ == "__main__":
    main()
