"""The wire format (see README.md of this folder): valid messages in, pictures out."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn

from scd.play.history import Frame

PROTOCOL = 2
MAX_BYTES = 4096  # of a message from a player
HEADER = struct.Struct("<BBBBHHIIIf")
WORLD_HEADER = struct.Struct("<BBHfff")
GIVEN, AGAIN = 1, 2  # flags of a frame: part of the start clip; shown before
OVER = 1  # flag of a world
MAX_NUMBER = 2**32 - 1


class CloseCode(IntEnum):
    """Why the server closed a connection, in addition to the codes of RFC 6455."""

    BAD_MESSAGE = 4400
    BAD_TOKEN = 4401
    IDLE = 4408
    TAKEN_OVER = 4409
    TOO_MANY_MESSAGES = 4429
    FAULT = 4500
    BUSY = 4503
    STALLED = 4508


class CloseConnection(Exception):
    """Ends a connection, and its session unless another connection has taken that over."""

    def __init__(self, code: CloseCode, reason: str):
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Message:
    """A valid message: its type, and its fields, as listed in `FIELDS`; optional ones if sent."""

    type: str
    fields: dict[str, Any]


# Message type -> field -> kind of value; with a question mark: optional.
FIELDS: dict[str, dict[str, str]] = {
    "input": {"action": "number?", "held": "numbers?", "seq": "number"},
    "seen": {"serial": "number"},
    "pause": {"paused": "flag"},
    "step": {},
    "start": {"start": "text", "worlds": "texts", "seed": "number?"},
    "settings": {"steps": "number?", "guidance_scale": "real?", "seed": "number?", "fps": "real?"},
    "rewind": {"frame": "number"},
    "keep": {},
    "return": {"branch": "number"},
}
_KINDS: dict[str, Callable[[Any], bool]] = {
    "number": lambda v: type(v) is int and 0 <= v <= MAX_NUMBER,
    "numbers": lambda v: type(v) is list and len(v) <= 256 and all(map(_KINDS["number"], v)),
    "real": lambda v: type(v) in (int, float) and abs(v) <= MAX_NUMBER,
    "flag": lambda v: type(v) is bool,
    "text": lambda v: type(v) is str and len(v) <= 100,
    "texts": lambda v: type(v) is list and 1 <= len(v) <= 8 and all(map(_KINDS["text"], v)),
}


def parse_message(text: str) -> Message:
    """Parse and check a message from a player.

    Raises:
        CloseConnection: it is not valid.
    """
    try:
        written = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise CloseConnection(CloseCode.BAD_MESSAGE, "messages must be JSON objects") from None
    kind = written.pop("type", None) if isinstance(written, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise CloseConnection(CloseCode.BAD_MESSAGE, f"type must be one of {', '.join(FIELDS)}")
    fields = FIELDS[kind]
    needed = {name for name, wanted in fields.items() if not wanted.endswith("?")}
    if not needed <= written.keys() <= fields.keys():
        raise CloseConnection(
            CloseCode.BAD_MESSAGE, f"{kind} has the fields {', '.join(fields) or 'none'}"
        )
    for name, value in written.items():
        wanted = fields[name].rstrip("?")
        if not _KINDS[wanted](value):
            raise CloseConnection(CloseCode.BAD_MESSAGE, f"{kind}: {name} is not a valid {wanted}")
    return Message(kind, written)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def pack_picture(
    frame: Frame, worlds: list[int], *, serial: int, seq: int, flags: int, made_ms: float
) -> bytes:
    """Pack a frame into a picture message.

    Args:
        worlds: each view's world, as its position in `worlds` of the hello message.
        serial: number of the picture in this connection, from 1.
        seq: of the newest input that the frame obeys.
        flags: `GIVEN`, `AGAIN`.
        made_ms: milliseconds from reading the action to the finished pictures of all worlds.
    """
    height, width, _ = frame.views[0].picture.shape
    action = frame.action
    if isinstance(action, tuple):  # the first eight components that are not 0, as bits
        action = sum(1 << bit for bit, value in enumerate(action[:8]) if value)
    parts = [
        HEADER.pack(
            *(PROTOCOL, len(worlds), action, flags, height, width),
            *(frame.number, serial, seq, made_ms),
        )
    ]
    for world, view in zip(worlds, frame.views, strict=True):
        parts.append(WORLD_HEADER.pack(world, OVER if view.over else 0, 0, *view.times))
        parts.append(view.picture.tobytes())
    return b"".join(parts)
