#!/usr/bin/env bash
# Train FastFlow on MPDD (https://github.com/stepanje/MPDD) and score the test images at their own resolution, tile by
# tile; one run per class.
#
#   bash/sample_training_fastflow_patch.sh /path/to/MPDD
#   CLASSES="metal_plate bracket_white" bash/sample_training_fastflow_patch.sh /path/to/MPDD --device cpu
#   export MPDD_PATH=/path/to/MPDD; RESULTS=/tmp/results bash/sample_training_fastflow_patch.sh --offline
#
# What follows the path reaches every command and wins over the recipe, as in --epochs or --batch_size. With --seed 5
# the names of the runs end in _S5; the evaluation finds them with the same --seed.
# shellcheck disable=SC2329  # run_classes calls the function by name
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MPDD_PATH https://github.com/stepanje/MPDD "$@"
choose_classes metal_plate bracket_white bracket_brown bracket_black
refuse_flags "set by this script: pick classes with CLASSES" --category -d --subdatasets
refuse_flags "set by this script: name other places with RESULTS or --log_project" --log_group

backbone=resnet18 network=
if [ "$offline" = yes ]; then
    backbone=efficientnet_lite0 network=_LITE0
fi

# train CLASS [FLAGS ...]
train() {
    "$PYTHON" "$root/bin/run_fastflow.py" --gpu 0 --seed 42 \
        --log_group "$(group_name "fastflow_patch_$1$network")" --save_model \
        "$RESULTS/fastflow_patch" \
        dataset --category "$1" --batch_size 10 --num_workers 0 --resize 256 --imagesize 224 --preserve_high_res \
        "$datapath" \
        fastflow --backbone "$backbone" --flow_steps 4 --input_size 224 --hidden_ratio 0.5 --use_class_specific \
        --enable_patch_inference --patch_size 160 --patch_stride 80 --low_memory "${@:2}"
}

run_classes train
finish
