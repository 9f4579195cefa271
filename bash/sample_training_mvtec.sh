#!/usr/bin/env bash
# Train and evaluate six PatchCore variants on the 15 classes of MVTec AD
# (https://www.mvtec.com/company/research/datasets/mvtec-ad).
#
#   bash/sample_training_mvtec.sh /path/to/mvtec
#   VARIANTS="IM224_WR50 IM320_WR50" bash/sample_training_mvtec.sh /path/to/mvtec --device cpu --batch_size 8
#   export MVTEC_PATH=/path/to/mvtec; CLASSES=bottle RESULTS=/tmp/results bash/sample_training_mvtec.sh --offline
#
# What follows the path reaches every command and wins over the recipe, as in --gpu or --imagesize. With --seed 5 the
# names of the runs end in _S5; the evaluation finds them with the same --seed.
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
        --log_group "$(group_name MVTecAD_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0)" "$RESULTS" \
        patch_core "${single[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 1024 \
        --anomaly_scorer_num_nn 1 --patchsize 3 \
        sampler -p 0.1 approx_greedy_coreset \
        dataset --resize 256 --imagesize 224 "${class_flags[@]}" mvtec "$datapath" "$@"
}

IM224_Ensemble() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 3 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MVTecAD_IM224_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S3)" "$RESULTS" \
        patch_core "${ensemble[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 384 \
        --anomaly_scorer_num_nn 1 --patchsize 3 \
        sampler -p 0.01 approx_greedy_coreset \
        dataset --resize 256 --imagesize 224 "${class_flags[@]}" mvtec "$datapath" "$@"
}

IM320_WR50() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 22 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MVTecAD_IM320_WR50_L2-3_P001_D1024-1024_PS-3_AN-1_S22)" "$RESULTS" \
        patch_core "${single[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 1024 \
        --anomaly_scorer_num_nn 1 --patchsize 3 \
        sampler -p 0.01 approx_greedy_coreset \
        dataset --resize 366 --imagesize 320 "${class_flags[@]}" mvtec "$datapath" "$@"
}

IM320_Ensemble() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 40 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MVTecAD_IM320_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S40)" "$RESULTS" \
        patch_core "${ensemble[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 384 \
        --anomaly_scorer_num_nn 1 --patchsize 3 \
        sampler -p 0.01 approx_greedy_coreset \
        dataset --resize 366 --imagesize 320 "${class_flags[@]}" mvtec "$datapath" "$@"
}

IM320_Segmentation() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 39 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MVTecAD_IM320_WR50_L2-3_P001_D1024-1024_PS-5_AN-3_S39)" "$RESULTS" \
        patch_core "${single[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 1024 \
        --anomaly_scorer_num_nn 3 --patchsize 5 \
        sampler -p 0.01 approx_greedy_coreset \
        dataset --resize 366 --imagesize 320 "${class_flags[@]}" mvtec "$datapath" "$@"
}

IM320_SegmentationEnsemble() {
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 --seed 88 \
        --save_patchcore_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name MVTecAD_IM320_Ensemble_L2-3_P001_D1024-384_PS-5_AN-5_S88)" "$RESULTS" \
        patch_core "${ensemble[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 384 \
        --anomaly_scorer_num_nn 5 --patchsize 5 \
        sampler -p 0.01 approx_greedy_coreset \
        dataset --resize 366 --imagesize 320 "${class_flags[@]}" mvtec "$datapath" "$@"
}

run_variants
