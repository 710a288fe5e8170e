#!/usr/bin/env bash
# Make the environment, then run every check: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCD_VENV=1 EXTRAS=dev bash scripts/setup_env.sh
source scripts/common.sh
fetch_weights
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy & types=$! # beside the tests: it takes one core
# Whole files side by side, on one thread each: the models are so small that threads mostly wait.
# In the order of tests/conftest.py.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
    --no-loadscope-reorder "$@"
wait $types || { echo "the types are wrong: see what mypy said, before the tests" >&2 && exit 1; }
