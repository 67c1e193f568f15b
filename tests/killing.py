"""
Tune a checkpoint twice, once undisturbed and once killed by SIGKILL at random moments and resumed:

    python killing.py CHECKPOINT OUTPUT STEPS SAVE_STEPS KILLS SEED

A kill comes within three steps' time after a step that is drawn at random, so in a checkpoint too. Prints as JSON in
which step each came. What is needed is imported once; every run is a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "finetune"))
import finetune  # noqa: E402


class Progress(transformers.TrainerCallback):
    """Writes the number of the step that is over; after the `last` one it waits to be killed."""

    def __init__(self, path: Path, last: int | None):
        self.path, self.last = path, last

    def on_train_begin(self, args, state, control, **kwargs):
        self.path.write_text(str(state.global_step))
        while self.last is not None and state.global_step >= self.last:
            signal.pause()

    on_step_end = on_train_begin


def run(arguments: list[str], progress: Path, last: int | None) -> None:
    torch.set_num_threads(1)
    tuner = finetune.Tuner.__init__
    callbacks = [Progress(progress, last)]
    finetune.Tuner.__init__ = lambda self, *args, **kwargs: tuner(self, *args, **kwargs, callbacks=callbacks)
    finetune.tune(*finetune.parse(arguments))


def fork(arguments: list[str], progress: Path, log: Path, last: int | None = None) -> int:
    progress.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            run(arguments, progress, last)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def is_over(child: int) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    if done and os.waitstatus_to_exitcode(status):
        sys.exit(f"a run ended with {os.waitstatus_to_exitcode(status)}")
    return bool(done)


def step_of(progress: Path) -> int:
    return int(progress.read_text() or -1) if progress.exists() else -1


def main(checkpoint: str, folder: str, steps: str, save_steps: str, kills: str, seed: str) -> None:
    folder, kills, rng = Path(folder), int(kills), random.Random(int(seed))
    common = ["--model_name_or_path", checkpoint, "--data_path", str(ROOT / "finetune" / "example.json")]
    common += ["--max_steps", steps, "--save_steps", save_steps, "--save_total_limit", "2", "--disable_tqdm", "True"]
    common += ["--use_lora", "--lora_r", "4", "--lora_dropout", "0.2", "--learning_rate", "5e-3", "--use_cpu", "True"]
    common += ["--per_device_train_batch_size", "2", "--model_max_length", "96", "--report_to", "none"]
    common += ["--logging_steps", save_steps, "--lr_scheduler_type", "cosine", "--resume_from_checkpoint", "auto"]
    progress, log, reached = folder / "progress", folder / "log", []

    child = fork([*common, "--output_dir", str(folder / "undisturbed")], progress, log)
    began = None
    while not is_over(child):
        time.sleep(0.02)
        began = began or (time.monotonic() if progress.exists() else None)
    duration = time.monotonic() - began

    step = duration / int(steps)
    targets = sorted(rng.randrange(int(steps) - 4) for _ in range(kills))
    while True:
        target = targets[len(reached)] if len(reached) < kills else None
        last = None if target is None else target + 4  # if the kill is late, the run waits for it
        child = fork([*common, "--output_dir", str(folder / "killed")], progress, log, last)
        while not (over := is_over(child)) and (target is None or step_of(progress) < target):
            time.sleep(step / 10)
        if over:
            break
        time.sleep(rng.uniform(0, 3 * step))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached.append(step_of(progress))
    print(json.dumps(reached))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(*sys.argv[1:])
