"""Handle faults of a run: bad steps, broken clips, processes that drift apart."""

import hashlib
import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from scd.data.loader import TrainingClips, too_many_broken
from scd.errors import ScdError
from scd.training.run_log import RunLog, read_log
from scd.utils.files import write_atomically
from scd.utils.processes import processes

MAX_CLIPS_SHOWN = 8  # in a message; the file has all


def is_bad_step(loss: Tensor, norms: Sequence[Tensor], limit: float | None) -> Tensor:
    """Decide whether a step must not be applied; returns a bool, still on the device.

    A step is bad if the loss or a gradient norm is not finite, or if the first norm, that of the
    task's network, is above `limit` (`optim.skip_grad_norm`; None: no limit).
    """
    values = torch.stack([loss.float(), *(norm.float() for norm in norms)])
    bad = ~torch.isfinite(values).all()
    return bad if limit is None else bad | (norms[0] > limit)


def any_process(accelerator: Accelerator, *flags: Tensor | bool) -> list[bool]:
    """Reduce each flag to whether any process has set it; collective.

    It is the only point of a training step that always waits for the device.
    """
    device = accelerator.device
    counts = torch.stack([torch.as_tensor(flag, device=device).float() for flag in flags])
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts, "sum")
    return [count > 0 for count in counts.tolist()]


class BadSteps:
    """The bad steps in a row, and the log of all of them with their clips (`bad-steps.jsonl`).

    Args:
        in_a_row: their number when the run starts.
    """

    def __init__(self, log: RunLog, clips: TrainingClips, in_a_row: int):
        self.log = log
        self.clips = clips
        self.in_a_row = in_a_row
        self.report = ""

    def record(
        self, step: int, batches: list[tuple[Tensor, Tensor]], norms: dict[str, Tensor]
    ) -> None:
        """Log a bad step; collective.

        Args:
            batches: sample numbers (B,) and loss () of each batch of this process.
            norms: of the gradients of network and critic, by their names in the log.
        """
        self.in_a_row += 1
        mine = [
            {"loss": str(float(loss)), "clips": [self._clip(int(n)) for n in samples]}
            for samples, loss in batches
        ]
        everywhere: list[dict[str, Any]] = gather_object(mine)
        known = {name: str(float(norm)) for name, norm in norms.items()}
        entry = {"step": step, "in_a_row": self.in_a_row, **known, "batches": everywhere}
        self.log.write(entry)
        losses = ", ".join(batch["loss"] for batch in everywhere)
        names = [clip["name"] for batch in everywhere for clip in batch["clips"]]
        more = ", …" if len(names) > MAX_CLIPS_SHOWN else ""
        self.report = (
            f"loss {losses}, gradient norm {' and (critic) '.join(known.values())}, clips "
            f"{', '.join(names[:MAX_CLIPS_SHOWN])}{more}"
        )
        if self.log.enabled:
            print(f"step {step} was not applied: {self.report}")

    def _clip(self, sample: int) -> dict[str, Any]:
        return {"sample": sample, "name": self.clips.folder.name(self.clips.number(sample))}


class RunningStatistics:
    """The running statistics of batch norms, which the forward pass of a bad step has changed."""

    def __init__(self, networks: Sequence[nn.Module]):
        self.buffers = [
            buffer
            for network in networks
            for name, buffer in network.named_buffers()
            if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        ]
        self.saved: list[Tensor] = []

    def save(self) -> None:
        self.saved = [buffer.clone() for buffer in self.buffers]

    def restore(self) -> None:
        for buffer, saved in zip(self.buffers, self.saved, strict=True):
            buffer.copy_(saved)


def refuse_unequal_weights(networks: Sequence[nn.Module], step: int) -> None:
    """Compare a hash of all parameters across the processes, which hold them whole; collective.

    Raises:
        ScdError: naming the processes whose weights differ from those of process 0.
    """
    digest = hashlib.sha256()
    for parameter in chain.from_iterable(network.parameters() for network in networks):
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    found = gather_object([digest.hexdigest()])
    others = [str(number) for number, value in enumerate(found) if value != found[0]]
    if others:
        raise ScdError(
            f"step {step}: process {', '.join(others)} holds other weights than process 0; the "
            f"newest checkpoint is process 0's and may be the last good one: look for a faulty "
            f"device or a parameter left out of the gradient reduction"
        )


class BrokenClips:
    """The broken clips that all processes and their data workers have skipped.

    Workers share no memory, so every sample carries the numbers of the clips that were skipped for
    it (see `TrainingClips`). They are counted at the step that uses the sample, not when it is
    prefetched. The main process reports each clip once, on stderr and in `broken-clips.jsonl`; a
    resumed run starts with those up to its checkpoint.

    Args:
        output: folder of the run.
        step: of the checkpoint.
    """

    def __init__(self, output: Path, clips: TrainingClips, step: int):
        self.clips = clips
        self.path = output / "broken-clips.jsonl"
        self.entries: list[dict[str, Any]] = []
        self.skipped: list[tuple[int, int]] = []  # for samples of this process since `count`
        if clips.max_broken and self.path.exists():
            found = (e for e in read_log(self.path) if e.keys() >= {"clip", "problem"})
            self.entries = [entry for entry in found if entry["step"] <= step]

    def pop_from(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Remove the numbers of broken clips from a batch on the CPU, and remember them."""
        if not self.clips.max_broken:
            return batch
        for sample, numbers in zip(batch["sample"].tolist(), batch["broken"].tolist(), strict=True):
            self.skipped += [(sample, number) for number in numbers if number >= 0]
        return {key: value for key, value in batch.items() if key != "broken"}

    def count(self, step: int) -> None:
        """Count the broken clips that processes have skipped for a step; collective.

        Raises:
            ScdError: naming them on every process, if there are more than `data.max_broken_clips`.
        """
        limit = self.clips.max_broken
        found = len(self.entries)
        for sample, number in sorted(gather_object(self.skipped)):
            if all(entry["clip"] != number for entry in self.entries):
                problem = self.clips.problem(sample, number)
                self.entries.append({"step": step, "clip": number, "problem": problem})
        self.skipped = []
        if len(self.entries) > found and processes().is_main_process:
            for entry in self.entries[found:]:
                print(f"broken clip, skipped: {entry['problem']}", file=sys.stderr)
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
            write_atomically(self.path, lambda aside: aside.write_text(text, encoding="utf-8"))
        if len(self.entries) > limit:
            raise too_many_broken([entry["problem"] for entry in self.entries], limit)
