"""Counting the clips that training passed over because they cannot be read."""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import gather
from torch import Tensor

from scd.data.clips import TrainingClips, too_many_broken
from scd.files import write_whole
from scd.processes import processes
from scd.training.run_folder import read_log


class BrokenClips:
    """The distinct clips passed over by all processes and their workers, told once each.

    Workers share no memory, so every sample carries the numbers of the clips that it was to be cut
    from (see `TrainingClips`), and they are counted here, at the step that uses it: what was read
    ahead has no say. The main process tells of each on stderr and in `broken-clips.jsonl`; a run
    that goes on from a checkpoint begins with those up to its step.

    Args:
        output: folder of the run.
        step: of the checkpoint.
    """

    def __init__(self, output: Path, clips: TrainingClips, step: int):
        self.clips = clips
        self.path = output / "broken-clips.jsonl"
        self.entries: list[dict[str, Any]] = []
        if clips.max_broken and self.path.exists():
            found = (e for e in read_log(self.path) if e.keys() >= {"clip", "problem"})
            self.entries = [entry for entry in found if entry["step"] <= step]

    def taken_from(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The batch of a step without its numbers of broken clips, which are counted; collective.

        Raises:
            ScdError: on every process, when there are more than `data.max_broken_clips`, naming
                them.
        """
        limit = self.clips.max_broken
        if not limit:
            return batch
        device = processes().device
        samples, broken = (gather(batch[key].to(device)).tolist() for key in ("sample", "broken"))
        found = len(self.entries)
        for sample, numbers in zip(samples, broken, strict=True):
            for number in numbers:
                if number >= 0 and all(entry["clip"] != number for entry in self.entries):
                    problem = self.clips.problem(sample, number)
                    self.entries.append({"step": step, "clip": number, "problem": problem})
        if len(self.entries) > found and processes().is_main_process:
            for entry in self.entries[found:]:
                print(f"broken clip, left out: {entry['problem']}", file=sys.stderr)
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
            write_whole(self.path, lambda aside: aside.write_text(text, encoding="utf-8"))
        if len(self.entries) > limit:
            raise too_many_broken([entry["problem"] for entry in self.entries], limit)
        return {key: value for key, value in batch.items() if key != "broken"}
