#!/usr/bin/env bash
# Evaluate the models that sample_training_fastflow_improved.sh left: of each class the newest run, on MPDD.
#
#   ./sample_evaluation_fastflow_loader.sh /path/to/MPDD
#   CLASSES="metal_plate bracket_white" ./sample_evaluation_fastflow_loader.sh /path/to/MPDD --device cpu
#   export MPDD_PATH=/path/to/MPDD; RESULTS=/tmp/results EVALUATED=/tmp/evaluated \
#       ./sample_evaluation_fastflow_loader.sh --offline
#
# A class that was never trained is skipped, unless CLASSES names it. LOG_PROJECT names the --log_project of the
# runs where that was given to the training. With --seed 5 the runs whose names end in _S5 are evaluated.
# shellcheck disable=SC2329  # run_classes calls the function by name
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MPDD_PATH https://github.com/stepanje/MPDD "$@"
choose_classes metal_plate bracket_white bracket_brown bracket_black
refuse_flags "set by this script: pick classes with CLASSES" --category -d --subdatasets

network=R18
if [ "$offline" = yes ]; then network=LITE0; fi

# evaluate CLASS [FLAGS ...]
evaluate() {
    find_model mpdd "$1" "$RESULTS/fastflow_improved/$1" "FFLOW_IMPROVED_$1_$network" \
        sample_training_fastflow_improved.sh || return
    "$PYTHON" "$root/bin/load_and_evaluate_fastflow.py" --gpu 0 --seed 0 --save_segmentation_images \
        "$EVALUATED/fastflow_results/$1" \
        fastflow_loader -p "$model" \
        dataset --resize 256 --imagesize 224 -d "$1" mpdd "$datapath" "${@:2}"
}

run_classes evaluate
finish "${CLASSES:-}"
