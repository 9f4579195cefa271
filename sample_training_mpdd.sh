#!/usr/bin/env bash
# Train and evaluate four PatchCore variants on MPDD (https://github.com/stepanje/MPDD).
#
#   ./sample_training_mpdd.sh /path/to/MPDD
#   VARIANTS="IM224_WR50 IM320_WR50" ./sample_training_mpdd.sh /path/to/MPDD --device cpu --batch_size 8
#   export MPDD_PATH=/path/to/MPDD; CLASSES=metal_plate RESULTS=/tmp/results ./sample_training_mpdd.sh --offline
#
# What follows the path reaches every command and wins over the recipe, as in --gpu or --imagesize. With --seed 5 the
# names of the runs end in _S5; the evaluation finds them with the same --seed.
# shellcheck disable=SC2329  # run_variants calls the variants by name
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MPDD_PATH https://github.com/stepanje/MPDD "$@"
choose_variants IM224_WR50 IM224_Ensemble IM320_WR50 IM320_Segmentation
choose_classes metal_plate bracket_white bracket_brown bracket_black
refuse_flags "set by this script: name other places with RESULTS or --log_project" --log_group

single=(-b wideresnet50 -le layer2 -le layer3)
ensemble=(
    -b wideresnet101 -b resnext101 -b densenet201
    -le 0.layer2 -le 0.layer3 -le 1.layer2 -le 1.layer3 -le 2.features.denseblock2 -le 2.features.denseblock3
)
if [ "$offline" = yes ]; then
    single=(-b efficientnet_lite0 -le blocks.2 -le blocks.4)
    ensemble=(
        -b efficientnet_lite0 -b efficientnet_lite1 -b efficientnet_lite2
        -le 0.blocks.2 -le 0.blocks.4 -le 1.blocks.2 -le 1.blocks.4 -le 2.blocks.2 -le 2.blocks.4
    )
fi

IM224_WR50() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 0 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MPDD_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0)" "$RESULTS" \
        patch_core "${single[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 1024 \
        --anomaly_scorer_num_nn 1 --patchsize 3 \
        sampler -p 0.1 approx_greedy_coreset \
        dataset --resize 256 --imagesize 224 "${class_flags[@]}" mpdd "$datapath" "$@"
}

IM224_Ensemble() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 3 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MPDD_IM224_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S3)" "$RESULTS" \
        patch_core "${ensemble[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 384 \
        --anomaly_scorer_num_nn 1 --patchsize 3 \
        sampler -p 0.01 approx_greedy_coreset \
        dataset --resize 256 --imagesize 224 "${class_flags[@]}" mpdd "$datapath" "$@"
}

IM320_WR50() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 22 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MPDD_IM320_WR50_L2-3_P001_D1024-1024_PS-3_AN-1_S22)" "$RESULTS" \
        patch_core "${single[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 1024 \
        --anomaly_scorer_num_nn 1 --patchsize 3 \
        sampler -p 0.01 approx_greedy_coreset \
        dataset --resize 366 --imagesize 320 "${class_flags[@]}" mpdd "$datapath" "$@"
}

IM320_Segmentation() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 39 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MPDD_IM320_WR50_L2-3_P001_D1024-1024_PS-5_AN-3_S39)" "$RESULTS" \
        patch_core "${single[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 1024 \
        --anomaly_scorer_num_nn 3 --patchsize 5 \
        sampler -p 0.01 approx_greedy_coreset \
        dataset --resize 366 --imagesize 320 "${class_flags[@]}" mpdd "$datapath" "$@"
}

run_variants
