"""What kernels in Triton share: how they are compiled and launched, what the GPU has, and functions of one number."""

# No `from __future__ import annotations`: the interpreter of Triton up to 3.2 knows no constexpr that is a text.

import functools
import importlib
import os
import threading
from concurrent import futures

import torch

# No import statements: transformers refuses code that imports what is not installed.
triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")

# --- Launches ----------------------------------------------------------------------------------------------------

_THREAD = threading.local()  # `.noted`: the launches that `compile_together` collects in it


class Kernel:
    """What `triton.jit` makes of a function, launched in its way: `kernel[grid](…)`."""

    def __init__(self, jitted):
        self.jitted = jitted

    def __getitem__(self, grid):
        noted = getattr(_THREAD, "noted", None)
        launch = self.jitted[grid] if noted is None else functools.partial(self._note, noted)
        # A product and a sum in one instruction, unless the launch says otherwise: Triton 3.9 warns where neither is
        # said, and later ones will compute them apart.
        return functools.partial(launch, enable_fp_fusion=True)

    def _note(self, noted: dict, *args, **options) -> None:
        kinds = (
            x.dtype if isinstance(x, torch.Tensor) else () if parameter.do_not_specialize else x
            for x, parameter in zip(args, self.jitted.params)
        )
        noted.setdefault((self, *kinds, *options.items()), (self.jitted, args, options))

    def __getattr__(self, name: str):
        return getattr(self.jitted, name)


def kernel(function=None, **options):
    """`triton.jit`, for functions that are launched."""
    if function is None:
        return lambda function: kernel(function, **options)
    return Kernel(triton.jit(function, **options))


def _done_once() -> list:
    """
    What a process does before its first kernel: to make the driver, by a C compiler, and to hash Triton's files.

    Triton keeps the results, but threads that come meanwhile all do it, and each takes longer.
    """
    modules = (importlib.import_module(f"triton.{name}") for name in ("runtime.cache", "compiler.compiler"))
    keys = [module.triton_key for module in modules if hasattr(module, "triton_key")]  # it has moved
    return [lambda: triton.runtime.driver.active, *keys[:1]]


def compile_together(compute, device: torch.device) -> None:
    """
    Makes the kernels that `compute()` launches on this GPU ready, in as many threads as there are cores.

    One after the other they take seconds in a process that finds none in Triton's cache: besides Triton's passes each
    has an assembler and a C compiler to wait for. `compute` is called, with its launches left out. What fails here
    raises what the launch would.
    """
    _THREAD.noted = noted = {}
    try:
        compute()
    finally:
        del _THREAD.noted

    def make_ready(launch) -> None:
        jitted, args, options = launch
        with torch.cuda.device(device):
            jitted.warmup(*args, grid=(1,), **options).run  # noqa: B018 (Triton builds it when it is looked up)

    launches = list(noted.values())
    if not launches or not hasattr(launches[0][0], "_hash_lock"):
        return  # up to Triton 3.3 two threads can't compile: they will be compiled when they are launched
    with futures.ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        list(threads.map(lambda function: function(), _done_once()))
        list(threads.map(make_ready, launches))


@functools.lru_cache(maxsize=None)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.lru_cache(maxsize=None)
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_block_optin", 2**16)


def known_options(launch: dict, cuda: bool) -> dict:
    """Without what only NVIDIA's GPUs know."""
    return launch if PTX.value and cuda else {name: x for name, x in launch.items() if name != "maxnreg"}


# --- Numbers -----------------------------------------------------------------------------------------------------


@triton.jit
def exp2(x):
    """2 to the power of x in float32. Triton's own links a library into the kernel, which takes some 60 ms."""
    if PTX:
        asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x) in float32; see `exp2`."""
    if PTX:
        asm: tl.constexpr = "rsqrt.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.rsqrt(x)


# Whether kernels may have instructions of NVIDIA's: AMD's cards are of the device type cuda too, and the interpreter is
# no GPU.
PTX = tl.constexpr(torch.version.cuda is not None and isinstance(rsqrt, triton.JITFunction))
