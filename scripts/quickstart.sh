#!/usr/bin/env bash
# Everything once: environment, recorded game video, a world model, sample videos and metrics.
# If interrupted, run it again to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
options=options/scd_doom_tiny.yml
output=experiments/scd_doom_tiny
names=() seconds=()

# Run a stage under its name, and record how long it takes: stage NAME COMMAND [ARG ...]
stage() {
    local began=$SECONDS
    names+=("$1")
    printf '\n== %d/6 %s\n' "${#names[@]}" "$1"
    shift
    "$@"
    seconds+=($((SECONDS - began)))
}

measure() {
    local newest
    newest=$(ls -d $output/checkpoints/step-* | tail -n 1)
    bash scripts/inference.sh "$newest/ema.safetensors"
}

stage "install into .venv" env SCD_VENV=1 bash scripts/setup_env.sh
source scripts/common.sh
stage "fetch the metrics' weights" fetch_weights
stage "record Doom episodes (data/doom)" \
    .venv/bin/scd record --root data/doom --train-episodes 40 --val-episodes 32
stage "encode them into latents" .venv/bin/scd encode --opt $options
stage "train $options" bash scripts/train.sh $options
stage "generate and measure" measure

echo "loss:    $output/loss.png"
echo "data:    data/doom/coverage.png"
printf '\nwhere the time went, in minutes:\n'
for i in "${!names[@]}"; do
    printf '%4d:%02d  %s\n' $((seconds[i] / 60)) $((seconds[i] % 60)) "${names[i]}"
done
printf '%4d:%02d  in all\n' $((SECONDS / 60)) $((SECONDS % 60))
