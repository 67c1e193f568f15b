"""
A decoding step, few new tokens behind a filled cache, and `generate` on top of it.

A step that is plain is computed from the weights of the network at once, a block at a time, without going through its
layers: that is `decoding_step`, around the forward methods of the network. Plain means the layers and weights as they
were made (no adapters, hooks, quantisers, shards, gradients, tracing), a cache of ours, and nothing asked for but the
result. What is not plain goes through the layers, which give the same.

In the shapes below B is the batch, T the new tokens, S the tokens attended to, nh the heads and hd the width of one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading

import torch
from torch import nn
from transformers import LogitsProcessorList
from transformers.utils import logging

from .qwen_attention import AttendingCache, check_mask
from .qwen_cache import QWenCache, is_plain_inference, quantized_cache
from .qwen_cuda_graph import graphed_step, has_graphs, is_checked, is_plain
from .qwen_generation_utils import StopAtText, StopWordsLogitsProcessor
from .qwen_graphed_generation import GraphedGeneration
from .qwen_ops import decode_blocks, has_decode_kernel, own_products, rms_norm, times
from .qwen_plain import is_as_made, is_untouched
from .qwen_quantization import Int8Linear, QuantizedLinear, check_training
from .transformers_compat import (
    ASSISTANTS_GENERATE,
    CACHE,
    DRAFTS_CROP_CACHES,
    DRAFTS_READ_PROMPTS_AGAIN,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GenerationMixin,
    accepts_cache,
    arguments_by_name,
    computes_attention,
    crop_cache,
    is_compiling,
    parameter_names,
    resolved_settings,
)

logger = logging.get_logger("transformers.models.qwen.qwen_decode")


# --- The step ----------------------------------------------------------------------------------------------------


def decoding_step(forward):
    """
    Have the steps of `forward`, that of `QWenModel` or `QWenLMHeadModel`, that are plain computed from its weights.

    Steps behind a cache of ours that are not plain, but few tokens, at least attend where the cache stores.
    """
    names = parameter_names(forward)[1:]

    def through_layers(self, *args, **kwargs):
        like = next(self.parameters(), None)  # there is none in a copy that DataParallel makes
        takes_own = like is not None and is_plain_inference()
        with own_products(like.device, like.dtype) if takes_own else contextlib.nullcontext():
            return forward(self, *args, **kwargs)

    @functools.wraps(forward)
    def step(self, *args, **kwargs):
        if is_compiling() or torch.jit.is_tracing():
            return forward(self, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            check_training(self)
        call = {**dict(zip(names, args)), **kwargs}
        cache = call.get("past_key_values")
        if not hasattr(cache, "attends") or isinstance(cache, AttendingCache) or not _attends(self, cache, call):
            return through_layers(self, *args, **kwargs)
        output = None
        if _is_plain_call(self, call):
            output = _compute(self, call)
        if output is None:
            output = through_layers(self, **{**call, "past_key_values": AttendingCache(cache)})
            if output.past_key_values is not None:
                output[CACHE] = cache
        return output

    return step


def _attends(model, cache, call: dict) -> bool:
    """Whether the cache can attend by itself in this call of `forward`."""
    ids, embeds, mask = (call.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    wants_attentions = call.get("output_attentions")
    if wants_attentions or (wants_attentions is None and model.config.output_attentions):
        return False
    network = getattr(model, "transformer", model)
    if not computes_attention(model.config._attn_implementation):
        return False
    if model.config.attn_dropout_prob and any(m.training for m in network.h.modules()):  # who attends drops nothing
        return False
    if (ids is None) == (embeds is None) or not (mask is None or mask.dim() == 2 or mask.dtype == torch.bool):
        return False
    new = ids if embeds is None else embeds
    return new.dim() > 1 and new.numel() > 0 and cache.attends(new.shape[1])


# What a call may ask for without being more than a plain one; everything else that is not None is more.
_PLAIN = {"input_ids", "past_key_values", "attention_mask", "position_ids", "inputs_embeds", "logits_to_keep"}
_PLAIN |= {"ntk_alpha", "cache_position"}


def _is_plain_call(model, call: dict) -> bool:
    asked = {name for name, value in call.items() if value is not None and value is not False} - _PLAIN - {"use_cache"}
    if asked or call.get("use_cache") is False or model.training:
        return False
    return not (call.get("output_hidden_states") is None and model.config.output_hidden_states)


def _compute(model, call: dict):
    """The output of the model for a plain call, from the weights; None if they are not plain, before a change."""
    network = getattr(model, "transformer", model)
    cache = call["past_key_values"]
    ids, x = call.get("input_ids"), call.get("inputs_embeds")
    checked = ids is not None and is_checked(model, cache, ids)
    weights = None if checked else _found_before(network)
    if not (checked or weights or is_as_made(network)) or (network is not model and not is_untouched(network)):
        return None
    new = ids if x is None else x
    if new.shape[0] != cache.layers[0].batch_size:
        return None
    T, length = new.shape[1], cache.get_seq_length()
    mask, position_ids = call.get("attention_mask"), call.get("position_ids")
    check_mask(mask, *new.shape[:2], length)
    if position_ids is None:
        places = call.get("cache_position")
        places = torch.arange(length, length + T, device=new.device) if places is None else places
        position_ids = network.positions(mask, places)
    has_head = network is not model
    if checked or (has_head and ids is not None and has_graphs(ids.device) and is_plain(model)):
        logits = graphed_step(model, cache, ids, position_ids, mask)
        if logits is not None:
            return CausalLMOutputWithPast(logits=logits[:, _kept(call)], past_key_values=cache)
        if checked:  # the graph is given up and forgotten: look at everything once more
            return _compute(model, call)

    like = network.ln_f.weight  # in device and precision
    head = _matrix(model.lm_head, like) if has_head else None
    if head is None and has_head:
        return None
    weights = weights or _weights(network, like)
    if weights is None or new.device != like.device or not _stores_for(network, cache, like):
        return None
    x = network.embed(ids, x)  # (B, T, hidden)
    if x.dtype != like.dtype or type(x) is not torch.Tensor:
        return None
    rotation = network.rotation(position_ids, cache, length, call.get("ntk_alpha"))
    mask = None if mask is None else mask[..., : length + T].bool()
    eps = network.ln_f.eps
    scaling = [block.attn.scaling for block in network.h]
    angles = rotation.cos, rotation.sin, rotation.query_scale
    cache.make_room(T)
    x = decode_blocks(x, *weights, *angles, cache.storages(), length, mask, eps, scaling)
    cache.advance(T)  # behind the kernels, which may refuse a mask or positions
    x = rms_norm(x, like, eps)
    if head is None:
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache)
    return CausalLMOutputWithPast(logits=times(x[:, _kept(call)], *head), past_key_values=cache)


def _kept(call: dict):
    """The tokens whose logits are wanted, as an index. `logits_to_keep` is their number, 0 for all, or the tokens."""
    kept = call.get("logits_to_keep", 0)
    return slice(-kept, None) if isinstance(kept, int) else kept


class _Found:
    """
    The weights of a network that is as it was made, and what tells that it still is so: whether a thousand attributes
    have changed takes less time than what they are. Modules that a step calls may be of any kind, and are left alone.
    """

    # of a module: where it holds what, and the settings that a step takes from it
    _NAMES = "_modules", "_parameters", "_buffers", "eps", "layer_idx", "format", "group_size", "is_ordered"

    def __init__(self, network, weights: list):
        self.weights = weights
        modules = [network, network.drop, network.h, network.ln_f]
        for block in network.h:
            attn, mlp = block.attn, block.mlp
            modules += [block, block.ln_1, block.ln_2, attn, attn.c_attn, attn.c_proj]
            modules += [mlp, mlp.w1, mlp.w2, mlp.c_proj, mlp.act]
        self._network = network
        self._owns = [(module, type(module), vars(module), len(vars(module))) for module in modules]
        self._values = [(own, name, own[name]) for _, _, own, _ in self._owns for name in self._NAMES if name in own]
        self._forwards = [(kind, kind.forward) for kind in {type(module) for module in modules}]
        self._children = [(module._modules, list(module._modules.items())) for module in modules if module._modules]
        dictionaries = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
        self._places = [(tensors, name) for tensors in dictionaries for name in tensors]
        self._tensors = [tensors[name] for tensors, name in self._places]
        self._memory = self._memory_of(self._tensors)

    @staticmethod
    def _memory_of(tensors: list) -> list:
        return [(t.data_ptr(), t.dtype, type(t)) for t in tensors if t is not None]

    def is_as_it_was(self) -> bool:
        for module, kind, own, number in self._owns:
            if type(module) is not kind or vars(module) is not own or len(own) != number or own["training"]:
                return False
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return False
        now = [tensors.get(name) for tensors, name in self._places]
        return (
            all(own.get(name) is value for own, name, value in self._values)
            and all(t is before for t, before in zip(now, self._tensors))
            and self._memory_of(now) == self._memory
            and all(list(children.items()) == before for children, before in self._children)
            and all(kind.forward is forward for kind, forward in self._forwards)
            and is_untouched(self._network)  # of the hooks of all modules, too
        )


_GENERATION = threading.local()  # `.found`: of each network a `_Found` or None, while this thread is in `generate`


def _found_before(network) -> list | None:
    """What `_weights` found before in this generation, if nothing has changed since."""
    found = getattr(_GENERATION, "found", {}).get(network)
    if found is None:
        return None
    if found.is_as_it_was():
        return found.weights
    _GENERATION.found[network] = None
    return None


def _weights(network, like: torch.Tensor) -> list | None:
    """
    Norms, matrices and formats of all blocks as `decode_blocks` takes them; None if one is not as the network was made.
    """
    if not _is_weight(like, like):
        return None
    blocks = []
    for block in network.h:
        attn, mlp = block.attn, block.mlp
        norms = [block.ln_1.weight, block.ln_2.weight]
        matrices = [_matrix(m, like) for m in (attn.c_attn, attn.c_proj, mlp.w1, mlp.w2, mlp.c_proj)]
        if None in matrices or not all(_is_weight(norm, like) and norm.is_contiguous() for norm in norms):
            return None
        if not block.ln_1.eps == block.ln_2.eps == network.ln_f.eps:
            return None
        blocks.append((norms, [t for matrix in matrices for t in matrix[:5]], [n for m in matrices for n in m[5:]]))
    weights = [[each for block in blocks for each in block[i]] for i in range(3)]
    if network not in getattr(_GENERATION, "found", {network}):
        _GENERATION.found[network] = _Found(network, weights)
    return weights


def _stores_for(network, cache, like: torch.Tensor) -> bool:
    """Whether the cache has stored keys and values of this network's heads, where its weights are."""
    stored = [layer.keys.tensors[0] for layer in cache.layers]
    return len(stored) == len(network.h) and all(
        t.device == like.device
        and (cache.bits is not None or t.dtype == like.dtype)
        # Kernels take the number of heads from here: another model's, of as many numbers together, would pass.
        and 3 * t.shape[1] * block.attn.head_dim == block.attn.c_attn.out_features
        for t, block in zip(stored, network.h)
    )


