"""Writing checkpoints beside the training that goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from scd.processes import together
from scd.training.checkpoint import TrainingState, save_checkpoint


def saves_in_background(device: torch.device) -> bool:
    """Whether training on the device leaves the CPU free to write."""
    return device.type == "cuda"


class CheckpointWriter:
    """Writes checkpoints on the main process; a context that is left when the last one is there.

    In the background, `write` returns at once: the state shares no memory with what is trained. At
    most one checkpoint is on its way, and it is whole or absent as ever.

    Args:
        folder, keep: see `save_checkpoint`.
        main: whether this is the main process; the others only take part in what is collective.
        background: write in a thread of its own.
    """

    def __init__(self, folder: Path, keep: int, main: bool, background: bool):
        self.folder = folder
        self.keep = keep
        self.main = main
        self.threads = ThreadPoolExecutor(1, "checkpoint") if main and background else None
        self.on_its_way: Future[Path] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.threads is not None:
            self.threads.shutdown()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint on its way will not arrive; `finish` then tells why."""
        ended = self.on_its_way
        return ended is not None and ended.done() and ended.exception() is not None

    def write(self, state: TrainingState) -> None:
        """Write a checkpoint; collective. `finish` comes first: it frees the last one's memory.

        Raises:
            ScdError: see `save_checkpoint`; in the background, `finish` raises it.
        """
        with together():
            if self.threads is not None:
                self.on_its_way = self.threads.submit(
                    save_checkpoint, self.folder, state, self.keep
                )
            elif self.main:
                save_checkpoint(self.folder, state, self.keep)

    def finish(self) -> None:
        """Wait for the checkpoint on its way; every process leaves when it is there, or raises.

        Raises:
            ScdError: see `save_checkpoint`.
        """
        with together():
            if self.on_its_way is not None:
                on_its_way, self.on_its_way = self.on_its_way, None
                on_its_way.result()
