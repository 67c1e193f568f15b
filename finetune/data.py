"""
Conversations to learn from: reading them, saying what is wrong with them, token ids and labels, packed batches.

Reads the published form, `{"conversations": [{"from": "user", "value": ...}, {"from": "assistant", "value": ...}]}`,
and messages, `{"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}`, with a system prompt each if
wanted; a file holds a JSON list of them or one a line.
"""

from __future__ import annotations

import bisect
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parent.parent
IGNORED = -100
SYSTEM = "You are a helpful assistant."
TRAIN_ON = ("published", "answers")
ROLES = ("system", "user", "assistant", "function", "tool")


class DataError(ValueError):
    """The data can't be learned from; the message says what was found where."""


# Reading


def read(path: str | Path) -> list:
    """
    The records of a JSON list, or of a file with one JSON object a line.

    Raises DataError, with its place, for what is not JSON or not UTF-8, and for a file without a record; OSError.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: this is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
    if not text.strip():
        raise DataError(f"{path} is empty. It must hold a JSON list of conversations, or one conversation a line.")
    if text.lstrip()[0] == "[":
        records = _parse(text, path)
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [_parse(line, path, number) for number, line in lines if line.strip()]
    if not records:
        raise DataError(f"{path} holds an empty list: there is no conversation to learn from.")
    return records


def _parse(text: str, path: Path, line: int | None = None):
    place = path if line is None else f"{path}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        found = text.splitlines()[error.lineno - 1][max(error.colno - 20, 0) : error.colno + 20]
        raise DataError(f"{path}, line {number}, column {error.colno}: {error.msg}, near {found!r}.") from None
    except RecursionError:
        raise DataError(f"{place}: lists and objects lie too deep in each other to be read.") from None
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _object(pairs: list[tuple]) -> dict:
    """A JSON object; DataError if it has a name twice: Python's reader would keep the last value alone."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise DataError(f"an object has {twice!r} twice, near {_short(pairs)}. Leave one of them out.")
    return values


def messages_of(record) -> tuple[list[dict], list]:
    """
    The messages of a record, `{"role": ..., "content": ...}` each, and its tools.

    Example:
        >>> messages_of({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]})
        ([{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}], [])

    Raises DataError for a record of another form, an unknown role, a question or an answer without text, or messages in
    an order that no chat has.
    """
    if not isinstance(record, Mapping):
        raise DataError(f'it is {_short(record)}, not an object with "conversations" or "messages"')
    name = next((name for name in ("conversations", "messages") if name in record), None)
    if name is None:
        raise DataError(f'it has neither "conversations" nor "messages", but {_short(sorted(record))}')
    messages = _normalised(record[name])
    system = record.get("system")
    if system is not None:
        if messages[0]["role"] == "system":
            raise DataError('it has a system prompt twice: under "system" and as the first message')
        if not isinstance(system, str):
            raise DataError(f"its system prompt is {_short(system)}, not a text")
        messages = [{"role": "system", "content": system}, *messages]
    tools = record.get("tools") or record.get("functions") or []
    if not isinstance(tools, list):
        raise DataError(f"its tools are {_short(tools)}, not a list")
    _check_order(messages, tools)
    return messages, tools


