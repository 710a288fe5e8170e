"""From options to a trained experiment."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from scd.files import remove_unfinished
from scd.locks import hold_lock
from scd.options import Options
from scd.processes import together
from scd.training.heartbeat import last_word
from scd.training.launch import make_accelerator
from scd.training.lost_process import lost_process_ends_run
from scd.training.tasks import Task
from scd.training.trainer import Trainer

LOCK = "run.lock"  # in an experiment's folder, held by its run


def run_experiment(options: Options) -> None:
    """Train what the options describe; see `Trainer` for what it writes, and for errors.

    Raises:
        ScdError: another run is going on in the same folder.
    """
    accelerator = make_accelerator(options)
    main = accelerator.is_main_process
    with ExitStack() as held:
        held.enter_context(sums_in_fixed_order(accelerator.device))
        held.enter_context(lost_process_ends_run(PartialState(), options.output))
        with together():
            if main:
                busy = f"{options.output}: a run is going on here"
                advice = "wait for it, stop it, or choose another name=..."
                held.enter_context(hold_lock(options.output / LOCK, busy, advice))
                remove_unfinished(options.output)
        with last_word(options.output, main):
            Trainer(options, build_task(options, accelerator), accelerator).run()


@contextmanager
def sums_in_fixed_order(device: torch.device) -> Iterator[None]:
    """On the CPU, the same gradients to the bit every time; other devices go on as they are.

    A compiled embedding would add up its gradient in whatever order the threads come.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # it would write all memory twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def build_task(options: Options, accelerator: Accelerator) -> Task:
    if options.task == "autoencoder":
        from scd.training.autoencoder_task import AutoencoderTask

        return AutoencoderTask(options, accelerator.device)
    from scd.training.world_model_task import WorldModelTask

    return WorldModelTask(options, accelerator.device)
