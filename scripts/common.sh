# Sourced by the scripts: changes to the project's root and finds the environment of setup_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Print the environment's python: that of .venv, else the active one, else that of the conda environment "scd".
find_python() {
    if [ -x .venv/bin/python ]; then
        echo "$PWD/.venv/bin/python"
    elif python -c "import accelerate, omegaconf, torch" >/dev/null 2>&1; then
        command -v python
    elif conda run --name scd python -c 'import sys; print(sys.executable)' 2>/dev/null; then
        return 0
    else
        echo "error: no environment yet: run bash scripts/setup_env.sh first" >&2
        return 1
    fi
}

# Download the weights of LPIPS and of FVD's network, if they are missing.
fetch_weights() {
    "$(find_python)" -m scd.cli fetch-weights >/dev/null ||
        echo "note: LPIPS and FVD will be reported as missing until 'scd fetch-weights' succeeds" >&2
}

# Print how many GPUs are visible, or NUM_GPUS.
count_gpus() {
    if [[ "${NUM_GPUS:-}" =~ ^(0|[1-9][0-9]*)$ ]]; then
        echo "$NUM_GPUS"
    elif [ -n "${NUM_GPUS:-}" ]; then
        echo "error: NUM_GPUS=$NUM_GPUS is not a number of GPUs" >&2
        return 1
    else
        "$(find_python)" -c "import torch; print(torch.cuda.device_count())"
    fi
}

# Launch a scd command on all visible GPUs (NUM_GPUS and PORT override), or on the CPU: one process,
# or NUM_PROCS. ACCELERATE_CONFIG names a file of scripts/accelerate/ instead (see scripts/README.md).
# Replaces the script's process, so that signals of a scheduler and the exit code pass through.
launch() {
    local python gpus port=${PORT:-29500}
    # For torchrun, also under accelerate: pass on SIGUSR1 too, and leave time to save a large checkpoint
    # (before torch 2.12 that time is always 30 s). Under nohup a run outlives its terminal: torchrun
    # would handle the signal that nohup ignores.
    local signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    [ -n "$(trap -p HUP)" ] && signals=${signals/SIGHUP,/}
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-$signals}
    export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600}
    python=$(find_python)
    gpus=$(count_gpus)
    if [ -n "${ACCELERATE_CONFIG:-}" ] && [ ! -f "$ACCELERATE_CONFIG" ]; then
        echo "error: ACCELERATE_CONFIG=$ACCELERATE_CONFIG: no such file" >&2
        exit 1
    fi
    if [ -n "${ACCELERATE_CONFIG:-}" ] && [ "$gpus" -eq 0 ] && [ -z "${NUM_PROCS:-}" ]; then
        echo "error: ACCELERATE_CONFIG is set, but no GPU is visible: unset it, or set NUM_PROCS" >&2
        exit 1
    elif [ -n "${ACCELERATE_CONFIG:-}" ]; then
        # The sizes of parallelism_config only take effect if the file enables it (hsdp.yaml).
        exec "$python" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG" \
            --num_processes "${NUM_PROCS:-$((gpus * ${NUM_NODES:-1}))}" \
            --num_machines "${NUM_NODES:-1}" --machine_rank "${NODE_RANK:-0}" \
            --main_process_ip "${MAIN_HOST:-127.0.0.1}" --main_process_port "$port" \
            --parallelism_config_dp_replicate_size "${NUM_NODES:-1}" \
            --parallelism_config_dp_shard_size "$gpus" \
            --module scd.cli "$@"
    elif [ "$gpus" -gt 1 ]; then
        # With our own file, or accelerate would read what `accelerate config` wrote for other projects.
        exec "$python" -m accelerate.commands.launch --config_file scripts/accelerate/ddp.yaml \
            --num_processes "$gpus" --num_machines 1 \
            --main_process_port "$port" --module scd.cli "$@"
    elif [ "$gpus" -eq 0 ] && [ "${NUM_PROCS:-1}" -gt 1 ]; then
        exec "$python" -m torch.distributed.run --nproc_per_node "$NUM_PROCS" --master_port "$port" \
            --module scd.cli "$@"
    else
        exec "$python" -m scd.cli "$@"
    fi
}