def _normalised(messages) -> list[dict]:
    """Role, content and, of a call, `function_call` of each; several calls of a message become as many messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"its messages are {_short(messages)}, not a list of at least one")
    normalised = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"message {number} is {_short(message)}, not an object")
        if "from" in message:
            message = {**message, "role": message["from"], "content": message.get("value")}
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"message {number} has the role {role!r}; the roles are {', '.join(ROLES)}")
        calls = message.get("tool_calls") or [call for call in [message.get("function_call")] if call is not None]
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise DataError(f"message {number} says {_short(content)}, not a text")
        if role in ("user", "assistant") and not calls and not content.strip():
            raise DataError(f"message {number}, of {role}, has an empty text")
        normalised.append({**message, "content": content, "tool_calls": [_checked(call, number) for call in calls]})
    if not any(message["tool_calls"] for message in normalised):
        return [{"role": message["role"], "content": message["content"]} for message in normalised]
    try:
        steps = list(_from_code("_steps")(normalised))
    except ValueError as error:
        raise DataError(str(error)) from None
    names = "role", "content", "function_call"
    return [{name: value for name, value in zip(names, step) if value is not None} for step in steps]


def _checked(call, number: int) -> dict:
    """A call of either form in that of `tool_calls`."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
        raise DataError(f"message {number} calls {_short(call)}, which has no name")
    return {"id": call.get("id"), "function": {"name": function["name"], "arguments": function.get("arguments", {})}}


@lru_cache(maxsize=None)
def _from_code(name: str):
    """A function of qwen_generation_utils.py: what is trained on is read and worded as what is asked."""
    return get_class_from_dynamic_module(f"qwen_generation_utils.{name}", str(ROOT))


def _check_order(messages: list[dict], tools) -> None:
    try:
        names = [_from_code("_tool_values")(tool)["name"] for tool in tools]
    except ValueError as error:
        raise DataError(str(error)) from None
    before = "nothing"
    for number, message in enumerate(messages, start=1):
        role = "function" if message["role"] == "tool" else message["role"]
        allowed = {
            "nothing": ("system", "user", "assistant"),
            "system": ("user", "assistant"),
            "user": ("assistant",),
            "assistant": ("user",),
            "a call": ("function",),
            "function": ("assistant",),
        }[before]
        if role not in allowed:
            raise DataError(f"message {number} is of {role} after {before}, where {' or '.join(allowed)} belongs")
        before = "a call" if "function_call" in message else role
        if before == "a call":
            called = message["function_call"]["name"]
            if role != "assistant":
                raise DataError(f"message {number} calls a function, but is not an assistant's")
            if called not in names:
                raise DataError(f"message {number} calls {called!r}, but the tools are {', '.join(names) or 'none'}")
    if not any(message["role"] == "user" for message in messages) or messages[-1]["role"] == "user":
        raise DataError("it has no question, or its last question has no answer")
    if before == "a call":
        raise DataError("it ends with a call; its result and an answer have to follow")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


# Tokens and labels


