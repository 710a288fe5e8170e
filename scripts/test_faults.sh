#!/usr/bin/env bash
# Every fault of scd/training/README.md in full, with figures: some minutes. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python=$(find_python)
SCD_FAULTS=full exec "$python" -m pytest tests/test_faults.py -s "$@"
