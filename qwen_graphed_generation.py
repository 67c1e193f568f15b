"""
The loop of `generate` that keeps a GPU busy with the graphs of qwen_cuda_graph.py: the host is one step ahead of it.
"""

from __future__ import annotations

import contextlib
import functools

import torch

from .qwen_cache import QWenCache
from .qwen_cuda_graph import (
    DRAWS,
    ENDING,
    checking_drafts,
    device_of,
    graphed_steps,
    has_graphs,
    is_plain,
    left_padding,
    prepare_steps,
    processes,
    takes,
)
from .qwen_sampling import draw, in_fewer_passes
from .transformers_compat import CACHE, GenerateDecoderOnlyOutput, prefill


class GraphedGeneration:
    """
    A mixin before `GenerationMixin`: greedy decoding and sampling with the host one step ahead of the GPU.

    The next step is launched before the host knows whether the last one was needed: the end is checked while it runs,
    and a step too many is taken back from the cache. Processors, criteria and streamers are called as ever, once a
    token, in their order. What it does not take goes through transformers' own loop.
    """

    _OWN_LOOP_TAKES = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}
    _OWN_LOOP_TAKES |= {"cache_position", "ntk_alpha"}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As inherited; tells a cache of ours how long it will become."""
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if isinstance(cache, QWenCache):
            cache.expect(generation_config.max_length)
        return result

    def _sample(self, input_ids, *args, **kwargs):
        if args or not self._is_for_own_loop(input_ids, **kwargs):
            return super()._sample(input_ids, *args, **kwargs)
        return self._own_loop(input_ids, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        with checking_drafts(self, kwargs.get(CACHE)):
            return super()._assisted_decoding(*args, **kwargs)

    def _is_for_own_loop(
        self,
        input_ids,
        logits_processor=None,
        stopping_criteria=None,
        generation_config=None,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ) -> bool:
        cache = model_kwargs.get(CACHE)
        settings = generation_config
        return (
            prefill is not None
            and isinstance(cache, QWenCache)
            and None not in (logits_processor, stopping_criteria, settings)
            and set(model_kwargs) <= self._OWN_LOOP_TAKES
            and bool(model_kwargs.get("use_cache"))
            and not synced_gpus
            and not (settings.output_attentions or settings.output_hidden_states)
            and getattr(settings, "prefill_chunk_size", None) is None
            and has_graphs(input_ids.device)
            and is_plain(self)
            and input_ids.device == device_of(self.transformer.wte)
            and takes(self, cache, input_ids.shape[0])
        )

    def _own_loop(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ):
        """transformers' `_sample`, which says what its arguments are."""
        settings, cache = generation_config, kwargs[CACHE]
        B, device = input_ids.shape[0], input_ids.device
        as_dict = settings.return_dict_in_generate
        scores = () if as_dict and settings.output_scores else None
        raw_logits = () if as_dict and settings.output_logits else None
        logits_processor = in_fewer_passes(logits_processor)
        has_ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad = settings._pad_token_tensor
        pad = None if pad is None else pad.to(device)
        vocab_size = self.config.vocab_size
        pads_with_no_token = has_ends and not 0 <= int(pad) < vocab_size
        max_length = stopping_criteria.max_length
        unfinished = torch.ones(B, dtype=torch.int64, device=device)
        reads = [_Reading(unfinished, streamer is not None) for _ in range(2)]
        if max_length is None or input_ids.shape[1] + 1 < max_length:
            prepare_steps(self, cache, B)
        outputs = prefill(self, input_ids, settings, kwargs)
        logits = outputs.logits
        del outputs
        # Positions, and the padding that the cache begins with
        mask, length = kwargs.get("attention_mask"), cache.get_seq_length()
        known, starts = left_padding(mask, length)
        positions = kwargs.get("position_ids")
        if positions is None or positions.shape[-1] == 0:
            positions = torch.full((B, 1), length, device=device)
            if starts is not None:
                positions = positions - starts[:, None]
        else:
            positions = positions[:, -1:].expand(B, 1) + 1
        alpha = getattr(cache, "ntk_alpha", None)
        takes_graph = known and takes(self, cache, B) and (alpha is not None or not self.config.use_dynamic_ntk)
        takes_graph = takes_graph and not (getattr(settings, "is_assistant", False) and self in ENDING)
        agree = _agreement(self)
        new = 0  # tokens behind those of the mask
        ahead = False  # a step is computed that may turn out not to be wanted
        with contextlib.ExitStack() as stack:
            graphed = stack.enter_context(graphed_steps(self, cache, B, 1)) if takes_graph else None

            def step(tokens):
                """The logits behind tokens (B, 1)."""
                nonlocal new, positions
                new += 1
                found = None
                if graphed is not None:
                    found = graphed(tokens, positions, starts, alpha)
                if found is None:
                    found = self(
                        input_ids=tokens,
                        past_key_values=cache,
                        attention_mask=None if mask is None else torch.cat([mask, mask.new_ones(B, new)], -1),
                        position_ids=positions,
                        use_cache=True,
                        return_dict=True,
                    ).logits
                positions = positions + 1
                return found

            try:
                while True:
                    last = logits[:, -1].to(copy=True, dtype=torch.float32)  # (B, vocab)
                    wanted = logits_processor(input_ids, last)
                    if scores is not None:
                        scores += (wanted,)
                    if raw_logits is not None:
                        raw_logits += (last,)
                    if settings.do_sample:
                        with DRAWS:
                            tokens, drawn = draw(wanted)
                    else:
                        tokens, drawn = wanted.argmax(-1), None
                    agree(tokens)
                    if has_ends:
                        tokens = tokens * unfinished + pad * (1 - unfinished)
                    input_ids = torch.cat([input_ids, tokens[:, None]], -1)
                    unfinished = unfinished & ~stopping_criteria(input_ids, scores)
                    agree(unfinished)
                    reads.reverse()
                    reads[0].begin(unfinished, tokens, drawn)
                    if max_length is None or input_ids.shape[1] < max_length:
                        # The embedding has no row for such padding; of a row that has ended nothing is wanted.
                        known_tokens = tokens.clamp(0, vocab_size - 1) if pads_with_no_token else tokens
                        logits = step(known_tokens[:, None])
                        ahead = True
                    is_end, on_host = reads[0].end()
                    if streamer is not None:
                        streamer.put(on_host)
                    if is_end:
                        break
                    ahead = False
            finally:
                if ahead:
                    cache.crop(-1)
        if streamer is not None:
            streamer.end()
        if not as_dict:
            return input_ids
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=raw_logits, **{CACHE: cache})


