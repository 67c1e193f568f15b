"""
What chatting is made of: contexts in ChatML, decoding of answers, stop words, streaming.

Knows tokens and text, not the network.
"""

from __future__ import annotations

import ast
import collections
import copy
import json
import queue
import re
import threading
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

logger = logging.get_logger("transformers.models.qwen.qwen_generation_utils")

CHAT_FORMATS = ("chatml", "raw")
HistoryType = List[Tuple[str, str]]  # (query, response), oldest first


def _check_chat_format(chat_format: str) -> None:
    if chat_format not in CHAT_FORMATS:
        raise ValueError(
            f"Unknown chat_format {chat_format!r}; it must be one of {', '.join(map(repr, CHAT_FORMATS))}. "
            f"It is a key of generation_config.json: 'chatml' for chat models, 'raw' for base models."
        )


def make_context(
    tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """
    The prompt for `query`, as text and as token ids.

    In ChatML the system prompt comes first, then as many of the latest turns of `history` (query, response) as stay
    below `max_window_size` tokens together with it, then the query. Roles and contents are encoded as ordinary text:
    what a person wrote never becomes a control token. In the raw format the prompt is the query itself.

    Raises ValueError for an unknown `chat_format`, or a history that is not made of pairs of texts; TypeError for a
    query that is no text, or a text in the place of the tokenizer.

    Example:
        >>> make_context(tokenizer, "1+1=?", chat_format="chatml")[0]
        '<|im_start|>system\\n<|im_end|>\\n<|im_start|>user\\n1+1=?<|im_end|>\\n<|im_start|>assistant\\n'
    """
    _check_chat_format(chat_format)
    if isinstance(tokenizer, str) or not isinstance(query, str):
        raise TypeError(
            f"A tokenizer comes first and then the query, a text; found {type(tokenizer).__name__} and "
            f"{type(query).__name__}. Write model.chat(tokenizer, query, history)."
        )
    if chat_format == "raw":
        return query, tokenizer.encode(query)

    newline = tokenizer.encode("\n")

    def message(role: str, content: str) -> tuple[str, list[int]]:
        text = f"<|im_start|>{role}\n{content}<|im_end|>"
        ids = tokenizer.encode(role, allowed_special=set()) + newline + tokenizer.encode(content, allowed_special=set())
        return text, [tokenizer.im_start_id, *ids, tokenizer.im_end_id]

    system_text, system_ids = message("system", system)
    turns_text, turns_ids = "", []
    for turn in reversed(history or []):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(
                f"history must be a list of (query, response) pairs of texts, found {turn!r} in it. For messages "
                f"with roles use tokenizer.apply_chat_template."
            )
        past_query, past_response = turn
        query_text, query_ids = message("user", past_query)
        response_text, response_ids = message("assistant", past_response)
        turn_ids = newline + query_ids + newline + response_ids
        if len(system_ids) + len(turn_ids) + len(turns_ids) >= max_window_size:
            break
        turns_text = f"\n{query_text}\n{response_text}{turns_text}"
        turns_ids = turn_ids + turns_ids
    query_text, query_ids = message("user", query)
    text = f"{system_text}{turns_text}\n{query_text}\n<|im_start|>assistant\n"
    opening = [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return text, system_ids + turns_ids + newline + query_ids + newline + opening


def decode_tokens(
    tokens: torch.Tensor | Sequence[int],
    tokenizer,
    raw_text_len: int,
    context_length: int,
    chat_format: str,
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
):
    """
    The response in `tokens`, int64 (T,): the prompt's `context_length` tokens and what was generated after them.

    In ChatML the response ends at the first `<|im_end|>` or `<|im_start|>`; a response that has neither loses its last
    token, as published. `raw_text_len` is accepted as published; the prompt's tokens are left out by their number.
    `verbose` logs the raw response at the level info.

    Returns:
        The response, or with `return_end_reason` the pair of it and the reason for the end, such as
        `"Gen '<|im_end|>'"` or `"Gen length 22"`.

    Raises ValueError for an unknown `chat_format`.
    """
    _check_chat_format(chat_format)
    tokens = tokens.tolist() if torch.is_tensor(tokens) else list(tokens)
    end_reason = f"Gen length {len(tokens)}"
    if chat_format == "raw":
        response = tokenizer.decode(tokens[context_length:], errors=errors)
        response = response.replace("<|endoftext|>", "")
    else:
        end = len(tokens) - 1
        for index in range(context_length, len(tokens)):
            if tokens[index] in (tokenizer.im_start_id, tokenizer.im_end_id):
                end = index
                end_reason = f"Gen {tokenizer.decode([tokens[index]])!r}"
                break
        response = tokenizer.decode(tokens[context_length : max(end, context_length)], errors=errors)
    if verbose:
        logger.info(f"Raw response: {tokenizer.decode(tokens[context_length:], errors=errors)!r}; end: {end_reason}")
    response = response.strip()
    return (response, end_reason) if return_end_reason else response


class ToolPrompt(NamedTuple):
    """
    The wording of a prompt with tools.

    instruction: what stands in front of the question; {tools} are their descriptions, {names} their names.
    tool: the description of one, with its {name}, its name for {human}s, {description} and {parameters}.
    comma: what separates the names.
    """

    instruction: str
    tool: str
    comma: str


# The published wordings, which the chat models were tuned on, to the letter. The first is that of openai_api.py,
# react_demo.py and function_call_finetune_examples.py, the second that of react_prompt.md.
TOOL_PROMPT = ToolPrompt(
    """Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!""",
    "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? {description} "
    "Parameters: {parameters}",
    ", ",
)
REACT_PROMPT = ToolPrompt(
    TOOL_PROMPT.instruction.replace("APIs", "tools"),
    TOOL_PROMPT.tool + " Format the arguments as a JSON object.",
    ",",
)
OBSERVATION = "Observation:"


def _fill(text: str, values: dict) -> str:
    """`str.format` that leaves other braces alone."""
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field.group(1), field.group(0)), text)


