"""
`chat` and `chat_stream`: conversations on top of `generate`, and the cache that a conversation keeps.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import torch

from .qwen_generation_utils import (
    StopAtText,
    TextStream,
    check_stop,
    check_stop_words_ids,
    get_stop_words_ids,
    make_context,
    stream_generate,
)
from .transformers_compat import DynamicCache, accepts_cache, crop_cache, input_device, resolved_settings


class QWenChatMixin:
    """Chat for a model that has `generate`."""

    @accepts_cache
    def chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        system: str = "You are a helpful assistant.",
        stop_words_ids: list | None = None,
        generation_config=None,
        *,
        stop: str | list[str] | None = None,
        past_key_values=None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """
        Answer `query` after `history`, a list of (query, response) pairs, which is not changed.

        Args:
            stop_words_ids: lists of token ids that end the answer; they stay part of it.
            stop: a text or texts that end the answer and are not part of it.
            past_key_values: the cache of this conversation's earlier turns. What it shares with the new prompt is not
                computed again; it is extended in place. Begin with None or an empty `DynamicCache`. Beam search neither
                uses nor changes it.
            return_past_key_values: return the cache too.
            generation_config, kwargs: as for `generate`; `max_window_size` is the largest prompt in tokens.

        Returns:
            The response, and a new history that ends with this turn; with `return_past_key_values` the cache besides.

        Raises:
            ValueError: the generation configuration is not that of a chat model, the question alone is longer
                than `max_window_size`, the stop words are not lists of ids or texts, or the cache can't be shortened.
            TypeError: the query is no text, or a text is in the place of the tokenizer.

        Example:
            >>> response, history = model.chat(tokenizer, "你好", history=None)
            >>> response, history = model.chat(tokenizer, "What is the capital of Iceland?", history=history)
        """
        if return_past_key_values and past_key_values is None:
            settings = resolved_settings(self, generation_config, kwargs.get("use_model_defaults"))
            kwargs = self._with_cache(settings, kwargs, kwargs.pop("cache_bits", None))
            past_key_values = kwargs.pop("past_key_values", None)
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
        turn = self._prepare_chat(
            tokenizer, query, history, system, stop_words_ids, generation_config, stop, past_key_values, kwargs
        )
        with turn.remembered() as new_tokens:
            output = self.generate(turn.input_ids, **turn.arguments())
            new_tokens += output[0, turn.input_ids.shape[1] :].tolist()
        stream = turn.text_stream()
        for token in new_tokens:
            if not stream.put(token):
                break
        response = stream.finish()
        history = [*(history or []), (query, response)]
        return (response, history, turn.cache) if return_past_key_values else (response, history)

    @accepts_cache
    def chat_stream(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        system: str = "You are a helpful assistant.",
        stop_words_ids: list | None = None,
        generation_config=None,
        *,
        stop: str | list[str] | None = None,
        past_key_values=None,
        **kwargs,
    ):
        """
        `chat` as a generator of the response so far; the last one is the whole response.

        The text never ends in half a character. Closing the generator stops the computation. Arguments and errors
        are those of `chat`, and errors in the arguments are raised at the call.

        Example:
            >>> for response in model.chat_stream(tokenizer, "你好", history=None):
            ...     print(response)
        """
        turn = self._prepare_chat(
            tokenizer, query, history, system, stop_words_ids, generation_config, stop, past_key_values, kwargs
        )
        if turn.beams > 1:
            raise ValueError("chat_stream can't stream beams, which are only chosen at the end; use chat.")
        if "streamer" in kwargs:
            raise ValueError("chat_stream is a stream itself; to use a streamer call model.generate.")

        def responses():
            text = turn.text_stream()
            shown = None
            tokens = stream_generate(self, turn.input_ids, **turn.arguments())
            with turn.remembered() as new_tokens, contextlib.closing(tokens):
                for token in tokens:
                    new_tokens.append(token)
                    text.put(token)
                    if text.text != shown:
                        shown = text.text
                        yield shown
            if text.finish() != shown:
                yield text.text

        return responses()

    def _prepare_chat(
        self, tokenizer, query, history, system, stop_words_ids, generation_config, stop, cache, kwargs
    ) -> _Turn:
        """Check the arguments of a chat, and bring them together as those of `generate`."""
        settings = self.generation_config if generation_config is None else generation_config

        def setting(name, default=None):
            value = kwargs.get(name, getattr(settings, name, None))
            return default if value is None else value

        if "stream" in kwargs:
            raise ValueError("chat has no argument stream; for the answer as it grows call chat_stream.")
        chat_format = getattr(settings, "chat_format", None)
        _check_chat_model(chat_format)
        if setting("num_return_sequences", 1) > 1:
            raise ValueError("chat gives one response; for several call model.generate with num_return_sequences.")
        if stop_words_ids is not None:
            check_stop_words_ids(stop_words_ids)
        max_window_size = setting("max_window_size", 6144)
        tokens = _prompt(tokenizer, query, history, system, max_window_size, self.config.seq_length)

        # The tokens that end a turn are ends of the sequence for `generate`; longer stop words need a processor.
        eos = setting("eos_token_id", [])
        ends = [words[0] for words in get_stop_words_ids(chat_format, tokenizer)]
        eos = list(dict.fromkeys([tokenizer.eod_id, *(eos if isinstance(eos, (list, tuple)) else [eos]), *ends]))
        ids = torch.tensor([tokens], device=input_device(self))  # (1, T)
        beams = setting("num_beams", 1)
        if cache is not None and beams == 1:
            alpha = None
            if self.config.use_dynamic_ntk:
                alpha = self.transformer.prompt_alpha(torch.tensor([len(tokens)]))
            keep_common_prefix(cache, tokens, alpha)
        kwargs = {key: value for key, value in kwargs.items() if key != "max_window_size"}
        if setting("stop_strings"):
            kwargs["tokenizer"] = tokenizer
        own = {
            "pad_token_id": setting("pad_token_id", tokenizer.eod_id),
            "eos_token_id": eos,
            "return_dict_in_generate": False,
        }
        if generation_config is not None:  # with keywords besides transformers warns: these are not the caller's
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**own)
            kwargs = {key: value for key, value in kwargs.items() if key not in own}
            own = {}
        return _Turn(
            tokenizer=tokenizer,
            input_ids=ids,
            ends=eos,
            stop=[] if stop is None else check_stop(stop),
            beams=beams,
            cache=cache,
            settings={
                "attention_mask": torch.ones_like(ids),
                **kwargs,
                **own,
                "generation_config": generation_config,
                "stop_words_ids": stop_words_ids,
            },
        )


def _check_chat_model(chat_format: str | None) -> None:
    """Raise ValueError unless the `chat_format` of a generation configuration is that of a chat model."""
    if chat_format == "chatml":
        return
    found = "names no chat_format" if chat_format is None else f"has chat_format={chat_format!r}"
    raise ValueError(
        f"chat needs a chat model, but the generation configuration {found}. For a base model call model.generate on "
        f"the encoded text. If these are the weights of a chat model, set model.generation_config.chat_format = "
        f"'chatml', or load the checkpoint's generation_config.json with GenerationConfig.from_pretrained."
    )


def _prompt(tokenizer, query: str, history, system: str, max_window_size: int, seq_length: int) -> list[int]:
    """The token ids of a chat's prompt; ValueError if system prompt and question alone exceed `max_window_size`."""
    _, shortest = make_context(tokenizer, query, None, system, max_window_size)
    if len(shortest) > max_window_size:
        raise ValueError(
            f"The system prompt and the question take {len(shortest)} tokens, more than "
            f"max_window_size={max_window_size}. Shorten them, or pass a larger max_window_size if the model's "
            f"context of {seq_length} tokens allows it."
        )
    return make_context(tokenizer, query, history, system, max_window_size)[1]


