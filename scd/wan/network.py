"""What the causal and the separable Wan share: the model's facts, its inputs, where weights go."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from scd.errors import ScdError
from scd.models.config import count_patches, own_config
from scd.models.world_model import WorldModel
from scd.wan.stack import WanSizes

IMAGE_FACTS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")  # of image-to-video models
Model = TypeVar("Model", bound="WanWorldModel")


class WanWorldModel(WorldModel):
    """A world model of Wan's blocks: conditioned on a text, and on actions if it has any.

    Its config is Wan's own, under diffusers' names, and more. It predicts velocities ε − x at noise
    levels σ = t/1000, as Wan does.
    """

    _repeated_blocks = ["WanBlock"]
    _no_split_modules = ["WanBlock"]
    _keep_in_fp32_modules = ["time_embedder", "scale_shift_table", "norm2"]
    has_text = True
    prediction = "velocity"
    sigma_min = 0.0  # nothing is divided by a noise level

    @property
    def channels(self) -> int:
        return self.config.in_channels

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.config.attention_head_dim

    @property
    def condition(self) -> str:
        return "action" if self.config.num_actions else "none"

    @property
    def num_conditions(self) -> int:
        return self.config.num_actions

    @property
    @abstractmethod
    def first_predicted(self) -> int:
        """The first frame of a clip that the model can predict."""

    def tokens_per_frame(self, height: int, width: int) -> int:
        _, rows, columns = self.config.patch_size
        return count_patches(height, width, rows, columns)

    def check_text(self, text: Tensor | None, batch: int) -> Tensor:
        if text is None:
            raise ScdError(f"{type(self).__name__} needs a text")
        if text.ndim != 3 or len(text) != batch or text.shape[2] != self.config.text_dim:
            raise ScdError(
                f"the text is {tuple(text.shape)}, expected ({batch}, T, {self.config.text_dim})"
            )
        return text


def config_of(transformer: WanTransformer3DModel) -> dict[str, Any]:
    """Take the config of a text-to-video Wan, without what belongs to image-to-video models.

    Raises:
        ScdError: it is an image-to-video model.
    """
    config = own_config(transformer)
    images = [key for key in IMAGE_FACTS if config.pop(key, None) is not None]
    if images:
        raise ScdError(f"an image-to-video Wan ({', '.join(images)}): give a text-to-video one")
    WanSizes.of(config)
    return config


def filled(build: Callable[[], Model], tensors: dict[str, Tensor]) -> Model:
    """Build a network out of copies of tensors, in their types and on their device.

    Raises:
        RuntimeError: names or shapes are others than the network's.
    """
    with torch.device("meta"):  # no time and memory for values that are replaced
        model = build()
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()
