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
from scd.rollout import generate
from scd.seeding import generator

CLIPS_AT_ONCE = 16  # in one pass; bounds the memory


@dataclass(frozen=True)
class ProbeClips:
    """n validation clips of F frames, of which the first `known` are given in rollouts."""

    latents: Tensor  # (n, F, C, h, w), scaled
    video: Tensor  # (n, F, 3, H, W) in [0, 1]
    actions: Tensor | None  # (n, F)
    labels: Tensor | None  # (n,)
    known: int
    first: int = 0  # number of the first clip, of which randomness is a function

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self))

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
                first=self.first + start,
            )

    def cut(self, new_frames: int) -> "ProbeClips":
        """The same clips, with fewer frames to make."""
        frames = self.known + new_frames
        actions = None if self.actions is None else self.actions[:, :frames]
        latents, video = self.latents[:, :frames], self.video[:, :frames]
        return replace(self, latents=latents, video=video, actions=actions)

    def conditions(self, model: WorldModel) -> Tensor | None:
        """(n, F), of every frame."""
        return model.frame_conditions(self.latents.shape[:2], self.actions, self.labels)

    def noise(self, seed: int) -> Tensor:
        """(n, new frames, C, h, w), what the new frames start from."""
        shape = (self.new_frames, *self.latents.shape[2:])
        return torch.stack(
            [torch.randn(shape, generator=generator("cpu", "probe", seed, i)) for i in self.numbers]
        )


def read_probe_clips(loaded: LoadedModel, count: int, new_frames: int) -> ProbeClips:
    """The first clips of the validation list, cut as an evaluation of `new_frames` cuts them.

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
    options = replace(options, eval=replace(options.eval, videos=count, new_frames=new_frames))
    data = clip_folder(options, options.data.val_list, "video")
    batch = read_evaluation_batch(data, list(range(count)), options, loaded.model.device)
    latents = loaded.codec.encode(batch["video"])
    return ProbeClips(latents, batch["video"], batch.get("actions"), batch.get("label"), known)


def roll_out(model: WorldModel, clips: ProbeClips, steps: int, seed: int) -> Tensor:
    """The clips' new frames, (n, new frames, C, h, w), without guidance."""
    return generate(
        model,
        clips.latents[:, : clips.known],
        actions=clips.actions,
        labels=clips.labels,
        num_frames=clips.new_frames,
        num_steps=steps,
        guidance="none",
        noise=clips.noise(seed),
    )