def _tool_values(tool: dict) -> dict:
    """What a description says of a tool in the published form, or of a function or a tool of OpenAI's interface."""
    tool = tool.get("function", tool) if isinstance(tool, dict) else {}
    name = tool.get("name_for_model", tool.get("name"))
    if not isinstance(name, str) or not name or "\n" in name:
        raise ValueError(
            f"A tool must be a dictionary with a name (or name_for_model), description and parameters, found {tool!r}."
        )
    return {
        "name": name,
        "human": tool.get("name_for_human", name),
        "description": tool.get("description_for_model", tool.get("description", "")),
        "parameters": json.dumps(tool.get("parameters", {}), ensure_ascii=False),
    }


def _calls(message: dict) -> list[dict]:
    """The calls of a message, each with an `id` or None, a `name` and `arguments`, a JSON text."""
    calls = message.get("tool_calls") or [{"function": message.get("function_call")}]
    functions = [(call.get("id"), call.get("function", call)) for call in calls]
    return [
        {
            "id": index,
            "name": function["name"],
            "arguments": function["arguments"]
            if isinstance(function["arguments"], str)
            else json.dumps(function["arguments"], ensure_ascii=False),
        }
        for index, function in functions
        if function is not None
    ]


def _steps(messages: Sequence[dict]) -> Iterator[tuple[str, str, dict | None]]:
    """Role, content and call of each message; of several calls in one each is followed by its result."""
    rest = collections.deque(messages)
    while rest:
        message = rest.popleft()
        content = (message.get("content") or "").lstrip("\n").rstrip()
        calls = _calls(message)
        if len(calls) < 2:
            yield message.get("role"), content, calls[0] if calls else None
            continue
        results = {}
        while rest and rest[0].get("role") in ("function", "tool"):
            result = rest.popleft()
            results[result.get("tool_call_id")] = result
        for call in calls:
            yield message.get("role"), content, call
            if call["id"] in results:
                yield from _steps([results.pop(call["id"])])
            content = ""
        if results:
            unknown = ", ".join(map(str, results))
            raise ValueError(f"There are results of calls that were not made: tool_call_id {unknown}.")


