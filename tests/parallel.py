"""
What several processes compute together, for test_parallel.py: `python parallel.py CHECKPOINT TASK PROCESSES ...`.

One process imports what is needed and forks the others, which saves their imports; they meet over gloo.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch import distributed
from transformers import AutoModelForCausalLM

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
IDS = (torch.arange(80) * 37 % 320).view(2, 40)
MASK = torch.ones_like(IDS)
MASK[0, :8] = 0


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own(tensor):
    """What this process holds of a parameter."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def results(model) -> dict:
    """Logits, greedy ids, loss and gradients."""
    with torch.no_grad():
        output = model(IDS, attention_mask=MASK, use_cache=True)
        ids = model.generate(IDS, attention_mask=MASK, **GREEDY)
    found = {"logits": output.logits, "ids": ids}
    if hasattr(output.past_key_values, "layers"):
        found["key shape"] = tuple(output.past_key_values.layers[0].keys.shape)
    return found


def training(model) -> dict:
    model.train()
    loss = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
    loss.backward()
    return {"loss": loss.detach(), **{f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}}


def tensor(path: str, folder: str) -> dict:
    model = load(path, tp_plan="auto")
    attention = model.transformer.h[0].attn
    found = {
        "c_attn": own(attention.c_attn.weight), "c_attn bias": own(attention.c_attn.bias),
        "c_proj": own(attention.c_proj.weight), "gate": own(model.transformer.h[0].mlp.w2.weight), **results(model),
        "static ids": model.generate(IDS, attention_mask=MASK, cache_implementation="static", **GREEDY),
    }
    found.update(training(model))
    try:
        model.save_pretrained(folder)
    except NotImplementedError as error:
        found["not saved"] = str(error)
    return found


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
