"""
Qwen as a model of lm-evaluation-harness, `--model qwen`: HFLM that computes what prompts begin with once.

The questions of a benchmark begin with the same examples, and the choices of a question with the same context. Sorted,
they are a tree of tokens: what all branches begin with is kept in a cache of keys and values, and the branches behind
it are computed side by side in one row, each token attending to its ancestors. Where answers are generated, the prompts
of a batch are those that begin alike; what they share is kept for the next batch.

    python evaluation/qwen_lm.py run --model qwen --model_args pretrained=demo --include_path evaluation/tasks \
        --tasks qwen_mmlu --metadata '{"data": "FOLDER"}'

is lm-eval's own command with this model class; arguments of HFLM (`peft`, `dtype`, `parallelize`, ...) work as there.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig

logger = logging.getLogger(__name__)
WORTHWHILE = 32  # tokens that prompts share, from which on computing them apart from the rest pays
# Arguments of `generate` that leave the cache alone.
SHAREABLE = {"attention_mask", "do_sample", "temperature", "top_k", "top_p"}


def common_prefix(a, b) -> int:
    """How many tokens (or characters) two tuples (or texts) begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is faster than a loop over tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


@register_model("qwen")
class QWenLM(HFLM):
    """
    HFLM for first-generation Qwen checkpoints.

    Args:
        tree_tokens: tokens that one step computes side by side, behind what they share; the memory of a step grows
            with it. A sequence that is longer is computed in pieces.
        batch_size: at most so many sequences in a step, "auto" as many as tree_tokens holds; and of generation.

    Raises ValueError for a model of another architecture.
    """

    def __init__(self, pretrained, *, tree_tokens: int = 1024, **kwargs):
        kwargs.setdefault("trust_remote_code", True)
        if isinstance(pretrained, str):
            kwargs.setdefault("attn_implementation", "sdpa")  # flash attention takes no mask of a tree
        self._largest_batch: int | None = None
        self._forget()
        super().__init__(pretrained, **kwargs)
        if self.config.model_type != "qwen":
            raise ValueError(
                f"The model class qwen is for first-generation Qwen, this model has the model_type "
                f"{self.config.model_type!r}. Use --model hf."
            )
        self.tree_tokens = int(tree_tokens)
        # Greedy, without what the checkpoint says of sampling, repetition and length; a chat ends with its turn.
        ends = [self.tokenizer.eod_id, self.tokenizer.im_end_id]
        self.model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=self.tokenizer.eod_id)

    def _create_model(self, *args, **kwargs):
        """HFLM passes on what config.json says of quantised weights, as if other software were asked to read them."""
        auto = self.AUTO_MODEL_CLASS

        class Loader:
            @staticmethod
            def from_pretrained(*args, quantization_config=None, **kwargs):
                return auto.from_pretrained(*args, **kwargs)

        self.AUTO_MODEL_CLASS = Loader
        try:
            super()._create_model(*args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto

    def _forget(self) -> None:
        """No prompt's beginning is kept: its tokens, and their keys and values, of one row."""
        self._kept: tuple[int, ...] = ()
        self._kept_cache = None

    def _detect_batch_size(self, requests=None, pos: int = 0) -> int:
        """As in HFLM, but once for sequences of the largest length."""
        if requests:
            return super()._detect_batch_size(requests, pos)
        if self._largest_batch is None:
            self._largest_batch = super()._detect_batch_size()
        return self._largest_batch

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """As in HFLM, which sorts by length and makes batches, but of prompts that begin alike."""
        prompts = [request.args[0] for request in requests]
        groups: list[list[int]] = []  # of indices
        for i in sorted(range(len(prompts)), key=prompts.__getitem__):
            if groups and 2 * common_prefix(prompts[groups[-1][-1]], prompts[i]) > len(prompts[i]):
                groups[-1].append(i)
            else:
                groups.append([i])
        enough = min(self.batch_size, 8) if isinstance(self.batch_size, int) else 8  # smaller batches would cost more
        rest = [i for group in groups if len(group) < enough for i in group]
        answers: list = [None] * len(requests)
        for group in [*(group for group in groups if len(group) >= enough), *([rest] if rest else [])]:
            for i, answer in zip(group, super().generate_until([requests[i] for i in group], disable_tqdm)):
                answers[i] = answer
            self._forget()
        return answers

    def _model_generate(self, context, max_length: int, stop: list[str], **kwargs) -> torch.Tensor:
        """As in HFLM, with what the prompts begin with read from a cache. context: int64 (B, T)."""
        mask = kwargs["attention_mask"]
        rows = [tuple(row[real].tolist()) for row, real in zip(context, mask.bool())]
        shared = min(min(common_prefix(rows[0], row), len(row) - 1) for row in rows)
        exact = not (self._is_stretched(max(map(len, rows))) or self.model.config.use_cache_quantization)
        if shared >= WORTHWHILE and exact and kwargs.keys() <= SHAREABLE:
            kept = self._cache_of(rows[0][:shared])
            kwargs["past_key_values"] = cache = type(kept)()
            cache.ntk_alpha = getattr(kept, "ntk_alpha", None)
            # Padding stays on the left, where CUDA graphs take it: of what is shared a row gets so much less from the
            # cache as it is padded, and computes the rest with its own.
            padding = torch.tensor([context.shape[1] - len(row) for row in rows], device=self.device)
            column = (torch.arange(shared, device=self.device) - padding[:, None]).clamp(min=0)  # (B, shared)
            with torch.no_grad():
                for i, pair in enumerate(kept):  # keys and values, (1, nh, shared, hd) each
                    keys, values = (x[0][:, column.to(x.device)].transpose(0, 1) for x in pair[:2])
                    cache.update(keys, values, i)  # (B, nh, shared, hd)
        return super()._model_generate(context, max_length, stop, **kwargs)

    def _cache_of(self, tokens: tuple[int, ...]):
        """Keys and values of these tokens, one row, in a cache of the kind that the model generates with."""
        keep = common_prefix(self._kept, tokens)
        if keep == 0:
            self._forget()
        elif keep < len(self._kept):
            self._kept_cache.crop(keep - len(self._kept))
        if keep < len(tokens):
            ids, cache = torch.tensor([tokens], device=self.device), self._kept_cache
            asked = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, "return_dict_in_generate": True}
            output = super()._model_generate(ids, len(tokens) + 1, [], **asked)
            self._kept_cache = output.past_key_values  # which holds nothing of the one new token
        self._kept = tokens
        return self._kept_cache

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """As in HFLM: (log-likelihood of the continuation, whether greedy decoding gives it) for each request."""
        if self.model.config._attn_implementation not in ("sdpa", "eager"):
            logger.warning(
                f"Attention by {self.model.config._attn_implementation} takes no mask of a tree, so the sequences are "
                f"computed one by one. Load the model with attn_implementation='sdpa'."
            )
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        results: list = [None] * len(requests)
        wanted = defaultdict(list)  # sequence of inputs: (index of the request, tokens to predict at its end)
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"A continuation has {len(continuation)} tokens; it needs 1 to {self.max_length}, as an input has."
                )
            sequence = (tuple(context) + tuple(continuation))[-(self.max_length + 1) : -1]
            wanted[sequence].append((i, continuation))

        limit = override_bs or (self.batch_size if isinstance(self.batch_size, int) else len(requests))
        cache, cached = DynamicCache(), ()
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="log-likelihoods", unit="request")
        for batch, prefix in self._batches(wanted, limit):
            if self._is_stretched(len(batch[0])):
                prefix = 0
            keep = common_prefix(cached, batch[0][:prefix])
            if keep == 0:
                cache = DynamicCache()
            elif keep < cache.get_seq_length():
                cache.crop(keep - cache.get_seq_length())
            self._extend(cache, batch[0], keep, prefix)
            for sequence, log_probs in zip(batch, self._branches(cache, batch, prefix, wanted)):
                for i, continuation in wanted[sequence]:
                    rows = log_probs[-len(continuation) :]  # (tokens, vocab)
                    targets = torch.tensor(continuation, device=rows.device)
                    likelihood = rows.gather(1, targets[:, None]).sum()
                    results[i] = (float(likelihood), bool((rows.argmax(1) == targets).all()))
                    if requests[i][0] is not None:  # None: part of a rolling log-likelihood
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                    bar.update(1)
            cached = batch[0][:prefix]
        bar.close()
        return results

    def _is_stretched(self, length: int) -> bool:
        """Whether the rotation of a sequence depends on its length (NTK): its keys are no other sequence's then."""
        return self.model.config.use_dynamic_ntk and length > self.model.config.seq_length

    def _batches(self, wanted: dict, limit: int):
        """Neighbours in the tree, and how many tokens they all begin with and don't have to predict."""
        batch: list = []
        shared = size = 0  # tokens that all begin with; tokens of the tree
        for sequence in sorted(wanted):
            longest = max(len(continuation) for _, continuation in wanted[sequence])
            free = len(sequence) - longest
            if batch:
                common = common_prefix(batch[-1], sequence)
                together, grown = min(shared, common, free), size + len(sequence) - common
                alone = self._is_stretched(len(sequence)) or self._is_stretched(len(batch[0]))
                if len(batch) < limit and grown - together <= self.tree_tokens and not alone:
                    batch.append(sequence)
                    shared, size = together, grown
                    continue
                yield batch, shared
            batch, shared, size = [sequence], free, len(sequence)
        if batch:
            yield batch, shared

    def _forward(self, tokens, cache, **kwargs) -> torch.Tensor:
        """Log-probabilities (positions kept, vocab) behind one row of tokens."""
        autocast = torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None)
        with torch.inference_mode(), autocast:
            ids = torch.tensor([tokens], device=self.device)  # (1, T)
            logits = self.model(ids, past_key_values=cache, use_cache=True, **kwargs).logits[0]  # (kept, vocab)
            return logits.log_softmax(-1, dtype=self.softmax_dtype or torch.float32)

    def _extend(self, cache, sequence: tuple[int, ...], start: int, end: int) -> None:
        """Put the tokens from start to end of the sequence into the cache."""
        for at in range(start, end, self.tree_tokens):
            self._forward(sequence[at : min(at + self.tree_tokens, end)], cache, logits_to_keep=1)

    def _branches(self, cache, batch: list, prefix: int, wanted: dict):
        """For each sequence the log-probabilities (tokens, vocab) at its end, for its longest continuation."""
        longest = [max(len(continuation) for _, continuation in wanted[sequence]) for sequence in batch]
        if len(batch) == 1:
            yield self._alone(cache, batch[0], prefix, longest[0])
            return
        ids, positions, path, paths = [], [], [], []
        for i, sequence in enumerate(batch):
            common = common_prefix(batch[i - 1], sequence) - prefix if i else 0
            new = range(len(ids), len(ids) + len(sequence) - prefix - common)
            path = path[:common] + list(new)
            ids.extend(sequence[prefix + common :])
            positions.extend(range(prefix + common, len(sequence)))
            paths.append((path, new))
        mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)  # True is attended to
        for path, new in paths:
            for node in new:
                mask[node, path[: positions[node] - prefix + 1]] = True
        mask = torch.cat((torch.ones(len(ids), prefix, dtype=torch.bool), mask), dim=1)  # (T, prefix + T)
        ends = [path[-n:] for (path, _), n in zip(paths, longest)]
        kept = sorted({node for end in ends for node in end})
        log_probs = self._forward(
            ids,
            cache,
            attention_mask=mask[None, None].to(self.device),
            position_ids=torch.tensor([positions], device=self.device),
            logits_to_keep=torch.tensor(kept, device=self.device),
        )
        row = {node: i for i, node in enumerate(kept)}
        for end in ends:
            yield log_probs[[row[node] for node in end]]

    def _alone(self, cache, sequence: tuple[int, ...], prefix: int, longest: int) -> torch.Tensor:
        """One sequence, in pieces if it is long."""
        piece = len(sequence) if self._is_stretched(len(sequence)) else self.tree_tokens
        rows = []
        for at in range(prefix, len(sequence), piece):
            end = min(at + piece, len(sequence))
            first = max(at, len(sequence) - longest)
            log_probs = self._forward(sequence[at:end], cache, logits_to_keep=max(end - first, 1))
            rows.append(log_probs[max(end - first, 1) - max(end - first, 0) :])
        return torch.cat(rows)


if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # this folder has an evaluate.py, as lm-eval needs a package of that name
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
