#!/usr/bin/env bash
# Everything once: environment, real game video, a world model, its pictures and its metrics.
# Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCD_VENV=1 bash scripts/setup_env.sh
source scripts/common.sh
fetch_weights
scd=.venv/bin/scd
options=options/scd_doom_tiny.yml
output=experiments/scd_doom_tiny

echo "== record Doom episodes (data/doom)"
$scd record --root data/doom --train-episodes 64 --val-episodes 32
echo "== encode them into latents"
$scd encode --opt $options
echo "== train $options"
bash scripts/train.sh $options
echo "== generate and measure"
checkpoint=$(ls -d $output/checkpoints/step-* | tail -n 1)/ema.safetensors
bash scripts/inference.sh "$checkpoint"
echo "loss:    $output/loss.png"
echo "data:    data/doom/coverage.png"
