"""Embeddings of prompts on disk, as `scd wan encode-prompts` writes them.

A folder holds `prompts.json`, the readable list, and a file of safetensors for every prompt, named
after a hash of it: the rows of its tokens, (n, text_dim), without the zeros behind them.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd.data.lists import read_list
from scd.errors import ScdError
from scd.utils.files import read_json, write_atomically, write_json
from scd.utils.paths import why_missing

LIST = "prompts.json"
EMBEDDINGS = "embeddings"  # folder
TENSOR = "embedding"


class PromptFolder:
    """The embeddings of prompts, read on demand.

    Attributes:
        text_encoder: what made them.
        length: tokens of a text, with the zeros behind its end.
        negative_prompt: the one that guidance leads away from if no other is given.
        files: the name of each prompt's file, in the order of their lists.

    Raises:
        ScdError: there is no such folder, or its list is damaged.
    """

    def __init__(self, folder: Path):
        path = folder / LIST
        if not path.is_file():
            raise ScdError(f"{path}: {why_missing(path)}; `scd wan encode-prompts` writes it")
        found = read_json(path)
        try:
            self.text_encoder: str = _typed(found["text_encoder"], str)
            self.length: int = _typed(found["length"], int)
            self.negative_prompt: str = _typed(found["negative_prompt"], str)
            self.files: dict[str, str] = {
                _typed(prompt, str): _typed(file, str) for prompt, file in found["files"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ScdError(f"{path}: not a list of `scd wan encode-prompts` ({error!r})") from error
        self.folder = folder

    def embedding(self, prompt: str) -> Tensor:
        """Read the embedding of a prompt of the list, (length, text_dim).

        Raises:
            ScdError: the list has no such prompt, it is not encoded yet, or its file is damaged.
        """
        file = self.files.get(prompt.strip())
        if file is None:
            raise ScdError(
                f"{self.folder / LIST}: has no prompt {prompt.strip()[:80]!r}; add it with `scd "
                f"wan encode-prompts`"
            )
        path = self.folder / EMBEDDINGS / Path(file).name
        if not path.is_file():
            raise ScdError(f"{path}: not encoded yet; run `scd wan encode-prompts` again")
        try:
            rows = load_file(path)[TENSOR]
        except (SafetensorError, OSError, KeyError) as error:
            raise ScdError(f"{path}: not a readable embedding ({error}); delete it") from error
        if rows.ndim != 2 or not 0 < len(rows) <= self.length or not rows.isfinite().all():
            raise ScdError(f"{path}: {tuple(rows.shape)} are no 1 to {self.length} finite tokens")
        return torch.cat([rows, rows.new_zeros(self.length - len(rows), rows.shape[1])])

    def check_source(self, text_encoder: str, length: int) -> None:
        """Refuse to mix with embeddings that another text encoder made, or of another length."""
        same = os.path.abspath(self.text_encoder) == os.path.abspath(text_encoder)
        if not same or self.length != length:
            raise ScdError(
                f"{self.folder}: holds embeddings of {self.text_encoder} with {self.length} "
                f"tokens, not of {text_encoder} with {length}: choose another folder"
            )

    def check(self, prompts: Iterable[str]) -> None:
        """Refuse prompts without an embedding, by the names of the files alone.

        Raises:
            ScdError: naming the first prompt, and how many lack one.
        """
        there = {path.name for path in (self.folder / EMBEDDINGS).glob("*.safetensors")}
        lacking = [p for p in prompts if self.files.get(p.strip()) not in there]
        if lacking:
            raise ScdError(
                f"{self.folder}: no embedding of {len(lacking)} prompts, such as "
                f"{lacking[0].strip()[:80]!r}: add them with `scd wan encode-prompts`, a negative "
                f"one by its --negative-prompt"
            )


def write_prompt_list(
    folder: Path, text_encoder: str, length: int, negative_prompt: str, cleaned: dict[str, str]
) -> PromptFolder:
    """Write a folder's list, or add prompts to it; their embeddings can follow one by one.

    Args:
        cleaned: prompt -> what the text encoder gets for it, after which its file is named.

    Raises:
        ScdError: the folder has embeddings of another text encoder or length.
    """
    files = {prompt: file_name(text) for prompt, text in cleaned.items()}
    if (folder / LIST).is_file():
        old = PromptFolder(folder)
        old.check_source(text_encoder, length)
        files = {**old.files, **files}
    about: dict[str, Any] = {"text_encoder": text_encoder, "length": length}
    write_json(folder / LIST, {**about, "negative_prompt": negative_prompt, "files": files})
    return PromptFolder(folder)


def file_name(text: str) -> str:
    """Name the file of an embedding after the cleaned prompt."""
    return f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def write_embedding(path: Path, rows: Tensor) -> None:
    """Write the embedding of one prompt (n, text_dim), whole or not at all."""
    tensors = {TENSOR: rows.contiguous().cpu()}
    write_atomically(path, lambda aside: save_file(tensors, aside))


def read_lines(path: Path) -> list[str]:
    """Read a text file with a prompt in every line; empty lines are left out.

    Raises:
        ScdError: it is missing, no UTF-8, or empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise ScdError(f"{path}: {why_missing(path)}") from error
    except OSError as error:
        raise ScdError(f"{path}: not a readable text file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ScdError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ScdError(f"{path}: holds no prompt")
    return prompts


def prompts_in(path: Path) -> list[str]:
    """List the different prompts of a text file, or captions of a list of clips, in their order.

    Args:
        path: a prompt in every line; or `.json`, see `scd.data.lists`.

    Raises:
        ScdError: it cannot be read, or there are none.
    """
    if path.suffix != ".json":
        return list(dict.fromkeys(read_lines(path)))
    captions = [entry.caption.strip() for entry in read_list(path) if entry.caption is not None]
    if not captions:
        raise ScdError(f"{path}: no clip in it has a caption")
    return list(dict.fromkeys(captions))


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value
