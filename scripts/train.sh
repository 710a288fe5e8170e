#!/usr/bin/env bash
# Train an experiment, or resume it: ./scripts/train.sh options/x.yml [--dry-run] [key=value ...]
# Uses all visible GPUs (NUM_GPUS, PORT override), or else the CPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [[ "${1:-}" != *.yml && "${1:-}" != *.yaml ]]; then
    echo "usage: ./scripts/train.sh options/x.yml [--dry-run] [key=value ...]" >&2
    exit 2
fi
options=$1
shift
# On a GPU, let memory segments grow: validations, with other shapes than steps, would fragment it.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
launch train --opt "$options" "$@"
