#!/usr/bin/env bash
# All weights, on all GPUs, with PyTorch's FSDP2 by accelerate.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec "$PYTHON" -m accelerate.commands.launch --config_file "$HERE/fsdp2.yaml" \
    --num_processes "$((${NNODES:-1} * ${GPUS_PER_NODE:-$(gpus)}))" --num_machines "${NNODES:-1}" \
    --machine_rank "${NODE_RANK:-0}" --main_process_ip "${MASTER_ADDR:-localhost}" \
    --main_process_port "${MASTER_PORT:-6001}" \
    "$HERE/finetune.py" "${COMMON[@]}" "${WHOLE[@]}" --bf16 True ${EXTRA[@]+"${EXTRA[@]}"}