def make_tool_context(
    tokenizer,
    messages: Sequence[dict],
    tools: Sequence[dict],
    system: str = "You are a helpful assistant.",
    max_window_size: int = 6144,
    prompt: ToolPrompt = TOOL_PROMPT,
) -> tuple[str, list[int]]:
    """
    The prompt for the next step of an answer that may call tools (ReAct, https://arxiv.org/abs/2210.03629).

    It is the published one, as the published server makes it of the same messages: the tools are described with the
    last question that has an answer, or part of one, else with the only question.

    Args:
        messages: `{"role": "user", "content": ...}`, `{"role": "assistant", "content": ..., "function_call": {"name":
            ..., "arguments": JSON}}` for a call, `{"role": "function", "name": ..., "content": ...}` for its result,
            and `{"role": "assistant", "content": ...}` for an answer; calls and results follow their question. Calls
            may be `tool_calls` too, and results messages of the role "tool" with a `tool_call_id`, as OpenAI's
            interface has them. A first message of the role "system" replaces `system`.
        tools: a name, a description and parameters (any JSON) each; the tools of OpenAI's interface and those of the
            published examples (`name_for_model`, `name_for_human`, `description_for_model`) are read too. A model is
            more likely to write JSON if a description ends in "Format the arguments as a JSON object."
        prompt: its wording; REACT_PROMPT is that of the published examples/react_prompt.md.

    Returns the prompt as text and as token ids, like `make_context`: nothing that a person or a tool wrote becomes a
    control token. The model's next words follow; stop it at `Observation:`, and read them with `parse_react`.

    Raises ValueError for tools without a name, or messages in another order.

    Example:
        >>> text, ids = make_tool_context(tokenizer, [{"role": "user", "content": "What is 17 * 23?"}], tools)
    """
    turns: list[list[str]] = []
    role = None
    for number, (role, content, call) in enumerate(_steps(messages)):
        said = content
        if call is not None:
            said = content if content.startswith("Thought:") else f"Thought: {content}"
            said += f"\nAction: {call['name']}\nAction Input: {call['arguments']}"
        elif tools:
            said = f"Thought: I now know the final answer.\nFinal Answer: {content}"
        if role == "system" and number == 0:
            system = content
        elif role == "user" and (not turns or turns[-1][1]):
            turns.append([content, ""])
        elif role == "assistant" and turns:
            turns[-1][1] = f"{turns[-1][1]}\n{said}" if turns[-1][1] else said.rstrip()
        elif role in ("function", "tool") and turns and turns[-1][1]:
            turns[-1][1] += f"\n{OBSERVATION} {content}"
        else:
            raise ValueError(
                f"After {len(turns)} questions a message of the role {role!r} has no place: the first is a user's, "
                f"and each question is followed by calls, their results and an answer."
            )
    if not turns:
        raise ValueError("There is no message from a user.")
    described = [_tool_values(tool) for tool in tools]
    values = {
        "tools": "\n\n".join(_fill(prompt.tool, tool) for tool in described),
        "names": prompt.comma.join(tool["name"] for tool in described),
    }
    instruction = _fill(prompt.instruction, values) + "\n\nQuestion: " if tools else ""

    def context(place: int) -> tuple[str, list[int]]:
        """With the instruction in front of this question."""
        asked = [(instruction + query if i == place else query, said.strip()) for i, (query, said) in enumerate(turns)]
        return make_context(tokenizer, asked[-1][0], asked[:-1], system, max_window_size)

    last = len(turns) - 1
    text, ids = context(last if turns[last][1] or not last else last - 1)
    if instruction not in text:  # its turn does not fit into the window
        text, ids = context(last)
    answer = turns[last][1].lstrip("\n").rstrip() + ("\nThought:" if role in ("function", "tool") else "")
    return text + answer, ids + tokenizer.encode(answer, allowed_special=set())


