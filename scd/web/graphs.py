"""The three graphs that a browser runs: encoder step, decoder step, and latents to a picture.

All that follows from the conditions and noise levels alone is in tables, and so are the angles of
rows and columns: a graph holds no weights that are read for a handful of vectors only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scd.errors import ScdError
from scd.models import SCD
from scd.models.attention import full_attention
from scd.models.autoencoder import Codec
from scd.models.rotary import ROTARY_DIMS, rotary_table
from scd.models.world_model import MAX_TIMESTEP, TextKeys, WorldModel


@dataclass(frozen=True)
class Sizes:
    """The sizes that the shapes of the graphs' inputs are made of."""

    channels: int
    height: int  # of the latents
    width: int
    window: int  # frames in the cache
    tokens: int  # of a frame
    model: SCD

    @property
    def latents(self) -> tuple[int, ...]:
        return (1, self.channels, self.height, self.width)

    @property
    def context(self) -> tuple[int, ...]:
        return (1, 1, self.tokens, self.model.width)

    @property
    def cache(self) -> tuple[int, ...]:
        model = self.model
        return (model.cached_layers, 1, model.heads, self.window * self.tokens, model.head_dim)


class SlotCache:
    """A key-value cache of a fixed number of frames, as tensors in and out (`scd.models.Cache`).

    Args:
        keys, values: (L, 1, heads, W·N, head_dim).
        slot: (1,), where the newest frame is written; see `scd.rollout.cache.Window`.
        held: (1,), the number of slots that hold a frame, the newest among them.
        tokens: N.
    """

    text: TextKeys | None = None
    frames = 0  # angles are given, not counted

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor, held: Tensor, tokens: int):
        slots = torch.arange(keys.shape[3] // tokens, dtype=torch.int32)
        self.keys = list(keys.unbind(0))
        self.values = list(values.unbind(0))
        self._tokens = tokens
        self._newest = (slots == slot)[:, None, None]  # (W, 1, 1)
        self._visible = (slots < held)[:, None].expand(-1, tokens).flatten()  # (W·N,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write a layer's keys and values (1, heads, N, head_dim), attend over all held frames."""
        self.keys[layer] = keys = self._written(self.keys[layer], k)
        self.values[layer] = values = self._written(self.values[layer], v)
        mask = self._visible.expand(q.shape[2], -1)  # (N, W·N)
        return full_attention(q, keys, values, mask)

    def advance(self, frames: int) -> None:
        """Do nothing: the caller counts."""

    def _written(self, cached: Tensor, new: Tensor) -> Tensor:
        by_frame = cached.unflatten(2, (-1, self._tokens))  # (1, heads, W, N, head_dim)
        return torch.where(self._newest, new.unsqueeze(2), by_frame).flatten(2, 3)


class EncoderStep(nn.Module):
    """Encode the newest frame under the action that leads to the next."""

    inputs = (
        *("latents", "action", "cosines", "sines"),
        *("slot", "held", "keys", "values", "perturbation"),
    )
    outputs = ("context", "perturbed", "new_keys", "new_values")

    def __init__(self, sizes: Sizes, actions: int):
        super().__init__()
        self.sizes = sizes
        self.encoder = sizes.model.encoder
        table = self.encoder.precompute_modulation(torch.arange(actions))
        self.register_buffer("modulation", table)  # (A, 6·L + 2, D)
        self.modulation: Tensor

    def forward(
        self,
        latents: Tensor,
        action: Tensor,
        cosines: Tensor,
        sines: Tensor,
        slot: Tensor,
        held: Tensor,
        keys: Tensor,
        values: Tensor,
        perturbation: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode a frame into the cache, and the context of the next.

        Args:
            latents: (1, C, H, W).
            action: (1,) int32, of the next frame.
            cosines, sines: (1, 8), of the frame's position (`frame_angles` in `onnx_rollout`).
            slot, held, keys, values: see `SlotCache`.
            perturbation: (1, 1, N, D), for guidance.

        Returns:
            The context and the perturbed context, (1, 1, N, D), and the cache's keys and values.
        """
        s, patch = self.sizes, self.sizes.model.config.patch_size
        cache = SlotCache(keys, values, slot, held, s.tokens)
        rotary = rotary_table(cosines, sines, s.height // patch, s.width // patch)
        modulation = self.modulation.index_select(0, action)[:, None]  # (1, 1, 6·L + 2, D)
        x = self.encoder.prefill(latents[:, None], modulation, cache, rotary=rotary)
        context = self.encoder.context(x, modulation, None)
        perturbed = self.encoder.context(x, modulation, perturbation)
        return context, perturbed, torch.stack(cache.keys), torch.stack(cache.values)

    def example(self) -> tuple[Tensor, ...]:
        """Make inputs of the right shapes and types."""
        s, angles = self.sizes, (1, ROTARY_DIMS[0] // 2)
        action, slot, held = (torch.ones(1, dtype=torch.int32) for _ in range(3))
        latents, cosines, sines, keys, values, perturbation = (
            torch.zeros(shape) for shape in (s.latents, angles, angles, s.cache, s.cache, s.context)
        )
        return latents, action, cosines, sines, slot, held, keys, values, perturbation


class DecoderStep(nn.Module):
    """Predict a frame's velocity at one noise level.

    Args:
        levels: the noise levels σ that any step can have.
    """

    inputs = ("noisy", "context", "action", "level")
    outputs = ("velocity",)

    def __init__(self, sizes: Sizes, actions: int, levels: list[float]):
        super().__init__()
        self.sizes = sizes
        self.model = sizes.model
        timesteps = MAX_TIMESTEP * torch.tensor(levels)
        precomputed = self.model.precompute_modulation(torch.arange(actions), timesteps)
        self.register_buffer("modulation", precomputed.noisy.flatten(0, 1))  # (A·T, 6·L + 2, D)
        self.register_buffer("timesteps", timesteps)
        self.modulation: Tensor
        self.timesteps: Tensor

    def forward(self, noisy: Tensor, context: Tensor, action: Tensor, level: Tensor) -> Tensor:
        """Predict a velocity (1, C, H, W).

        Args:
            noisy: (1, C, H, W).
            context: (1, 1, N, D).
            action, level: (1,) int32, of the frame and of the step, by number.
        """
        row = action * len(self.timesteps) + level
        modulation = self.modulation.index_select(0, row)[:, None]  # (1, 1, 6·L + 2, D)
        frames = noisy[:, None]  # (1, 1, C, H, W)
        prediction = self.model.decoder(frames, context, modulation)
        timestep = self.timesteps.index_select(0, level)[:, None]  # (1, 1)
        return self.model.as_velocity(prediction, frames, timestep)[:, 0]

    def example(self) -> tuple[Tensor, ...]:
        """Make inputs of the right shapes and types."""
        action, level = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
        latents, context = torch.zeros(self.sizes.latents), torch.zeros(self.sizes.context)
        return latents, context, action, level


class PictureDecoder(nn.Module):
    """Decode latents to a picture."""

    inputs = ("latents",)
    outputs = ("picture",)

    def __init__(self, sizes: Sizes, codec: Codec):
        super().__init__()
        self.sizes = sizes
        self.codec = codec

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (1, C, H, W) to RGB (height, width, 3), whole numbers in 0..255."""
        pixels = self.codec.decode(latents[:, None])[0, 0]  # (3, height, width)
        return (pixels * 255).round().movedim(0, -1)

    def example(self) -> tuple[Tensor, ...]:
        """Make inputs of the right shapes and types."""
        return (torch.zeros(self.sizes.latents),)


Graph = EncoderStep | DecoderStep | PictureDecoder


def make_graphs(
    model: WorldModel, codec: Codec, frame_size: int, window: int, levels: list[float]
) -> dict[str, Graph]:
    """Make the graphs of a model.

    Args:
        window: frames in the key-value cache.
        levels: the noise levels σ that any step can have.

    Raises:
        ScdError: the browser cannot run models of this kind.
    """
    sizes = check_model(model, codec, frame_size, window)
    actions = model.num_conditions
    graphs: dict[str, Graph] = {
        "encoder": EncoderStep(sizes, actions),
        "decoder": DecoderStep(sizes, actions, levels),
        "picture": PictureDecoder(sizes, codec),
    }
    return {name: graph.eval().requires_grad_(False) for name, graph in graphs.items()}


def check_model(model: WorldModel, codec: Codec, frame_size: int, window: int) -> Sizes:
    """Refuse a model that the browser cannot run; give the sizes of its tensors.

    Raises:
        ScdError: says which property of the model it is.
    """
    if not isinstance(model, SCD):
        raise ScdError(f"web: only an SCD runs in the browser, not a {type(model).__name__}")
    for key, wanted in (("condition", "action"), ("encoder_frame", "shift")):
        if model.config[key] != wanted:
            raise ScdError(
                f"web: model.{key} is {model.config[key]}; the browser only runs {key}={wanted}"
            )
    if model.config.first_frame:
        raise ScdError("web: a model with model.first_frame=true cannot run in the browser yet")
    side = frame_size // codec.downsampling
    tokens = model.tokens_per_frame(side, side)
    return Sizes(codec.channels, side, side, window, tokens, model)
