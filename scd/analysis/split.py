"""From a trained dense model to an SCD that starts from its layers.

The encoder gets the first E layers, the frame decoder the last D, or the first and the last D/2 (as
the paper does with a text-to-video model: 25 of 30 layers, and 5 + 5). Embedding, conditioning and
output layers are copied to where they have a counterpart.

What agrees with the dense model: the encoder's layers see clean frames at timestep −1 and their
past, as its clean branch did; the decoder's rotary positions differ inside a frame as they did; the
velocity is read by the same layers. What cannot, and has to be learned: history now comes as tokens
of the same frame, normed, and the decoder never attended to such tokens; the encoder's frame j is
conditioned on the action of frame j+1 (the dense model's clean frame on its own); noisy tokens of
`last` enter in the middle of the stack. The encoder's output norm starts without modulation.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scd.errors import ScdError
from scd.models import SCD, CausalDiT
from scd.models.autoencoder import Codec
from scd.models.load import LoadedModel, build_world_model, load_checkpoint_for_use
from scd.models.weights import load_matching
from scd.options import OPTIONS_FILE, Options, options_to_dict, options_to_yaml
from scd.utils.files import write_atomically

FRESH = ("encoder.norm_out.", "encoder.start")  # has no counterpart in a dense model


@dataclass(frozen=True)
class Split:
    """Which layers of a dense model go where."""

    encoder_layers: int
    decoder_layers: int
    decoder_from: str = "last"

    @property
    def name(self) -> str:
        return f"{self.encoder_layers}+{self.decoder_layers} {self.decoder_from}"

    @property
    def arguments(self) -> list[str]:
        """Write the split as the command line's options."""
        numbers = ("--encoder-layers", self.encoder_layers, "--decoder-layers", self.decoder_layers)
        return [*map(str, numbers), "--decoder-from", self.decoder_from]

    def decoder_sources(self, layers: int) -> list[int]:
        """The numbers of the dense model's layers, from 0, that the decoder is made of.

        Raises:
            ScdError: there are not so many, or none for a part.
        """
        for part, count in (("encoder", self.encoder_layers), ("decoder", self.decoder_layers)):
            if not 1 <= count <= layers:
                raise ScdError(
                    f"--{part}-layers {count}: the dense model has layers for 1 to {layers}"
                )
        first = 0
        if self.decoder_from == "first-and-last":
            if self.decoder_layers % 2:
                raise ScdError(
                    f"--decoder-layers {self.decoder_layers}: first-and-last takes as many from "
                    f"either end, so an even number"
                )
            first = self.decoder_layers // 2
        return [*range(first), *range(layers - self.decoder_layers + first, layers)]


def split_options(options: Options, split: Split) -> Options:
    """The dense model's experiment, with an SCD of these layers.

    Its layers attended to their history, so the context comes as tokens.
    """
    model = replace(
        options.model,
        type="scd",
        fusion="token_concat",
        layers=0,
        encoder_layers=split.encoder_layers,
        decoder_layers=split.decoder_layers,
    )
    return replace(options, model=model)


def split_model(dense: CausalDiT, codec: Codec, options: Options, split: Split) -> SCD:
    """An SCD of the dense model's weights.

    Args:
        options: see `split_options`.

    Raises:
        ScdError: see `Split.decoder_sources`.
    """
    sources = split.decoder_sources(len(dense.blocks))
    torch.manual_seed(options.seed)
    model = build_world_model(options, codec).to(dense.device)
    assert isinstance(model, SCD)
    weights: dict[str, Tensor] = dense.state_dict()
    taken = {
        name: tensor if name.startswith(FRESH) else weights[_source(name, sources)].clone()
        for name, tensor in model.state_dict().items()
    }
    load_matching(model, taken, f"split {split.name}")
    return model.eval()


def split_checkpoint(
    path: Path,
    split: Split,
    out: Path,
    options_path: str | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Write `model.safetensors` and the `options.yml` that trains from it to a new folder; say how.

    Raises:
        ScdError: the checkpoint is no dense model, or cannot be split so, or the folder holds
            anything.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ScdError(f"--out {out}: is there already; name a new folder, or delete it")
    loaded = load_checkpoint_for_use(path, options_path, overrides)
    dense = dense_model(loaded, path)
    # Training goes on in that folder.
    options = split_options(loaded.options, split)
    options = replace(options, output_root=str(out.parent), name=out.resolve().name)
    model = split_model(dense, loaded.codec, options, split)
    weights = out / "model.safetensors"
    metadata = {
        "options": json.dumps(options_to_dict(options)),
        "step": "0",
        "split": f"{split.name} of {loaded.source['sha256']}",
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    write_atomically(weights, lambda aside: save_file(tensors, aside, metadata))
    text = options_to_yaml(replace(options, init_from=str(weights)))
    write_atomically(out / OPTIONS_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"weights: {weights}\ntrain:   ./scripts/train.sh {out / 'options.yml'}")


def dense_model(loaded: LoadedModel, path: Path) -> CausalDiT:
    if not isinstance(loaded.model, CausalDiT):
        raise ScdError(f"{path}: only a dense model (model.type=causal_dit) can be split")
    return loaded.model


def _source(name: str, decoder_sources: list[int]) -> str:
    """The dense model's name of an SCD's tensor."""
    part, _, rest = name.partition(".")
    if part == "decoder" and rest.startswith("blocks."):
        _, number, rest = rest.split(".", 2)
        return f"blocks.{decoder_sources[int(number)]}.{rest}"
    return rest
