#!/usr/bin/env bash
# Make the environment (a conda environment "scd" if there is conda and no .venv, else .venv), and
# install the project with tested versions (constraints.txt). EXTRAS=dev adds the test tools.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${EXTRAS:-trackers}

if command -v conda >/dev/null 2>&1 && [ -z "${SCD_VENV:-}" ] && [ ! -x .venv/bin/python ]; then
    conda env list | grep -E '^scd\s' >/dev/null || conda create --yes --name scd python=3.12
    python=$(conda run --name scd python -c 'import sys; print(sys.executable)')
    hint="conda activate scd"
else
    if [ ! -x .venv/bin/python ]; then
        base=${PYTHON:-python3}
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $base is $("$base" --version 2>&1), but Python 3.11 or newer is needed; set PYTHON=" >&2
            exit 1
        }
        "$base" -m venv .venv || {
            rm -rf .venv # half of one would pass for whole
            exit 1
        }
    fi
    python=.venv/bin/python
    hint="source .venv/bin/activate"
fi

# As of `uv venv`, or of a system without ensurepip when it was made.
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null || {
    echo "error: $python has no pip: install your system's python3-venv, delete .venv and run this again" >&2
    exit 1
}

stamp=$("$python" -c 'import sys; print(sys.prefix)')/.scd-installed
hash='import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
files="$(cat pyproject.toml constraints.txt | "$python" -c "$hash") $PWD"
installed=$(cat "$stamp" 2>/dev/null || true)
if [ "$installed" != "$extras $files" ] && [ "$installed" != "dev $files" ]; then # dev has all
    echo "installing into $(dirname "$(dirname "$python")"): this takes some minutes the first time"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    what=(--constraint constraints.txt --editable ".[$extras]")
    [ -t 2 ] || what+=(--quiet) # no progress bars in a log
    # uv takes a third of pip's time, but does not know of an index that is set for pip.
    { "$python" -m pip install --quiet --constraint constraints.txt uv &&
        "$python" -m uv pip install --python "$python" --compile-bytecode "${what[@]}"; } || {
        echo "note: uv could not install it; trying pip" >&2
        "$python" -m pip install "${what[@]}"
    }
    echo "installed in $((SECONDS / 60)):$(printf %02d $((SECONDS % 60))) minutes"
    echo "$extras $files" >"$stamp"
fi
echo "environment ready: $hint"
