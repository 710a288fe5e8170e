#!/usr/bin/env bash
# Train, or go on with, an experiment: ./scripts/train.sh [options/x.yml] [key=value ...]
# All visible GPUs (NUM_GPUS, PORT override), or the CPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options=options/scd_minecraft.yml
if [[ "${1:-}" == *.yml || "${1:-}" == *.yaml ]]; then
    options=$1
    shift
fi
# On a GPU, memory grows in place: a validation's shapes leave no holes that a step does not fit in.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
launch train --opt "$options" "$@"
