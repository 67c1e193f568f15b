"""Triton's interpreter, which computes GPU kernels on a CPU, without what takes most of its time."""

from __future__ import annotations

import functools

import triton.language as tl

try:
    from triton.runtime import interpreter
except ImportError:  # Triton 2.0 has none
    interpreter = None


@functools.lru_cache(maxsize=None)
def patch_once_a_launch() -> None:
    """
    A launch replaces the functions of triton.language by interpreted ones, and so does every call of a function within
    it, where they are replaced already: leave the repetitions out.
    """
    if interpreter is None:
        return
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @functools.lru_cache(maxsize=None)
    def modules(fn) -> frozenset:
        """Those whose functions `patch` replaces for a function: where it finds them under any name."""
        return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)

    def patch_new(fn):
        found = modules(fn)
        if found in patched:
            return None  # only a launch, which begins with nothing patched, has a use for it
        patched.add(found)
        return patch(fn)

    def begin(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, begin
