"""Third stage of an evaluation: from measurements to one table.

PSNR, SSIM and LPIPS: mean over the predicted frames, best of a video's trajectories, mean over the
videos. FVD: over whole clips, for each trajectory, then the mean.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scd.errors import ScdError, reason
from scd.evaluation.fvd import frechet_distance
from scd.evaluation.measure import FEATURES
from scd.evaluation.measures import Measures
from scd.evaluation.protocol import REAL_SET
from scd.evaluation.samples import SampleFolder
from scd.options import RolloutOptions
from scd.utils.table import Table

FIRST_FRAMES = 4


class Column(NamedTuple):
    """How a metric is named, which way is better (`↑` or `↓`), and with how many decimals."""

    name: str
    better: str
    decimals: int

    @property
    def head(self) -> str:
        return f"{self.name} {self.better}"

    def format(self, value: float | None) -> str:
        """Write a value, or a dash for none."""
        return "–" if value is None else f"{value:.{self.decimals}f}"


COLUMNS = {  # key in a row ->
    "psnr": Column("PSNR", "↑", 2),
    "ssim": Column("SSIM", "↑", 3),
    "lpips": Column("LPIPS", "↓", 3),
    f"psnr_first_{FIRST_FRAMES}": Column(f"PSNR +1…+{FIRST_FRAMES}", "↑", 2),
    f"lpips_first_{FIRST_FRAMES}": Column(f"LPIPS +1…+{FIRST_FRAMES}", "↓", 3),
    "fvd": Column("FVD", "↓", 1),
}


@dataclass
class Evaluation:
    """What was found; `rows` maps a row's name to its metrics."""

    checkpoint: dict[str, Any]
    protocol: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    missing: dict[str, str]
    weights: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(samples: SampleFolder, measures: Measures) -> Evaluation:
    """Read all measurements and make the rows of the table.

    Raises:
        ScdError: a measurement is missing, or some are of another kind than the others.
    """
    real = samples.read_measurements(REAL_SET).get(FEATURES)
    rows = {}
    for name, sets in samples.rows.items():
        measured = [samples.read_measurements(set_) for set_ in sets]
        try:
            rows[name] = row(measured, real)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ScdError(
                f"{samples.path}: measurements of {name} do not fit the others "
                f"({reason(error)}); remove {samples.measured}"
            ) from error
    manifest = samples.manifest
    return Evaluation(
        manifest["checkpoint"], manifest["protocol"], rows, measures.missing, measures.hashes
    )


def row(trajectories: list[dict[str, Tensor]], real_features: Tensor | None) -> dict[str, Any]:
    """One line of the table.

    Args:
        trajectories: for each, metric -> (videos, frames), and features (videos, 400).
        real_features: (videos, 400); None: FVD is missing.
    """
    out: dict[str, Any] = {}
    for metric in trajectories[0]:
        if metric == FEATURES:
            continue
        values = torch.stack([measured[metric] for measured in trajectories])
        out[metric] = _best(metric, values)
        out[f"{metric}_first_{FIRST_FRAMES}"] = _best(metric, values[..., :FIRST_FRAMES])
        out[f"{metric}_by_frame"] = [round(float(v), 5) for v in values.mean(dim=(0, 1))]
    if real_features is not None:
        distances = [frechet_distance(real_features, m[FEATURES]) for m in trajectories]
        out["fvd"] = float(np.mean(distances))
    return out


def table(evaluation: Evaluation) -> Table:
    """The rows of an evaluation."""
    lines = [({"": name}, values) for name, values in evaluation.rows.items()]
    return _make_table(lines, [evaluation])


def sweep_table(found: list[tuple[dict[str, str], Evaluation]], row_name: str) -> Table:
    """One row of each of several evaluations.

    Args:
        found: evaluations with the options that were varied, in the order of the table.
    """
    lines = [(varied, evaluation.rows[row_name]) for varied, evaluation in found]
    return _make_table(lines, [evaluation for _, evaluation in found])


def rollout_text(r: RolloutOptions) -> str:
    """How frames are made, in words."""
    guided = r.guidance != "none" and r.guidance_scale != 1
    return ", ".join(
        [
            f"{r.steps} steps",
            r.solver,
            f"spacing {r.spacing}",
            f"{r.guidance} guidance {r.guidance_scale}" if guided else "no guidance",
            f"window of {r.window} frames" if r.window else "all past frames",
            r.precision,
        ]
    )


def of_fvd(protocols: list[dict[str, Any]]) -> str:
    """What stands behind FVD in a head: it depends on the number of videos, and on precision."""
    parts = ["n=" + "/".join(map(str, sorted({protocol["videos"] for protocol in protocols})))]
    precisions = sorted({protocol["fvd_precision"] for protocol in protocols})
    if precisions != ["fp32"]:
        parts.append("/".join(precisions))
    return f" ({', '.join(parts)})"


def _make_table(
    lines: list[tuple[dict[str, str], dict[str, Any]]], evaluations: list[Evaluation]
) -> Table:
    """Names, then the metrics that any line has."""
    shown = {key: c for key, c in COLUMNS.items() if any(key in values for _, values in lines)}
    heads = list(lines[0][0])
    for key, column in shown.items():
        head = column.head
        if key == "fvd":
            head += of_fvd([evaluation.protocol for evaluation in evaluations])
        heads.append(head)
    cells = [
        [*names.values()] + [column.format(values.get(key)) for key, column in shown.items()]
        for names, values in lines
    ]
    missing = {metric: why for e in evaluations for metric, why in e.missing.items()}
    notes = [f"{metric} is missing: {why}" for metric, why in missing.items()]
    return Table(heads, cells, len(lines[0][0]), notes)


def _best(metric: str, values: Tensor) -> float:
    """(trajectories, n, frames): mean over frames, best trajectory of each video, mean."""
    by_video = values.double().mean(dim=-1)
    best = by_video.amin(dim=0) if COLUMNS[metric].better == "↓" else by_video.amax(dim=0)
    return float(best.mean())
