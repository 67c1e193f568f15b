"""The Qwen tokenizer: byte-level BPE by tiktoken behind the interface of transformers' tokenizers."""

from __future__ import annotations

import base64
import os
import re
import unicodedata

import tiktoken
from transformers import AddedToken
from transformers.utils import logging

from .transformers_compat import PreTrainedTokenizer

logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "qwen.tiktoken", "extra_vocab_file": "qwen_extra.tiktoken"}

PAT_STR = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDOFTEXT = "<|endoftext|>"
IMSTART = "<|im_start|>"
IMEND = "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IMSTART, IMEND, *(f"<|extra_{i}|>" for i in range(205)))
_TOKEN_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)

# ChatML, as `make_context` writes it. Like `chat`, it begins with a system prompt even when none is given.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
    """
    Read a `.tiktoken` file: one `base64(token bytes) rank` a line, ranks 0 to n - 1.

    Raises FileNotFoundError if there is no such file, and ValueError, with the line, for one that is truncated, not
    base64, repeats a token or a rank, or lacks a rank or one of the 256 single bytes.
    """
    ranks: dict[bytes, int] = {}
    for number, token, rank in _read_lines(path):
        if token in ranks:
            raise ValueError(f"{path}, line {number}: the token {token!r} is there already, with rank {ranks[token]}.")
        ranks[token] = rank
    by_rank = {rank: token for token, rank in ranks.items()}
    if len(by_rank) != len(ranks):
        seen: dict[int, bytes] = {}
        for token, rank in ranks.items():
            if rank in seen:
                raise ValueError(f"{path}: the rank {rank} is there twice, for {seen[rank]!r} and {token!r}.")
            seen[rank] = token
    if by_rank.keys() != set(range(len(ranks))):
        lacking = next(rank for rank in range(len(ranks)) if rank not in by_rank)
        raise ValueError(f"{path} lacks the rank {lacking}: the file is not complete. Copy it again.")
    lacking_bytes = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking_bytes:
        raise ValueError(f"{path} lacks the single byte {lacking_bytes[0]}: the file is not complete. Copy it again.")
    return ranks


