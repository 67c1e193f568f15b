"""The Qwen tokenizer: byte-level BPE by tiktoken behind the interface of transformers' tokenizers."""

from __future__ import annotations

import base64
import codecs
import os
import re
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import tiktoken
from transformers import AddedToken, BatchEncoding
from transformers.utils import logging

from .transformers_compat import PreTrainedTokenizer

logger = logging.get_logger("transformers.models.qwen.tokenization_qwen")

VOCAB_FILES_NAMES = {"vocab_file": "qwen.tiktoken", "extra_vocab_file": "qwen_extra.tiktoken"}

PAT_STR = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDOFTEXT = "<|endoftext|>"
IMSTART = "<|im_start|>"
IMEND = "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IMSTART, IMEND, *(f"<|extra_{i}|>" for i in range(205)))
_ALL_SPECIAL = frozenset(SPECIAL_TOKENS)
_TOKEN_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)

# Arguments of transformers' ways to encode that are for its `prepare_for_model`.
_FURTHER_LISTS = ("return_token_type_ids", "return_special_tokens_mask", "return_length")
_PREPARING = ("add_special_tokens", "stride", "verbose", *_FURTHER_LISTS)

# In texts shorter than this on average, threads cost more than they bring.
_TEXT_FOR_THREADS = 1000
# A run of white space with twice as many characters overflows the stack of tiktoken's regular expression.
_LONG_SPACE = 500_000
_SPACE = "\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # the pattern's \s without \r and \n
# unicodedata sorts a run of combining marks in quadratic time.
_LONG_MARKS = 500