def _is_weight(tensor, like: torch.Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.dtype == like.dtype and tensor.device == like.device


def _matrix(module: nn.Module, like: torch.Tensor):
    """The 8 arguments that `times` takes for a matrix; None for a module that is more than that."""
    if not is_untouched(module):
        return None
    plain = None, None, 0, 0, 0
    if type(module) is nn.Linear and _is_weight(module.weight, like):
        return (module.weight, module.bias, None, *plain)
    if type(module) is Int8Linear and module.codes.device == like.device:
        return (module.codes, module.bias, module.weight_scale, *plain)
    if type(module) is QuantizedLinear and module.codes.device == like.device and module.order is None:
        qweight, qzeros, scales, g_idx, *format = module.tensors()
        return (qweight, module.bias, scales, qzeros, g_idx, *format)
    return None


# --- Generation --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_generation():
    """Within it, and what it calls, a network that stays as it is is looked at once."""
    if hasattr(_GENERATION, "found"):  # an assistant's
        yield
        return
    _GENERATION.found = {}
    try:
        yield
    finally:
        del _GENERATION.found


class QWenGenerationMixin(GraphedGeneration, GenerationMixin):
    """transformers' `generate` with stop words, and with the cache that steps are fast with."""

    @accepts_cache
    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        *args,
        stop_words_ids=None,
        cache_bits=None,
        **kwargs,
    ):
        """
        transformers' `generate`, and:

        stop_words_ids: lists of token ids; after any of them was generated the next token is `eos_token_id`.
        Default: `stop_words_ids` of the generation configuration.
        cache_implementation: "quantized" takes `QWenQuantizedCache`; with a `cache_config`, transformers' own.
        cache_bits: 8 or 4, of the quantised cache, which it asks for. Default: `config.cache_bits`.
        assistant_model: also a Qwen whose embedding has fewer rows, as Qwen-1.8B's has beside Qwen-72B's, without
        tokenizers.

        Raises TypeError for a prompt that is no tensor, IndexError for ids outside the vocabulary, ValueError for a
        prompt without tokens, for stop words that are not lists of ids, for a streamer with beams and for
        contradictions about the cache.
        """
        kwargs.update(arguments_by_name(args, after="logits_processor"))
        settings = resolved_settings(self, generation_config, kwargs.get("use_model_defaults"))
        if kwargs.get("streamer") is not None and (_setting("num_beams", settings, kwargs) or 1) > 1:
            raise ValueError("Beams can't be streamed: they may change until the last token. Pass num_beams=1.")
        kwargs = self._with_cache(settings, kwargs, cache_bits)
        if stop_words_ids is None:
            stop_words_ids = getattr(settings, "stop_words_ids", None)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None:
            if not torch.is_tensor(ids):
                raise TypeError(
                    f"The prompt must be a tensor of token ids, found {type(ids).__name__}. Encode a text first: "
                    f"model.generate(**tokenizer(text, return_tensors='pt').to(model.device))."
                )
            if kwargs.get("inputs_embeds") is None:
                self.transformer.check_tokens(ids)
            self.transformer.check_ids(ids)
        prompt_length = 0 if ids is None else ids.shape[1]
        if logits_processor is not None:
            logits_processor = [
                processor.behind(prompt_length) if hasattr(processor, "behind") else processor
                for processor in logits_processor
            ]
        if stop_words_ids is not None:
            eos = kwargs.get("eos_token_id", settings.eos_token_id)
            eos = eos.tolist() if torch.is_tensor(eos) else eos
            stop = StopWordsLogitsProcessor(
                stop_words_ids, eos[0] if isinstance(eos, (list, tuple)) else eos, prompt_length=prompt_length
            )
            logits_processor = [*(logits_processor or []), stop]
        tokenizer = kwargs.get("tokenizer")
        texts = kwargs.get("stop_strings", getattr(settings, "stop_strings", None))
        if texts and hasattr(tokenizer, "base_ranks") and hasattr(settings, "stop_strings"):
            kwargs["stop_strings"] = None  # transformers' own criterion takes tokens for texts: these are bytes
            end = StopAtText(tokenizer, [texts] if isinstance(texts, str) else texts, prompt_length)
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), end]
        if DRAFTS_READ_PROMPTS_AGAIN and self._has_drafts(settings, kwargs):
            cache = kwargs.get("past_key_values")
            if hasattr(cache, "get_seq_length") and 0 < cache.get_seq_length() <= prompt_length:
                crop_cache(cache, 0)
        alpha = self._prompt_alpha(settings, ids, kwargs)
        if alpha is not None:
            kwargs["ntk_alpha"] = alpha
        assistant = kwargs.get("assistant_model")
        is_qwen = isinstance(assistant, QWenGenerationMixin)
        if ASSISTANTS_GENERATE and is_qwen and assistant.config.vocab_size < self.config.vocab_size:
            kwargs["assistant_model"] = _PaddedAssistant(assistant, self.config.vocab_size, logits_processor)
        with _one_generation():
            return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def _prompt_alpha(self, settings, ids, kwargs: dict) -> torch.Tensor | None:
        """
        The NTK scale of each prompt, float32 (B,), for the whole generation: its first call may see a piece of the
        prompt only, or draft tokens behind it, or there is no cache that remembers. None where a cache has begun.
        """
        cache, assistant = kwargs.get("past_key_values"), kwargs.get("assistant_model")
        known_to_assistant = assistant is None or "ntk_alpha" in parameter_names(assistant.forward)
        if not self.config.use_dynamic_ntk or self.training or not known_to_assistant:
            return None
        if cache is not None and (not hasattr(cache, "get_seq_length") or int(cache.get_seq_length())):
            return None
        mask, position_ids, embeds = (kwargs.get(name) for name in ("attention_mask", "position_ids", "inputs_embeds"))
        if position_ids is not None:
            lengths = position_ids.amax(-1) + 1  # (B,)
        elif mask is not None and mask.dim() == 2:
            lengths = mask.long().sum(-1)
        elif mask is None and embeds is not None:
            lengths = torch.full(embeds.shape[:1], embeds.shape[1], device=embeds.device)
        elif mask is None and ids is not None and ids.dim() == 2:
            # As transformers infers the mask that is missing: what may be padding is.
            pad, eos = (kwargs.get(name, getattr(settings, name, None)) for name in ("pad_token_id", "eos_token_id"))
            ends = torch.as_tensor([] if eos is None else eos).reshape(-1).tolist()
            lengths = (ids != (-1 if pad is None or int(pad) in ends else int(pad))).sum(-1)
        else:
            return None
        return self.transformer.prompt_alpha(lengths)

    def _has_drafts(self, settings, kwargs: dict) -> bool:
        names = "assistant_model", "prompt_lookup_num_tokens", "penalty_alpha"
        return any(_setting(name, settings, kwargs) for name in names)

    def _with_cache(self, settings, kwargs: dict, bits: int | None) -> dict:
        """The arguments of `generate`, with a cache of ours unless that is left to the caller or to transformers."""

        def setting(name):
            return _setting(name, settings, kwargs)

        named = setting("cache_implementation")
        unwanted = kwargs.get("past_key_values") is not None or setting("use_cache") is False
        if bits is not None and (unwanted or named not in (None, "quantized")):
            raise ValueError(
                f"cache_bits={bits} asks for a quantised cache, but there is past_key_values, use_cache=False or "
                f"cache_implementation={named!r}. Pass one of them, or past_key_values=QWenQuantizedCache({bits})."
            )
        # transformers' own cache copies everything for every token. On a CPU SDPA reads bfloat16 slowly; on new GPUs it
        # takes cuDNN, which plans anew for every length.
        is_faster = (
            has_decode_kernel(self.device, self.dtype, self.config.kv_channels)
            and (self.device.type == "cuda" or self.config._attn_implementation == "sdpa")
            and (DRAFTS_CROP_CACHES or not self._has_drafts(settings, kwargs))
        )
        if unwanted:
            return kwargs
        if bits is not None or (named == "quantized" and setting("cache_config") is None):
            cache = quantized_cache(self.config, bits)
        elif named is not None:
            return kwargs
        elif self.config.use_cache_quantization:
            cache = quantized_cache(self.config)
        elif is_faster and not self.training:
            cache = QWenCache()
        else:
            return kwargs
        _announce(f"generate keeps keys and values in {cache}")
        return {**kwargs, "past_key_values": cache, **({} if named is None else {"cache_implementation": None})}


