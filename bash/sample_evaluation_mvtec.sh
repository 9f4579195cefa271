#!/usr/bin/env bash
# Evaluate the models that sample_training_mvtec.sh left: of each variant the newest run, on MVTec AD.
#
#   bash/sample_evaluation_mvtec.sh /path/to/mvtec
#   VARIANTS="IM224_WR50 IM320_WR50" bash/sample_evaluation_mvtec.sh /path/to/mvtec --device cpu
#   export MVTEC_PATH=/path/to/mvtec; RESULTS=/tmp/results bash/sample_evaluation_mvtec.sh --offline
#
# A variant that was never trained is skipped, unless VARIANTS names it. LOG_PROJECT names the --log_project of the
# runs where that was given to the training. With --seed 5 the runs whose names end in _S5 are evaluated.
# shellcheck disable=SC2329  # run_variants calls the variants by name
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MVTEC_PATH https://www.mvtec.com/company/research/datasets/mvtec-ad "$@"
choose_variants IM224_WR50 IM224_Ensemble IM320_WR50 IM320_Ensemble IM320_Segmentation IM320_SegmentationEnsemble
choose_classes bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor \
    wood zipper

# evaluate GROUP RESIZE IMAGESIZE [FLAGS ...]
evaluate() {
    find_models mvtec "$1" || return
    "$PYTHON" "$root/bin/load_and_evaluate_patchcore.py" --gpu 0 --seed 0 --save_segmentation_images \
        "$EVALUATED/${run_folder##*/}" \
        patch_core_loader "${model_flags[@]}" --faiss_on_gpu \
        dataset --resize "$2" --imagesize "$3" "${class_flags[@]}" mvtec "$datapath" "${@:4}"
}

IM224_WR50() { evaluate MVTecAD_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0 256 224 "$@"; }
IM224_Ensemble() { evaluate MVTecAD_IM224_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S3 256 224 "$@"; }
IM320_WR50() { evaluate MVTecAD_IM320_WR50_L2-3_P001_D1024-1024_PS-3_AN-1_S22 366 320 "$@"; }
IM320_Ensemble() { evaluate MVTecAD_IM320_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S40 366 320 "$@"; }
IM320_Segmentation() { evaluate MVTecAD_IM320_WR50_L2-3_P001_D1024-1024_PS-5_AN-3_S39 366 320 "$@"; }
IM320_SegmentationEnsemble() { evaluate MVTecAD_IM320_Ensemble_L2-3_P001_D1024-384_PS-5_AN-5_S88 366 320 "$@"; }

run_variants