class ReactStep(NamedTuple):
    """
    What a model wrote behind a prompt of `make_tool_context`.

    Either `action` is the name of a tool and `arguments` are its arguments, or `answer` is the final answer. `error`
    says what is wrong with a call, in words to give back to the model as the tool's result. `written` are the arguments
    as the model wrote them.
    """

    thought: str
    action: Optional[str] = None
    arguments: Optional[dict] = None
    answer: Optional[str] = None
    error: Optional[str] = None
    written: Optional[str] = None


def parse_react(text: str) -> ReactStep:
    """
    Read a step: a thought, then a call or the final answer. Text without either is taken for the answer.

    What follows `Observation:` is left out: the model made it up. Arguments may stand in a Markdown fence, have text
    behind them, or be written as a Python dictionary; whatever else they are is described in `error`.

    Example:
        >>> parse_react(' I multiply.\\nAction: calculator\\nAction Input: {"expression": "17*23"}\\nObservation:')[:3]
        ('I multiply.', 'calculator', {'expression': '17*23'})
    """
    text = text.split(OBSERVATION)[0]
    call = re.search(r"^\s*Action\s*:(.*)$", text, re.MULTILINE)
    final = re.search(r"^\s*Final Answer\s*:", text, re.MULTILINE)
    first = min((found.start() for found in (call, final) if found), default=None)
    thought = re.sub(r"^\s*Thought\s*:", "", text[:first] if first is not None else "").strip()
    if call is None or (final is not None and final.start() < call.start()):
        answer = text[final.end() :] if final else re.sub(r"^\s*Thought\s*:", "", text)
        return ReactStep(thought, answer=answer.strip())
    name = call.group(1).strip().strip("`\"'[]")
    rest = re.search(r"^\s*Action Input\s*:", text[call.end() :], re.MULTILINE)
    if rest is None:
        return ReactStep(thought, name, error="There was no line 'Action Input:' with the arguments.", written="")
    written = text[call.end() + rest.end() :].strip()
    if final is not None:
        written = written.split("Final Answer")[0].strip()
    arguments = _read_arguments(written)
    if arguments is None:
        error = f"The Action Input is not a JSON object: {written[:200]}"
        return ReactStep(thought, name, error=error, written=written)
    return ReactStep(thought, name, arguments, written=written)


def _read_arguments(written: str) -> dict | None:
    written = re.sub(r"^```\w*\s*|\s*```$", "", written)
    for read in (lambda: json.JSONDecoder(strict=False).raw_decode(written)[0], lambda: ast.literal_eval(written)):
        try:
            arguments = read()
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(arguments, dict):
            return arguments
    return {} if not written else None


def get_stop_words_ids(chat_format: str, tokenizer) -> list[list[int]]:
    """
    The token sequences that end a response in this format.

    Raises ValueError for an unknown `chat_format`.
    """
    _check_chat_format(chat_format)
    if chat_format == "raw":
        return [tokenizer.encode("Human:"), [tokenizer.eod_id]]
    return [[tokenizer.im_end_id], [tokenizer.im_start_id]]


def check_stop_words_ids(stop_words_ids) -> None:
    """Raise ValueError unless it is a non-empty list of non-empty lists of non-negative integers."""
    ask = "Pass a list of lists of token ids, such as [tokenizer.encode('Observation:')]."
    if not isinstance(stop_words_ids, (list, tuple)) or not stop_words_ids:
        raise ValueError(f"stop_words_ids must be a non-empty list, found {stop_words_ids!r}. {ask}")
    for words in stop_words_ids:
        if not isinstance(words, (list, tuple)) or not words:
            raise ValueError(f"Each of stop_words_ids must be a non-empty list of token ids, found {words!r}. {ask}")
        for token in words:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ValueError(f"stop_words_ids must hold token ids, found {token!r} in {words!r}. {ask}")


