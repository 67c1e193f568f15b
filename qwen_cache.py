"""
Caches of keys and values that grow in blocks and attend where they store: full precision, int8 and int4.

A step that adds few tokens to a filled cache is computed over the storage itself by the operations of qwen_ops.py,
which have native kernels for CPUs and GPUs. Everything else, a prompt above all, goes through the attention function
that the model is configured with: the cache hands over keys and values as every transformers cache does.

In the shapes below B is the batch, T the new tokens, S the tokens attended to, nh the heads and hd the width of one.
"""

from __future__ import annotations

import functools

import torch

from .qwen_ops import (
    decode_attention,
    dequantize,
    implementation,
    quantize_append,
    quantized_decode_attention,
    quantized_sizes,
    rotate,
)
from .transformers_compat import DynamicCache, LayeredCache, is_compiling, is_differentiating_forward

BLOCK = 256  # tokens by which storage grows


def is_plain_inference() -> bool:
    """Whether nothing is differentiated nor compiled, neither of which goes well with writing in place."""
    return not (torch.is_grad_enabled() or is_compiling() or is_differentiating_forward())


class _Store:
    """Keys or values of a layer: tensors (B, nh, capacity, width), of which the first `length` tokens are written."""

    def __init__(self, bits: int | None, device, expected_length: int | None):
        self.bits = bits
        self.device = device
        self.expected_length = expected_length
        self.tensors: list[torch.Tensor] = []
        self.length = 0

    def append(self, x: torch.Tensor) -> None:
        """x: (B, nh, T, hd)."""
        x = x.to(self.tensors[0].device if self.length else self.device or x.device)
        end = self.length + x.shape[2]
        if self.bits is None and not is_plain_inference():
            before = self.written() if self.length else ()  # what was emptied may be another batch's
            self.tensors = [torch.cat((*before, x), dim=2)]
        else:
            self._reserve(x, end)
            if self.bits is None:
                self.tensors[0][:, :, self.length : end] = x
            else:
                quantize_append(*self.tensors, x, self.length)
        self.length = end

    def _reserve(self, x: torch.Tensor, needed: int) -> None:
        """Room for `needed` tokens like x."""
        if self.length and self.tensors[0].shape[:2] != x.shape[:2]:
            rows, heads = self.tensors[0].shape[:2]
            raise ValueError(f"This cache holds {rows} rows of {heads} heads, the new tokens are {tuple(x.shape[:2])}.")
        if self.length:
            self.grow(needed)
            return
        if self.bits is None:
            widths, dtype = (x.shape[-1],), x.dtype
        else:
            widths, dtype = quantized_sizes(x.shape[-1], self.bits), torch.uint8
        with torch.inference_mode(False):  # the cache may be filled inside and used outside of it
            like_x = [torch.empty(*x.shape[:2], 0, n, dtype=dtype, device=x.device) for n in widths]

        def kind(t: torch.Tensor) -> tuple:
            return (*t.shape[:2], t.shape[3], t.dtype, t.device)

        # Storage that was emptied may be another model's, or of another precision.
        if list(map(kind, self.tensors)) != list(map(kind, like_x)):
            self.tensors = like_x
        self.grow(needed)

    def grow(self, needed: int) -> None:
        """
        Room for `needed` tokens. Growing copies what is there, one layer after the other, so that the peak is one layer
        above the total; storage grows by a quarter, or towards the length that is expected, so that it is rare.
        """
        if needed <= self.tensors[0].shape[2]:
            return
        capacity = needed + needed // 4 if self.length else needed
        if self.expected_length is not None:
            capacity = max(needed, min(needed + max(needed // 4, 4 * BLOCK), self.expected_length))
        capacity = -(-capacity // BLOCK) * BLOCK
        old = self.written()
        with torch.inference_mode(False):  # as in `_reserve`
            self.tensors = [t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in self.tensors]
        for tensor, before in zip(self.tensors, old):
            tensor[:, :, : self.length] = before

    def written(self) -> list[torch.Tensor]:
        """Views of the tensors, (B, nh, length, width)."""
        return [t[:, :, : self.length] for t in self.tensors]

    def read(self, dtype: torch.dtype, device) -> torch.Tensor:
        """Everything as (B, nh, length, hd)."""
        if self.bits is None:
            (x,) = self.written()
            return x.to(device=device, dtype=dtype)
        codes, params = self.written()
        hd = codes.shape[-1] * 8 // self.bits
        rotation = rotate(torch.eye(hd, dtype=torch.float32, device=codes.device))
        return (dequantize(codes, params, hd) @ rotation).to(device=device, dtype=dtype)

    def extend(self, x: torch.Tensor) -> torch.Tensor:
        """Append x, and give everything for an attention function; what is new is still exact."""
        if self.length == 0 or self.bits is not None:
            before = [self.read(x.dtype, x.device)] if self.length else []
            self.append(x)
            return torch.cat((*before, x), dim=2) if before else x
        self.append(x)
        return self.read(x.dtype, x.device)


class _Layer:
    def __init__(self, *settings):
        self.keys, self.values = _Store(*settings), _Store(*settings)

    @property
    def length(self) -> int:
        return self.keys.length

    @property
    def batch_size(self) -> int:
        return self.keys.tensors[0].shape[0]

    def storages(self) -> list[torch.Tensor]:
        """The tensors of keys, then those of values, each (B, nh, capacity, width)."""
        return [*self.keys.tensors, *self.values.tensors]

    def crop(self, length: int) -> None:
        for store in (self.keys, self.values):
            store.length = min(store.length, length)

    def select(self, rows: torch.Tensor) -> None:
        for store in (self.keys, self.values):
            with torch.inference_mode(False):  # as in `_reserve`
                store.tensors = [t[rows.to(t.device)] for t in store.tensors]


class QWenCache(LayeredCache):
    """
    Keys and values in the model's precision, for `past_key_values`; `generate` takes it by itself on a CPU
    and on an NVIDIA GPU.

    Args:
        device: where to keep keys and values, and to attend over them: "cpu" leaves the memory of a GPU to the
            weights. Default: each layer's own.

    Attributes:
        nbytes: bytes of all tensors held.

    Example:
        >>> output = model.generate(ids, past_key_values=QWenCache())
    """

    bits: int | None = None
    kernel = True
    MAX_NEW_TOKENS = 16  # from there on an attention function is as fast

    def __init__(self, *, device=None):
        super().__init__()
        self.device = None if device is None else torch.device(device)
        self._expected_length: int | None = None

    def _layer(self, layer_idx: int) -> _Layer:
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer(self.bits, self.device, self._expected_length))
        return self.layers[layer_idx]

    def _stores(self) -> list[_Store]:
        return [store for layer in self.layers for store in (layer.keys, layer.values)]

    def expect(self, length: int | None) -> None:
        """Tokens that will be stored at most, where that is known: storage grows towards them."""
        self._expected_length = length
        for store in self._stores():
            store.expected_length = length

    def storages(self) -> list[torch.Tensor]:
        """Of every layer the tensors of keys, then those of values, each (B, nh, capacity, width)."""
        return [tensor for layer in self.layers for tensor in layer.storages()]

    def make_room(self, new_tokens: int) -> None:
        """Storage for so many tokens more, for who writes them there itself and then calls `advance`."""
        for store in self._stores():
            store.grow(store.length + new_tokens)

    def advance(self, new_tokens: int) -> None:
        """So many tokens were written behind those that were there."""
        for store in self._stores():
            store.length += new_tokens

    def attends(self, new_tokens: int) -> bool:
        """Whether this step is for `attend`: few new tokens behind a filled cache, outside of training."""
        return self.kernel and new_tokens <= self.MAX_NEW_TOKENS and self.get_seq_length() > 0 and is_plain_inference()

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """
        Append the keys and values of new tokens, and compute their attention over all.

        query, key, value: (B, nh, T, hd). mask: boolean, True is attended to: None or (B, S), the tokens that are
        real, or (B, 1 or nh, T, S), which says everything. Returns (B, T, nh, hd).
        """
        layer = self._layer(layer_idx)
        layer.keys.append(key)
        layer.values.append(value)
        stored = (*layer.keys.written(), *layer.values.written())
        device = stored[0].device
        attention = decode_attention if self.bits is None else quantized_decode_attention
        mask = None if mask is None else mask.to(device)
        return attention(query.to(device), *stored, mask, scaling).to(query.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """
        Append the keys and values (B, nh, T, hd) of new tokens; all of them for an attention function, (B, nh, S, hd)
        each.
        """
        layer = self._layer(layer_idx)
        return layer.keys.extend(key_states), layer.values.extend(value_states)

    def __getitem__(self, layer_idx: int):
        stores = (self.layers[layer_idx].keys, self.layers[layer_idx].values)
        # Copies: what is written later must not show in them.
        return tuple(store.read(store.tensors[0].dtype, store.tensors[0].device).clone() for store in stores)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.storages())

    def _settings(self) -> str:
        return "" if self.device is None else f"device={str(self.device)!r}"

    def __repr__(self) -> str:
        name = f"{type(self).__name__}({self._settings()})"
        if not self.nbytes:
            return name
        attention = implementation(self.layers[0].keys.tensors[0].device) if self.kernel else "the model's"
        return (
            f"{name}: {self.get_seq_length()} tokens, {len(self.layers)} layers, {self.nbytes / 1e6:.1f} MB, "
            f"attention: {attention}"
        )


class QWenQuantizedCache(QWenCache):
    """
    Keys and values in 8 or 4 bits: 0.52 or 0.30 of the memory that bfloat16 takes at a head size of 128.

    Every token and head has scales of its own (qwen_ops.py describes the format). A prompt attends to its own keys
    and values before they are rounded. No gradient flows through what is stored.

    Args:
        bits: 8 or 4.
        kernel: attend over the stored codes where that is possible; False reads them back at every step instead, which
            is slow, and leaves all attention to the attention function that the model is configured with.
        device: as of `QWenCache`.

    Raises ValueError for other bits.

    Example:
        >>> output = model.generate(ids, past_key_values=QWenQuantizedCache(bits=4))
    """

    MAX_NEW_TOKENS = 64  # reading back everything costs more than that many tokens

    def __init__(self, bits: int = 8, *, kernel: bool = True, device=None):
        if bits not in (4, 8):
            raise ValueError(f"A quantised cache has 8 or 4 bits, found bits={bits!r}.")
        super().__init__(device=device)
        self.bits = bits
        self.kernel = kernel

    def _settings(self) -> str:
        settings = [f"bits={self.bits}", f"kernel={self.kernel}", super()._settings()]
        return ", ".join(filter(None, settings))

    def __getitem__(self, layer_idx: int):
        raise ValueError(
            "This release of transformers reads keys and values out of the cache to take draft tokens back, and a "
            "quantised cache would be lost by it. Use transformers 4.42 or newer, or past_key_values=QWenCache()."
        )


def new_cache(config):
    """The cache of a call that brings none, as the configuration says."""
    return quantized_cache(config) if config.use_cache_quantization else DynamicCache()


def quantized_cache(config, bits: int | None = None) -> QWenQuantizedCache:
    """As the configuration says; by `use_cache_kernel` too if it is what asked for quantisation."""
    kernel = config.use_cache_kernel or not config.use_cache_quantization
    return QWenQuantizedCache(config.cache_bits if bits is None else bits, kernel=kernel)


def remembered_alpha(cache, past_length, of_new_tokens) -> torch.Tensor:
    """
    The NTK scale of each row, float32 (B or 1, T or 1): the one that its first tokens had, which the cache remembers as
    `cache.ntk_alpha`, float32 (B or 1,), and which follows its rows.

    cache: a transformers Cache, or None. past_length: its tokens, an int or (a static cache) a tensor of one element.
    of_new_tokens: gives the scale of the tokens of this call, (B or 1, T or 1), for rows that begin with them.
    """
    stored = getattr(cache, "ntk_alpha", None)
    if stored is not None and not isinstance(past_length, torch.Tensor) and past_length:
        return stored[:, None]
    alpha = of_new_tokens()
    if cache is None:
        return alpha
    if stored is not None and isinstance(past_length, torch.Tensor):
        # A static cache may have been reset. Its length is a tensor: decide without a branch, so that this
        # compiles and no device waits for the host. A compiled step is never the first, and has nothing to store.
        alpha = torch.where(past_length == 0, alpha, stored.to(alpha.device)[:, None])
        if is_compiling():
            return alpha
    if not isinstance(cache, (LayeredCache, _FollowsRows)) and not is_compiling():
        cache.__class__ = _following(type(cache))
    cache.ntk_alpha = alpha.amax(-1)
    return alpha


class _FollowsRows:
    """For a cache of transformers: the scale that was noted on it follows its rows."""

    ntk_alpha = None

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        if self.ntk_alpha is not None and self.ntk_alpha.shape[0] > 1:
            self.ntk_alpha = self.ntk_alpha.repeat_interleave(repeats)

    def _select(self, rows) -> None:
        if self.ntk_alpha is not None and self.ntk_alpha.shape[0] > 1:  # one is for all
            self.ntk_alpha = self.ntk_alpha[rows.to(self.ntk_alpha.device)]

    def __reduce__(self):
        return _restored, (type(self).__mro__[2], vars(self))


@functools.lru_cache(maxsize=None)
def _following(kind: type) -> type:
    return type(kind.__name__, (_FollowsRows, kind), {"__module__": kind.__module__})


def _restored(kind: type, state: dict):
    cache = object.__new__(_following(kind))
    cache.__dict__.update(state)
    return cache
