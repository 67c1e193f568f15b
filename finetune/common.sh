# What the scripts in this folder share; they source it. -m MODEL and -d DATA; every other argument is handed to
# finetune.py behind a script's own and overrides them. Several GPUs or nodes: GPUS_PER_NODE, NNODES, NODE_RANK,
# MASTER_ADDR, MASTER_PORT as for torchrun.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MODEL=${MODEL:-Qwen/Qwen-7B}
DATA=${DATA:-}
EXTRA=()
while [ $# -gt 0 ]; do
    case $1 in
        -m | --model | -d | --data)
            [[ ${2:--} != -* ]] || { echo "$1 needs a value: bash $0 -m MODEL -d DATA.json" >&2; exit 2; }
            case $1 in -m | --model) MODEL=$2 ;; *) DATA=$2 ;; esac
            shift 2 ;;
        -h | --help) echo "Usage: bash $0 [-m MODEL] -d DATA.json [arguments of finetune.py]"; exit 0 ;;
        *) EXTRA+=("$1"); shift ;;
    esac
done
[ -n "$DATA" ] || { echo "Name the conversations to learn: bash $0 -m MODEL -d DATA.json" >&2; exit 2; }

PYTHON=${PYTHON:-python}
COMMON=(
    --model_name_or_path "$MODEL" --data_path "$DATA" --output_dir output_qwen
    --num_train_epochs 5 --per_device_eval_batch_size 1
    --save_strategy steps --save_steps 1000 --save_total_limit 10
    --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine
    --logging_steps 1 --model_max_length 512 --lazy_preprocess True --gradient_checkpointing True
)
ADAPTER=(--use_lora True --learning_rate 3e-4 --per_device_train_batch_size 2 --gradient_accumulation_steps 8)
WHOLE=(--learning_rate 1e-5 --per_device_train_batch_size 1 --gradient_accumulation_steps 16)

alone() {
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} exec "$PYTHON" "$HERE/finetune.py" "${COMMON[@]}" "$@" \
        ${EXTRA[@]+"${EXTRA[@]}"}
}

gpus() {
    "$PYTHON" -c "import torch; print(max(torch.cuda.device_count(), 1))"
}

together() {
    exec "$PYTHON" -m torch.distributed.run --nproc_per_node "${GPUS_PER_NODE:-$(gpus)}" --nnodes "${NNODES:-1}" \
        --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6001}" \
        "$HERE/finetune.py" "${COMMON[@]}" "$@" ${EXTRA[@]+"${EXTRA[@]}"}
}
