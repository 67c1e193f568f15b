"""
finetune/finetune.py with its model divided by FSDP2 among processes on a CPU; test_finetune.py starts it.

accelerate 1.15 leaves FSDP aside, without a word, where processes are on a CPU. PyTorch's works there. So accelerate is
told that they are on GPUs, once it has chosen their device and their way to speak to each other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "finetune"))
import finetune

make = PartialState.__init__


def make_as_on_gpus(self, *args, **kwargs):
    make(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = make_as_on_gpus
    model = finetune.tune(*finetune.parse()).model
    for module in (model, *model.transformer.h):
        assert isinstance(module, FSDPModule), type(module)
    torch.distributed.destroy_process_group()
