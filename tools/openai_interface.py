"""
What tools/serve.py knows of OpenAI's interface: errors, the fields of a request, and answers that come in pieces.

Nothing here knows a model, or transformers' server.
"""

from __future__ import annotations

import importlib
import json
import re


def error_object(text: str, status: int, code: str | None = None) -> dict:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


class BadRequest(Exception):
    """What is wrong with a request, in words for its sender."""

    def __init__(self, text: str, status: int = 400, code: str | None = None, headers: dict | None = None):
        super().__init__(text)
        self.status, self.code, self.headers = status, code, headers

    def response(self):
        content = error_object(str(self), self.status, self.code)
        return responses().JSONResponse(content, status_code=self.status, headers=self.headers)


def responses():
    return importlib.import_module("starlette.responses")


# The numbers of a request, each with its kind and bounds; within them no probability leaves the range of floats.
NUMBERS = {
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 1_000_000),
    "frequency_penalty": (float, -0.9, 2),
    "max_tokens": (int, 1, 1_000_000),
    "max_completion_tokens": (int, 1, 1_000_000),
    "max_length": (int, 1, 1_000_000),
    "seed": (int, -(2**63), 2**63 - 1),
}
# What would change the answer and is not served, with the values that ask for nothing.
NOT_SERVED = {
    "n": [1],
    "best_of": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "presence_penalty": [0],
    "echo": [False],
    "suffix": [""],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "web_search_options": [],
}
ROLES = {"developer": "system", **{role: role for role in ("system", "user", "assistant", "tool", "function")}}


def check_fields(request: dict) -> None:
    for name, (kind, low, high) in NUMBERS.items():
        value = request.get(name)
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if value is not None and not (is_number and low <= value <= high):
            whole = "whole " if kind is int else ""
            raise BadRequest(f"{name} must be a {whole}number from {low} to {high}, found {value!r}.")
    for name, harmless in NOT_SERVED.items():
        if request.get(name) is not None and request[name] not in harmless:
            raise BadRequest(f"{name} is not served here, found {request[name]!r}: leave it out.")
    if request.get("stream") not in (None, True, False):
        raise BadRequest(f"stream must be true or false, found {request['stream']!r}.")


def token_biases(given, tokens: int) -> dict[tuple[int], float]:
    """The "sequence_bias" of `generate` for a "logit_bias": numbers by ids of tokens, of which there are `tokens`."""
    found = {} if given is None else given
    biases = found.values() if isinstance(found, dict) else [None]
    numbers = all(type(bias) in (int, float) and abs(bias) <= 100 for bias in biases)
    if not numbers or not all(re.fullmatch("[0-9]{1,9}", key) and int(key) < tokens for key in found):
        text = f"logit_bias must be an object of ids of tokens, below {tokens}, with numbers from -100 to 100"
        raise BadRequest(f"{text}, found {repr(given)[:80]}.")
    return {(int(key),): float(bias) for key, bias in found.items()}


def check_messages(messages) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"messages must be a list with at least one message, found {repr(messages)[:80]}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"A message must be an object with a role and a content, found {str(message)[:80]}.")
        if message["role"] not in ROLES:
            raise BadRequest(f"A role must be one of {', '.join(ROLES)}, found {message['role']!r}.")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise BadRequest(f"A content must be a text, or parts of the type text, found {str(content)[:80]}.")
    if all(message["role"] != "user" for message in messages):
        raise BadRequest("messages must have at least one of the role user.")


def plain_text(content) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


class Until:
    """
    A text that comes in pieces, up to the one of some texts that is complete first.

    What may be the beginning of one is held back.
    """

    def __init__(self, stop: list[str]):
        self._stop = stop
        self._held = ""
        self.ended = False

    def feed(self, piece: str) -> str:
        """Take more of the text; returns what is certain to belong to it, and was not before."""
        text = self._held + piece
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        self.ended = self.ended or bool(found)
        begins = (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        certain = min(found)[1] if found else len(text) - max(begins, default=0)
        self._held = "" if found else text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back."""
        return self._held


class PlainAnswer:
    """What a model writes, shown as it comes."""

    def feed(self, piece: str) -> str:
        return piece

    def finish(self) -> tuple[str, dict | None]:
        return "", None


class ToolAnswer:
    """
    What a model writes behind a prompt with tools, while it comes: the final answer, or a call in the end.

    An answer is shown as soon as it is certain to be one.
    """

    def __init__(self, parse):
        self._parse = parse
        self._text = self._shown = ""

    def feed(self, piece: str) -> str:
        """Take more of the text; returns what is to be shown of it."""
        self._text += piece
        final = re.search(r"^\s*Final Answer\s*:", self._text, re.MULTILINE)
        if final is None or re.search(r"^\s*Action\s*:", self._text[: final.start()], re.MULTILINE):
            return ""
        return self._show(self._text[final.end() :].strip())

    def _show(self, answer: str) -> str:
        new, self._shown = answer[len(self._shown) :], answer
        return new

    def finish(self) -> tuple[str, dict | None]:
        """What is still to be shown, and the name and arguments of a call or None."""
        step = self._parse(self._text)
        if step.action is None:
            return self._show(step.answer), None
        arguments = step.written
        if step.arguments is not None:
            try:
                json.loads(arguments)
            except ValueError:  # in a fence, or as Python writes it
                arguments = json.dumps(step.arguments, ensure_ascii=False)
        return step.thought, {"name": step.action, "arguments": arguments}
