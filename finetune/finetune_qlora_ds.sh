#!/usr/bin/env bash
# Q-LoRA on all GPUs, with DeepSpeed ZeRO-2.
MODEL=${MODEL:-Qwen/Qwen-7B-Chat-Int4}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
together "${ADAPTER[@]}" --q_lora True --fp16 True --deepspeed "$HERE/ds_config_zero2.json"
