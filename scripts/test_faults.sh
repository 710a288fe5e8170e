#!/usr/bin/env bash
# Run the fault tests in full, with figures: thousands of damaged files, full disks, killed runs, long
# rollouts. Arguments go to pytest, such as -k killed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCD_VENV=1 EXTRAS=dev bash scripts/setup_env.sh
SCD_FAULTS=full .venv/bin/python -m pytest tests/faults -s "$@"
