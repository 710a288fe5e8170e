"""From options to a trained experiment."""

from accelerate import Accelerator

from scd.options import Options
from scd.training.tasks import Task
from scd.training.trainer import Trainer, make_accelerator


def run_experiment(options: Options) -> None:
    """Train what the options describe; see `Trainer` for what it writes."""
    accelerator = make_accelerator(options)
    Trainer(options, build_task(options, accelerator), accelerator).run()


def build_task(options: Options, accelerator: Accelerator) -> Task:
    if options.task == "autoencoder":
        from scd.training.autoencoder_task import AutoencoderTask

        return AutoencoderTask(options, accelerator.device)
    from scd.training.world_model_task import WorldModelTask

    return WorldModelTask(options, accelerator.device)
