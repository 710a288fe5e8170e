"""What a Wan is trained on: latents of captioned videos, or prompts alone."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scd.data.clips import ClipFolder, check_actions, read_actions
from scd.data.lists import ClipEntry
from scd.data.prompts import PromptFolder, read_lines
from scd.errors import ScdError
from scd.options import Options


def open_prompts(options: Options) -> PromptFolder:
    """Open the embeddings of prompts in `data.root`.

    Raises:
        ScdError: there are none, or they have another number of tokens than `wan.text_length`.
    """
    folder = PromptFolder(Path(options.data.root))
    if folder.length != options.wan.text_length:
        raise ScdError(
            f"{folder.folder}: its prompts have {folder.length} tokens, but wan.text_length is "
            f"{options.wan.text_length}"
        )
    return folder


class CaptionedLatents(ClipFolder):
    """The latents of videos, each with the embedding of its caption and perhaps with actions.

    A clip begins where its video does: there, one latent frame is of a single picture, and every
    further one of `frames_per_latent`. Its action is that of the first of its pictures.

    Raises:
        ScdError: see `ClipFolder` and `open_prompts`; or a clip has no caption.
    """

    def __init__(self, options: Options, list_file: str, frames_per_latent: int):
        m = options.model
        root = Path(options.data.root)
        super().__init__(root, list_file, "latents", m.condition, m.num_conditions)
        self.frames_per_latent = frames_per_latent
        self.texts = open_prompts(options)
        for number, entry in enumerate(self.entries):
            if entry.caption is None:
                raise ScdError(f"{self.list_path}: entry {number} has no caption")

    @property
    def prompts(self) -> list[str]:
        """The captions of all clips."""
        return [str(entry.caption) for entry in self.entries]

    def read_bytes(
        self,
        number: int,
        frames: int,
        stride: int = 1,
        rng: np.random.Generator | None = None,
        framing_rng: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Read `latents` (F, C, h, w), `text` (T, text_dim), and any `actions` (F,)."""
        clip = super().read_bytes(number, frames, stride, rng, framing_rng)
        caption = str(self.entries[number].caption)
        return {**clip, "text": self.texts.embedding(caption).float()}

    def first_frame(self, last: int, rng: np.random.Generator | None) -> int:
        """Begin with the video."""
        return 0

    def _actions(self, entry: ClipEntry, length: int) -> Tensor:
        """Read one action for each of `length` latent frames."""
        path, of_each = self.root / str(entry.actions_in), self.frames_per_latent
        actions = read_actions(path)
        pictures = 1 + (length - 1) * of_each
        check_actions(path, actions, pictures, self.condition, self.num_conditions)
        first = [0, *range(1, pictures, of_each)]
        return torch.from_numpy(actions[first])


class Prompts:
    """The prompts of a text file, each a clip that holds nothing but a `text` (T, text_dim)."""

    def __init__(self, options: Options):
        self.list_path = Path(options.data.root) / options.data.train_list
        self.prompts = read_lines(self.list_path)
        self.texts = open_prompts(options)

    def __len__(self) -> int:
        return len(self.prompts)

    def name(self, number: int) -> str:
        return repr(self.prompts[number])

    def read_bytes(
        self,
        number: int,
        frames: int,
        stride: int = 1,
        rng: np.random.Generator | None = None,
        framing_rng: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        return {"text": self.texts.embedding(self.prompts[number]).float()}
