"""From options to a trained experiment."""

from contextlib import ExitStack

from accelerate import Accelerator

from scd.files import remove_unfinished
from scd.options import Options
from scd.processes import together
from scd.training.heartbeat import last_word
from scd.training.lock import only_run_in
from scd.training.tasks import Task
from scd.training.trainer import Trainer, make_accelerator


def run_experiment(options: Options) -> None:
    """Train what the options describe; see `Trainer` for what it writes, and for errors.

    Raises:
        ScdError: another run is going on in the same folder.
    """
    accelerator = make_accelerator(options)
    main = accelerator.is_main_process
    with ExitStack() as held:
        with together():
            if main:
                held.enter_context(only_run_in(options.output))
                remove_unfinished(options.output)
        with last_word(options.output, main):
            Trainer(options, build_task(options, accelerator), accelerator).run()


def build_task(options: Options, accelerator: Accelerator) -> Task:
    if options.task == "autoencoder":
        from scd.training.autoencoder_task import AutoencoderTask

        return AutoencoderTask(options, accelerator.device)
    from scd.training.world_model_task import WorldModelTask

    return WorldModelTask(options, accelerator.device)