def _setting(name: str, settings, kwargs: dict):
    """Of a call of `generate`, from its keywords or its resolved settings."""
    value = kwargs.get(name)
    return getattr(settings, name, None) if value is None else value


class _PaddedAssistant:
    """
    An assistant that seems to have the rows of the model it drafts for. The four sizes share one vocabulary and pad
    their embeddings to 151,936 or 152,064 rows, but transformers takes unequal numbers for unequal tokenizers. The rows
    that the assistant lacks have probability 0, as speculative sampling (https://arxiv.org/abs/2211.17192) needs it.

    transformers would hand on the model's logits processors, which know its number of rows. Those that the settings ask
    for, the assistant makes itself; those of the caller, `processors`, are given all rows.
    """

    def __init__(self, assistant, vocab_size: int, processors=None):
        self.assistant, self.rows = assistant, assistant.config.vocab_size
        self.config = copy.copy(assistant.config)
        self.config.vocab_size = vocab_size
        self.processors = LogitsProcessorList(processors or ())

    def __getattr__(self, name):
        return getattr(self.assistant, name)

    def process(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The caller's processors, on scores (B, rows of the assistant)."""
        missing = self.config.vocab_size - self.rows
        return self.processors(input_ids, nn.functional.pad(scores, (0, missing), value=-torch.inf))[:, : self.rows]

    def generate(self, *args, input_ids: torch.Tensor, **kwargs):
        kwargs["logits_processor"] = [self.process] if self.processors else []
        # A row of padding that was generated all the same would be outside of the assistant's embedding.
        output = self.assistant.generate(*args, input_ids=input_ids.clamp(max=self.rows - 1), **kwargs)
        output.sequences[:, : input_ids.shape[1]] = input_ids
        missing = self.config.vocab_size - self.rows
        output.scores = tuple(nn.functional.pad(scores, (0, missing), value=-torch.inf) for scores in output.scores)
        return output


@functools.lru_cache(maxsize=None)
def _announce(text: str) -> None:
    """Say it once in a process."""
    logger.info(text)
