"""What tests/test_processes.py launches on two or four processes: train as the arguments say.

torchrun --nproc_per_node=2 tests/train_on_processes.py KIND OPTIONS [key=value ...]

KIND is plain, sharded, sharded-wan, hybrid, lost or dry (a dry run).
Accelerate shards on accelerators only. `sharded…` and `hybrid` stand for it on the CPU: they take
the settings of `scripts/accelerate/fsdp2.yaml`, `fsdp2_wan.yaml` and `hsdp.yaml` as `accelerate
launch` hands them over; `hybrid` as on nodes of two. In `lost`, the second process stands still
after the first step, as one does whose machine is gone, and seconds are enough to notice it.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, ParallelismConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor, Replicate, Shard

from scd.options import load_options
from scd.training import watchdog
from scd.training.dry_run import dry_run
from scd.training.launch import build_task, make_accelerator, sharding_plugin
from scd.training.trainer import Trainer

CONFIGS = Path(__file__).parent.parent / "scripts/accelerate"


def main(kind: str, path: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    options = load_options(path, list(overrides))
    if kind == "dry":
        dry_run(options)
        return
    accelerator = make_accelerator(options)
    sharded = {"sharded": "fsdp2", "sharded-wan": "fsdp2_wan", "hybrid": "hsdp"}
    if kind in sharded:
        shard(accelerator, sharded[kind])
    trainer = Trainer(options, build_task(options, accelerator), accelerator)
    for parameter in trainer.task.network.parameters():
        assert isinstance(parameter, DTensor) == (kind in sharded)
        if kind == "hybrid":
            assert parameter.device_mesh.shape == (accelerator.num_processes // 2, 2)
            assert parameter.placements == (Replicate(), Shard(0))
    if kind != "lost":
        trainer.run()
        return
    watchdog.BEAT_SECONDS, watchdog.SILENT_BEATS = 0.25, 8
    if accelerator.process_index == 1:
        trainer.log.write = lambda entry: os.kill(os.getpid(), signal.SIGSTOP)
    with watchdog.lost_process_ends_run(PartialState(), options.output):
        trainer.run()


def shard(accelerator: Accelerator, config: str) -> None:
    nodes = accelerator.num_processes // 2
    command = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", "0"]
    command += ["--num_processes", str(accelerator.num_processes), "--num_machines", "1"]
    command += ["--parallelism_config_dp_replicate_size", str(nodes)]
    command += ["--parallelism_config_dp_shard_size", "2", "script"]
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    named = ("FSDP_", "ACCELERATE_USE_", "PARALLELISM_")
    variables = prepare_multi_gpu_env(launch).items()
    os.environ.update({key: value for key, value in variables if key.startswith(named)})
    # What `Accelerator` does on accelerators.
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    state = accelerator.state
    state.fsdp_plugin = sharding_plugin(precision)
    state.distributed_type = DistributedType.FSDP
    if "ACCELERATE_USE_PARALLELISM_CONFIG" in os.environ:
        state.parallelism_config = ParallelismConfig()
        state.device_mesh = state.parallelism_config.get_device_mesh("cpu")
        state.parallelism_config._validate_accelerator(accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