class StopWordsLogitsProcessor(LogitsProcessor):
    """
    Forces `eos_token_id` as the next token of every sequence that has just ended in one of `stop_words_ids`.

    Args:
        stop_words_ids: lists of token ids.
        eos_token_id: the token to force.
        prompt_length: tokens of the prompt; a stop word counts only where all of it lies behind them. None: the
            `generate` of a Qwen model fills it in, elsewhere the whole sequence counts.

    Raises ValueError if `stop_words_ids` is not a non-empty list of non-empty lists of ids, or `eos_token_id` is None.

    Example:
        >>> stop = StopWordsLogitsProcessor([tokenizer.encode("Observation:")], tokenizer.eod_id)
        >>> model.generate(ids, logits_processor=[stop])
    """

    def __init__(self, stop_words_ids: list[list[int]], eos_token_id: int, *, prompt_length: int | None = None):
        check_stop_words_ids(stop_words_ids)
        if not isinstance(eos_token_id, int) or eos_token_id < 0:
            raise ValueError(
                f"Stop words need eos_token_id, the token id that ends a sequence, found {eos_token_id!r}. "
                f"Pass eos_token_id, or set model.generation_config.eos_token_id."
            )
        self.stop_words_ids = [list(words) for words in stop_words_ids]
        self.eos_token_id = eos_token_id
        self.prompt_length = prompt_length
        self._on_device: list[torch.Tensor] = []

    def behind(self, prompt_length: int) -> StopWordsLogitsProcessor:
        """A copy for generation behind a prompt of this length, unless it was made for another."""
        other = copy.copy(self)
        other.prompt_length = prompt_length if self.prompt_length is None else self.prompt_length
        return other

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids: (B, T) so far; scores: (B, vocab) of the next token. Returns the scores to use."""
        if not self._on_device or self._on_device[0].device != input_ids.device:
            # Once: a copy a step would have the host wait for the device.
            self._on_device = [torch.tensor(words, device=input_ids.device) for words in self.stop_words_ids]
        generated = input_ids[:, self.prompt_length or 0 :]
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for words in self._on_device:
            if generated.shape[1] >= len(words):
                ended |= (generated[:, -len(words) :] == words).all(-1)
        only_eos = torch.full_like(scores, -float("inf"))
        only_eos[:, self.eos_token_id] = 0
        return torch.where(ended[:, None], only_eos, scores)


def check_stop(stop) -> list[str]:
    """`stop` as a list; ValueError unless it is a non-empty text or a list of them."""
    texts = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, (list, tuple)) else [None]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(
            f"stop must be a text or a list of texts, none of them empty, found {stop!r}. Token ids are for "
            f"stop_words_ids."
        )
    return texts


class TextStream:
    """
    The answer that a model is giving: the text of tokens that come one at a time, never ending in half a character.

    Args:
        tokenizer: a QWenTokenizer.
        stop_ids: token ids that end the text and are not part of it.
        stop: texts that end it and are not part of it; what may be the beginning of one is not shown yet.

    Example:
        >>> stream = TextStream(tokenizer, stop_ids={tokenizer.im_end_id})
        >>> for token in tokenizer.encode("你好"):
        ...     stream.put(token)
        >>> stream.finish()
        '你好'
    """

    def __init__(self, tokenizer, stop_ids=(), stop=()):
        self._decoded = tokenizer.decode_stream()
        self._stop_ids = frozenset(stop_ids)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._text = ""
        self.ended = False

    def put(self, token: int) -> bool:
        """Take the next token id; False from the one on that ends the text."""
        if not self.ended:
            self.ended = token in self._stop_ids
        if not self.ended:
            self._add(self._decoded.put(token))
        return not self.ended

    def _add(self, piece: str) -> None:
        begin = max(0, len(self._text) + 1 - self._longest)
        self._text += piece
        found = [at for at in (self._text.find(stop, begin) for stop in self._stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.ended = True

    @property
    def text(self) -> str:
        """The text so far without surrounding white space; what may yet change is held back."""
        held = 0
        if not self.ended:
            for length in range(1, min(self._longest, len(self._text) + 1)):
                if any(stop.startswith(self._text[-length:]) for stop in self._stop):
                    held = length
        return self._text[: len(self._text) - held].strip()

    def finish(self) -> str:
        """The whole text; an incomplete last character is shown as the tokenizer's `errors` says."""
        self._add(self._decoded.finish())
        self.ended = True
        return self.text


