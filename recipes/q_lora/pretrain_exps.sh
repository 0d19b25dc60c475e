#!/usr/bin/env bash
# Every method on every kind of data, one run after the other; further flags go to each run.
#
#     bash recipes/q_lora/pretrain_exps.sh --dry_run
#     bash recipes/q_lora/pretrain_exps.sh --model_name tiny --max_steps 20
#
# A run that was stopped is resumed by the same command; a finished one is not repeated.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dry_run=
flags=()
for flag in "$@"; do
    if [ "$flag" = --dry_run ]; then dry_run=1; else flags+=("$flag"); fi
done
for method in lora qlora full; do
    for data in raw filtered described_filtered; do
        command=(python "$here/run_pretraining.py" --training_method "$method" --data_type "$data"
            --experiment_name "$method-$data" "${flags[@]}")
        echo "${command[*]}"
        [ -n "$dry_run" ] || "${command[@]}"
    done
done
