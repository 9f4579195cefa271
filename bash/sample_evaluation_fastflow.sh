#!/usr/bin/env bash
# Evaluate the models that sample_training_fastflow.sh left: of each class the newest run, on MPDD. VARIANTS picks those
# of other scripts instead, by the names of their folders: fastflow, fastflow_patch, fastflow_wresnet50.
#
#   bash/sample_evaluation_fastflow.sh /path/to/MPDD
#   VARIANTS="fastflow fastflow_patch" bash/sample_evaluation_fastflow.sh /path/to/MPDD --device cpu
#   export MPDD_PATH=/path/to/MPDD; CLASSES=metal_plate bash/sample_evaluation_fastflow.sh --offline
#
# A class that was never trained is skipped, unless CLASSES or VARIANTS is set. LOG_PROJECT names the --log_project of
# the runs where that was given to the training. With --seed 5 the runs whose names end in _S5 are evaluated.
# shellcheck disable=SC2329  # run_classes calls the variants by name
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MPDD_PATH https://github.com/stepanje/MPDD "$@"
choose_variants fastflow fastflow_patch fastflow_wresnet50
if [[ ${VARIANTS:-} != *[![:space:]]* ]]; then variants=(fastflow); fi
choose_classes metal_plate bracket_white bracket_brown bracket_black
refuse_flags "set by this script: pick classes with CLASSES" --category -d --subdatasets

resnet18=resnet18 r18=R18
wide=wide_resnet50_2 wr50=WR50
lite=
if [ "$offline" = yes ]; then
    resnet18=efficientnet_lite0 r18=LITE0
    wide=efficientnet_lite0 wr50=LITE0
    lite=_LITE0
fi

# evaluate FOLDER BACKBONE CLASS [FLAGS ...] ; of the model that find_model has found
evaluate() {
    "$PYTHON" "$root/bin/run_fastflow.py" "$EVALUATED/$1/$3" \
        dataset --category "$3" "$datapath" \
        fastflow --backbone "$2" --log_group "$(group_name "FFLOW_EVAL$lite")" \
        --eval_only --checkpoint "$model" --save_segmentation_images "${@:4}"
}

fastflow() {
    find_model mpdd "$1" "$RESULTS/fastflow/$1" "FFLOW_$1_$r18" sample_training_fastflow.sh || return
    evaluate fastflow "$resnet18" "$@"
}

fastflow_patch() {
    find_model mpdd "$1" "$RESULTS/fastflow_patch" "fastflow_patch_$1$lite" sample_training_fastflow_patch.sh || return
    evaluate fastflow_patch "$resnet18" "$@"
}

fastflow_wresnet50() {
    find_model mpdd "$1" "$RESULTS/fastflow_wresnet50/$1" "FFLOW_$1_$wr50" \
        sample_training_fastflow_wresnet50.sh || return
    evaluate fastflow_wresnet50 "$wide" "$@"
}

for variant in "${variants[@]}"; do run_classes "$variant" "$variant/"; done
finish "${VARIANTS:-}${CLASSES:-}"