def _read_lines(path: str):
    """Line number, token bytes and rank of every line of a vocabulary file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"There is no vocabulary file {path}. It comes with the checkpoint, as {VOCAB_FILES_NAMES['vocab_file']}."
        )
    with open(path, "rb") as file:
        for number, line in enumerate(file.read().splitlines(), start=1):
            if not line:
                continue
            fields = line.split()
            try:
                encoded, rank = fields
                token, rank = base64.b64decode(encoded, validate=True), int(rank)
            except ValueError:
                raise ValueError(
                    f"{path}, line {number}: expected 'base64-of-the-token rank', found {line[:80]!r}. "
                    f"The file is damaged or truncated (or a Git LFS pointer); copy it again."
                ) from None
            yield number, token, rank


class QWenTokenizer(PreTrainedTokenizer):
    """
    The tokenizer of the first-generation Qwen models.

    Regular tokens are `bytes`, special tokens `str`. Text is normalised to NFC. Unless told otherwise, the surface form
    of a special token in a text becomes that token; `allowed_special` and `disallowed_special` of `tokenize`,
    `encode` and `__call__` decide which do:

        >>> tokenizer.encode("<|endoftext|>")
        [151643]
        >>> tokenizer.encode("<|endoftext|>", allowed_special=set())  # text that came from a person
        [27, 91, 8691, 723, 427, 91, 29]

    Args:
        vocab_file: path of `qwen.tiktoken`.
        errors: what `decode` does with bytes that are not UTF-8: "replace", "ignore" or "strict".
        extra_vocab_file: path of further tokens, one `base64(token bytes) id` a line, ids after the special tokens.

    Raises:
        FileNotFoundError, ValueError: the vocabulary file is missing or damaged; the message names the line.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    _auto_class = "AutoTokenizer"  # saving copies this module and what it imports

    def __init__(self, vocab_file, errors="replace", extra_vocab_file=None, **kwargs):
        self.errors = errors
        self.vocab_file = vocab_file
        self.extra_vocab_file = extra_vocab_file
        self.base_ranks = load_tiktoken_bpe(vocab_file)
        self.special_tokens = {token: len(self.base_ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.extra_ranks = {} if extra_vocab_file is None else self._load_extra(extra_vocab_file)
        self.mergeable_ranks = {**self.base_ranks, **self.extra_ranks}
        self.tokenizer = self._make_encoding()
        self.decoder: dict[int, bytes | str] = {rank: token for token, rank in self.mergeable_ranks.items()}
        self.decoder.update({rank: token for token, rank in self.special_tokens.items()})
        self.eod_id = self.special_tokens[ENDOFTEXT]
        self.im_start_id = self.special_tokens[IMSTART]
        self.im_end_id = self.special_tokens[IMEND]

        for name in ("eos_token", "pad_token"):
            if kwargs.get(name) is None:
                kwargs[name] = ENDOFTEXT
        for name in _TOKEN_NAMES:
            self._check_special(kwargs.get(name))
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = CHAT_TEMPLATE
        super().__init__(errors=errors, **kwargs)

    def _check_special(self, token) -> None:
        """Raise ValueError unless it is None, a special token of this vocabulary, or several of them."""
        token = list(token.values()) if isinstance(token, dict) else token  # names of tokens, in extra_special_tokens
        for one in token if isinstance(token, (list, tuple)) else [token]:
            surface = one.content if isinstance(one, AddedToken) else one
            if surface is not None and surface not in self.special_tokens:
                raise ValueError(
                    f"{surface!r} is not a special token of this vocabulary. Use one of "
                    f"<|extra_0|> to <|extra_204|>, which are there for this."
                )

    def __setattr__(self, name, value):
        if name in _TOKEN_NAMES:
            self._check_special(value)
        super().__setattr__(name, value)

    def add_special_tokens(self, special_tokens_dict, *args, **kwargs) -> int:
        """As inherited, for special tokens of this vocabulary; ValueError, and no change, for others."""
        for value in special_tokens_dict.values():
            self._check_special(value)
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _load_extra(self, path: str) -> dict[bytes, int]:
        """Further tokens with ids behind the special tokens; a token or id that is taken already is skipped."""
        extra: dict[bytes, int] = {}
        first = len(self.base_ranks) + len(SPECIAL_TOKENS)
        for number, token, rank in _read_lines(path):
            if token in self.base_ranks or token in extra:
                logger.info(f"{path}, line {number}: the token {token!r} exists already, skipping it.")
            elif rank < first or rank in extra.values():
                logger.info(f"{path}, line {number}: the id {rank} is taken already, skipping {token!r}.")
            else:
                extra[token] = rank
        return extra

    def _make_encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "Qwen", pat_str=PAT_STR, mergeable_ranks=self.mergeable_ranks, special_tokens=self.special_tokens
        )

    def __getstate__(self):
        state = self.__dict__.copy()
        del state["tokenizer"]  # an object of Rust; made again from the ranks
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.tokenizer = self._make_encoding()

    def __len__(self) -> int:
        return self.tokenizer.n_vocab

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.n_vocab

    def get_vocab(self) -> dict[bytes | str, int]:
        """Every token with its id; regular tokens are bytes, special tokens str."""
        return {**self.mergeable_ranks, **self.special_tokens}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(SPECIAL_TOKENS)

    # Text to tokens

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        allowed_special="all",
        disallowed_special=(),
        **kwargs,
    ) -> list[bytes | str]:
        """
        Split a text into tokens: bytes, or str for special tokens.

        Args:
            text: the text; `pair`: a second one, to follow it.
            allowed_special: "all", or the set of special tokens whose surface form becomes the token.
            disallowed_special: "all", or the special tokens whose surface form in the text raises ValueError.

        Example:
            >>> tokenizer.tokenize("print(1)<|endoftext|>")
            [b'print', b'(', b'1', b')', '<|endoftext|>']
        """
        if kwargs.get("split_special_tokens", self.split_special_tokens):  # transformers' name for it
            allowed_special = set()
        ids = self._text_to_ids(text, allowed_special, disallowed_special, kwargs.get("quotes"))
        if pair is not None:
            ids += self._text_to_ids(pair, allowed_special, disallowed_special)
        return [self.decoder[token] for token in ids]

    def _text_to_ids(self, text: str, allowed_special, disallowed_special, quotes=None) -> list[int]:
        """Token ids of a text; what stands between the two characters `quotes` is ordinary text (see `_quote`)."""
        if not isinstance(text, str):
            raise TypeError(f"Expected a text (str) to encode, found {type(text).__name__}.")
        if quotes is not None:
            opening, closing = quotes
            ids: list[int] = []
            for i, part in enumerate(re.split(f"{opening}(.*?){closing}", text, flags=re.DOTALL)):
                ids += self._text_to_ids(part, set() if i % 2 else allowed_special, disallowed_special)
            return ids
        text = unicodedata.normalize("NFC", text)
        return self.tokenizer.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)

    def _convert_token_to_id(self, token: bytes | str) -> int | None:
        if token in self.special_tokens:
            return self.special_tokens[token]
        data = token.encode("utf-8", errors="surrogatepass") if isinstance(token, str) else token
        if data in self.mergeable_ranks:
            return self.mergeable_ranks[data]
        raise ValueError(f"There is no token {token!r} in this vocabulary.")

    def convert_tokens_to_ids(self, tokens):
        """The id of a token (bytes or str), or the ids of a list of them; ValueError for one that does not exist."""
        if tokens is None:
            return None
        if isinstance(tokens, (str, bytes)):
            return self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    # Tokens to text

    def _convert_id_to_token(self, index: int) -> bytes | str:
        if index in self.decoder:
            return self.decoder[index]
        raise ValueError(f"There is no token with the id {index}; this vocabulary has {len(self)} tokens.")

    def convert_ids_to_tokens(self, ids, skip_special_tokens: bool = False):
        """The token (bytes or str) of an id, or those of a list of ids; ValueError for an id that does not exist."""
        if isinstance(ids, int) or getattr(ids, "ndim", 1) == 0:  # a number of Python, NumPy or torch
            return self._convert_id_to_token(int(ids))
        tokens = [self._convert_id_to_token(int(index)) for index in ids]
        return [t for t in tokens if not (skip_special_tokens and isinstance(t, str))]

    def convert_tokens_to_string(self, tokens: list[bytes | str]) -> str:
        """Join tokens; special tokens appear as their surface form."""
        data = b"".join(t if isinstance(t, bytes) else t.encode("utf-8") for t in tokens)
        return data.decode("utf-8", errors=self.errors)

    def _decode(self, token_ids, skip_special_tokens: bool = False, errors: str | None = None, **kwargs) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if skip_special_tokens:
            special = range(self.eod_id, self.eod_id + len(SPECIAL_TOKENS))
            ids = [index for index in ids if index not in special]
        for index in ids:
            if index not in self.decoder:
                self._convert_id_to_token(index)  # raises
        return self.tokenizer.decode_bytes(ids).decode("utf-8", errors=errors or self.errors)

    # Special tokens

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        """Nothing is ever added: special tokens must be known, regular tokens belong into `extra_vocab_file`."""
        for token in new_tokens:
            surface = token.content if isinstance(token, AddedToken) else token
            if surface in self.special_tokens:
                continue
            if special_tokens or getattr(token, "special", False):
                self._check_special(surface)
            raise ValueError(
                f"Adding the regular token {surface!r} is not supported. Put new tokens into a file and pass it "
                f"as extra_vocab_file."
            )
        return 0

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens: bool = False):
        """1 for special tokens, 0 for regular ones; the tokenizer adds none by itself."""
        special = range(self.eod_id, self.eod_id + len(SPECIAL_TOKENS))
        return [int(index in special) for index in [*token_ids_0, *(token_ids_1 or [])]]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        """The ids themselves, the pair's behind the first's: Qwen has no tokens that every text begins or ends with."""
        return [*token_ids_0, *(token_ids_1 or [])]

    # Chat

    def apply_chat_template(self, conversation, *args, tokenize: bool = True, tokenizer_kwargs=None, **kwargs):
        """
        As inherited; what the messages say is encoded as ordinary text and never becomes a control token.

        With the default template the ids are exactly those of `make_context`. The text (`tokenize=False`) can't keep
        that apart: encode it only if you trust the messages.
        """
        conversation = getattr(conversation, "messages", conversation)
        if not conversation:
            raise ValueError("The conversation is empty; it needs at least one message.")
        is_default = (kwargs.get("chat_template") or self.chat_template) == CHAT_TEMPLATE
        if is_default:
            if kwargs.get("tools") or any(args[:1]):
                raise ValueError("The default chat template has no place for tools; pass a chat_template that has.")
            conversation = _plain(conversation)
        if tokenize:
            quotes = _unused_characters([conversation, args, kwargs])
            conversation = _quote(conversation, quotes, everything=is_default)
            args = [_quote(value, quotes) for value in args]
            kwargs = {k: v if k == "chat_template" else _quote(v, quotes) for k, v in kwargs.items()}
            tokenizer_kwargs = {**(tokenizer_kwargs or {}), "quotes": quotes}
        return super().apply_chat_template(
            conversation, *args, tokenize=tokenize, tokenizer_kwargs=tokenizer_kwargs, **kwargs
        )

    # Saving

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `qwen.tiktoken`, and `qwen_extra.tiktoken` if there are extra tokens; returns their paths."""
        if not os.path.isdir(save_directory):
            raise ValueError(f"save_directory must be a folder that exists, found {save_directory!r}.")
        prefix = "" if filename_prefix is None else filename_prefix + "-"
        paths = []
        for key, ranks in (("vocab_file", self.base_ranks), ("extra_vocab_file", self.extra_ranks)):
            if ranks:
                paths.append(os.path.join(save_directory, prefix + VOCAB_FILES_NAMES[key]))
                with open(paths[-1], "wb") as file:
                    for token, rank in ranks.items():
                        file.write(base64.b64encode(token) + b" %d\n" % rank)
        return tuple(paths)


def _unused_characters(conversation) -> tuple[str, str]:
    """Two characters that do not occur in the conversation; Unicode reserves these for such internal use."""
    text = repr(conversation)  # shows noncharacters as escapes, so look for those
    free = [code for code in range(0xFDD0, 0xFDF0) if f"\\u{code:04x}" not in text and chr(code) not in text]
    if len(free) < 2:
        raise ValueError("The conversation holds nearly all of the noncharacters U+FDD0 to U+FDEF; remove them.")
    return chr(free[0]), chr(free[1])


def _plain(message):
    """Messages with contents that are texts: parts of type "text" joined, None as an empty text."""
    if isinstance(message, (list, tuple)):
        return [_plain(m) for m in message]
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"Qwen reads text only; found a message with the content {content!r}.")
        content = "".join(parts)
    return {**message, "content": "" if content is None else content}


def _quote(value, quotes: tuple[str, str], everything: bool = False, key: str | None = None):
    """
    Put what people say between the two characters `quotes`, so that it can be found in the rendered template.

    Everything under "content" if the template is the one that we know. Another template may want to look into the
    messages (trim them, compare them), so there only texts with a "|" are marked: every special token has one, so
    none can come out of texts that a template changes or joins.
    """
    if isinstance(value, dict):
        return {_quote(k, quotes): _quote(v, quotes, everything, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_quote(v, quotes, everything, key) for v in value]
    if isinstance(value, str) and ("|" in value or (everything and key == "content")):
        return f"{quotes[0]}{value}{quotes[1]}"
    return value
