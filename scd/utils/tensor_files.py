"""Tensors that others saved with `torch.save`: no code runs, and no more memory than the file has.

`weights_only=True` alone keeps code out, but not size: a compressed member, a tensor that claims
more values than its storage has, or an innocent `bytearray(10**12)` may stand for any amount of
memory. Here an archive must be what `torch.save` writes, uncompressed, and name only what dense
tensors are made of.
"""

import pickletools
import re
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scd.errors import ScdError, reason
from scd.utils.paths import why_missing

# The names in the pickle of a dictionary of tensors, as an optimiser's or a model's state is.
ADMITTED = re.compile(
    r"collections OrderedDict|torch (\w+Storage|Size)"
    r"|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
)
MAX_PICKLE_BYTES = 64 * 2**20  # without the tensors' values; 300 tensors take 40 kB


def read_pt(path: Path) -> Any:
    """What `torch.save` wrote of dense tensors, dictionaries, lists and plain values, on the CPU.

    Raises:
        ScdError: the file is missing, damaged, of before torch 1.6, or anything else than that.
    """
    if not path.is_file():
        raise ScdError(f"{path}: {why_missing(path)}")
    try:
        _check_archive(path)
        # Mapped, a storage cannot be larger than the file; copied, the file may go.
        return deepcopy(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # refused names, damaged archives and pickles: many kinds
        raise ScdError(
            f"{path}: refused: not a plain tensor or a dictionary of such, as expected "
            f"({reason(error)})"
        ) from error


def is_plain(value: object) -> bool:
    """Whether a value is a dense tensor that holds every number of its shape."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def is_torch_archive(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError("damaged, or no file of torch.save of version 1.6 or newer")
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename!r} is compressed, which torch.save never does")
            if not member.filename.endswith("/data.pkl"):
                continue
            if member.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"{member.filename!r} has {member.file_size} bytes")
            for opcode, argument, _ in pickletools.genops(archive.read(member)):
                if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not ADMITTED.fullmatch(
                    str(argument)
                ):
                    raise ValueError(f"it names {argument}")
