#!/usr/bin/env bash
# All weights, on all GPUs, with DeepSpeed ZeRO-3.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
together "${WHOLE[@]}" --bf16 True --deepspeed "$HERE/ds_config_zero3.json"