def encode(
    conversations: Sequence[Mapping],
    tokenizer,
    max_length: int | None,
    system: str = SYSTEM,
    train_on: str = "published",
    tools: Sequence[Mapping] = (),
    control_tokens: bool = False,
) -> dict[str, list[int]]:
    """
    Token ids and labels of one conversation in ChatML, `{"input_ids": [...], "labels": [...]}`, not padded.

    Args:
        conversations: messages, `{"from": ..., "value": ...}` or `{"role": ..., "content": ...}` each. One of the role
            system, if it is the first, takes the place of `system`. As published, what an assistant says before the
            first question is left out.
        max_length: more tokens than these are cut off; None: as many as there are.
        train_on: "published" learns what an assistant says, and `<|im_start|>`, `<|im_end|>` and the line break of
            every message, as the published script does; "answers" what an assistant says and its `<|im_end|>`.
        tools: functions that the assistant may call (`function_call` of a message; the next one, of the role function,
            is the result; or `tool_calls` and the role tool). They and the calls are read and written in the ReAct form
            of `make_tool_context`.
        control_tokens: read `<|im_start|>` and the like in the texts as the tokens of that name.

    Raises DataError for messages that make no conversation, ValueError for another `train_on`.

    Example:
        >>> encode([{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}], tokenizer, 512)
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}, found {train_on!r}.")
    messages = _normalised(conversations)
    _check_order(messages, tools)
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if messages[0]["role"] == "assistant":
        messages = messages[1:]
    if tools:
        turns = _react_turns(messages, tools)
    else:
        turns = [(message["role"], [(message["content"], message["role"] == "assistant")]) for message in messages]
    newline = tokenizer.encode("\n", allowed_special=set())
    allowed = "all" if control_tokens else set()
    ids: list[int] = []
    labels: list[int] = []
    for role, pieces in [("system", [(system, False)]), *turns]:
        head = [*tokenizer.encode(role, allowed_special=set()), *newline]
        content = tokenizer.encode("".join(text for text, _ in pieces), allowed_special=allowed, verbose=False)
        learned = _learned(content, pieces, tokenizer)
        if train_on == "published":
            learned = [role == "assistant"] * len(content)
        ids += [tokenizer.im_start_id, *head, *content, tokenizer.im_end_id, *newline]
        frame = train_on == "published"
        kept = [frame, *[False] * len(head), *learned, frame or role == "assistant", *[frame] * len(newline)]
        labels += [token if keep else IGNORED for token, keep in zip(ids[-len(kept) :], kept)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _react_turns(messages: list[dict], tools) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Roles with pieces of text, and whether each is learned; calls, results and answers become one text."""
    turns: list[tuple[str, list]] = []
    for role, content, call in _from_code("_steps")(messages):
        if role == "user":
            turns.append(("user", [(content if turns else _tool_question(content, tools), False)]))
            continue
        if turns[-1][0] == "user":
            turns.append(("assistant", []))
        pieces = turns[-1][1]
        if role != "assistant":
            pieces += [(f" {content}\n", False)]
        elif call is not None:
            thought = content or f"I can use {call['name']}."
            thought = thought if thought.startswith("Thought:") else f"Thought: {thought}"
            step = f"{thought}\nAction: {call['name']}\nAction Input: {call['arguments']}\nObservation:"
            pieces += [(step, True)]
        else:
            pieces += [(f"Thought: I now know the final answer\nFinal Answer: {content}", True)]
    return turns


def _tool_question(query: str, tools) -> str:
    """The question behind the description of the tools, in the words of `make_tool_context`."""
    text, _ = _from_code("make_tool_context")(_NoTokens(), [{"role": "user", "content": query}], tools, "")
    return text.split("<|im_start|>user\n", 1)[1].rpartition("<|im_end|>\n<|im_start|>assistant\n")[0]


class _NoTokens:
    """For `make_tool_context`, of which only the text is wanted here."""

    im_start_id = im_end_id = 0

    def encode(self, text, **kwargs):
        return []