class StopAtText(StoppingCriteria):
    """
    Ends every sequence whose generated text has just come to contain one of the texts `stop`.

    It looks at the new tokens, several where drafts are accepted, and at as many before them as the longest of the
    texts may have. So it costs the same at every step.

    Args:
        tokenizer: a QWenTokenizer.
        stop: texts.
        prompt_length: tokens of the prompt, which are not looked at.
    """

    def __init__(self, tokenizer, stop: Sequence[str], prompt_length: int):
        self._tokenizer = tokenizer
        self._stop = check_stop(list(stop))
        self._prompt_length = prompt_length
        self._longest = max(len(text.encode("utf-8")) for text in self._stop)
        self._seen = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        """input_ids: (B, T). Returns bool (B,), whether a row has ended."""
        length = input_ids.shape[1]
        seen = self._seen if self._seen < length else self._prompt_length  # else this is another generation
        self._seen = length
        tails = input_ids[:, max(self._prompt_length, seen - self._longest) :].tolist()
        texts = [self._tokenizer.decode(tail, errors="replace") for tail in tails]
        ended = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


class _TokenQueue(BaseStreamer, StoppingCriteria):
    """Hands generated tokens to another thread, and stops the generation when that thread asks for it."""

    _AHEAD = 16  # tokens computed before they are asked for: who stops asking soon stops the computation

    def __init__(self):
        self.items: queue.Queue = queue.Queue()
        self.stop = threading.Event()
        self._places = threading.Semaphore(self._AHEAD)
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for token in value.reshape(-1).tolist():
                while not self.stop.is_set() and not self._places.acquire(timeout=0.1):
                    pass
                self.items.put(token)
        self._prompt_seen = True  # `generate` puts the prompt first

    def get(self):
        item = self.items.get()
        self._places.release()
        return item

    def end(self) -> None:
        pass  # the thread that generates says when it is through, also after an error

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_generate(model, input_ids: torch.LongTensor, **kwargs) -> Iterator[int]:
    """
    `model.generate(input_ids, **kwargs)` as an iterator of the new token ids.

    input_ids: int64 (1, T). The computation runs in a thread of its own. Closing the iterator stops it at the next
    token and waits for its end; an error in it is raised here, with its traceback.

    Raises ValueError for more than one sequence.
    """
    if input_ids.shape[0] != 1:
        raise ValueError(f"Only one sequence can be streamed, found a batch of {input_ids.shape[0]}.")
    tokens = _TokenQueue()
    done = object()
    criteria = [*(kwargs.pop("stopping_criteria", None) or []), tokens]

    def work() -> None:
        result = done
        try:
            model.generate(input_ids, streamer=tokens, stopping_criteria=criteria, **kwargs)
        except BaseException as error:  # noqa: BLE001 (handed to the caller, whatever it is)
            result = error
        tokens.items.put(result)

    def iterate() -> Iterator[int]:
        worker = threading.Thread(target=work, name="qwen-generate", daemon=True)
        worker.start()
        try:
            while True:
                item = tokens.get()
                if item is done:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            tokens.stop.set()
            worker.join()

    return iterate()