def _chat_template(message: str) -> str:
    """ChatML, as `make_context` writes it. Like `chat`, it begins with a system prompt even when none is given."""
    return (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{% endif %}"
        "{% for message in messages %}"
        + message
        + "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# What lies in `generation` is what an assistant says, for `return_assistant_tokens_mask`.
CHAT_TEMPLATE = _chat_template(
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
)
# The same for programs that do not know `generation`, such as transformers up to 4.41.
PLAIN_CHAT_TEMPLATE = _chat_template(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
)
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
    """
    Read a `.tiktoken` file: one `base64(token bytes) rank` a line, ranks 0 to n - 1.

    Raises FileNotFoundError if there is no such file, and ValueError, with the line, for one that is truncated, not
    base64, repeats a token or a rank, or lacks a rank or one of the 256 single bytes.
    """
    ranks: dict[bytes, int] = {}
    for number, token, rank in _parse(_read(path), path):
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


def _read(path: str | None) -> bytes:
    if path is None or not os.path.isfile(path):  # None: transformers found no such file
        raise FileNotFoundError(
            f"There is no vocabulary file {path or 'beside the configuration'}. It comes with the checkpoint, as "
            f"{VOCAB_FILES_NAMES['vocab_file']}."
        )
    with open(path, "rb") as file:
        return file.read()


def _parse(content: bytes, path: str):
    """Line number, token bytes and rank of every line of a vocabulary file."""
    for number, line in enumerate(content.splitlines(), start=1):
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


def format_tiktoken_bpe(ranks: dict[bytes, int]) -> bytes:
    """The content of a `.tiktoken` file: one `base64(token bytes) rank` a line."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


class QWenTokenizer(PreTrainedTokenizer):
    """
    The tokenizer of the first-generation Qwen models.

    Regular tokens are `bytes`, special tokens `str`. Text is normalised to NFC. Unless told otherwise, the surface form
    of a special token in a text becomes that token; `allowed_special` and `disallowed_special` of `tokenize`,
    `encode` and `__call__` decide which do, and `split_special_tokens=True` means none:

        >>> tokenizer.encode("<|endoftext|>")
        [151643]
        >>> tokenizer.encode("<|endoftext|>", allowed_special=set())  # text that came from a person
        [27, 91, 8691, 723, 427, 91, 29]

    A batch of long texts is encoded by several threads, as many as `__call__` is told by `num_threads`, otherwise one
    for each core.

    Args:
        vocab_file: path of `qwen.tiktoken`.
        errors: what `decode` does with bytes that are not UTF-8: "replace", "ignore" or "strict".
        extra_vocab_file: path of further tokens, one `base64(token bytes) id` a line, ids after the special tokens.

    Raises:
        FileNotFoundError, ValueError: a vocabulary file is missing, damaged, or gives an id twice; the message names
            the line.
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
        self._index_vocabulary()
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
        self._show_as_added(self.special_tokens)

    def _index_vocabulary(self) -> None:
        """What follows from `base_ranks`, `extra_ranks` and `special_tokens`."""
        self.mergeable_ranks = {**self.base_ranks, **self.extra_ranks}
        self.decoder: dict[int, bytes | str] = {rank: token for token, rank in self.mergeable_ranks.items()}
        self.decoder.update({rank: token for token, rank in self.special_tokens.items()})
        self._encoding = tiktoken.Encoding(
            "Qwen", pat_str=PAT_STR, mergeable_ranks=self.mergeable_ranks, special_tokens=self.special_tokens
        )
        self.tokenizer = self._encoding  # its published name, where gptqmodel's subclass puts the tokenizer it wraps

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
        """Further tokens, with ids behind the special tokens; a token that exists already is skipped."""
        extra: dict[bytes, int] = {}
        owners: dict[int, bytes] = {}
        first = len(self.base_ranks) + len(SPECIAL_TOKENS)
        for number, token, rank in _parse(_read(path), path):
            if token in self.base_ranks or token in extra:
                logger.info(f"{path}, line {number}: the token {token!r} exists already, skipping it.")
                continue
            if rank < first or rank in owners:
                owner = repr(owners[rank]) if rank in owners else "the vocabulary itself"
                raise ValueError(
                    f"{path}, line {number}: the id {rank} of {token!r} is taken by {owner}. Give every extra token an "
                    f"id of its own from {first} on, as tools/extend_vocabulary.py does."
                )
            extra[token], owners[rank] = rank, token
        return extra

    # A pickle holds the vocabulary as its files do; what can be made from it is left out.

    def __getstate__(self):
        state = self.__dict__.copy()
        for name in ("mergeable_ranks", "decoder", "tokenizer", "_encoding"):
            state.pop(name, None)
        for name in ("base_ranks", "extra_ranks"):
            state[name] = format_tiktoken_bpe(state[name])
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        for name in ("base_ranks", "extra_ranks"):
            self.__dict__[name] = {token: rank for _, token, rank in _parse(state[name], name)}
        self._index_vocabulary()

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def vocab_size(self) -> int:
        return self._encoding.n_vocab

    def get_vocab(self) -> dict[bytes | str, int]:
        """Every token with its id; regular tokens are bytes, special tokens str."""
        return {**self.mergeable_ranks, **self.special_tokens}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(SPECIAL_TOKENS)

    # Text to ids

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

        Raises TypeError for what is not a text, ValueError for a special token that does not exist.

        Example:
            >>> tokenizer.tokenize("print(1)<|endoftext|>")
            [b'print', b'(', b'1', b')', '<|endoftext|>']
        """
        special = self._choose_special(allowed_special, disallowed_special, kwargs.get("split_special_tokens"))
        texts = [text] if pair is None else [text, pair]
        return [self.decoder[token] for text in texts for token in self._text_to_ids(text, *special)]

    def _choose_special(self, allowed_special, disallowed_special, split_special_tokens=None):
        """The special tokens that are recognised in a text, and those that must not be in it."""
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        allowed = frozenset() if split_special_tokens else _special_set("allowed_special", allowed_special)
        disallowed = _special_set("disallowed_special", disallowed_special)
        return allowed, disallowed - allowed if disallowed_special == "all" else disallowed

    def _encode_pairs(
        self,
        pairs,
        is_batch: bool,
        is_split_into_words=False,
        allowed_special="all",
        disallowed_special=(),
        split_special_tokens=None,
        sanitize_control_tokens=False,  # `apply_chat_template` always does
        marks=None,
        return_assistant_tokens_mask=False,
        num_threads=None,
        return_offsets_mapping=False,
        **kwargs,
    ) -> BatchEncoding:
        """All that `__call__`, `encode` and their relatives do, to pairs of a text and a second text or None."""
        if return_offsets_mapping and marks is not None:
            raise ValueError("A chat template has no offsets: the text that it makes is not what is encoded.")
        special = self._choose_special(allowed_special, disallowed_special, split_special_tokens)

        def encode(text) -> tuple[list[int], list]:
            """Ids, and what else is asked for about each of them."""
            if is_split_into_words and isinstance(text, str):
                raise ValueError(f"is_split_into_words=True takes a list of words, found the text {text[:80]!r}.")
            if marks is not None:
                return self._rendered_to_ids(text, *special, *marks)
            if isinstance(text, (list, tuple)) and not is_split_into_words:
                if return_offsets_mapping:
                    raise ValueError(f"return_offsets_mapping=True takes texts, found {str(text)[:80]}.")
                return self._tokens_to_ids(text), []
            ids: list[int] = []
            offsets: list[tuple[int, int]] = []
            for word in text if is_split_into_words else [text]:
                new = self._text_to_ids(word, *special)
                ids += new
                if return_offsets_mapping:
                    offsets += self._offsets(word, new)
            return ids, offsets

        texts = [text for first, second in pairs for text in ((first,) if second is None else (first, second))]
        encoded = iter(_map(encode, texts, num_threads))
        pairs = [(next(encoded), None if second is None else next(encoded)) for _, second in pairs]
        column = ()
        if return_offsets_mapping or return_assistant_tokens_mask:
            values = [[*first[1], *(second[1] if second else [])] for first, second in pairs]
            column = ("offset_mapping", values, (0, 0)) if return_offsets_mapping else ("assistant_masks", values, 0)
        pairs = [(first[0], second[0] if second else None) for first, second in pairs]
        return self._prepare(pairs, is_batch, column, **kwargs)

    def _tokens_to_ids(self, tokens) -> list[int]:
        """The ids of a text that is given as ids or tokens; ValueError for a token that does not exist."""
        if tokens and isinstance(tokens[0], int):
            return list(tokens)
        ids = self.convert_tokens_to_ids(tokens)
        if None in ids:
            raise ValueError(f"There is no token {tokens[ids.index(None)]!r} in this vocabulary.")
        return ids

    def _prepare(
        self,
        pairs: list,
        is_batch: bool,
        column: tuple,
        padding_strategy,
        truncation_strategy,
        max_length=None,
        pad_to_multiple_of=None,
        padding_side=None,
        return_tensors=None,
        return_attention_mask=None,
        return_overflowing_tokens=False,
        **kwargs,
    ) -> BatchEncoding:
        """
        What transformers' `prepare_for_model` makes of pairs of ids and further ids or None, padded together.

        column: a name, values for the ids of every pair, and the value of padding, which are cut and padded with them.
        """
        name, values, filler = column or (None, [], None)
        preparing = {name: kwargs.pop(name) for name in _PREPARING if name in kwargs}
        if kwargs:
            logger.warning_once(f"Arguments that QWenTokenizer does not know are ignored: {', '.join(sorted(kwargs))}.")
        # If only the ids are asked for, its lists take a tenth of the time that encoding takes, for nothing.
        ids_only = (
            truncation_strategy == "do_not_truncate"
            and "token_type_ids" not in self.model_input_names
            and not return_overflowing_tokens
            and not any(preparing.get(name) for name in _FURTHER_LISTS)
        )
        rows = []
        for i, (first, second) in enumerate(pairs):
            ids = self.build_inputs_with_special_tokens(first, second)
            if ids_only:
                row = {"input_ids": ids}
                verbose = preparing.get("verbose", True)
                self._eventual_warn_about_too_long_sequence(row["input_ids"], max_length, verbose)
            else:
                places = list(range(len(ids)))  # instead of the ids: so it is known which of them are left
                row = self.prepare_for_model(
                    places[: len(first)],
                    None if second is None else places[len(first) :],
                    truncation=truncation_strategy,
                    max_length=max_length,
                    return_attention_mask=False,
                    return_overflowing_tokens=return_overflowing_tokens,
                    **preparing,
                ).data
                places = row["input_ids"]
                for kind in {"input_ids", "overflowing_tokens"} & set(row):
                    row[kind] = [ids[place] for place in row[kind]]
                if "special_tokens_mask" in row and preparing.get("add_special_tokens", True):
                    row["special_tokens_mask"] = self.get_special_tokens_mask(row["input_ids"])
            if name:
                row[name] = values[i] if ids_only else [values[i][place] for place in places]
            if return_overflowing_tokens:
                row.setdefault("overflowing_tokens", [])
                row.setdefault("num_truncated_tokens", 0)
            rows.append(row)
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ["input_ids"])}
        if return_tensors is not None:  # rows of these have different lengths
            columns.pop("overflowing_tokens", None)
            columns.pop("num_truncated_tokens", None)
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if return_attention_mask:
            columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        if padding_strategy != "do_not_pad" and rows:
            columns = self.pad(
                columns,
                padding=padding_strategy,
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
                return_attention_mask=return_attention_mask,
            ).data
            if name:
                left = (padding_side or self.padding_side) == "left"
                for i, (row, ids) in enumerate(zip(columns[name], columns["input_ids"])):
                    padding = [filler] * (len(ids) - len(row))
                    columns[name][i] = [*padding, *row] if left else [*row, *padding]
        if is_batch or return_tensors is not None:
            return BatchEncoding(columns, tensor_type=return_tensors)
        return BatchEncoding({name: column[0] for name, column in columns.items()})

    def _text_to_ids(self, text: str, allowed: frozenset, disallowed: frozenset) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"Expected a text (str) to encode, found {type(text).__name__}.")
        text = _nfc(text)
        if len(text) >= _LONG_SPACE and re.search(f"[{_SPACE}]", text[::_LONG_SPACE]):
            return self._encode_long_space(text, allowed, disallowed)
        return self._encode_nfc(text, allowed, disallowed)

    def _rendered_to_ids(
        self, text: str, allowed: frozenset, disallowed: frozenset, bar: str, edge: str, begin: str, end: str
    ) -> tuple[list[int], list[int]]:
        """
        Ids of what a template made of messages with marks in them (see `_mark`): only its own words are special.

        Besides, 1 for those that have a part of what lies between `begin` and `end`, 0 for the others.
        """
        surfaces = [token for token in SPECIAL_TOKENS if token in allowed and token in text]
        pattern = "|".join(map(re.escape, surfaces)) or "(?!)"
        ids: list[int] = []
        flags: list[int] = []
        inside = False
        for part in text.split(edge):
            for i, piece in enumerate(re.split(f"({pattern})", part)):
                if i % 2:
                    ids.append(self.special_tokens[piece])
                    flags.append(int(inside))
                    continue
                plain, blocks = "", []
                for bit in re.split(f"([{begin}{end}])", piece.replace(bar, "|").replace(_json_escape(bar), "|")):
                    if bit in (begin, end):
                        inside = bit == begin
                    elif bit:
                        blocks += [(len(plain), len(plain) + len(bit))] if inside else []
                        plain += bit
                new = self._text_to_ids(plain, frozenset(), disallowed)
                ids += new
                if not blocks or blocks == [(0, len(plain))]:
                    flags += [len(blocks)] * len(new)
                else:
                    offsets = self._offsets(plain, new)
                    flags += [int(any(first < b and a < last for a, b in blocks)) for first, last in offsets]
        return ids, flags

    def _offsets(self, text: str, ids: list[int]) -> list[tuple[int, int]]:
        """Where each token lies in the text: the first of its characters, and the one behind its last."""
        characters = [place for character, place in _aligned_nfc(text) for _ in character.encode("utf-8")]
        offsets, begin = [], 0
        for index in ids:
            end = begin + len(self.decoder[index])  # special tokens are ASCII
            offsets.append((characters[begin][0], characters[end - 1][1]))
            begin = end
        return offsets

    def _encode_nfc(self, text: str, allowed: frozenset, disallowed: frozenset) -> list[int]:
        if "|" not in text or "<|" not in text:  # every special token has both; the second takes longer to look for
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special=set(allowed), disallowed_special=disallowed)

    def _encode_long_space(self, text: str, allowed: frozenset, disallowed: frozenset) -> list[int]:
        """
        The same ids for a text that has runs of white space too long for tiktoken's regular expression.

        In the pattern such a run, without line breaks in it or behind it, is one piece; the last character belongs to
        what follows, if anything does. So each is encoded as one piece, apart from the text around it.
        """
        one_piece = tiktoken.Encoding(
            "Qwen, not split", pat_str="(?s:.+)", mergeable_ranks=self.mergeable_ranks, special_tokens={}
        )
        ids: list[int] = []
        done = 0
        for run in re.finditer(f"[{_SPACE}]{{{_LONG_SPACE},}}", text):
            end = run.end()
            if text.startswith(("\r", "\n"), end):
                continue
            if end < len(text) and not text.startswith(tuple(allowed), end):
                end -= 1
            ids += self._encode_nfc(text[done : run.start()], allowed, disallowed)
            ids += one_piece.encode_ordinary(text[run.start() : end])
            done = end
        return ids + self._encode_nfc(text[done:], allowed, disallowed)

    def _convert_token_to_id(self, token: bytes | str) -> int | None:
        if token in self.special_tokens:
            return self.special_tokens[token]
        data = token.encode("utf-8", errors="surrogatepass") if isinstance(token, str) else token
        index = self.mergeable_ranks.get(data)
        return self.unk_token_id if index is None else index

    def convert_tokens_to_ids(self, tokens):
        """
        The id of a token (bytes or str), or the ids of a list of them.

        For a token that does not exist it is `unk_token_id`, which is None unless you set an `unk_token`.
        """
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

    def decode(self, token_ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces=None, **kwargs):
        """
        The text of token ids (or the texts of a list of lists); special tokens appear as their surface form.

        Args:
            token_ids: int, list of int, or an array or tensor of integers.
            skip_special_tokens: leave special tokens out; tokens of the extra vocabulary stay.
            clean_up_tokenization_spaces: ignored, Qwen's tokens need no cleaning.
            errors: what to do with bytes that are not UTF-8, "replace", "ignore" or "strict"; default: the tokenizer's.

        An id that has no token is decoded as nothing, with a warning; ValueError for a negative one.
        """
        if isinstance(token_ids, list) and token_ids:  # transformers would look at each id to find out what this is
            if isinstance(token_ids[0], list):
                return [self.decode(ids, skip_special_tokens, **kwargs) for ids in token_ids]
            if isinstance(token_ids[0], int):
                return self._decode(token_ids, skip_special_tokens, **kwargs)
        return super().decode(token_ids, skip_special_tokens, **kwargs)

    def _decode(self, token_ids, skip_special_tokens: bool = False, errors: str | None = None, **kwargs) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        try:
            data = self._encoding.decode_bytes(ids)
        except BaseException:  # a panic of Rust in tiktoken before 0.8
            known = [index for index in ids if self._has_token(index)]
            if len(known) == len(ids):
                raise
            ids, data = known, self._encoding.decode_bytes(known)
        if skip_special_tokens and b"|" in data and b"<|" in data:
            special = set(self.special_tokens.values())
            data = self._encoding.decode_bytes([index for index in ids if index not in special])
        return data.decode("utf-8", errors=errors or self.errors)

    def _has_token(self, index: int) -> bool:
        """Whether there is something to decode; a model's vocabulary is padded with ids that have no token."""
        if index in self.decoder:
            return True
        if index < 0:
            return self._convert_id_to_token(index) is not None  # raises: this was no model
        logger.warning_once(
            f"Ids that have no token are decoded as nothing. This vocabulary has {len(self)} tokens; a model with more "
            f"rows in its embedding gives such an id, rarely, when it samples. To exclude them pass "
            f"suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)) to generate or chat."
        )
        return False

    def decode_stream(self, skip_special_tokens: bool = False) -> DecodeStream:
        """Decodes ids that come one at a time; see `DecodeStream`."""
        return DecodeStream(self, skip_special_tokens)

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
        return token_ids_0 + token_ids_1 if token_ids_1 else token_ids_0

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None) -> list[int]:
        """0 for the tokens of the first text, 1 for those of the second."""
        return [0] * len(token_ids_0) + [1] * len(token_ids_1 or [])

    # Chat

    def apply_chat_template(
        self,
        conversation,
        tools=None,
        documents=None,
        chat_template=None,
        *,
        tokenize: bool = True,
        tokenizer_kwargs=None,
        return_assistant_tokens_mask: bool = False,
        **kwargs,
    ):
        """
        As inherited; what the messages say is encoded as ordinary text and never becomes a control token, with
        transformers' `sanitize_control_tokens` or without.

        With the default template the ids are exactly those of `make_context`. The text (`tokenize=False`) can't keep
        that apart: encode it only if you trust the messages.

        return_assistant_tokens_mask: add `assistant_masks`, 1 for the tokens of what an assistant says (in the default
        template its content and `<|im_end|>`), on any release. A template of yours marks it with `{% generation %}`.

        Raises ValueError for an empty conversation, tools or messages that the default template has no place for, or a
        mask from a template that marks nothing, and TypeError for messages that are not made of dictionaries, lists,
        texts and numbers.
        """
        conversation = _as_data(conversation)
        if not conversation:
            raise ValueError("The conversation is empty; it needs at least one message.")
        template = chat_template or self.chat_template
        if isinstance(self.chat_template, dict) and hasattr(self, "get_chat_template"):  # several, with names
            template = self.get_chat_template(chat_template, tools)
        is_default = template in (CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE)
        if is_default:
            if tools:
                raise ValueError(
                    "The default chat template has no place for tools; pass a chat_template that has, or see "
                    "make_tool_context in qwen_generation_utils.py."
                )
            conversation = _plain(conversation)
        if return_assistant_tokens_mask and not (tokenize and _GENERATION.search(str(template))):
            raise ValueError(
                "return_assistant_tokens_mask=True needs tokenize=True, and a template that says with "
                "{% generation %} ... {% endgeneration %} what the assistant's words are."
            )
        given = {"tools": tools, "documents": documents}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        if tokenize:
            kwargs.pop("sanitize_control_tokens", None)  # done here, of itself
            marks = _unused_characters([conversation, kwargs, template], 4)
            conversation = _mark(conversation, *marks[:2], whole_contents=is_default)
            kwargs = _mark(kwargs, *marks[:2])
            tokenizer_kwargs = {
                **(tokenizer_kwargs or {}),
                "marks": marks,
                "return_assistant_tokens_mask": return_assistant_tokens_mask,
            }
        if isinstance(template, str):
            chat_template = _mark_generation(template, *(marks[2:] if return_assistant_tokens_mask else ("", "")))
        encoded = super().apply_chat_template(
            conversation, chat_template=chat_template, tokenize=tokenize, tokenizer_kwargs=tokenizer_kwargs, **kwargs
        )
        if return_assistant_tokens_mask and not isinstance(encoded, Mapping):
            raise ValueError("return_assistant_tokens_mask=True needs return_dict=True.")
        return encoded

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
                    file.write(format_tiktoken_bpe(ranks))
        return tuple(paths)


