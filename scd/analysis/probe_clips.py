"""The clips that all probes look at, and frames made under their real history."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scd.data.clips import clip_folder
from scd.errors import ScdError
from scd.evaluation.protocol import read_evaluation_batch
from scd.models import WorldModel
from scd.models.load import LoadedModel
from scd.options import RolloutOptions
from scd.rollout import continue_videos
from scd.utils.precision import Precision, autocast, resolve_precision
from scd.utils.seeding import generator

CLIPS_AT_ONCE = 16  # in one pass; bounds the memory


@dataclass(frozen=True)
class ProbeClips:
    """n validation clips of F frames, of which the first `known` are given in rollouts."""

    latents: Tensor  # (n, F, C, h, w), scaled
    video: Tensor  # (n, F, 3, H, W) in [0, 1]
    actions: Tensor | None  # (n, F)
    labels: Tensor | None  # (n,)
    known: int
    numbers: tuple[int, ...]  # of the clips in the validation list; randomness is a function of it
    precision: Precision = "fp32"  # that probes compute in: fp32, tf32 or bf16

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def new_frames(self) -> int:
        return self.latents.shape[1] - self.known

    def parts(self, size: int = CLIPS_AT_ONCE) -> Iterator["ProbeClips"]:
        """At most `size` clips at a time."""
        for start in range(0, len(self), size):
            own = slice(start, start + size)
            yield replace(
                self,
                latents=self.latents[own],
                video=self.video[own],
                actions=None if self.actions is None else self.actions[own],
                labels=None if self.labels is None else self.labels[own],
                numbers=self.numbers[own],
            )

    def cut(self, new_frames: int) -> "ProbeClips":
        """The same clips, with fewer frames to make."""
        frames = self.known + new_frames
        actions = None if self.actions is None else self.actions[:, :frames]
        latents, video = self.latents[:, :frames], self.video[:, :frames]
        return replace(self, latents=latents, video=video, actions=actions)

    def conditions(self, model: WorldModel) -> Tensor | None:
        """(n, F), of every frame."""
        conditions = model.frame_conditions(self.latents.shape[:2], self.actions, self.labels)
        model.check_conditions(conditions)
        return conditions

    def noise(self, seed: int) -> Tensor:
        """(n, new frames, C, h, w), what the new frames start from."""
        shape = (self.new_frames, *self.latents.shape[2:])
        return torch.stack(
            [torch.randn(shape, generator=generator("cpu", "probe", seed, i)) for i in self.numbers]
        )


def clip_numbers(text: str) -> tuple[int, ...]:
    """`16`: the first 16 clips; `3,17,40`: these.

    Raises:
        ScdError: it is neither, or they are fewer than two.
    """
    try:
        given = [int(part) for part in text.split(",")]
    except ValueError:
        given = []
    numbers = list(range(given[0])) if len(given) == 1 else given
    if len(numbers) < 2 or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ScdError(
            f"--clips {text}: give how many (2 or more), or the numbers of two or more different "
            f"ones, such as 3,17,40"
        )
    return tuple(numbers)


def read_probe_clips(loaded: LoadedModel, numbers: tuple[int, ...], new_frames: int) -> ProbeClips:
    """Clips of the validation list, cut as an evaluation of `new_frames` cuts them.

    They are encoded, and will be probed, in `rollout.precision`.

    Raises:
        ScdError: they are missing, broken, too short, or the options give too little context.
    """
    options = loaded.options
    known = options.eval.context_frames
    if known < 2:
        raise ScdError(
            f"eval.context_frames={known}: probes look at attention to past frames and need 2 or "
            f"more; add eval.context_frames=8, say"
        )
    options = replace(options, eval=replace(options.eval, new_frames=new_frames))
    data = clip_folder(options, options.data.val_list, "video")
    if max(numbers) >= len(data):
        raise ScdError(
            f"--clips: {data.list_path} has clips 0 to {len(data) - 1}, none of number "
            f"{max(numbers)}"
        )
    batch = read_evaluation_batch(data, list(numbers), options, loaded.model.device)
    precision = resolve_precision(options.rollout.precision, loaded.model.device)
    loaded.codec.precision = precision
    latents = loaded.codec.encode(batch["video"])
    actions, labels = batch.get("actions"), batch.get("label")
    return ProbeClips(latents, batch["video"], actions, labels, known, numbers, precision)


def roll_out(model: WorldModel, clips: ProbeClips, steps: int, seed: int) -> Tensor:
    """The clips' new frames, (n, new frames, C, h, w), without guidance."""
    # For bf16 a rollout would copy the model, of which probes hold the original in their hands.
    own = "fp32" if clips.precision == "bf16" else clips.precision
    with autocast(model.device, clips.precision):
        return continue_videos(
            model,
            RolloutOptions(steps, guidance="none", precision=own),
            clips.latents[:, : clips.known],
            clips.new_frames,
            clips.actions,
            clips.labels,
            noise=clips.noise(seed),
        )