@dataclasses.dataclass
class _Turn:
    """One turn of a chat: its prompt, what ends its answer, the conversation's cache, the settings of `generate`."""

    tokenizer: object
    input_ids: torch.Tensor  # (1, T)
    ends: list
    stop: list
    beams: int
    cache: object
    settings: dict

    def arguments(self) -> dict:
        """Of `generate`."""
        arguments = dict(self.settings)
        if self.cache is not None and self.beams == 1:
            arguments["past_key_values"] = self.cache
        if self.stop and self.beams == 1:  # beams go on, and the text is cut in the end
            stop = StopAtText(self.tokenizer, self.stop, self.input_ids.shape[1])
            arguments["stopping_criteria"] = [*(arguments.get("stopping_criteria") or []), stop]
        return arguments

    def text_stream(self) -> TextStream:
        return TextStream(self.tokenizer, self.ends, self.stop)

    @contextlib.contextmanager
    def remembered(self):
        """
        Gives a list for the generated tokens; afterwards the cache remembers which tokens its keys are of.

        If the turn breaks off the cache is as it was before: some layers may have had a token more than others.
        """
        if self.cache is None or self.beams > 1:
            yield []
            return
        length, tokens, new_tokens = int(self.cache.get_seq_length()), self.input_ids[0].tolist(), []
        try:
            yield new_tokens
        except BaseException:
            crop_cache(self.cache, length)
            self.cache.token_ids = tokens[:length]
            raise
        self.cache.token_ids = (tokens + new_tokens)[: int(self.cache.get_seq_length())]


def keep_common_prefix(cache, tokens: list[int], alpha: torch.Tensor | None) -> None:
    """
    Shorten the cache of a conversation to what it shares with the prompt `tokens`, all of it but the last token.

    Nothing is shared if the prompt's NTK scale is another: its keys are rotated otherwise.

    Raises ValueError for a cache that holds keys of unknown tokens, or can't be shortened.
    """
    length = int(cache.get_seq_length())
    known = getattr(cache, "token_ids", [])[:length]  # what was shortened, or reset, knows its first tokens
    if len(known) != length:
        raise ValueError(
            f"past_key_values holds {length} tokens that chat has not seen. Pass the cache that an earlier turn of "
            f"this conversation has filled, or an empty one."
        )
    shared = 0
    if alpha is None or getattr(cache, "ntk_alpha", None) is None or bool((cache.ntk_alpha.cpu() == alpha).all()):
        limit = min(length, len(tokens) - 1)
        shared = next((i for i in range(limit) if known[i] != tokens[i]), limit)
    crop_cache(cache, shared)
    cache.token_ids = tokens[:shared]
