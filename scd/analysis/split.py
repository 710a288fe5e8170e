"""Initialize an SCD from the layers of a trained dense model, causal or bidirectional.

The encoder gets the first E layers. The frame decoder gets the last D, or the first and the last
D/2 (as in the paper's text-to-video model: 25 of 30 layers, and 5 + 5). Embedding, conditioning and
output layers are copied wherever they have a counterpart.

Some things stay as in the dense model: the encoder's layers see clean frames at timestep −1 and
their past; the decoder's rotary positions differ inside a frame as before; the same layers read out
the velocity. The rest has to be learned: history now comes as normalized tokens of the same frame,
to which the decoder never attended; with `last`, noisy tokens enter in the middle of the stack. The
encoder's output norm starts without modulation.

How the encoder meets the frame to come (`model.encoder_frame`) is a matter of wiring: the same
weights are taken for all three ways. With `shift`, the encoder's frame j is conditioned on the
action of frame j + 1, and its output stands for a frame that it has not seen: both new to a dense
model. With `noise` and `joint` nothing about the encoder has to be relearned: clean frames carry
their own action, and its output at a noisy frame is, up to the norm, what a causal dense model has
there after the same layers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch
from safetensors.torch import save_file
from torch import Tensor

from scd.errors import ScdError
from scd.models import SCD
from scd.models.autoencoder import Codec
from scd.models.dit import DiT
from scd.models.load import LoadedModel, build_world_model, load_checkpoint_for_use
from scd.models.weights import load_matching
from scd.options import OPTIONS_FILE, EncoderFrame, Options, options_to_dict, options_to_yaml
from scd.utils.files import write_atomically

FRESH = ("encoder.norm_out.", "encoder.start")  # tensors without counterpart in a dense model


@dataclass(frozen=True)
class Split:
    """A choice of the dense model's layers for the encoder and for the decoder."""

    encoder_layers: int
    decoder_layers: int
    decoder_from: str = "last"
    encoder_frame: EncoderFrame = "shift"

    @property
    def name(self) -> str:
        frame = "" if self.encoder_frame == "shift" else f" {self.encoder_frame}"
        return f"{self.encoder_layers}+{self.decoder_layers} {self.decoder_from}{frame}"

    @property
    def arguments(self) -> list[str]:
        """Write the split as arguments of `scd split`."""
        numbers = ("--encoder-layers", self.encoder_layers, "--decoder-layers", self.decoder_layers)
        frame = () if self.encoder_frame == "shift" else ("--encoder-frame", self.encoder_frame)
        return [*map(str, numbers), "--decoder-from", self.decoder_from, *frame]

    def decoder_sources(self, layers: int) -> list[int]:
        """List the dense model's layers, from 0, that the decoder is made of.

        Raises:
            ScdError: there are fewer layers, or a part would have none.
        """
        for part, count in (("encoder", self.encoder_layers), ("decoder", self.decoder_layers)):
            if not 1 <= count <= layers:
                raise ScdError(
                    f"--{part}-layers {count}: choose 1 to {layers}, the dense model's layers"
                )
        first = 0
        if self.decoder_from == "first-and-last":
            if self.decoder_layers % 2:
                raise ScdError(
                    f"--decoder-layers {self.decoder_layers}: first-and-last takes the same number "
                    f"from both ends, so choose an even number"
                )
            first = self.decoder_layers // 2
        return [*range(first), *range(layers - self.decoder_layers + first, layers)]


def split_options(options: Options, split: Split) -> Options:
    """Replace the dense model in an experiment's options by an SCD of these layers.

    The context is fused as tokens (`token_concat`), since the dense layers attended to history too.
    """
    model = replace(
        options.model,
        type="scd",
        fusion="token_concat",
        layers=0,
        encoder_layers=split.encoder_layers,
        decoder_layers=split.decoder_layers,
        encoder_frame=split.encoder_frame,
    )
    flow = replace(options.flow, prefix_frames=[])
    return replace(options, model=model, flow=flow)


def split_model(dense: DiT, codec: Codec, options: Options, split: Split) -> SCD:
    """Build an SCD from the dense model's weights.

    Args:
        options: of the SCD, from `split_options`.

    Raises:
        ScdError: see `Split.decoder_sources`.
    """
    sources = split.decoder_sources(len(dense.blocks))
    torch.manual_seed(options.seed)
    model = build_world_model(options, codec).to(dense.device)
    assert isinstance(model, SCD)
    weights: dict[str, Tensor] = dense.state_dict()
    tensors = {
        name: tensor if name.startswith(FRESH) else weights[_source(name, sources)].clone()
        for name, tensor in model.state_dict().items()
    }
    load_matching(model, tensors, f"split {split.name}")
    return model.eval()


def split_checkpoint(
    path: Path,
    split: Split,
    out: Path,
    options_path: str | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Split a checkpoint: write `model.safetensors` and the `options.yml` that trains from it.

    Raises:
        ScdError: the checkpoint is not a dense model, the split is impossible, or the folder is not
            empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ScdError(f"--out {out}: already exists; choose a new folder, or delete it")
    loaded = load_checkpoint_for_use(path, options_path, overrides)
    dense = dense_model(loaded, path)
    # Training will use the same folder.
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
    print(f"weights: {weights}\ntrain:   ./scripts/train.sh {quote(str(out / OPTIONS_FILE))}")


def dense_model(loaded: LoadedModel, path: Path) -> DiT:
    """Check that a loaded model is dense.

    Raises:
        ScdError: it is not.
    """
    if not isinstance(loaded.model, DiT):
        raise ScdError(
            f"{path}: only a dense model (model.type=causal_dit or bidirectional_dit) can be split"
        )
    return loaded.model


def _source(name: str, decoder_sources: list[int]) -> str:
    """Map the name of an SCD's tensor to the dense model's."""
    part, _, rest = name.partition(".")
    if part == "decoder" and rest.startswith("blocks."):
        _, number, rest = rest.split(".", 2)
        return f"blocks.{decoder_sources[int(number)]}.{rest}"
    return rest