def _agreement(model):
    """
    A function that gives the processes of tensor parallelism what the first of them has, in place: the tokens, which
    each may have drawn by a random state of its own, and who has ended, which may depend on a clock.
    """
    group = processes(model)
    if group is None:
        return lambda x: None
    return functools.partial(torch.distributed.broadcast, src=torch.distributed.get_global_rank(group, 0), group=group)


class _Reading:
    """Brings to the host whether all rows have ended, and their tokens if wanted, while the GPU goes on."""

    def __init__(self, like: torch.Tensor, with_tokens: bool):
        """like: int64 (B), on the GPU."""
        on_host = {"dtype": torch.int64, "device": "cpu", "pin_memory": like.is_cuda}
        self._left = torch.zeros((), **on_host)
        self._tokens = torch.zeros(len(like), **on_host) if with_tokens else None
        self._event = torch.cuda.Event() if like.is_cuda else None

    def begin(self, unfinished: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor | None) -> None:
        """unfinished, tokens: int64 (B). drawn: bool (B), whether they could be, None if they were not drawn."""
        left = unfinished.max()
        self._left.copy_(left if drawn is None else torch.where(drawn.all(), left, -1), non_blocking=True)
        if self._tokens is not None:
            self._tokens.copy_(tokens, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(unfinished.device))

    def end(self):
        if self._event is not None:
            self._event.synchronize()
        if self._left < 0:
            raise RuntimeError(
                "No token can be drawn: a score is not a number, or none is finite. float16 overflows in some models: "
                "load with bfloat16 or float32; else look at the weights and at your logits processors."
            )
        return not self._left.item(), None if self._tokens is None else self._tokens.clone()
