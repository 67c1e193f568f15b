"""Two tools for the examples that call tools: how a model sees them, and what they do."""

from __future__ import annotations

import ast
import datetime
import operator

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
            if isinstance(node.op, ast.Pow) and (abs(right) > 100 or abs(left) > 10**100):  # else it may take hours
                raise ValueError("the base or the exponent is too large")
            return OPERATORS[type(node.op)](left, right)
        raise ValueError(f"{ast.dump(node)} is not arithmetic")

    return str(value(ast.parse(expression, mode="eval").body))


FUNCTIONS = {"calculator": calculator, "today": lambda: datetime.date.today().isoformat()}


def call(name: str, arguments: dict, functions: dict) -> str:
    """What the tool of this name gives, or in words what is wrong: the model is told, and may mend its call."""
    if name not in functions:
        return f"There is no tool {name!r}; there are {', '.join(functions)}."
    try:
        return functions[name](**arguments)
    except Exception as error:  # noqa: BLE001 (whatever a tool does wrong, the model is told)
        return f"{type(error).__name__}: {error}"
