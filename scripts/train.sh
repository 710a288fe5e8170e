#!/usr/bin/env bash
# Train, or go on with, an experiment: ./scripts/train.sh [options/x.yml] [key=value ...]
# All visible GPUs (NUM_GPUS, PORT override), or the CPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options=options/scd_minecraft.yml
if [[ "${1:-}" == *.yml || "${1:-}" == *.yaml ]]; then
    options=$1
    shift
fi
launch train --opt "$options" "$@"
