"""
`transformers serve` for a checkpoint with this code: an HTTP server with OpenAI's interface.

    python tools/serve.py CHECKPOINT --host 127.0.0.1 --port 8000    every option of `transformers serve`

CHECKPOINT is a folder or a repository of the hub. Clients may name the model as it was named here, by its full path, or
by its last part; /v1/models lists these names. It needs `pip install transformers[serving]`, and adds, in its own
process, what `transformers serve` (read in 5.23) lacks for such a checkpoint:

- The model's class is looked for among transformers' own, although there is an option --trust-remote-code.
- `tokenizer.tokenizer` is taken for the tokenizer of a processor, and its Rust form for streaming.
- Answers end only where generation_config.json says, which for the published chat models is not `<|im_end|>`.
- Tools: `tools` and `functions` of /v1/chat/completions are put into the published ReAct prompt, and what the model
  writes is read back, with and without `stream`.
- A model that is not here is 404, messages that can't be read are 400, each with a text.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from typing import AsyncIterator

from export_fast_tokenizer import tokenizer_json
from tokenizers import Tokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module


class BadRequest(Exception):
    """What is wrong with a request, in words for its sender."""

    def __init__(self, text: str, status: int = 400):
        super().__init__(text)
        self.status = status

    def response(self):
        kind = {"type": "invalid_request_error", "param": None, "code": None}
        return responses().JSONResponse({"error": {"message": str(self), **kind}}, status_code=self.status)


def responses():
    return importlib.import_module("starlette.responses")


class Requests:
    """Middleware of ASGI: checks requests, and gives the model the one name that the server knows."""

    def __init__(self, app, path: str, names: list[str]):
        self.app, self.path, self.names, self.started = app, path, names, int(time.time())

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or not (scope["path"].startswith("/v1/") or scope["path"] == "/load_model"):
            await self.app(scope, receive, send)
        elif scope["path"] == "/v1/models":
            models = [{"id": name, "object": "model", "created": self.started, "owned_by": ""} for name in self.names]
            await responses().JSONResponse({"object": "list", "data": models})(scope, receive, send)
        else:
            body = b""
            while (message := await receive())["type"] == "http.request":
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
            try:
                body = self.checked(scope["path"], body)
            except BadRequest as error:
                await error.response()(scope, receive, send)
                return
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", b"%d" % len(body))]}
            messages = iter([{"type": "http.request", "body": body}])

            async def replay():
                return next(messages, None) or await receive()

            await self.app(scope, replay, send)

    def checked(self, path: str, body: bytes) -> bytes:
        try:
            request = json.loads(body)
        except ValueError:
            request = None
        if not isinstance(request, dict):
            raise BadRequest("The request must be a JSON object.")
        asked = request.get("model", self.path)
        if re.sub("@main$", "", str(asked)) not in self.names:
            raise BadRequest(f"There is no model {asked!r} here; there is {' or '.join(self.names)}.", status=404)
        request["model"] = self.path
        if path == "/v1/chat/completions":
            check_messages(request.get("messages"))
        return json.dumps(request).encode()


def check_messages(messages) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"messages must be a list with at least one message, found {str(messages)[:80]}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"A message must be an object with a role and a content, found {str(message)[:80]}.")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise BadRequest(f"A content must be a text, or parts of the type text, found {str(content)[:80]}.")


def uses_tools(body: dict) -> bool:
    return bool(body.get("tools") or body.get("functions")) or any(
        message.get("tool_calls") or message.get("function_call") or message["role"] in ("tool", "function")
        for message in body["messages"]
    )


class ToolAnswer:
    """
    What a model writes behind a prompt with tools, while it comes: the final answer, or a call in the end.

    An answer is shown as soon as it is certain to be one, and never more than `Observation:` leaves of it.
    """

    def __init__(self, parse, end: str):
        self._parse, self._end = parse, end
        self._text = self._shown = ""

    def feed(self, piece: str) -> str:
        """Take more of the text; returns what is to be shown of it."""
        self._text += piece
        final = re.search(r"^\s*Final Answer\s*:", self._text, re.MULTILINE)
        if final is None or re.search(r"^\s*Action\s*:", self._text[: final.start()], re.MULTILINE):
            return ""
        answer = self._text[final.end() :].split(self._end)[0].lstrip()
        held = next((n for n in range(len(self._end), 0, -1) if answer.endswith(self._end[:n])), 0)
        return self._show(answer[: len(answer) - held].rstrip())

    def _show(self, answer: str) -> str:
        new, self._shown = answer[len(self._shown) :], answer
        return new

    @property
    def ended(self) -> bool:
        return self._end in self._text

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


def with_tools(make_tool_context, parse_react, observation: str):
    """The method that answers a request of the chat handler if that has to do with tools."""

    async def handle(self, body: dict, request_id: str):
        self._validate_request(body)
        legacy = "functions" in body
        tools = body.get("functions" if legacy else "tools") or []
        choice = body.get("function_call" if legacy else "tool_choice") or "auto"
        if choice not in ("auto", "none"):
            raise BadRequest(f"A model can't be made to call a tool: choose auto or none, found {choice!r}.")
        model_id, model, tokenizer = self._resolve_model(body)
        window = getattr(model.generation_config, "max_window_size", None) or 6144
        messages = [{**message, "content": plain_text(message.get("content"))} for message in body["messages"]]
        try:
            _, tokens = make_tool_context(
                tokenizer, messages, tools if choice == "auto" else [], max_window_size=window
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequest(f"The messages or tools can't be read: {error}") from None
        modality = self.model_manager.get_model_modality(model, processor=tokenizer)
        batching = self.generation_state.use_continuous_batching(model, modality)
        manager = self.generation_state.get_manager(model_id, use_cb=batching)
        config = self._build_generation_config(body, model.generation_config, use_cb=batching)
        inputs = {"input_ids": tokens}
        if batching:
            manager.init_cb(model, config)
        else:
            torch = importlib.import_module("torch")
            ids = torch.tensor([tokens], device=model.device)  # (1, T)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        queue, streamer = manager.generate_streaming(model, tokenizer, inputs, config, request_id=request_id)

        def head(kind: str, **choice) -> dict:
            about = {"id": request_id, "object": kind, "created": int(time.time()), "model": model_id}
            return {**about, "choices": [{"index": 0, **choice}]}

        def call_fields(call: dict) -> dict:
            if legacy:
                return {"function_call": call}
            return {"tool_calls": [{"index": 0, "id": f"{request_id}_0", "type": "function", "function": call}]}

        def ending(call: dict | None) -> dict:
            reason = ("function_call" if legacy else "tool_calls") if call else "stop"
            if call is None and config.max_new_tokens is not None and streamer.total_tokens >= config.max_new_tokens:
                reason = "length"
            usage = {"prompt_tokens": len(tokens), "completion_tokens": streamer.total_tokens}
            return {"finish_reason": reason, "usage": {**usage, "total_tokens": sum(usage.values())}}

        async def parts() -> AsyncIterator[dict]:
            """The fields of a message as they come, in the end those of `ending`."""
            answer = ToolAnswer(parse_react, observation)
            while not answer.ended and (piece := await queue.get()) is not None:
                if not isinstance(piece, str):
                    raise RuntimeError(getattr(piece, "msg", str(piece)))
                if shown := answer.feed(piece):
                    yield {"content": shown}
            if answer.ended:
                streamer.cancel()
            shown, call = answer.finish()
            yield {"content": shown, **(call_fields(call) if call else {})}
            yield ending(call)

        async def stream() -> AsyncIterator[str]:
            delta: dict = {"role": "assistant"}
            try:
                async for part in parts():
                    reason, usage = part.pop("finish_reason", None), part.pop("usage", None)
                    chunk = head("chat.completion.chunk", delta={**delta, **part}, finish_reason=reason)
                    yield f"data: {json.dumps({**chunk, 'usage': usage})}\n\n"
                    delta = {}
                yield "data: [DONE]\n\n"
            except (GeneratorExit, asyncio.CancelledError):  # nobody reads on
                streamer.cancel()
                raise
            except RuntimeError as error:
                yield f"data: {json.dumps({'error': {'message': str(error)}})}\n\n"

        if body.get("stream"):
            return responses().StreamingResponse(stream(), media_type="text/event-stream")
        message: dict = {"role": "assistant", "content": ""}
        async for part in parts():
            if "usage" in part:
                end = part
            else:
                message = {**message, **part, "content": message["content"] + part["content"]}
        done = head("chat.completion", message=message, finish_reason=end["finish_reason"])
        return responses().JSONResponse({**done, "usage": end["usage"]})

    return handle


def plain_text(content) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def prepare(path: str, names: list[str]) -> None:
    """Give transformers, in this process, what it lacks for the checkpoint."""

    def ours(module: str, name: str):
        return get_class_from_dynamic_module(f"{module}.{name}", path)

    # A name bound by `import transformers` may be another object: the module replaces itself by a lazy one.
    sys.modules["transformers"].QWenLMHeadModel = ours("modeling_qwen", "QWenLMHeadModel")
    tokenizer_class = ours("tokenization_qwen", "QWenTokenizer")
    make_index = tokenizer_class._index_vocabulary

    def with_rust_form(tokenizer) -> None:
        make_index(tokenizer)
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))

    tokenizer_class._index_vocabulary = with_rust_form
    # The vocabulary still puts its Encoding there, under the published name.
    tokenizer_class.tokenizer = property(lambda tokenizer: tokenizer, lambda *encoding: None)

    server = importlib.import_module("transformers.cli.serving.server")
    manager = importlib.import_module("transformers.cli.serving.model_manager").ModelManager
    handler = importlib.import_module("transformers.cli.serving.chat_completion").ChatCompletionHandler
    build_server, load, handle = server.build_server, manager.load_model_and_processor, handler.handle_request
    stop_words = ours("qwen_generation_utils", "get_stop_words_ids")
    tools = with_tools(
        *(ours("qwen_generation_utils", name) for name in ("make_tool_context", "parse_react")),
        sys.modules[stop_words.__module__].OBSERVATION,
    )

    def build_with_checks(*args, **kwargs):
        app = build_server(*args, **kwargs)
        app.add_middleware(Requests, path=path, names=names)
        return app

    def load_with_ends(self, *args, **kwargs):
        model, tokenizer = load(self, *args, **kwargs)
        config = model.generation_config
        if getattr(config, "chat_format", None) == "chatml":
            ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            ends = [*ends, *(words[0] for words in stop_words("chatml", tokenizer))]
            config.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
        return model, tokenizer

    async def handle_tools_too(self, body: dict, request_id: str):
        try:
            return await (tools if uses_tools(body) else handle)(self, body, request_id)
        except BadRequest as error:
            return error.response()

    server.build_server = build_with_checks
    manager.load_model_and_processor = load_with_ends
    handler.handle_request = handle_tools_too


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    if importlib.util.find_spec("transformers.cli") is None:
        sys.exit("This needs transformers 5: the release here has no command `transformers serve`.")
    if importlib.util.find_spec("transformers.cli.serving") is None:
        sys.exit("This needs a newer transformers: the release here has no server for one checkpoint.")
    given = arguments[0]
    path = str(Path(given).resolve()) if Path(given).is_dir() else given
    prepare(path, list(dict.fromkeys([given, path, Path(path).name])))
    sys.argv = ["transformers", "serve", path, "--trust-remote-code", *arguments[1:]]
    sys.exit(importlib.import_module("transformers.cli.transformers").main())


if __name__ == "__main__":
    main()
