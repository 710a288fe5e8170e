#!/usr/bin/env bash
# Download published data from the Hugging Face hub: HF_TOKEN=... bash scripts/setup_data.sh [NAME ...]
# Without names: what options/scd_minecraft.yml needs. If interrupted, run it again to resume.
# Set HF_ENDPOINT to use a mirror.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python=$(find_python)
if [[ $# -eq 0 || "$1" == -* ]]; then # only options, such as --root DIR
    set -- dcae_minecraft minecraft minecraft_latent "$@" # the small one first, to fail early
fi
"$python" -m scd.cli fetch-data "$@"
