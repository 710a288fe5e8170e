#!/usr/bin/env bash
# Play a generated world in the browser: bash scripts/play.sh [scd play's arguments]
# Makes the environment if it is missing, then serves http://127.0.0.1:8000.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCD_VENV=1 bash scripts/setup_env.sh
source scripts/common.sh
exec "$(find_python)" -m scd.cli play --baseline assets/pretrained/scd_doom "$@"
