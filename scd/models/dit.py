"""The network of the dense models: one stack of blocks from frames to predictions of them."""

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from scd.models.config import check_config
from scd.models.layers import (
    HEAD_DIM,
    Attend,
    Block,
    ConditionEmbedding,
    Float32Linear,
    OutputNorm,
    initialize,
    patchify,
    run_blocks,
    unpatchify,
)
from scd.models.rotary import rotary_positions
from scd.models.world_model import WorldModel


class DiT(WorldModel):
    """A diffusion transformer over the tokens of all frames; subclasses say which sees which.

    Args: as `SCD`, with one number of `layers`.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 32,
        patch_size: int = 1,
        heads: int = 16,
        layers: int = 12,
        condition: str = "none",
        num_conditions: int = 0,
        first_frame: bool = False,
        modulate_output: bool = True,
        prediction: str = "velocity",
        sigma_min: float = 0.05,
    ):
        super().__init__()
        check_config(self.config)
        width = heads * HEAD_DIM
        self.gradient_checkpointing = False
        self.embed = nn.Linear(channels * patch_size**2, width)
        self.conditioning = ConditionEmbedding(width, num_conditions)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm_out = OutputNorm(width, modulate_output)
        self.unembed = Float32Linear(width, channels * patch_size**2)
        initialize(self)
        nn.init.zeros_(self.unembed.weight)

    def _predict(
        self, frames: Tensor, e: Tensor, positions: Tensor, attends: Sequence[Attend]
    ) -> Tensor:
        """Predict from frames (B, F, C, H, W) at positions (F,), in the shape of the frames.

        Args:
            e: (B, F, D), the frames' embeddings; or (B, F, 6·L + 2, D), precomputed modulation.
        """
        height, width = frames.shape[-2:]
        patch = self.config.patch_size
        rotary = rotary_positions(positions, height // patch, width // patch)
        x = self.embed(patchify(frames, patch).to(self.embed.weight.dtype))  # (B, F, N, D)
        if self.config.prediction == "data":  # it is divided by σ, which magnifies its rounding
            x = x.float()
        x = run_blocks(self.blocks, x, e, rotary, attends, self.gradient_checkpointing)
        x = self.unembed(self.norm_out(x.float(), e))  # (B, F, N, C·p·p)
        return unpatchify(x, patch, height, width)  # (B, F, C, H, W)
