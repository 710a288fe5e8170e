"""Seeded damage: what files of each format become when somebody, or a disk, tampers with them.

Half of the mutations hit raw bytes; the other half understand the format and keep lengths,
checksums and outer structure right, so that the damage gets past the first check.
"""

import io
import json
import struct
import zipfile
from pathlib import PurePosixPath
from random import Random
from typing import Any

NUMBERS = [-1, 0, 1, 3, 255, 10**6, 2**31, 10**9, 2**62, 10**18, 10**30, 10**400]
VALUES: list[Any] = [
    *NUMBERS,
    *(None, True, False, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "x" * 300, "\0"),
    *("x/" * 3000, "../../etc/passwd", "/dev/zero", "~", "\ud800", "é\n", "${oc.env:HOME}", "???"),
    *([], {}, [[]], [None], ["a", 1], {"a": 1}, [0] * 5000, [10**9] * 4),
]
DEEP = "@deep@"  # becomes brackets that no recursion survives


def mutated(name: str, data: bytes, rng: Random) -> bytes:
    """A damaged copy of a file; its name tells the format."""
    suffix = PurePosixPath(name).suffix
    aware = {
        **{".json": _json, ".yml": _json, ".safetensors": _safetensors, ".tar": _tar},
        **dict.fromkeys((".npz", ".pt", ".pth"), _zip),
    }.get(suffix)
    if aware is None or rng.random() < 0.5:
        return mutated_bytes(data, rng)
    return aware(data, rng)


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """Flip, cut, insert, delete, repeat or overwrite; one to four times, mostly near an end."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        place = rng.choice([rng.randrange(len(out)), rng.randrange(min(len(out), 256))])
        if rng.random() < 0.2:
            place = max(len(out) - 1 - rng.randrange(256), 0)
        length = rng.choice([1, 2, 8, 64, 1024])
        match rng.randrange(7):
            case 0 | 1:
                out[place] ^= 1 << rng.randrange(8)
            case 2:
                del out[place:]
            case 3:
                out[place:place] = rng.randbytes(length)
            case 4:
                del out[place : place + length]
            case 5:
                out[place:place] = out[place : place + length]
            case 6:
                number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
                form = rng.choice(["<Q", ">Q", "<I", ">I"])
                packed = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
                out[place : place + len(packed)] = packed
    return bytes(out)


def mutated_value(value: Any, rng: Random) -> Any:
    """One node of a JSON value replaced, removed, doubled or exchanged with another."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places:
        return rng.choice(VALUES)
    for _ in range(rng.choice([1, 1, 2])):
        container, key = rng.choice(places)
        if key not in (container if isinstance(container, dict) else range(len(container))):
            continue
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1:
                other, of = rng.choice(places)
                if of in (other if isinstance(other, dict) else range(len(other))):
                    container[key] = json.loads(json.dumps(other[of]))
            case 2 if isinstance(container, dict):
                container[rng.choice(["", "new", "x" * 300, key + "x"])] = container.pop(key)
            case 3:
                container[key] = DEEP
            case 4 if isinstance(container[key], int):
                container[key] = rng.choice(NUMBERS)
            case _:
                container[key] = rng.choice(VALUES)
    return value


def dumped(value: Any) -> bytes:
    text = json.dumps(value).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)
    return text.encode()


def _places(value: Any) -> Any:
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _json(data: bytes, rng: Random) -> bytes:
    return dumped(mutated_value(json.loads(data), rng))


def _safetensors(data: bytes, rng: Random) -> bytes:
    """Its header as JSON; options in its metadata, JSON in JSON, most of all."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if "options" in metadata and rng.random() < 0.7:
        metadata["options"] = dumped(mutated_value(json.loads(metadata["options"]), rng)).decode()
    else:
        header = mutated_value(header, rng)
    new = dumped(header)
    return struct.pack("<Q", len(new)) + new + data[8 + length :]


def _zip(data: bytes, rng: Random) -> bytes:
    """One member damaged, under a right checksum; sometimes all of them compressed, or swollen."""
    method = rng.choice([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED])
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        victim = rng.choice(pickles if pickles and rng.random() < 0.7 else names)
        for name in names:
            content = old.read(name)
            if name == victim:
                content = _member(content, rng)
            if name != victim or rng.random() < 0.95:
                new.writestr(name, content)
    return out.getvalue()


def _member(content: bytes, rng: Random) -> bytes:
    shape = b"'shape': ("
    if content[:6] == b"\x93NUMPY" and rng.random() < 0.6:
        (length,) = struct.unpack("<H", content[8:10])
        header, rest = content[10 : 10 + length], content[10 + length :]
        number = rng.choice([b"-1", b"0", b"99999", b"999999999999", b"9" * 30, b"1," * 40 + b"1"])
        descr = rng.choice([b"'|O'", b"'<U999999999'", b"'|V0'", b"'<f8'", b"'<M8[s]'", b"'>i4'"])
        if rng.random() < 0.7:
            header = header.replace(shape, shape + number + b", ")
        else:
            start = header.index(b"'descr': ") + 9
            header = header[:start] + descr + header[header.index(b",", start) :]
        return content[:8] + struct.pack("<H", len(header)) + header + rest
    if rng.random() < 0.05:
        return content + bytes(64 * 2**20)
    if rng.random() < 0.3:  # pickled integers and names
        old, new = rng.choice(
            [
                (b"K\x01", b"J\xff\xff\xff\x7f"),
                (b"K\x02", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x3f"),
                (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nbytearray\n"),
                (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n"),
                (b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n"),
                (b"ccollections\nOrderedDict\n", b"ccollections\nCounter\n"),
            ]
        )
        return content.replace(old, new)
    return mutated_bytes(content, rng)


def _tar(data: bytes, rng: Random) -> bytes:
    """A header's field damaged under a right checksum."""
    out = bytearray(data)
    headers = [
        start for start in range(0, len(out), 512) if out[start + 257 : start + 262] == b"ustar"
    ]
    start = rng.choice(headers)
    fields = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "type": (156, 1)}
    at, length = fields[rng.choice(list(fields))]
    new = rng.choice(
        [
            *(
                b"/etc/passwd",
                b"../../x",
                b"a/../../x",
                b".hub/lock",
                b"\xff" * 12,
                b"\x80" + b"\xff" * 11,
            ),
            *(
                b"77777777777",
                b"00000000001",
                b"-0000000001",
                b"1",
                b"2",
                b"3",
                b"5",
                b"x",
                b"g",
                b"L",
                b"K",
            ),
            *(b"S", b"\0", b"\x80" + bytes(7) + b"\x7f\xff\xff\xff", rng.randbytes(length)),
        ]
    )[:length].ljust(length, b"\0")
    out[start + at : start + at + length] = new
    out[start + 148 : start + 156] = b" " * 8
    total = sum(out[start : start + 512])
    out[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(out)
