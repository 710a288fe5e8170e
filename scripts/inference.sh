#!/usr/bin/env bash
# Evaluate a checkpoint: ./scripts/inference.sh path/to/ema.safetensors [--opt FILE] [key=value ...]
# on all visible GPUs (NUM_GPUS, PORT override), or the CPU. Run again, it only does what is missing.
# Also accepts the reference implementation's ema.pth (with options/scd_minecraft.yml, or --opt).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ $# -lt 1 ]; then
    echo "usage: ./scripts/inference.sh path/to/ema.safetensors [--opt FILE] [key=value ...]" >&2
    exit 2
fi
launch evaluate "$@"
