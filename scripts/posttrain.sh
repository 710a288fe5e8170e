#!/usr/bin/env bash
# Post-train a Doom model, stage by stage, beside a control, and compare. On a GPU: all that the
# shipped models went through, from nothing, in minutes a stage. On CPUs: assets/pretrained/scd_doom,
# in smaller batches; the teacher takes hours.
# Needs the data: `scd record --train-episodes 400 --val-episodes 512`, and
# `scd encode --opt options/scd_doom.yml`.
# Batches are those of each GPU: the shipped models had one (NUM_GPUS=1).
# Every stage resumes; run it again after an interruption. key=value arguments go to the evaluations.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/common.sh
scd=("$(find_python)" -m scd.cli)

base=assets/pretrained/scd_doom
stages=(causal_dit_doom bidirectional_dit_doom scd_doom_consistency scd_doom_distilled scd_doom_continued)
gpus=$(count_gpus)
if [ "$gpus" -gt 0 ]; then
    base=experiments/scd_doom/exported
    large="train.batch_size=64 train.workers=4"
    small="train.batch_size=16 train.mixed_precision=fp32 train.compile=false"
    weak=experiments/scd_doom/checkpoints/step-00000125/ema.safetensors
    if [ -d "$base" ] && [ ! -f "$weak" ]; then
        echo "error: experiments/scd_doom is of another training ($weak is missing): move it away" >&2
        exit 1
    fi
    stages=(
        "scd_doom $large train.steps=2500 train.save_every=125 train.keep_checkpoints=1000"
        "bidirectional_dit_doom $large train.steps=2200 init_from=null optim.lr=1.5e-3 optim.muon_lr=0.02"
        "scd_doom_consistency $small train.steps=300 init_from=$base distill.teacher=$base distill.weak_teacher=$weak distill.guidance_scale=1.25"
        "scd_doom_distilled $small train.steps=362 optim.lr=1e-4 distill.critic_lr=2e-4 distill.critic_updates=4"
        "scd_doom_continued $large train.steps=2300 init_from=$base"
    )
fi

exported=()
for stage in "${stages[@]}"; do
    read -r name overrides <<<"$stage"
    printf '\n== train options/%s.yml %s\n' "$name" "$overrides"
    # shellcheck disable=SC2086 # overrides are words
    [ -d "experiments/$name/exported" ] || bash scripts/train.sh "options/$name.yml" $overrides
    case "$name" in scd_doom_*) exported+=("experiments/$name/exported") ;; esac
done
# Trained with one and two steps a frame, the student is used with one, from less noise.
one_step=experiments/scd_doom_one_step
[ -d "$one_step" ] || "${scd[@]}" export experiments/scd_doom_distilled/exported --out "$one_step" \
    name=scd_doom_one_step rollout.steps=1 rollout.temperature=0.7
exported+=("$one_step")

fetch_weights
protocol=(eval.context_frames=36 eval.new_frames=64 eval.windows=4 eval.trajectories=2 'eval.seeds=[0,1]' "$@")
for model in "$base" "${exported[@]}"; do
    printf '\n== evaluate %s\n' "$model"
    bash scripts/inference.sh "$model" "${protocol[@]}"
done
"${scd[@]}" compare "$base" "${exported[@]}" "${protocol[@]}" --out experiments/posttraining