class DecodeStream:
    """
    Ids to text, one at a time, in constant time an id, and never half a character.

    What `put` and in the end `finish` return is, put together, what the tokenizer's `decode` gives for all ids.

    Args:
        tokenizer: a QWenTokenizer; its `errors` says how bytes that are not UTF-8 are shown.
        skip_special_tokens: leave special tokens out.

    Example:
        >>> stream = tokenizer.decode_stream()
        >>> [stream.put(token) for token in tokenizer.encode("龘!")], stream.finish()
        (['', '', '龘', '!'], '')
    """

    def __init__(self, tokenizer: QWenTokenizer, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)

    def put(self, token: int) -> str:
        """
        Take the next id; returns the text that is now certain, and was not before.

        An id that has no token adds nothing, with a warning; ValueError for a negative one.
        """
        if not self._tokenizer._has_token(token):
            return ""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, bytes):
            return self._bytes.decode(piece)
        return "" if self._skip_special_tokens else self.finish() + piece  # it breaks off an incomplete character

    def finish(self) -> str:
        """What is left: an incomplete character, as the tokenizer's `errors` says. A new text may follow."""
        return self._bytes.decode(b"", final=True)


def _special_set(argument: str, tokens) -> frozenset:
    """The special tokens that `argument` names, "all" or a collection; ValueError for tokens that do not exist."""
    if tokens == "all":
        return _ALL_SPECIAL
    if isinstance(tokens, str):
        raise ValueError(
            f'{argument} must be "all" or a set of special tokens, found {tokens!r}; write {{{tokens!r}}}.'
        )
    unknown = set(tokens) - _ALL_SPECIAL
    if unknown:
        raise ValueError(
            f"{argument}: {', '.join(sorted(map(repr, unknown)))} is no special token of this vocabulary. They are "
            f"{ENDOFTEXT}, {IMSTART}, {IMEND} and <|extra_0|> to <|extra_204|>."
        )
    return frozenset(tokens)


