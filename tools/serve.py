"""
`transformers serve` for a checkpoint with this code: an HTTP server with OpenAI's interface.

    python tools/serve.py CHECKPOINT --host 127.0.0.1 --port 8000 [--api-auth USER:PASSWORD]

CHECKPOINT is a folder or a repository of the hub. Every option of `transformers serve` may follow, and those of the
published openai_api.py: -c/--checkpoint-path, --server-name, --server-port, --cpu-only, --disable-gc (there is no such
collection here) and --api-auth, after which every request but /health must name the user and the password, as HTTP's
basic authentication does; `OpenAI(api_key=base64 of USER:PASSWORD)` works, too. Without TLS both can be read on the
way.

Clients may name the model as it was named here, by its full path, or by its last part; /v1/models lists these names. It
needs `pip install transformers[serving]`, and adds, in its own process, what `transformers serve` (read in 5.23) lacks
for such a checkpoint:

- The model's class is looked for among transformers' own, although there is an option --trust-remote-code.
- `tokenizer.tokenizer` is taken for the tokenizer of a processor, and its Rust form for streaming.
- Answers end only where generation_config.json says, which for the published chat models is not `<|im_end|>`.
- `stop` reads a vocabulary of texts, ours is one of bytes; and the stop text stays in the answer.
- Tools: `tools` and `functions` of /v1/chat/completions are put into the published ReAct prompt, and what the model
  writes is read back, with and without `stream`.
- The published fields `top_k` and `max_length`; a temperature below 0.01 is the likeliest token, another one samples.
- What can't be served is an error with a text, an object as OpenAI's interface has it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hmac
import importlib
import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from typing import AsyncIterator

from checkpoint_files import Problem, check_loadable
from export_fast_tokenizer import tokenizer_json
from openai_interface import (
    ROLES,
    BadRequest,
    PlainAnswer,
    ToolAnswer,
    Until,
    check_fields,
    check_messages,
    error_object,
    plain_text,
    responses,
    token_biases,
)
from tokenizers import Tokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

USAGE = "usage: python tools/serve.py CHECKPOINT [--port 8000] [--api-auth USER:PASSWORD] [options]; --help says more"


class GenerationFailed(Exception):
    """The model did not come to the end of an answer."""


class Requests:
    """
    Middleware of ASGI: lets in who may, lists the models, and checks what is asked.

    The endpoints of `answering` get a request as it was, others the one name for the model that transformers knows.
    """

    OURS = ("/v1/chat/completions", "/v1/completions")

    def __init__(self, app, path: str, names: list[str], credentials: bytes | None = None):
        self.app, self.path, self.names, self.credentials = app, path, names, credentials
        self.started = int(time.time())

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            try:
                self.let_in(scope)
                listed = self.listed(scope)
                if listed is not None:
                    await responses().JSONResponse(listed)(scope, receive, send)
                    return
                if scope["method"] == "POST" and (scope["path"].startswith("/v1/") or scope["path"] == "/load_model"):
                    scope, receive = await self.checked(scope, receive)
            except BadRequest as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def let_in(self, scope) -> None:
        if self.credentials is None or scope["path"] == "/health":
            return
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() not in (b"basic", b"bearer") or not hmac.compare_digest(given.strip(), self.credentials):
            text = "This server asks for a user and a password, by HTTP's basic authentication."
            raise BadRequest(text, 401, "invalid_api_key", {"WWW-Authenticate": "Basic"})

    def listed(self, scope) -> dict | None:
        """The answer to a question for models, None for another request."""
        begin, _, name = scope["path"].partition("/v1/models")
        if begin or scope["method"] != "GET" or (name and name[0] != "/"):
            return None
        about = {"object": "model", "created": self.started, "owned_by": ""}
        if not name:
            return {"object": "list", "data": [{"id": name, **about} for name in self.names]}
        return {"id": self.known(name[1:]), **about}

    def known(self, name) -> str:
        if re.sub("@main$", "", str(name)) not in self.names:
            text = f"There is no model {name!r} here; there is {' or '.join(self.names)}."
            raise BadRequest(text, 404, "model_not_found")
        return name

    async def checked(self, scope, receive):
        """The same request for the application, in our words; BadRequest if something is wrong with it."""
        parts = []
        while (message := await receive())["type"] == "http.request":
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        request = None
        with contextlib.suppress(ValueError, RecursionError):
            request = json.loads(b"".join(parts))
        if not isinstance(request, dict):
            raise BadRequest("The request must be a JSON object.")
        request["model"] = self.known(request.get("model", self.path))
        if scope["path"] in self.OURS:
            check_fields(request)
        else:
            request["model"] = self.path
        if scope["path"] == "/v1/chat/completions":
            check_messages(request.get("messages"))
        body = json.dumps(request).encode()
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        messages = iter([{"type": "http.request", "body": body}])

        async def replay():
            return next(messages, None) or await receive()

        return {**scope, "headers": [*headers, (b"content-length", b"%d" % len(body))]}, replay


def is_published(body: dict) -> bool:
    """Whether a request offers `functions`, as the published server has them, and not `tools`."""
    return body.get("functions") is not None


def offered_tools(body: dict) -> list:
    """The tools that the model may call; BadRequest if it is to be made to call one."""
    legacy = is_published(body)
    choice = body.get("function_call" if legacy else "tool_choice") or "auto"
    if choice not in ("auto", "none"):
        raise BadRequest(f"A model can't be made to call a tool: choose auto or none, found {choice!r}.")
    return (body.get("functions" if legacy else "tools") or []) if choice == "auto" else []


def reader_of_chats(make_tool_context, parse_react, observation: str):
    def read(body: dict, model, tokenizer):
        """The ids of the prompt, a list; more texts that end the answer; what reads it."""
        messages = [
            {**message, "role": ROLES[message["role"]], "content": plain_text(message.get("content"))}
            for message in body["messages"]
        ]
        tools = offered_tools(body)
        called = any(
            message.get("tool_calls") or message.get("function_call") or message["role"] in ("tool", "function")
            for message in messages
        )
        try:
            if not tools and not called:
                encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
                return list(encoded["input_ids"]), [], PlainAnswer()
            window = getattr(model.generation_config, "max_window_size", None) or 6144
            _, tokens = make_tool_context(tokenizer, messages, tools, max_window_size=window)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadRequest(f"The messages or tools can't be read: {error}") from None
        return tokens, [observation], ToolAnswer(parse_react)

    return read


def read_completion(body: dict, model, tokenizer):
    """As `reader_of_chats` has it, for a prompt that is one text, or a list of one."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:  # LangChain sends it so
        (prompt,) = prompt
    if not isinstance(prompt, str) or not prompt:
        raise BadRequest(f"prompt must be one text with at least one character, found {str(prompt)[:80]!r}.")
    return tokenizer(prompt)["input_ids"], [], PlainAnswer()


