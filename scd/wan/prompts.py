"""Text embeddings on disk: a folder of prompts, and of what the text encoder makes of each.

    FOLDER/prompts.txt                          one prompt a line
    FOLDER/embeds/0f2c….safetensors             `prompt_embeds` (tokens, text_dim), without padding

A file is named by the first 16 hexadecimal digits of the SHA-256 of its prompt, cleaned.
"""

import hashlib
import html
import re
from collections.abc import Iterable
from pathlib import Path

import ftfy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from scd.errors import ScdError, reason
from scd.utils.files import write_atomically
from scd.utils.paths import why_missing

PROMPTS, EMBEDDINGS, KEY = "prompts.txt", "embeds", "prompt_embeds"
DIGITS = 16  # of the hash: two of a billion prompts share it with a probability of 0.03
SHOWN = 60  # letters of a prompt in a message


def clean_prompt(prompt: str) -> str:
    """Repair encodings and HTML entities, and turn white space into single spaces, as Wan does."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def embedding_path(folder: Path, prompt: str) -> Path:
    """Name the file of a prompt's embedding."""
    digest = hashlib.sha256(clean_prompt(prompt).encode("utf-8", "replace")).hexdigest()
    return folder / EMBEDDINGS / f"{digest[:DIGITS]}.safetensors"


def save_embedding(folder: Path, prompt: str, embedding: Tensor) -> None:
    """Write what the text encoder made of a prompt, (tokens, text_dim), without padding."""
    data = save({KEY: embedding.detach().cpu().contiguous()}, {"prompt": clean_prompt(prompt)})
    path = embedding_path(folder, prompt)
    write_atomically(path, lambda aside: aside.write_bytes(data))


def load_embedding(folder: Path, prompt: str, length: int) -> Tensor:
    """Read a prompt's embedding (length, text_dim) in float32, with zeros behind its end.

    Args:
        length: tokens; of a longer prompt, the first ones.

    Raises:
        ScdError: it is missing or damaged.
    """
    path = embedding_path(folder, prompt)
    if not path.is_file():
        raise ScdError(
            f"{path}: {why_missing(path)}, the embedding of {prompt[:SHOWN]!r}: run "
            f"scd wan encode-prompts"
        )
    try:
        embedding = load_file(path)[KEY].float()
    except (SafetensorError, OSError, KeyError) as error:
        raise ScdError(f"{path}: not a readable embedding ({reason(error)})") from error
    if embedding.ndim != 2 or not embedding.isfinite().all():
        raise ScdError(f"{path}: {tuple(embedding.shape)}, not finite tokens (tokens, text_dim)")
    embedding = embedding[:length]
    return torch.nn.functional.pad(embedding, (0, 0, 0, length - len(embedding)))


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a text file, one a line; empty lines do not count.

    Raises:
        ScdError: it is missing, not UTF-8, or holds none.
    """
    if not path.is_file():
        raise ScdError(f"{path}: {why_missing(path, 'file of prompts')}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ScdError(f"{path}: not a readable text file ({reason(error)})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ScdError(f"{path}: no prompts in it")
    return prompts


def check_embeddings(folder: Path, prompts: Iterable[str]) -> None:
    """Refuse prompts without an embedding, by the names of the files alone.

    Raises:
        ScdError: naming the first prompt, and how many lack one.
    """
    known = {path.name for path in (folder / EMBEDDINGS).glob("*.safetensors")}
    lacking = [p for p in prompts if embedding_path(folder, p).name not in known]
    if lacking:
        raise ScdError(
            f"{folder / EMBEDDINGS}: no embedding of {len(lacking)} prompts, such as "
            f"{lacking[0][:SHOWN]!r}: run scd wan encode-prompts"
        )