def _map(function, texts: list, num_threads: int | None) -> list:
    """`[function(text) for text in texts]`, by up to `num_threads` threads where texts are long enough for that."""
    num_threads = min(num_threads or os.cpu_count() or 1, len(texts))
    characters = sum(len(text) for text in texts if isinstance(text, str))
    if num_threads < 2 or characters < len(texts) * _TEXT_FOR_THREADS:
        return [function(text) for text in texts]
    results: list = [None] * len(texts)
    numbered = enumerate(texts)  # each thread takes the next one from here

    def work() -> None:
        for i, text in numbered:
            results[i] = function(text)

    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(work) for _ in range(num_threads)]:
            future.result()
    return results


def _nfc(text: str) -> str:
    """The text in normalisation form C, in n log n steps even if it has long runs of combining marks."""
    if text.isascii():
        return text
    if any(map(_is_mark, text[::_LONG_MARKS])):
        text = _sort_marks(text)
    return unicodedata.normalize("NFC", text)


def _is_mark(character: str) -> bool:
    """Whether it, or what it is decomposed into, begins with a combining mark (U+0F73, U+0F75, U+0F81 are for that)."""
    return unicodedata.combining(character) != 0 or character in "\u0f73\u0f75\u0f81"


def _sort_marks(text: str) -> str:
    """The text with its runs of at least `_LONG_MARKS` combining marks in canonical order, which changes no NFC."""
    parts = []
    done = 0
    for i in range(0, len(text), _LONG_MARKS):
        if i < done or not _is_mark(text[i]):
            continue
        start = end = i
        while start > done and _is_mark(text[start - 1]):
            start -= 1
        while end < len(text) and _is_mark(text[end]):
            end += 1
        if end - start >= _LONG_MARKS:
            marks = "".join(unicodedata.normalize("NFD", mark) for mark in text[start:end])
            parts += [text[done:start], "".join(sorted(marks, key=unicodedata.combining))]
            done = end
    return "".join(parts) + text[done:]


