#!/usr/bin/env bash
# Q-LoRA on one GPU: an Int4 checkpoint, or any other in 4 bits by bitsandbytes.
MODEL=${MODEL:-Qwen/Qwen-7B-Chat-Int4}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
alone "${ADAPTER[@]}" --q_lora True --fp16 True
