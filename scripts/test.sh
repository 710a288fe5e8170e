#!/usr/bin/env bash
# Make the environment, then run every check: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCD_VENV=1 EXTRAS=dev bash scripts/setup_env.sh
source scripts/common.sh
fetch_weights
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
