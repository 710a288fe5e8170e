"""What tests/test_processes.py launches on two processes: train as the arguments say.

torchrun --nproc_per_node=2 tests/train_on_processes.py plain|sharded|lost OPTIONS [key=value ...]

Accelerate shards on accelerators only. `sharded` stands for it on the CPU: it takes the settings of
`scripts/accelerate/fsdp2.yaml` as `accelerate launch` would hand them over. In `lost`, the second
process stands still after the first step, as one does whose machine is gone, and seconds are
enough to notice it.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from scd.options import load_options
from scd.training import lost_process
from scd.training.launch import make_accelerator, sharding_plugin
from scd.training.run import build_task
from scd.training.trainer import Trainer

CONFIG = Path(__file__).parent.parent / "scripts/accelerate/fsdp2.yaml"


def main() -> None:
    kind, path, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    options = load_options(path, overrides)
    accelerator = make_accelerator(options)
    assert accelerator.num_processes == 2
    if kind == "sharded":
        os.environ.update(launcher_variables())
        precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        accelerator.state.fsdp_plugin = sharding_plugin(precision)
        accelerator.state.distributed_type = DistributedType.FSDP
    trainer = Trainer(options, build_task(options, accelerator), accelerator)
    parameters = list(trainer.task.network.parameters())
    assert all(isinstance(p, DTensor) == (kind == "sharded") for p in parameters)
    if kind != "lost":
        trainer.run()
        return
    lost_process.BEAT_SECONDS, lost_process.SILENT_BEATS = 0.25, 8
    if accelerator.process_index == 1:
        trainer.log.write = lambda entry: os.kill(os.getpid(), signal.SIGSTOP)
    with lost_process.lost_process_ends_run(PartialState()):
        trainer.run()


def launcher_variables() -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes that it starts."""
    config = yaml.safe_load(CONFIG.read_text())
    assert config["distributed_type"] == "FSDP"
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    settings = {names.get(k, k.upper()): str(v) for k, v in config["fsdp_config"].items()}
    return {"ACCELERATE_USE_FSDP": "true", **settings}


main()