def _learned(content: list[int], pieces: list[tuple[str, bool]], tokenizer) -> list[bool]:
    """For each token whether it begins in a piece that is learned; the pieces are encoded together."""
    if len(pieces) == 1:
        return [pieces[0][1]] * len(content)
    lengths = [len(_bytes(tokenizer.decoder[token])) for token in content]
    starts = [0, *accumulate(lengths)][:-1]
    so_far = accumulate(text for text, _ in pieces)
    # Half of a surrogate pair is encoded as U+FFFD, which has as many bytes.
    ends = [len(unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")) for text in so_far]
    return [pieces[min(bisect.bisect_right(ends, start), len(pieces) - 1)][1] for start in starts]


def _bytes(token: bytes | str) -> bytes:
    return token if isinstance(token, bytes) else token.encode("utf-8")


# Data sets and batches


class Conversations(Dataset):
    """
    The conversations of a file, encoded; an item is a list of one or, with `packing`, of as many as fit together.

    Everything is checked when it is made. `lazy` forgets the ids then and encodes again what is drawn.

    Attributes:
        too_long: indices of records that were cut at `max_length`.
        left_out: indices of records of which no label is left after the cut.

    Raises DataError that says how many records are wrong, which, and why.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer,
        max_length: int,
        system: str = SYSTEM,
        train_on: str = "published",
        control_tokens: bool = False,
        lazy: bool = False,
        packing: bool = False,
    ):
        self.max_length = max_length
        self._encode = partial(
            encode, tokenizer=tokenizer, system=system, train_on=train_on, control_tokens=control_tokens
        )
        self.records, problems = [], []
        self._encoded: list | None = [] if not lazy else None
        lengths, self.too_long, self.left_out = [], [], []
        for i, record in enumerate(read(path)):
            try:
                self.records.append(messages_of(record))
                messages, tools = self.records[-1]
                row = self._encode(messages, max_length=None, tools=tools)
            except DataError as problem:
                problems.append(f"no. {i + 1}: {problem}")
                continue
            length = min(len(row["input_ids"]), max_length)
            lengths.append(length)
            if len(row["input_ids"]) > max_length:
                self.too_long.append(i)
            row = {name: values[:max_length] for name, values in row.items()}
            if all(label == IGNORED for label in row["labels"][1:]):
                self.left_out.append(i)
            if self._encoded is not None:
                self._encoded.append(row)
        if problems:
            some = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
            raise DataError(f"{path}: {len(problems)} of {i + 1} conversations are wrong ({some}).")
        out = set(self.left_out)
        kept = [i for i in range(len(lengths)) if i not in out]
        if not kept:
            raise DataError(f"{path}: within {max_length} tokens there is nothing to learn in any conversation.")
        self.groups = pack([lengths[i] for i in kept], max_length) if packing else [[i] for i in range(len(kept))]
        self.groups = [[kept[i] for i in group] for group in self.groups]
        self.num_tokens = sum(lengths[i] for i in kept)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        return [self._row(i) for i in self.groups[index]]

    def _row(self, i: int) -> dict[str, list[int]]:
        if self._encoded is not None:
            return self._encoded[i]
        messages, tools = self.records[i]
        return self._encode(messages, max_length=self.max_length, tools=tools)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Groups of indices whose lengths together are at most `capacity`, few and in a fixed order (best fit, longest first).

    Example:
        >>> pack([3, 5, 2, 4], 7)
        [[1, 2], [3, 0]]
    """
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, group), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(free, (lengths[i], -1))
        if place == len(free):
            groups.append([])
            room, group = capacity, len(groups) - 1
        else:
            room, group = free.pop(place)
        groups[group].append(i)
        bisect.insort(free, (room - lengths[i], group))
    return groups


@dataclass
class PackedBatch:
    """
    Makes a batch of items of `Conversations`, with as little padding as there can be, for a model in training.

    Conversations share rows; none sees another: `position_ids` begin anew with each, of which transformers makes block
    masks, and what follows another has no label for its first token. `flat`, for flash attention: one row without
    padding, with the lengths in the arguments that its kernels for variable lengths take.

    Returns `input_ids`, `labels` and `position_ids`, int64 (rows, T), and what the model is to do: return no logits and
    keep no cache. There is no attention mask: padding is a conversation of its own, without labels.
    """

    pad_token_id: int
    flat: bool = False

    def __call__(self, items: list[list[dict]]) -> dict:
        members = [row for item in items for row in item]
        lengths = [len(row["input_ids"]) for row in members]
        longest = max(sum(len(row["input_ids"]) for row in item) for item in items)
        rows = [list(range(len(members)))] if self.flat else pack(lengths, longest)
        width = max(sum(lengths[i] for i in row) for row in rows)
        columns: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            ids = [token for i in row for token in members[i]["input_ids"]]
            labels = [label for i in row for label in [IGNORED, *members[i]["labels"][1:]]]
            positions = [position for i in row for position in range(lengths[i])]
            padding = width - len(ids)
            columns["input_ids"].append(ids + [self.pad_token_id] * padding)
            columns["labels"].append(labels + [IGNORED] * padding)
            columns["position_ids"].append(positions + list(range(padding)))
        batch = {name: torch.tensor(rows) for name, rows in columns.items()}
        if self.flat:
            ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            batch.update(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths))
        return {**batch, "use_cache": False, "skip_logits": True}
