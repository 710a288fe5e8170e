"""Wan's text encoder (UMT5, by transformers): prompts to embeddings, as diffusers' `WanPipeline`.

It is four times the size of the 1.3B model, so embeddings are best made once, on disk: see
`scd.data.prompts`. Transformers and ftfy are extras: `pip install -e '.[wan]'`.
"""

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from scd.errors import ScdError, reason
from scd.utils.paths import why_missing
from scd.utils.precision import DTYPES, resolve_precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

MAX_TOKENS = 512  # Wan's length of a text; the tokens behind a prompt's end are zeros
PARTS = ("tokenizer", "text_encoder")  # folders, in diffusers' format
ON_HUB = r"[\w.-]+/[\w.-]+"


class TextEncoder(NamedTuple):
    """A tokenizer and the encoder that reads its tokens."""

    tokenizer: "PreTrainedTokenizerBase"
    encoder: "UMT5EncoderModel"


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as Wan does: mend its Unicode, unescape HTML, join its lines and spaces.

    Raises:
        ScdError: the extra packages are missing.
    """
    try:
        import ftfy
    except ImportError as error:
        raise _without_extra(error) from error
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


@torch.no_grad()
def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    encoder: "UMT5EncoderModel",
    prompts: list[str],
    length: int = MAX_TOKENS,
) -> Tensor:
    """Encode prompts: (B, length, text_dim), zeros behind the end of each.

    Cut at the true length, an embedding does not depend on how much was padded.

    Args:
        prompts: cleaned by `clean_prompt`; what is longer than `length` tokens is cut off.
    """
    tokens: Any = tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask.to(encoder.device)  # (B, length)
    embeddings = encoder(tokens.input_ids.to(encoder.device), mask).last_hidden_state
    return embeddings.masked_fill(mask[..., None] == 0, 0)  # (B, length, text_dim)


def load_text_encoder(source: str, device: torch.device) -> TextEncoder:
    """Load tokenizer and encoder, in bf16 where the device computes it fast, otherwise in fp32.

    Args:
        source: a folder in diffusers' format (`tokenizer/`, `text_encoder/`), or OWNER/NAME of the
            hub, whose files stay in the hub's cache.

    Raises:
        ScdError: the extra packages are missing, or the source is, or it is damaged.
    """
    try:
        import ftfy  # noqa: F401 (before a large download)
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError as error:
        raise _without_extra(error) from error
    folder = Path(source).expanduser()
    if folder.is_dir():
        for part in PARTS:
            if not (folder / part).is_dir():
                raise ScdError(f"{folder / part}: {why_missing(folder / part, 'folder')}")
    elif not re.fullmatch(ON_HUB, source):
        raise ScdError(f"{source}: {why_missing(folder, 'folder')}, and no OWNER/NAME of the hub")
    name = str(folder) if folder.is_dir() else source
    dtype = DTYPES[resolve_precision("auto", device)]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=PARTS[0])
        loaded: Any = UMT5EncoderModel.from_pretrained(
            name, subfolder=PARTS[1], dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # of the hub, of damaged files, of other models: many kinds
        raise ScdError(f"{source}: no readable text encoder ({reason(error)})") from error
    encoder, found = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[kind])):  # transformers would leave them random, or out
            what = kind.replace("_", " ")
            raise ScdError(f"{source}: no UMT5 encoder ({len(names)} {what}, such as {names[0]})")
    return TextEncoder(tokenizer, encoder.to(device).eval().requires_grad_(False))


def _without_extra(error: ImportError) -> ScdError:
    return ScdError(f"prompts need the package {error.name}: pip install -e '.[wan]'")