def generation_config(handler, body: dict, model, length: int, batching: bool):
    """The settings of `generate` for a request whose prompt has `length` tokens."""
    ours = {"stop": None, "temperature": None, "logit_bias": None}
    try:
        config = handler._build_generation_config({**body, **ours}, model.generation_config, use_cb=batching)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"generation_config can't be read: {error}") from None
    for name in ("num_beams", "num_return_sequences"):
        if getattr(config, name) not in (None, 1):
            raise BadRequest(f"{name} must be 1, found {getattr(config, name)!r}: an answer is sent as it grows.")
    biases = token_biases(body.get("logit_bias"), model.config.vocab_size)
    if biases:
        config.sequence_bias = biases
    temperature = body.get("temperature")
    if temperature is not None:
        config.do_sample = temperature >= 0.01  # the published server takes less for greedy decoding
        if config.do_sample:
            config.temperature = float(temperature)
    if body.get("top_k") is not None:
        config.top_k = body["top_k"]
    if body.get("max_length") is not None:
        if body["max_length"] <= length:
            raise BadRequest(f"The prompt has {length} tokens, and max_length={body['max_length']} leaves none.")
        config.max_new_tokens = body["max_length"] - length
    return config


def answering(path: str, chat: bool, read, check_stop):
    """The method of transformers' handler that answers a request, for chats or for completions of a text."""

    async def handle(self, body: dict, request_id: str):
        self._validate_request(body)
        try:
            stop = [] if body.get("stop") is None else check_stop(body["stop"])
        except ValueError as error:
            raise BadRequest(str(error)) from None
        model_id, model, tokenizer = self._resolve_model({**body, "model": path})
        tokens, stop_too, reader = read(body, model, tokenizer)
        modality = self.model_manager.get_model_modality(model, processor=tokenizer)
        batching = self.generation_state.use_continuous_batching(model, modality)
        manager = self.generation_state.get_manager(model_id, use_cb=batching)
        config = generation_config(self, body, model, len(tokens), batching)
        inputs = {"input_ids": tokens}
        if batching:
            manager.init_cb(model, config)
        else:
            torch = importlib.import_module("torch")
            ids = torch.tensor([tokens], device=model.device)  # (1, T)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        queue, streamer = manager.generate_streaming(model, tokenizer, inputs, config, request_id=request_id)

        def head(kind: str, message: str, part: dict, reason: str | None) -> dict:
            about = {"id": request_id, "object": kind, "created": int(time.time()), "model": body["model"]}
            said = {message: part} if chat else {"text": part.get("content", ""), "logprobs": None}
            return {**about, "choices": [{"index": 0, **said, "finish_reason": reason}]}

        def call_fields(call: dict) -> dict:
            if is_published(body):
                return {"function_call": call}
            return {"tool_calls": [{"index": 0, "id": f"{request_id}_0", "type": "function", "function": call}]}

        def ending(call: dict | None, is_whole: bool) -> dict:
            reason = "stop"
            if call:
                reason = "function_call" if is_published(body) else "tool_calls"
            elif not is_whole and streamer.total_tokens >= (config.max_new_tokens or float("inf")):
                reason = "length"
            usage = {"prompt_tokens": len(tokens), "completion_tokens": streamer.total_tokens}
            return {"finish_reason": reason, "usage": {**usage, "total_tokens": sum(usage.values())}}

        async def parts() -> AsyncIterator[dict]:
            """The fields of a message as they come, in the end those of `ending`."""
            if chat:
                yield {"role": "assistant", "content": ""}
            until = Until([*stop, *stop_too])
            while not until.ended and (piece := await queue.get()) is not None:
                if not isinstance(piece, str):
                    raise GenerationFailed(getattr(piece, "msg", str(piece)))
                if shown := reader.feed(until.feed(piece)):
                    yield {"content": shown}
            if until.ended:
                streamer.cancel()
            shown = reader.feed(until.finish())
            rest, call = reader.finish()
            if shown or rest or call:
                yield {"content": shown + rest, **(call_fields(call) if call else {})}
            yield ending(call, is_whole=until.ended)

        async def stream() -> AsyncIterator[str]:
            kind = "chat.completion.chunk" if chat else "text_completion"
            try:
                async for part in parts():
                    reason, usage = part.pop("finish_reason", None), part.pop("usage", None)
                    chunk = head(kind, "delta", part, reason)
                    yield f"data: {json.dumps({**chunk, 'usage': usage} if usage else chunk)}\n\n"
                yield "data: [DONE]\n\n"
            except (GeneratorExit, asyncio.CancelledError):  # nobody reads on
                streamer.cancel()
                raise
            except GenerationFailed as error:
                yield f"data: {json.dumps(error_object(str(error), 500))}\n\n"

        if body.get("stream"):
            return responses().StreamingResponse(stream(), media_type="text/event-stream")
        message: dict = {"content": ""}
        async for part in parts():
            if "usage" in part:
                end = part
            else:
                message = {**message, **part, "content": message["content"] + part["content"]}
        done = head("chat.completion" if chat else "text_completion", "message", message, end["finish_reason"])
        return responses().JSONResponse({**done, "usage": end["usage"]})

    return handle