def _as_encoded(text: str) -> str:
    """The text in form C, and lone surrogates, which are no text, as tiktoken reads them."""
    text = _nfc(text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _aligned_nfc(text: str) -> list[tuple[str, tuple[int, int]]]:
    """The characters that are encoded, each with where it comes from: the first character, the one behind the last."""
    encoded = _as_encoded(text)
    if encoded == text:
        return [(character, (i, i + 1)) for i, character in enumerate(text)]
    aligned: list[tuple[str, tuple[int, int]]] = []
    begin = 0
    for end in range(1, len(text) + 1):
        if end < len(text) and (
            _is_mark(text[end])
            or _as_encoded(text[begin : end + 1]) != _as_encoded(text[begin:end]) + _as_encoded(text[end])
        ):
            continue  # the next character belongs to these
        part = _as_encoded(text[begin:end])
        same = part == text[begin:end]
        aligned += [(c, (begin + i, begin + i + 1) if same else (begin, end)) for i, c in enumerate(part)]
        begin = end
    return aligned


def _mark_generation(template: str, begin: str, end: str) -> str:
    """
    The template with `begin` and `end` in the text that it makes, around what stands in its `{% generation %}` blocks.

    Up to 4.41 transformers does not know these blocks, and has no characters' places for this tokenizer later either.
    """

    def tag(found) -> str:
        left, closing, right = found.groups()
        mark = end if closing else begin
        return f"{{%{left} if true %}}" + (f"{{{{ '{mark}' }}}}" if mark else "") + f"{{% endif {right}%}}"

    return _GENERATION.sub(tag, template)


def _json_escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _unused_characters(conversation, number: int) -> list[str]:
    """Characters that do not occur in the conversation; Unicode reserves these for such internal use."""
    text = repr(conversation)
    free = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in text and _json_escape(c) not in text]
    if len(free) < number:
        raise ValueError("The conversation holds nearly all of the noncharacters U+FDD0 to U+FDEF; remove them.")
    return free[:number]


