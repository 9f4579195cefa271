#!/usr/bin/env bash
# Evaluate the models that sample_training_mpdd.sh left: of each variant the newest run, on MPDD.
#
#   ./sample_evaluation_mpdd.sh /path/to/MPDD
#   VARIANTS="IM224_WR50 IM320_WR50" ./sample_evaluation_mpdd.sh /path/to/MPDD --device cpu
#   export MPDD_PATH=/path/to/MPDD; RESULTS=/tmp/results EVALUATED=/tmp/evaluated ./sample_evaluation_mpdd.sh --offline
#
# A variant that was never trained is skipped, unless VARIANTS names it. LOG_PROJECT names the --log_project of the
# runs where that was given to the training. With --seed 5 the runs whose names end in _S5 are evaluated.
# shellcheck disable=SC2329  # run_variants calls the variants by name
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MPDD_PATH https://github.com/stepanje/MPDD "$@"
choose_variants IM224_WR50 IM224_Ensemble IM320_WR50 IM320_Segmentation
choose_classes metal_plate bracket_white bracket_brown bracket_black

# evaluate GROUP RESIZE IMAGESIZE [FLAGS ...]
evaluate() {
    find_models mpdd "$1" || return
    "$PYTHON" "$root/bin/load_and_evaluate_patchcore.py" --gpu 0 --seed 0 --save_segmentation_images \
        "$EVALUATED/${run_folder##*/}" \
        patch_core_loader "${model_flags[@]}" --faiss_on_gpu \
        dataset --resize "$2" --imagesize "$3" "${class_flags[@]}" mpdd "$datapath" "${@:4}"
}

IM224_WR50() { evaluate MPDD_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0 256 224 "$@"; }
IM224_Ensemble() { evaluate MPDD_IM224_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S3 256 224 "$@"; }
IM320_WR50() { evaluate MPDD_IM320_WR50_L2-3_P001_D1024-1024_PS-3_AN-1_S22 366 320 "$@"; }
IM320_Segmentation() { evaluate MPDD_IM320_WR50_L2-3_P001_D1024-1024_PS-5_AN-3_S39 366 320 "$@"; }

run_variants
