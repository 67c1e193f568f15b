r"""
Tokens a second and peak memory of tuning, beside transformers' Qwen2 with the same Trainer, on one GPU or several.

    python benchmarks/finetune.py [--cases 7B-lora-8x2048 ...] [--seconds 330]
    accelerate launch --config_file finetune/fsdp2.yaml --num_processes 4 \
        benchmarks/finetune.py --engines ours --cases 14B-lora-1x2048

A case is SIZE-METHOD-ROWSxTOKENS. The methods: `lora`, bfloat16; `int4`, LoRA over matrices of 4 bits (GPTQ, groups of
128; Qwen2 gets the same modules, as it has none of its own); `full`, all weights in float32, computed in bfloat16.
ROWSxTOKENSxN accumulates N batches a step, and `-plain` at the end means no gradient checkpointing. With several
processes the model is divided among them by FSDP2, and each has ROWS of its own. With `--deepspeed`, and torchrun,
DeepSpeed divides it as its file says, and keeps the float32 copy of what learns itself.

Random weights of the published shapes, made on the GPU, the same for every number of processes; random tokens without
padding. Ours goes through finetune.py's batches, both through transformers' Trainer with the same adapters (r = 64 on
every matrix of the blocks), optimiser, precision and attention: SDPA, or --attention flash_attention_2. Seconds are
means of --steps behind --warmup; the memory is what PyTorch allocated at most, on the fullest card. Every line is
printed as it comes; what would begin after --seconds is left out, and that is said. `--fp32` is for comparing losses.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import re
import sys
import tempfile
import time

import torch
from gpu import CUDA, SIZES, modeling, quantization, synchronize
from kv_cache import ROOT
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

sys.path.append(str(ROOT / "finetune"))
from data import PackedBatch

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
FORMAT = quantization.GPTQFormat(bits=4, group_size=128, desc_act=False, zero_offset=1, lm_head=False)
LORA_TARGETS = {
    "ours": ["c_attn", "c_proj", "w1", "w2"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
BLOCKS = {"ours": "QWenBlock", "qwen2": "Qwen2DecoderLayer"}
CASES = [  # what is asked for most first
    *("7B-lora-8x2048", "7B-int4-1x2048", "7B-lora-1x2048", "72B-int4-1x2048", "1.8B-full-8x2048", "1.8B-full-1x2048"),
    *("7B-int4-8x2048", "7B-lora-1x256x8", "7B-int4-1x256x8", "7B-lora-1x2048-plain", "7B-int4-1x2048-plain"),
]
CASE = re.compile(r"(?P<size>[\d.]+B|tiny)-(?P<method>lora|int4|full)-(?P<shape>\d+x\d+(x\d+)?)(?P<plain>-plain)?")


def network(engine: str, size: str, length: int, dtype: torch.dtype, attention: str):
    """Without weights, on the meta device; under ZeRO-3 on the device, divided among the processes."""
    hidden, layers, heads, intermediate, vocabulary = SIZES[size]
    common = {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "use_cache": False}
    common |= {"num_attention_heads": heads, "max_position_embeddings": max(length, 8192)}
    if engine == "qwen2":
        maker = Qwen2ForCausalLM
        config = Qwen2Config(**common, num_key_value_heads=heads, intermediate_size=intermediate // 2)
    else:
        maker = modeling.QWenLMHeadModel
        config = modeling.QWenConfig(
            **common, kv_channels=hidden // heads, intermediate_size=intermediate, seq_length=8192
        )
    with contextlib.ExitStack() as making:
        if is_deepspeed_zero3_enabled():
            import deepspeed

            deepspeed.init_distributed()  # dividing takes a group of processes
        else:
            making.enter_context(torch.device("meta"))
        return maker._from_config(config, dtype=dtype, attn_implementation=attention)


def make_model(engine: str, size: str, method: str, length: int, args):
    """Without weights: what learns is in float32 (not for DeepSpeed), the rest in bfloat16 or 4 bits."""
    single = args.fp32 or (method == "full" and args.deepspeed is None)
    model = network(engine, size, length, torch.float32 if single else torch.bfloat16, args.attention)
    if method == "full":
        return model
    if method == "int4":
        for name, old in list(model.named_modules()):
            if isinstance(old, torch.nn.Linear) and name != "lm_head":
                new = quantization.QuantizedLinear(
                    old.in_features, old.out_features, FORMAT, device="meta", dtype=old.weight.dtype
                )
                new.bias = None if old.bias is None else new.bias
                model.set_submodule(name, new)
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules=LORA_TARGETS[engine]))


@torch.no_grad()
def make_weights(model) -> None:
    """On the device, random: by the number of the parameter, so that any number of processes has the same."""
    if not is_deepspeed_zero3_enabled():
        model.to_empty(device=DEVICE)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        draw = torch.Generator(DEVICE).manual_seed(number)
        whole = torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device=DEVICE)
        if name.endswith("qweight"):
            whole.random_(-(2**31), 2**31 - 1, generator=draw)
        elif name.endswith("qzeros"):
            whole.fill_(0x77777777)
        elif name.endswith("scales"):
            whole.uniform_(0.8, 1.2, generator=draw).mul_(0.07 / 16)  # weights deviate by 0.02
        elif name.endswith("g_idx"):
            whole.copy_(torch.arange(len(whole)) // FORMAT.group_size)
        elif whole.dim() == 1:
            whole.fill_(0 if name.endswith("bias") else 1)
        elif "lora_B" in name:
            whole.zero_()
        else:
            whole.normal_(std=0.02, generator=draw)
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(whole)
        elif isinstance(parameter, DTensor):
            part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(whole)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:  # Qwen2's rotary frequencies
                module._buffers[name] = getattr(type(module)(module.config), name).to(DEVICE)


class ShardingTrainer(Trainer):
    """Has accelerate divide a model while it is on the meta device, and makes the weights then."""

    def create_optimizer(self, *args, **kwargs):
        if self.is_fsdp_enabled:
            from accelerate.utils import fsdp2_prepare_model

            fsdp2_prepare_model(self.accelerator, self.model)
            make_weights(self.model)
        return super().create_optimizer(*args, **kwargs)


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, *_, **__):
        synchronize()
        self.times.append(time.perf_counter())


def collate_qwen2(rows: list[list[int]]) -> dict:
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}


def collate_ours(rows: list[list[int]], flat: bool) -> dict:
    return PackedBatch(0, flat)([[{"input_ids": row, "labels": row}] for row in rows])


def measure(engine: str, case: re.Match, args) -> list:
    """The cells of a line behind its name."""
    size, method = case["size"], case["method"]
    batch, length, accumulated = [*map(int, case["shape"].split("x")), 1][:3]
    steps = args.warmup + args.steps
    draw = torch.Generator().manual_seed(0)
    rows = steps * batch * accumulated * PROCESSES
    data = torch.randint(0, SIZES[size][4] - 300, (rows, length), generator=draw).tolist()
    flat = args.attention.startswith("flash")
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = BLOCKS[engine]  # instead of what the file names
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            gradient_checkpointing=not case["plain"],
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=not args.fp32,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not CUDA,
            deepspeed=args.deepspeed,
        )
        model = make_model(engine, size, method, length, args)
        if PROCESSES == 1 or args.deepspeed:
            make_weights(model)
        trainer = ShardingTrainer(
            model=model,
            args=training,
            train_dataset=data,
            data_collator=functools.partial(collate_ours, flat=flat) if engine == "ours" else collate_qwen2,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = (clock.times[-1] - clock.times[args.warmup - 1]) / args.steps
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    peaks = [torch.cuda.max_memory_allocated() if CUDA else 0]
    if PROCESSES > 1:
        gathered = [None] * PROCESSES
        torch.distributed.all_gather_object(gathered, peaks[0])
        peaks = gathered
    if args.fp32:
        losses = " ".join(f"{entry['loss']:.6f} ({entry['grad_norm']:.6f})" for entry in log)
    else:
        losses = f"{log[0]['loss']:.3f} {log[-1]['loss']:.3f}"
    return [
        f"{batch * accumulated * PROCESSES * length / seconds:.0f}",
        f"{seconds:.3f}",
        f"{max(peaks) / 1e9:.2f}",
        losses,
    ]


def line(*cells) -> None:
    if RANK == 0:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second and peak memory of tuning.")
    parser.add_argument("--cases", nargs="+", default=CASES, help="as 7B-lora-8x2048")
    parser.add_argument("--engines", nargs="+", choices=LORA_TARGETS, default=list(LORA_TARGETS))
    parser.add_argument("--attention", default="sdpa", help="by transformers' name, for both")
    parser.add_argument("--deepspeed", help="its configuration, such as finetune/ds_config_zero3.json")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3600, help="what would begin later is left out")
    parser.add_argument("--fp32", action="store_true", help="all in float32; tells the loss of every step")
    args = parser.parse_args()
    cases = [CASE.fullmatch(case) for case in args.cases]
    if None in cases:
        parser.error(f"{args.cases[cases.index(None)]!r} is no case, such as 7B-lora-8x2048")
    began = time.perf_counter()
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if RANK == 0:
        card = torch.cuda.get_device_name() if CUDA else "CPU"
        print(f"{PROCESSES} x {card}, torch {torch.__version__}, attention {args.attention}\n")
    line(
        "case",
        "",
        "tokens/s",
        "s a step",
        "peak GB",
        "loss (norm of its gradient)" if args.fp32 else "first and last loss",
    )
    line(*["---"] * 6)
    for case in cases:
        for engine in args.engines:
            late = torch.tensor(time.perf_counter() - began > args.seconds, device=DEVICE)
            if PROCESSES > 1 and torch.distributed.is_initialized():
                torch.distributed.broadcast(late, 0)
            if late:
                line(case[0], engine, "left out for lack of time", "", "", "")
                continue
            try:
                cells = measure(engine, case, args)
            except Exception as error:
                if PROCESSES > 1:  # the others wait for this one
                    raise
                cells = [f"{type(error).__name__}: {str(error).splitlines()[0][:100]}", "", "", ""]
            line(case[0], engine, *cells)
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
                if torch.cuda.memory_allocated() > 1e8:
                    print(f"{torch.cuda.memory_allocated() / 1e9:.2f} GB were not given back", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
