"""A trace of some training steps (`train.profile_steps`), for Perfetto or chrome://tracing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from scd.files import write_whole


class StepTrace:
    """Records steps with torch's profiler and writes `traces/steps-<first>-<last>.json.gz`.

    A run that begins or ends among these steps writes none.

    Args:
        output: the run's folder.
        steps: the first and the last step; empty: none.
        enabled: on the main process.
    """

    def __init__(self, output: Path, steps: list[int], enabled: bool):
        self.first, self.last = steps or (0, 0)
        self.path = output / "traces" / f"steps-{self.first}-{self.last}.json.gz"
        self.enabled = enabled
        self.profiler: profile | None = None

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Of the block, which takes this step."""
        if self.enabled and number == self.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities, record_shapes=True)
            self.profiler.start()
        if self.profiler is None:
            yield
            return
        with record_function(f"training step {number}"):
            yield
        if number == self.last:
            recorded, self.profiler = self.profiler, None
            recorded.stop()
            write_whole(self.path, lambda aside: recorded.export_chrome_trace(str(aside)))
            print(f"{self.path}: open it at https://ui.perfetto.dev")
