#!/usr/bin/env bash
# Encode an experiment's training videos into latents: ./scripts/encode.sh options/x.yml [key=value ...]
# All visible GPUs (NUM_GPUS, PORT override), or the CPU. If interrupted, run it again to resume.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [[ "${1:-}" != *.yml && "${1:-}" != *.yaml ]]; then
    echo "usage: ./scripts/encode.sh options/x.yml [key=value ...]" >&2
    exit 2
fi
options=$1
shift
launch encode --opt "$options" "$@"
