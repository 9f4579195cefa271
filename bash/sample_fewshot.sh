#!/usr/bin/env bash
# Train PatchCore on few images, several seeds each, and draw the curve over their number.
#
#   bash/sample_fewshot.sh /path/to/MPDD
#   SHOTS="1 4 16" SEEDS="0 1 2 3 4" bash/sample_fewshot.sh /path/to/MPDD --device cpu --batch_size 8
#   export MPDD_PATH=/path/to/MPDD; CLASSES=metal_plate RESULTS=/tmp/results bash/sample_fewshot.sh --offline
#
# Any folder in the layout of MPDD will do, with CLASSES. What follows the path reaches every training and wins over
# the recipe.
if [ -z "${BASH_VERSION:-}" ]; then echo "error: run this with bash" >&2; exit 2; fi
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=bash/arguments.sh
source "$root/bash/arguments.sh"

read_arguments MPDD_PATH https://github.com/stepanje/MPDD "$@"
choose_classes metal_plate bracket_white bracket_brown bracket_black
choose_numbers SHOTS 1 1 2 4 8 16 50
shots=("${numbers[@]}")
choose_numbers SEEDS 0 0 1 2
seeds=("${numbers[@]}")
refuse_flags "set by this script: use SHOTS, SEEDS and RESULTS" --limit_train --seed --log_group --log_project

seed_flags=()
for seed in "${seeds[@]}"; do seed_flags+=(--seed "$seed"); done
single=(-b wideresnet50 -le layer2 -le layer3)
if [ "$offline" = yes ]; then
    single=(-b efficientnet_lite0 -le blocks.2 -le blocks.4)
fi
recipe=$(group_name FEWSHOT_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1)
finished_runs=()

# train NUM_IMAGES [FLAGS ...] ; a run with a failed class does not enter the curve
# shellcheck disable=SC2329  # attempt calls it
train() {
    local seed
    "$PYTHON" "$root/bin/run_patchcore.py" --gpu 0 "${seed_flags[@]}" \
        --log_project fewshot --log_group "${recipe}_N$1_S${seeds[0]}" "$RESULTS" \
        patch_core "${single[@]}" --pretrain_embed_dimension 1024 --target_embed_dimension 1024 \
        --anomaly_scorer_num_nn 1 --patchsize 3 \
        sampler -p 0.1 approx_greedy_coreset \
        dataset --resize 256 --imagesize 224 --limit_train "$1" "${class_flags[@]}" mpdd "$datapath" "${@:2}" || return
    for seed in "${seeds[@]}"; do # several seeds: one folder each, _S0 _S1 ...
        newest_run "$RESULTS/fewshot/${recipe}_N$1_S$seed" results.csv || return
        finished_runs+=("$run_folder")
    done
}

for num_images in "${shots[@]}"; do
    attempt "$num_images training image(s)" train "$num_images" ${flags[@]+"${flags[@]}"}
done
if [ "${#finished_runs[@]}" -gt 0 ]; then
    free_name "$RESULTS/fewshot/${recipe}_curve"
    attempt "curve" "$PYTHON" "$root/bin/fewshot_curve.py" "${finished_runs[@]}" --out "$free_name"
fi
finish
