"""
What several processes compute together, for test_parallel.py: `python parallel.py CHECKPOINT TASK PROCESSES ...`.

One process imports what is needed and forks the others, which saves their imports; they meet over gloo.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from pathlib import Path

import accelerate
import torch
import transformers
from accelerate.utils import fsdp_utils
from torch import distributed
from torch.distributed import fsdp
from transformers import AutoModelForCausalLM

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
IDS = (torch.arange(80) * 37 % 320).view(2, 40)
MASK = torch.ones_like(IDS)
MASK[0, :8] = 0
# A static cache that is made before it sees keys is as wide as all heads.
HAS_LAZY_STATIC_CACHE = "lazy_initialization" in dir(
    getattr(getattr(transformers, "cache_utils", None), "StaticLayer", None)
)


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, fp32=True, **kwargs)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own(tensor):
    """What this process holds of a parameter."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def results(model) -> dict:
    """Logits, greedy ids, and the shape of the first layer's keys where the release tells."""
    with torch.no_grad():
        output = model(IDS, attention_mask=MASK, use_cache=True)
        ids = model.generate(IDS, attention_mask=MASK, **GREEDY)
    found = {"logits": output.logits, "ids": ids}
    if hasattr(output.past_key_values, "layers"):
        found["key shape"] = tuple(output.past_key_values.layers[0].keys.shape)
    return found


def training(model, ids=IDS, mask=MASK, **kwargs) -> dict:
    model.train()
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **kwargs).loss
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients}


def tensor(path: str, folder: str) -> dict:
    model = load(path, tp_plan="auto")
    attention = model.transformer.h[0].attn
    found = {
        "c_attn": own(attention.c_attn.weight),
        "c_attn bias": own(attention.c_attn.bias),
        "c_proj": own(attention.c_proj.weight),
        "gate": own(model.transformer.h[0].mlp.w2.weight),
        **results(model),
    }
    if HAS_LAZY_STATIC_CACHE:
        found["static ids"] = model.generate(IDS, attention_mask=MASK, cache_implementation="static", **GREEDY)
    compat = importlib.import_module(f"{type(model).__module__.rpartition('.')[0]}.transformers_compat")
    if compat.KEEPS_FUSED_HEADS:
        few = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # or nearly all memory
        settings = transformers.GenerationConfig(**{**GREEDY, "eos_token_id": -1})
        rows = [row[mask.bool()].tolist() for row, mask in zip(IDS, MASK)]
        batch = model.generate_batch(rows, generation_config=settings, continuous_batching_config=few)
        found["batch ids"] = [output.generated_tokens for output in batch.values()]
    found.update(training(model))
    try:
        model.save_pretrained(folder)
    except NotImplementedError as error:
        found["not saved"] = str(error)
    return found


class EndsAfter(transformers.StoppingCriteria):
    """All rows, at another length in every process, as a clock would have it."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= IDS.shape[1] + 5 - 2 * distributed.get_rank())


def graphs(path: str, folder: str) -> dict:
    """Steps as a graph computes them, in Triton's interpreter, and those of the network."""
    importlib.import_module("interpreter").patch_once_a_launch()
    model = load(path, tp_plan="auto")
    home = type(model).__module__.rpartition(".")[0]
    steps, caches, attention, products = (
        importlib.import_module(f"{home}.{name}")
        for name in ("qwen_cuda_graph", "qwen_cache", "triton_attention", "triton_products")
    )
    for entry in products.PRODUCT.values():  # few large programs are faster there
        entry["BN"] = 64
    for entry in attention.TUNING.values():
        entry["programs"] = 2
    taken, step = [], steps.GraphedSteps.step

    def counting(self, *args):
        taken.append(1)
        return step(self, *args)

    steps.GraphedSteps.step = counting

    def run(devices, cache=None, rows=2, **settings):
        steps.DEVICES = devices
        kwargs = {
            "output_logits": True,
            "return_dict_in_generate": True,
            "past_key_values": cache or caches.QWenCache(),
        }
        output = model.generate(IDS[:rows], attention_mask=MASK[:rows], **{**GREEDY, **kwargs, **settings})
        return {"ids": output.sequences, "logits": torch.stack(output.logits)}

    found = {}
    for name, settings in {
        "rows": {},
        "row": {"rows": 1},
        "int8": {"cache": caches.QWenQuantizedCache, "max_new_tokens": 3},
    }.items():
        makes = settings.pop("cache", caches.QWenCache)
        settings = {"max_new_tokens": 4, **settings}
        found[name] = run(("cpu",), makes(), **settings), run((), makes(), **settings)
    torch.manual_seed(distributed.get_rank())
    found["drawn"] = run(("cpu",), do_sample=True, max_new_tokens=4)["ids"]
    found["ended"] = run(("cpu",), stopping_criteria=[EndsAfter()])["ids"]
    found["steps"] = len(taken)
    w1 = model.transformer.h[1].mlp.w1
    forward = w1.forward
    with torch.no_grad():
        plain = [steps.is_plain(model)]
        w1.forward = lambda *args: forward(*args)  # something else around it
        found["plain"] = [*plain, steps.is_plain(model)]
    return found


def share_of_training(model, **kwargs) -> dict:
    """A training step under FSDP2, in which each process has one row of the batch."""
    ids = IDS[distributed.get_rank()][None]
    return {
        "wrapped": [name for name, module in model.named_modules() if isinstance(module, fsdp.FSDPModule)],
        "share": sum(own(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters()),
        **training(model, ids, torch.ones_like(ids), **kwargs),
    }


def sharded(path: str, folder: str) -> dict:
    """By accelerate's policy for `_no_split_modules`, which older releases of it want to be told."""
    model = load(path)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(model._no_split_modules),
    )
    to_wrap = fsdp_utils.fsdp2_prepare_auto_wrap_policy(plugin, model)
    for module in filter(to_wrap, list(model.modules())):
        fsdp.fully_shard(module)
    return share_of_training(fsdp.fully_shard(model))


def sharded_with_head(path: str, folder: str) -> dict:
    """As accelerate 1.15 does it: embedding, and last norm with head, are units too. The model is saved then."""
    model = load(path)
    for module in (*model.transformer.h, model.transformer.wte):
        fsdp.fully_shard(module)
    fsdp.fully_shard([model.transformer.ln_f, model.lm_head], reshard_after_forward=False)
    found = share_of_training(fsdp.fully_shard(model), skip_logits=True)
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    model.save_pretrained(folder, state_dict=weights, is_main_process=distributed.get_rank() == 0)
    return found


def sharded_at_loading(path: str, folder: str) -> dict:
    return share_of_training(load(path, distributed_config={"fsdp_size": 2}))


def work(task: str, rank: int, processes: int, port: int, path: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    found = globals()[task](path, str(Path(folder, f"{task}-{processes}-saved")))
    torch.save(found, Path(folder, f"{task}-{processes}-{rank}.pt"))
    distributed.barrier()
    distributed.destroy_process_group()


def main(path: str, folder: str, *tasks: str) -> None:
    for task, processes in zip(tasks[::2], map(int, tasks[1::2])):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = torch.multiprocessing.get_context("fork")
        children = [
            context.Process(target=work, args=(task, rank, processes, port, path, folder)) for rank in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            sys.exit(f"{task} on {processes} processes ended with {[child.exitcode for child in children]}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(*sys.argv[1:])
