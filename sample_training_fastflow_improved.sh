#!/usr/bin/env bash
# Train FastFlow on ResNet18 with the preset of each class and evaluate it on MPDD (https://github.com/stepanje/MPDD),
# one folder per class.
#
#   ./sample_training_fastflow_improved.sh /path/to/MPDD
#   CLASSES="metal_plate bracket_white" ./sample_training_fastflow_improved.sh /path/to/MPDD --device cpu
#   export MPDD_PATH=/path/to/MPDD; RESULTS=/tmp/results ./sample_training_fastflow_improved.sh --offline
#
# What follows the path reaches every command and wins over the recipe, as in --epochs or --batch_size. With --seed 5
# the names of the runs end in _S5; the evaluation finds them with the same --seed.
# shellcheck disable=SC2329  # run_classes calls the function by name
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MPDD_PATH https://github.com/stepanje/MPDD "$@"
choose_classes metal_plate bracket_white bracket_brown bracket_black
refuse_flags "set by this script: pick classes with CLASSES" --category -d --subdatasets
refuse_flags "set by this script: name other places with RESULTS or --log_project" --log_group

backbone=resnet18 network=R18
if [ "$offline" = yes ]; then
    backbone=efficientnet_lite0 network=LITE0
fi

# train CLASS [FLAGS ...]
train() {
    "$PYTHON" "$root/bin/run_fastflow.py" \
        --log_group "$(group_name "FFLOW_IMPROVED_$1_$network")" --save_model --save_segmentation_images \
        "$RESULTS/fastflow_improved/$1" \
        dataset --category "$1" "$datapath" \
        fastflow --backbone "$backbone" --use_class_specific "${@:2}"
}

run_classes train
finish
