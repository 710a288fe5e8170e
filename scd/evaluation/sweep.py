"""`--sweep key=value,value`: evaluations under every combination of some options."""

from itertools import product
from typing import Any

import yaml

from scd.errors import ScdError


def sweep_combinations(sweeps: list[str]) -> list[dict[str, str]]:
    """Every combination of the values of `key=value,value` texts; one empty one without texts.

    Raises:
        ScdError: a text of another form, or a key given twice.
    """
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, values = text.partition("=")
        try:
            parsed = yaml.load(f"[{values}]", yaml.BaseLoader) if equals and key else []
        except yaml.YAMLError:
            parsed = []
        if not parsed or key in axes:
            raise ScdError(f"--sweep {text!r}: expected key=value,value,... with each key once")
        axes[key] = [_as_override(value) for value in parsed]
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _as_override(value: Any) -> str:
    return f"[{', '.join(map(_as_override, value))}]" if isinstance(value, list) else str(value)