def _as_data(value):
    """Messages as dictionaries, lists, texts and numbers; TypeError for what a template could turn into text unseen."""
    value = getattr(value, "messages", value)  # a conversation of transformers' pipelines
    if isinstance(value, Mapping):
        return {_as_data(key): _as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_data(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(
        f"Messages must be dictionaries with texts, such as {{'role': 'user', 'content': 'Hi'}}; found "
        f"{type(value).__name__} in them."
    )


def _plain(message):
    """Messages with contents that are texts: parts of type "text" joined, None as an empty text."""
    if isinstance(message, (list, tuple)):
        return [_plain(m) for m in message]
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"A message must be a dictionary with a role and a content, found {message!r}.")
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else ["" if content is None else content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"Qwen reads text only; found a message with the content {content!r}.")
    return {**message, "content": "".join(texts)}


def _mark(value, bar: str, edge: str, whole_contents: bool = False, key: str | None = None):
    """
    Put `bar` for every "|" in what people say, so that none of it can be a special token, however a template cuts,
    joins and changes it: every special token has a "|".

    `whole_contents` also puts `edge` around every "content": it is encoded by itself then, as `make_context` does. That
    is for the template that we know; another may want to look into the messages (trim them, compare them).
    """
    if isinstance(value, dict):
        return {_mark(k, bar, edge): _mark(v, bar, edge, whole_contents, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark(v, bar, edge, whole_contents, key) for v in value]
    if isinstance(value, str):
        value = value.replace("|", bar)
        return edge + value + edge if whole_contents and key == "content" else value
    return value
