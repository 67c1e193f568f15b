#!/usr/bin/env bash
# LoRA on all GPUs, with DeepSpeed ZeRO-2.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
together "${ADAPTER[@]}" --bf16 True --deepspeed "$HERE/ds_config_zero2.json"
