"""Reading options: an options file and its base, `key=value` overrides, options in checkpoints.

Everything is checked before any data or device is touched; an unknown key, a wrong type or a
contradictory pair is an `ScdError` that names the file, the key and the nearest known name.
"""

import copy
import difflib
import json
import math
import reprlib
from dataclasses import asdict, fields, is_dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scd.errors import ScdError, reason
from scd.options.other_names import unknown_key, with_present_names
from scd.options.rules import check, check_rollout, check_training, wrong_choice
from scd.options.schema import Options, RolloutOptions
from scd.utils.paths import expand, from_user, to_read, why_missing

OPTIONS_FILE = "options.yml"  # beside a model: the options it was trained with
MAX_BYTES = 2**16  # of an options file; those of this project have about 2 KiB
PATHS = (
    *("output_root", "init_from", "autoencoder.path", "autoencoder.world_model"),
    *("distill.teacher", "distill.weak_teacher"),
    *("data.root", "data.train_list", "data.val_list"),
)
Bytes = TypeVar("Bytes", str, bytes)


def load_options(path: str | Path, overrides: list[str] | None = None) -> Options:
    """Read an options file, on top of the one it names as `base`, and apply overrides.

    Sections are merged key by key; lists are replaced.

    Args:
        overrides: `key=value` each.

    Raises:
        ScdError: see the module's first lines.
    """
    path = to_read(path)
    written = _read_yaml(path)
    below = []
    if isinstance(written, dict) and "base" in written:
        base = written.pop("base")
        if not isinstance(base, str) or not base:
            raise ScdError(
                f"{path}: base takes the path of another options file, not {reprlib.repr(base)}"
            )
        file = path.parent / from_user(base)
        under = _read_yaml(file, f"{path}: base ")
        if isinstance(under, dict) and "base" in under:
            raise ScdError(f"{path}: base {file} has a base itself; only one level is supported")
        below.append((f"{path}: base {file}", under))
    return _resolve([*below, (str(path), written)], str(path), overrides or [])


def load_training_options(path: str | Path, overrides: list[str] | None = None) -> Options:
    """Read an options file as `load_options` does, to train what it describes.

    Raises:
        ScdError: as there, or for options that a model can be used with, but not trained.
    """
    options = load_options(path, overrides)
    check_training(options, str(to_read(path)))
    return options


def change_rollout(rollout: RolloutOptions, overrides: list[str]) -> RolloutOptions:
    """Apply overrides `rollout.key=value` where a model comes without an options file.

    Raises:
        ScdError: an override is not of this form, or its key or value is wrong.
    """
    for text in overrides:
        where, part = f"override {text!r}", _parse_override(text)
        if list(part) != ["rollout"] or not isinstance(part["rollout"], dict):
            raise ScdError(f"{where}: here only options of rollout can be changed")
        rollout = merge_rollout(rollout, part["rollout"], where)
    check_rollout(rollout)
    return rollout


def merge_rollout(
    rollout: RolloutOptions, changes: dict[str, Any], where: str = "rollout"
) -> RolloutOptions:
    """Change settings of a rollout by name, with the types that options files take.

    Args:
        where: the changes come from, for messages.

    Raises:
        ScdError: an unknown name, or a value of another type or choice.
    """
    changes = {key: _from_code(value) for key, value in changes.items()}
    try:
        values = _plain(changes, RolloutOptions, where, "rollout.")
        merged = OmegaConf.to_object(OmegaConf.unsafe_merge(OmegaConf.structured(rollout), values))
    except OmegaConfBaseException as error:
        raise ScdError(f"{where}: {error.full_key}: {_one_line(error)}") from error
    assert isinstance(merged, RolloutOptions)
    return merged


def _from_code(value: Any) -> Any:
    """Take tuples and arrays as lists, and numbers of NumPy and torch as Python's."""
    if hasattr(value, "tolist"):  # of arrays, tensors, and their numbers
        return value.tolist()
    return [_from_code(one) for one in value] if isinstance(value, list | tuple) else value


def options_from_json(text: str, source: str, overrides: list[str] | None = None) -> Options:
    """Read options as a checkpoint carries them, with the same checks."""
    try:
        written = json.loads(_bounded(text))
    except (ValueError, RecursionError) as error:
        raise ScdError(f"{source}: unreadable options ({_one_line(error)})") from error
    return _resolve([(source, written)], source, overrides or [])


def options_to_dict(options: Options) -> dict[str, Any]:
    """Return every option as plain nested values."""
    return asdict(options)


def options_to_yaml(options: Options) -> str:
    """Write an options file with every value in it."""
    return OmegaConf.to_yaml(OmegaConf.structured(options))


def _read_yaml(path: Path, prefix: str = "") -> Any:
    try:
        with open(path, "rb") as file:
            return yaml.load(_bounded(file.read(MAX_BYTES + 1)).decode("utf-8"), _Loader)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        message = f"{prefix}{path}: {why_missing(path, 'options file')}{hint}"
        raise ScdError(message) from error
    except Exception as error:  # YAML errors of several kinds, unreadable files
        message = f"{prefix}{path}: not a readable options file ({_one_line(error)})"
        raise ScdError(message) from error


def _bounded(text: Bytes) -> Bytes:
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**10} KiB")
    return text