def reading(handle):
    """A method of transformers' handler that answers a request: what it can't read in one is the sender's fault."""

    async def answer(self, *request):
        try:
            return await handle(self, *request)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadRequest(f"The request can't be read: {type(error).__name__}: {error}") from error

    return answer


async def as_error(request, error):
    """The response to an exception, an object as OpenAI's interface has it."""
    if isinstance(error, BadRequest):
        return error.response()
    status = getattr(error, "status_code", 500)
    content = error_object(str(getattr(error, "detail", error)), status)
    return responses().JSONResponse(content, status_code=status, headers=getattr(error, "headers", None))


def prepare(path: str, names: list[str], credentials: bytes | None = None) -> None:
    """Give transformers, in this process, what it lacks for the checkpoint."""

    def ours(name: str, module: str = "qwen_generation_utils"):
        return get_class_from_dynamic_module(f"{module}.{name}", path)

    # A name bound by `import transformers` may be another object: the module replaces itself by a lazy one.
    sys.modules["transformers"].QWenLMHeadModel = ours("QWenLMHeadModel", "modeling_qwen")
    tokenizer_class = ours("QWenTokenizer", "tokenization_qwen")
    make_index = tokenizer_class._index_vocabulary

    def with_rust_form(tokenizer) -> None:
        make_index(tokenizer)
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))

    tokenizer_class._index_vocabulary = with_rust_form
    # The vocabulary still puts its Encoding there, under the published name.
    tokenizer_class.tokenizer = property(lambda tokenizer: tokenizer, lambda *encoding: None)

    server = importlib.import_module("transformers.cli.serving.server")
    manager = importlib.import_module("transformers.cli.serving.model_manager").ModelManager
    build_server, load = server.build_server, manager.load_model_and_processor
    stop_words = ours("get_stop_words_ids")

    def build_with_checks(*args, **kwargs):
        app = build_server(*args, **kwargs)
        middleware = importlib.import_module("starlette.middleware").Middleware
        # Innermost: what CORS adds, it adds to our answers, too.
        app.user_middleware.append(middleware(Requests, path=path, names=names, credentials=credentials))
        for kind in (importlib.import_module("starlette.exceptions").HTTPException, BadRequest, GenerationFailed):
            app.add_exception_handler(kind, as_error)
        app.add_exception_handler(Exception, as_error)
        return app

    def load_with_ends(self, *args, **kwargs):
        model, tokenizer = load(self, *args, **kwargs)
        config = model.generation_config
        if getattr(config, "chat_format", None) == "chatml":
            ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            ends = [*ends, *(words[0] for words in stop_words("chatml", tokenizer))]
            config.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
        return model, tokenizer

    server.build_server = build_with_checks
    manager.load_model_and_processor = load_with_ends
    read_chat = reader_of_chats(
        ours("make_tool_context"), ours("parse_react"), sys.modules[stop_words.__module__].OBSERVATION
    )
    for module, name, read in (
        ("chat_completion", "ChatCompletionHandler", read_chat),
        ("completion", "CompletionHandler", read_completion),
    ):
        handler = getattr(importlib.import_module(f"transformers.cli.serving.{module}"), name)
        handler.handle_request = answering(path, read is read_chat, read, ours("check_stop"))
        fields = handler._valid_params_class.__mutable_keys__ | {"top_k", "max_length"}
        handler._valid_params_class = type("Fields", (), {"__mutable_keys__": fields})
        handler._unused_fields = handler._unused_fields - {"functions", "function_call", "tool_choice"}
    for module, name in (("response", "ResponseHandler"), ("transcription", "TranscriptionHandler")):
        handler = getattr(importlib.import_module(f"transformers.cli.serving.{module}"), name)
        handler.handle_request = reading(handler.handle_request)


