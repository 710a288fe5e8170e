"""Read files of `torch.save` from elsewhere without running code or exceeding the file's size.

`weights_only=True` refuses code, but no size: a compressed member, a tensor with more values than
its storage holds, or a plain `bytearray(10**12)` can take any amount of memory. So an archive must
be uncompressed, as `torch.save` writes it, and may only name the parts of dense tensors.
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

# Names in the pickle of a dictionary of tensors, such as the state of a model or an optimizer.
ADMITTED = re.compile(
    r"collections OrderedDict|torch (\w+Storage|Size)"
    r"|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
)
MAX_PICKLE_BYTES = 64 * 2**20  # without the values of the tensors; 300 tensors take 40 kB


def read_pt(path: Path) -> Any:
    """Read dense tensors, dictionaries, lists and plain values of `torch.save`, on the CPU.

    Raises:
        ScdError: the file is missing, damaged, older than torch 1.6, or holds anything else.
    """
    if not path.is_file():
        raise ScdError(f"{path}: {why_missing(path)}")
    try:
        _check_archive(path)
        # Mapped: no storage can be larger than the file. Copied: the file may disappear.
        return deepcopy(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # refused names, damaged archives and pickles: many kinds
        raise ScdError(
            f"{path}: refused: expected a plain tensor or a dictionary of plain tensors "
            f"({reason(error)})"
        ) from error


def is_plain(value: object) -> bool:
    """Check that a value is a dense tensor whose storage holds all of its values."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def is_torch_archive(path: Path) -> bool:
    """Check whether a file may be one of `torch.save`."""
    return path.is_file() and zipfile.is_zipfile(path)


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError("damaged, or not a file of torch.save since version 1.6")
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename!r} is compressed, which torch.save does not do")
            if not member.filename.endswith("/data.pkl"):
                continue
            if member.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"{member.filename!r} has {member.file_size} bytes")
            for opcode, argument, _ in pickletools.genops(archive.read(member)):
                if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not ADMITTED.fullmatch(
                    str(argument)
                ):
                    raise ValueError(f"it names {argument}")
