#!/usr/bin/env bash
# Train and evaluate three baselines on MPDD (https://github.com/stepanje/MPDD): nearest neighbours of pooled features,
# an autoencoder of the images and one of feature maps.
#
#   bash/sample_training_baselines.sh /path/to/MPDD
#   METHODS="resnet_knn feature_autoencoder" bash/sample_training_baselines.sh /path/to/MPDD --device cpu
#   export MPDD_PATH=/path/to/MPDD; CLASSES=metal_plate RESULTS=/tmp/results bash/sample_training_baselines.sh --offline
#
# What follows the path reaches every command and wins over the recipe, as in --gpu or --imagesize; options of one method
# alone, as --epochs, need METHODS. With --seed 5 the names of the runs end in _S5. Classes with 50 training images or
# fewer get fewer neighbours (--clamp_k), which the log says.
# shellcheck disable=SC2329  # run_variants calls the methods by name
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MPDD_PATH https://github.com/stepanje/MPDD "$@"
choose_methods resnet_knn autoencoder feature_autoencoder
choose_classes metal_plate bracket_white bracket_brown bracket_black
refuse_flags "set by this script: name other places with RESULTS or --log_project" --log_group

backbone=(-b resnet50) network=R50
if [ "$offline" = yes ]; then
    backbone=(-b efficientnet_lite0) network=LITE0
fi

# train GROUP METHOD [OPTIONS OF THE METHOD ...]
train() {
    "$PYTHON" "$root/bin/run_baselines.py" --gpu 0 --seed 0 \
        --save_model --save_segmentation_images --save_anomaly_scores \
        --log_group "$(group_name "$1")" "$RESULTS" \
        "${@:2}" \
        dataset --resize 256 --imagesize 224 "${class_flags[@]}" mpdd "$datapath" ${flags[@]+"${flags[@]}"}
}

resnet_knn() {
    train "MPDD_IM224_KNN_${network}_S0" resnet_knn "${backbone[@]}" --num_features 500 -k 50 --clamp_k
}

autoencoder() {
    train MPDD_IM224_AE_S0 autoencoder
}

feature_autoencoder() {
    train "MPDD_IM224_FAE_${network}_S0" feature_autoencoder "${backbone[@]}"
}

run_variants
