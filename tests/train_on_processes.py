"""What tests/test_processes.py launches on two processes: train as the arguments say.

torchrun --nproc_per_node=2 tests/train_on_processes.py plain|sharded OPTIONS [key=value ...]
"""

import sys

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from scd.options import load_options
from scd.training.run import build_task
from scd.training.trainer import Trainer, make_accelerator


def main() -> None:
    kind, path, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    options = load_options(path, overrides)
    accelerator = make_accelerator(options)
    assert accelerator.num_processes == 2
    if kind == "sharded":  # accelerate itself shards on accelerators only
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
        accelerator.state.distributed_type = DistributedType.FSDP
    trainer = Trainer(options, build_task(options, accelerator), accelerator)
    parameters = list(trainer.task.network.parameters())
    assert all(isinstance(p, DTensor) == (kind == "sharded") for p in parameters)
    trainer.run()


main()
