#!/usr/bin/env bash
# Post-train the shipped Doom model, stage by stage, beside a control, and compare: hours on two cores.
# Every stage resumes; run it again after an interruption. key=value arguments go to the evaluations.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/common.sh
scd=("$(find_python)" -m scd.cli)

exported=()
for name in causal_dit_doom bidirectional_dit_doom scd_doom_consistency scd_doom_distilled scd_doom_continued; do
    printf '\n== train options/%s.yml\n' "$name"
    [ -d "experiments/$name/exported" ] || bash scripts/train.sh "options/$name.yml"
    case "$name" in *_dit_doom) ;; *) exported+=("experiments/$name/exported") ;; esac
done
# Trained with one and two steps a frame, the student is used with one.
one_step=experiments/scd_doom_one_step
[ -d "$one_step" ] || "${scd[@]}" export experiments/scd_doom_distilled/exported --out "$one_step" \
    name=scd_doom_one_step rollout.steps=1
exported+=("$one_step")

fetch_weights
protocol=(eval.context_frames=36 eval.new_frames=64 eval.windows=4 eval.trajectories=2 'eval.seeds=[0,1]' "$@")
for model in assets/pretrained/scd_doom "${exported[@]}"; do
    printf '\n== evaluate %s\n' "$model"
    bash scripts/inference.sh "$model" "${protocol[@]}"
done
"${scd[@]}" compare assets/pretrained/scd_doom "${exported[@]}" "${protocol[@]}" --out experiments/posttraining
