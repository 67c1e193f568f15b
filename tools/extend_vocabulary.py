"""
Learn new tokens for words of your domain, behind a vocabulary that exists.

    python tools/extend_vocabulary.py VOCABULARY WORDS OUTPUT

VOCABULARY is the checkpoint's qwen.tiktoken, WORDS a text file in UTF-8 with one `word<TAB>frequency` a line, OUTPUT
the file to write: as `qwen_extra.tiktoken` beside the vocabulary it is found by itself, anywhere else pass it as
`extra_vocab_file`. Exit status: 0 done; 2 something is wrong with the files, or OUTPUT can't be written, and there is
no OUTPUT.

The method is the byte pair encoding of Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with
Subword Units" (2016), https://arxiv.org/abs/1508.07909, section 3.2, begun where the vocabulary ends:

1. A word is used if the tokenizer's pattern keeps it in one piece; what is split before merging can never be a token.
   Words are brought to NFC, and words that are tokens already are left out.
2. Every word is encoded with the tokens that exist, which gives its parts.
3. Of all pairs of neighbouring parts the most frequent one becomes the next token, with the next id; a pair counts with
   the frequency of each word that it is in, once for each place. Pairs that spell the same bytes are the same token to
   tiktoken and are counted together. Among equally frequent ones the first in the order of their bytes is taken.
4. The words that have it are merged again, and so on, until every word is a token or --max-tokens are learned.

tiktoken merges tokens of lower ids first. New ones have the highest ids, in the order of learning, so a text that none
of them occurs in is encoded as before, and the parts that step 3 sees are those that the tokenizer will make.
"""

from __future__ import annotations

import argparse
import heapq
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from byte_pairs import merges
from checkpoint_files import Problem, exit_status, from_code, write_file
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from tqdm import tqdm

QWenTokenizer = from_code("tokenization_qwen.QWenTokenizer")
tokenization_qwen = sys.modules[QWenTokenizer.__module__]


def read_words(path: Path) -> Counter[str]:
    """Words in NFC with their frequencies; Problem, with the line, for anything else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise Problem(f"There is no file {path}.") from None
    except UnicodeDecodeError as error:
        raise Problem(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from None
    words: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        word, tab, frequency = line.rpartition("\t")
        if not tab or not word or not frequency.strip().isdecimal() or int(frequency) < 1:
            raise Problem(
                f"{path}, line {number}: expected word<TAB>frequency, such as '一只猫\\t100', found {line!r}."
            )
        words[unicodedata.normalize("NFC", word)] += int(frequency)
    return words


def choose(words: Counter[str], ranks: dict[bytes, int]) -> dict[bytes, int]:
    """The words that can become new tokens, as bytes, with their frequencies; a line is printed for each other one."""
    split = Split(Regex(tokenization_qwen.PAT_STR), "isolated")
    chosen = {}
    for word, frequency in words.items():
        pieces = [piece for piece, _ in split.pre_tokenize_str(word)]
        if len(pieces) > 1:
            print(f"refused  {word!r}: it is split before merging, into {', '.join(map(repr, pieces))}")
        elif word.encode() in ranks:
            print(f"skipped  {word!r}: it is a token already, {ranks[word.encode()]}")
        else:
            chosen[word.encode()] = frequency
    return chosen


def learn(words: dict[bytes, int], ranks: dict[bytes, int], max_tokens: int | None = None) -> dict[bytes, int]:
    """
    The new tokens in the order of learning, each with its frequency when it was learned.

    Example:
        >>> learn({b"aab": 3, b"ab": 1}, {b"a": 0, b"b": 1})
        {b'ab': 4, b'aab': 3}
    """
    ranks = dict(ranks)
    next_rank = max(ranks.values()) + 1
    parts = {word: [bytes([byte]) for byte in word] for word in words}
    counts: Counter[bytes] = Counter()
    found_in: dict[bytes, set[bytes]] = defaultdict(set)
    queue: list[tuple[int, bytes]] = []

    def count(word: bytes, sign: int) -> None:
        for pair in map(bytes.__add__, parts[word], parts[word][1:]):
            counts[pair] += sign * words[word]
            found_in[pair].add(word)
            heapq.heappush(queue, (-counts[pair], pair))

    def merge(word: bytes) -> None:
        for _ in merges(parts[word], ranks):
            pass
        count(word, 1)

    for word in tqdm(words, desc="encoding words", unit="word", disable=len(words) < 1000):
        merge(word)
    learned: dict[bytes, int] = {}
    with tqdm(desc="learning", unit="token", disable=len(words) < 1000) as progress:
        while queue and len(learned) != max_tokens:
            frequency, token = heapq.heappop(queue)
            if frequency == 0 or -frequency != counts[token]:
                continue  # counted anew since, and in the queue with that
            ranks[token] = next_rank + len(learned)
            learned[token] = -frequency
            for word in sorted(found_in.pop(token)):
                count(word, -1)
                merge(word)
            progress.update()
    return learned


def extend(vocabulary: Path, words_file: Path, output: Path, start: int | None, max_tokens: int | None) -> None:
    if output.exists():
        raise Problem(f"{output} exists, and embeddings may have been trained for its ids. Name another file.")
    try:
        tokenizer = QWenTokenizer(str(vocabulary))
    except (FileNotFoundError, ValueError) as error:
        raise Problem(str(error)) from None
    start = len(tokenizer) if start is None else start
    if start < len(tokenizer):
        raise Problem(f"--start-id {start} is taken; ids are free from {len(tokenizer)} on.")
    if start >= 2**31:
        raise Problem(f"--start-id {start} is more than an id can be: take {len(tokenizer)}, the first that is free.")
    words = choose(read_words(words_file), tokenizer.mergeable_ranks)
    learned = learn(words, tokenizer.mergeable_ranks, max_tokens)
    if not learned:
        raise Problem(f"There is nothing to learn: no word of {words_file} can become a new token.")
    ids = {token: start + i for i, token in enumerate(learned)}
    for token, index in ids.items():
        print(f"{index}  {token.decode(errors='backslashreplace')}  {learned[token]}")
    write_file(output, tokenization_qwen.format_tiktoken_bpe(ids))

    extended = QWenTokenizer(str(vocabulary), extra_vocab_file=str(output))
    whole = sum(extended.encode(word.decode(), allowed_special=set()) == [ids.get(word)] for word in words)
    print(f"{len(learned)} new tokens in {output}; {whole} of {len(words)} words are one token now")
    print(
        f"the model needs {len(extended)} embeddings: if it has fewer, model.resize_token_embeddings({len(extended)})"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Learn new tokens for the words of a file, behind a vocabulary.")
    parser.add_argument("vocabulary", type=Path, help="the checkpoint's qwen.tiktoken")
    parser.add_argument("words", type=Path, help="a file with word<TAB>frequency on every line")
    parser.add_argument("output", type=Path, help="the file to write, qwen_extra.tiktoken")
    parser.add_argument("--start-id", type=int, help="the first new id (default: the first that is free)")
    parser.add_argument(
        "--max-tokens", type=int, help="learn at most so many, such as the spare embeddings of the model"
    )
    args = parser.parse_args(arguments)
    if args.max_tokens is not None and args.max_tokens < 0:
        parser.error(f"--max-tokens must be at least 0, found {args.max_tokens}")
    return exit_status(extend, args.vocabulary, args.words, args.output, args.start_id, args.max_tokens)


if __name__ == "__main__":
    sys.exit(main())