def read_arguments(given: list[str]) -> tuple[str | None, list[str], bytes | None]:
    """
    The checkpoint, the arguments of `transformers serve`, and what a request must bring in base 64, or None.

    Raises ValueError for credentials without a colon.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--checkpoint-path")
    for name in ("--server-name", "--server-port", "--api-auth"):
        parser.add_argument(name)
    for name in ("--cpu-only", "--disable-gc"):
        parser.add_argument(name, action="store_true")
    first = [argument for argument in given[:1] if not argument.startswith("-")]
    options, rest = parser.parse_known_args(given[len(first) :])
    for name, value in (("--host", options.server_name), ("--port", options.server_port)):
        rest += [name, value] if value is not None else []
    rest += ["--device", "cpu"] if options.cpu_only else []
    credentials = None
    if options.api_auth is not None:
        if not options.api_auth.partition(":")[0] or ":" not in options.api_auth:
            raise ValueError("--api-auth must be USER:PASSWORD.")
        credentials = base64.b64encode(options.api_auth.encode())
    return first[0] if first else options.checkpoint_path, rest, credentials


def main() -> None:
    try:
        given, arguments, credentials = read_arguments(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
    if given is None:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(USAGE, __doc__ or "", sep="\n")  # python -OO leaves the docstring out
            return
        sys.exit(USAGE)
    if importlib.util.find_spec("transformers.cli") is None:
        sys.exit("This needs transformers 5: the release here has no command `transformers serve`.")
    if importlib.util.find_spec("transformers.cli.serving") is None:
        sys.exit("This needs a newer transformers: the release here has no server for one checkpoint.")
    missing = [name for name in ("fastapi", "openai", "pydantic", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'Not installed: {", ".join(missing)}. Type: pip install "transformers[serving]"')
    try:
        check_loadable(given)
    except Problem as problem:
        sys.exit(str(problem))
    path = str(Path(given).resolve()) if Path(given).is_dir() else given
    prepare(path, list(dict.fromkeys([given, path, Path(path).name])), credentials)
    sys.argv = ["transformers", "serve", path, "--trust-remote-code", *arguments]
    sys.exit(importlib.import_module("transformers.cli.transformers").main())


if __name__ == "__main__":
    main()
