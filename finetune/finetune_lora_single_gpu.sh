#!/usr/bin/env bash
# LoRA on one GPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
alone "${ADAPTER[@]}" --bf16 True