class _Loader(yaml.SafeLoader):
    """Load YAML, leaving plain scalars but null as text: the option's type says what they are.

    YAML itself reads a name `no` as false, `1.10` as 1.1 and `1e-3` as text. Merge keys (`<<`) work
    as in YAML 1.1: a section's own keys go before merged ones.
    """

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            raise yaml.MarkedYAMLError(
                problem="a key stands twice in one section", problem_mark=node.start_mark
            )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # PyYAML's own takes the first of several merged sections in some versions, and the last in
        # others. Each key is kept once: sections merged many times over stay small.
        taken: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own = {str(key.value): (key, value) for key, value in node.value if key.tag != _MERGE}
        for key, value in node.value:
            for section in self._merged(value) if key.tag == _MERGE else []:
                self.flatten_mapping(section)
                for pair in section.value:
                    taken.setdefault(str(pair[0].value), pair)
        node.value = list((taken | own).values())

    def _merged(self, node: yaml.Node) -> list[yaml.MappingNode]:
        sections = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(section, yaml.MappingNode) for section in sections):
            raise yaml.MarkedYAMLError(
                problem="<< takes a section, or a list of sections", problem_mark=node.start_mark
            )
        return sections


_MERGE = "tag:yaml.org,2002:merge"
_SPECIAL = ("tag:yaml.org,2002:null", _MERGE)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _SPECIAL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _resolve(files: list[tuple[str, Any]], source: str, overrides: list[str]) -> Options:
    """Merge the parts, each over the ones before it, and check what comes out.

    Args:
        files: what each file holds, after how errors name the file.
        source: how errors about the whole name it.
    """
    parts = files + [(f"override {text!r}", _parse_override(text)) for text in overrides]
    merged = copy.deepcopy(_defaults())
    for where, part in parts:
        if not isinstance(part, dict):
            raise ScdError(f"{where}: an options file is a mapping of names to values")
        try:
            part = with_present_names(part, where)
            merged = OmegaConf.unsafe_merge(merged, _plain(part, Options, where))
        except OmegaConfBaseException as error:
            raise ScdError(f"{where}: {error.full_key}: {_one_line(error)}") from error
        except OverflowError as error:
            raise ScdError(f"{where}: a number is too large ({_one_line(error)})") from error
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ScdError(f"{source}: no value for {', '.join(missing)}")
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ScdError(f"{source}: {error.full_key}: {_one_line(error)}") from error
    assert isinstance(options, Options)
    check(options, source)
    _refuse_idle_guidance(options.rollout, overrides)
    _expand_paths(options)
    return options


@cache
def _defaults() -> Any:
    """Read the schema into OmegaConf, which takes it four times as long as a copy."""
    return OmegaConf.structured(Options)


def _refuse_idle_guidance(rollout: RolloutOptions, overrides: list[str]) -> None:
    """Refuse an override that does nothing; options files often leave the scale as it is."""
    given = any(text.partition("=")[0].strip() == "rollout.guidance_scale" for text in overrides)
    if given and rollout.guidance == "none" and rollout.guidance_scale != 1:
        raise ScdError(
            f"rollout.guidance_scale={rollout.guidance_scale:g} does nothing with "
            f"rollout.guidance=none: set rollout.guidance=context or condition as well"
        )


def _expand_paths(options: Options) -> None:
    """Expand `~` in every path."""
    for key in PATHS:
        section, _, name = key.rpartition(".")
        part = getattr(options, section) if section else options
        if (text := getattr(part, name)) is not None:
            setattr(part, name, expand(text))


def _parse_override(text: str) -> dict[str, Any]:
    """Parse `a.b=value` to {"a": {"b": value}}."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ScdError(f"override {text!r}: overrides are written key=value")
    try:
        part = yaml.load(value, _Loader)
    except Exception as error:
        raise ScdError(f"override {text!r}: {_one_line(error)}") from error
    for name in reversed(key.strip().split(".")):
        part = {name: part}
    return part


def _plain(part: dict, section: type, where: str, prefix: str = "") -> dict[str, Any]:
    """Convert values to what their options take (see `_as`).

    Raises:
        ScdError: an unknown key, an unknown choice, or sections, lists and single values in each
            other's place.
    """
    plain: dict[str, Any] = {}
    types: dict[Any, Any] = {item.name: item.type for item in fields(section)}
    for key, value in part.items():
        name = f"{prefix}{key}"
        if key not in types:
            raise ScdError(f"{where}: {unknown_key(name)}")
        if is_dataclass(types[key]):
            if not isinstance(value, dict):
                short = reprlib.repr(value)
                raise ScdError(f"{where}: {name} is a section of options, not {short}")
            plain[key] = _plain(value, types[key], where, f"{name}.")
            continue
        wants_list = get_origin(types[key]) is list
        items = value if wants_list and isinstance(value, list) else [value]
        if any(isinstance(item, str) and "${" in item for item in items):
            # To OmegaConf a reference: to another option, or to the reader's environment.
            raise ScdError(f"{where}: {name} is plain data, which ${{...}} is not")
        if wants_list != isinstance(value, list) or any(isinstance(i, list | dict) for i in items):
            wanted = "a list" if wants_list else "a single value"
            raise ScdError(f"{where}: {name} takes {wanted}, not {reprlib.repr(value)}")
        if value != "???" and (message := wrong_choice(name, types[key], value)):
            raise ScdError(f"{where}: {message}")
        kinds = get_args(types[key]) or (types[key],)
        plain[key] = [_as(kinds, item) for item in value] if wants_list else _as(kinds, value)
    return plain


def _as(kinds: tuple[type, ...], value: Any) -> Any:
    """Read `1e5` as an integer and `None` as null, where an option takes these."""
    if isinstance(value, str) and NoneType in kinds and value.lower() == "none":
        return None
    if isinstance(value, str) and int in kinds:
        try:
            # Of numbers beyond floats OmegaConf tells that they are none.
            whole = math.isfinite(float(value)) and float(value).is_integer()
            return int(Decimal(value)) if whole else value
        except (ValueError, ArithmeticError):
            return value
    return value


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return reason(error)
