"""Third stage of an evaluation: from measurements to rows of metrics, and to tables.

Frame metrics: mean over the new frames, best of a video's trajectories, mean over the videos.
Clip statistics: mean over everything, divided by that of the real clips; also by quarter of the new
frames. Trajectory metrics: mean over everything, also by quarter. Set metrics: over whole clips,
for each trajectory, then the mean; also by window.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scd.errors import ScdError, reason
from scd.evaluation.measure import quantities, window_features
from scd.evaluation.metrics import (
    METRICS,
    AvailableMetrics,
    ClipStatistic,
    FrameMetric,
    Metric,
    SetMetric,
    TrajectoryMetric,
    by_window,
)
from scd.evaluation.protocol import REAL_SET
from scd.evaluation.samples import SampleFolder
from scd.options import RolloutOptions
from scd.utils.table import Table

FIRST_FRAMES = 4
PARTS = 4  # quarters of the new frames

Row = dict[str, Any]  # metric -> value, or values over time
Measured = dict[str, Tensor]  # quantity -> (videos, …), of a set of clips


@dataclass
class Evaluation:
    """The result of an evaluation; `rows` maps a row's name to its metrics."""

    checkpoint: dict[str, Any]
    protocol: dict[str, Any]
    rows: dict[str, Row]
    missing: dict[str, str]
    weights: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(samples: SampleFolder, available: AvailableMetrics) -> Evaluation:
    """Read all measurements and make the rows of the table.

    Raises:
        ScdError: a measurement is missing, or does not fit the others.
    """

    def read(set_: str) -> Measured:
        return samples.read_measurements(set_, quantities(samples, available, set_))

    real = read(REAL_SET)
    rows = {}
    for name, sets in samples.rows.items():
        trajectories = [read(set_) for set_ in sets]
        try:
            rows[name] = make_row(trajectories, real, samples.windows)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ScdError(
                f"{samples.path}: measurements of {name} do not fit the others "
                f"({reason(error)}); remove {samples.measured}"
            ) from error
    manifest = samples.manifest
    return Evaluation(
        manifest["checkpoint"], manifest["protocol"], rows, available.missing, available.hashes
    )


def make_row(trajectories: list[Measured], real: Measured, windows: int = 0) -> Row:
    """Compute the metrics whose quantities were measured.

    Args:
        trajectories: the quantities of each trajectory's clips.
        real: those of the real clips.
        windows: number of windows that features were extracted from.
    """
    row: Row = {}
    for key, metric in METRICS.items():
        measured = trajectories[0].keys()
        if isinstance(metric, FrameMetric) and key in measured:
            row |= _frame_metric(key, metric, torch.stack([m[key] for m in trajectories]))
        elif isinstance(metric, ClipStatistic) and key in measured:
            row |= _clip_statistic(key, torch.stack([m[key] for m in trajectories]), real[key])
        elif isinstance(metric, TrajectoryMetric) and key in measured:
            row |= _trajectory_metric(key, [m[key] for m in trajectories if key in m])
        elif isinstance(metric, SetMetric) and metric.features in measured:
            row |= _set_metric(key, metric, trajectories, real, windows)
    return row


def _frame_metric(key: str, metric: FrameMetric, values: Tensor) -> Row:
    """Summarize values (trajectories, videos, frames)."""
    return {
        key: _best(metric, values),
        f"{key}_first_{FIRST_FRAMES}": _best(metric, values[..., :FIRST_FRAMES]),
        f"{key}_by_frame": [round(float(v), 5) for v in values.mean(dim=(0, 1))],
    }


def _best(metric: Metric, values: Tensor) -> float:
    """Average (trajectories, videos, frames): over frames, best trajectory of a video, videos."""
    by_video = values.double().mean(dim=-1)
    best = by_video.amin(dim=0) if metric.better == "↓" else by_video.amax(dim=0)
    return float(best.mean())


def _clip_statistic(key: str, values: Tensor, real: Tensor) -> Row:
    """Summarize values (trajectories, videos, frames) against real ones (videos, frames)."""
    pairs = zip(_quarters(values), _quarters(real), strict=True)
    return {key: _ratio(values, real), f"{key}_by_quarter": [_ratio(*pair) for pair in pairs]}


def _quarters(values: Tensor) -> tuple[Tensor, ...]:
    """Split values (..., frames) into quarters of the frames; of fewer than four, into frames."""
    return values.tensor_split(min(PARTS, values.shape[-1]), dim=-1)


def _ratio(values: Tensor, real: Tensor) -> float | None:
    """Divide means; None where the real one is 0."""
    whole = float(real.double().mean())
    return float(values.double().mean()) / whole if whole else None


def _trajectory_metric(key: str, pairs: list[Tensor]) -> Row:
    """Average the values (videos, frames) of pairs of trajectories."""
    values = torch.stack(pairs).double()
    quarters = [float(part.mean()) for part in _quarters(values)]
    return {key: float(values.mean()), f"{key}_by_quarter": quarters}


def _set_metric(
    key: str, metric: SetMetric, trajectories: list[Measured], real: Measured, windows: int
) -> Row:
    """Average the distances of the trajectories, of whole clips and of windows."""

    def mean_distance(real: Tensor, others: list[Tensor]) -> float:
        return float(np.mean([metric.function(real, features) for features in others]))

    whole = metric.features
    row: Row = {key: mean_distance(real[whole], [m[whole] for m in trajectories])}
    cut = window_features(whole, windows)
    if cut in real:
        row[by_window(key)] = [
            mean_distance(real[cut][:, number], [m[cut][:, number] for m in trajectories])
            for number in range(windows)
        ]
    return row


class Column(NamedTuple):
    """A column of a table: key in a row, metric, head."""

    key: str
    metric: Metric
    head: str

    def cell(self, row: Row) -> str:
        """Write a value, the values over time, or a dash."""
        value = row.get(self.key)
        values = value if isinstance(value, list) else [value]
        return " ".join(map(self.metric.format, values))


def columns(rows: list[Row], protocols: list[dict[str, Any]]) -> list[Column]:
    """List the columns of the main table, as far as any row has them."""
    frames = {key: m for key, m in METRICS.items() if isinstance(m, FrameMetric)}
    sets = {key: m for key, m in METRICS.items() if isinstance(m, SetMetric)}
    first = f"_first_{FIRST_FRAMES}"
    known = [Column(key, m, m.head) for key, m in frames.items()]
    known += [
        Column(key + first, m, f"{m.title} +1…+{FIRST_FRAMES} {m.better}")
        for key, m in frames.items()
        if m.first_frames and all(p["new_frames"] >= FIRST_FRAMES for p in protocols)
    ]
    known += [Column(key, m, m.head + _conditions(protocols)) for key, m in sets.items()]
    return _shown(known, rows)


def columns_over_time(rows: list[Row], protocols: list[dict[str, Any]]) -> list[Column]:
    """List the columns of the second table, as far as any row has them."""
    known = []
    for key, m in METRICS.items():
        if isinstance(m, ClipStatistic | TrajectoryMetric):
            known.append(Column(key, m, m.head))
            known.append(Column(f"{key}_by_quarter", m, f"{m.title} by quarter"))
    conditions = _conditions(protocols)
    known += [
        Column(by_window(key), m, f"{m.title} by window {m.better}{conditions}")
        for key, m in METRICS.items()
        if isinstance(m, SetMetric)
    ]
    return _shown(known, rows)


def _shown(columns: list[Column], rows: list[Row]) -> list[Column]:
    return [column for column in columns if any(column.key in row for row in rows)]


def _conditions(protocols: list[dict[str, Any]]) -> str:
    """Name what a set metric depends on: the number of videos, and the features' precision."""
    parts = ["n=" + "/".join(map(str, sorted({protocol["videos"] for protocol in protocols})))]
    precisions = sorted({protocol["fvd_precision"] for protocol in protocols})
    if precisions != ["fp32"]:
        parts.append("/".join(precisions))
    return f" ({', '.join(parts)})"


def tables(evaluation: Evaluation) -> dict[str, Table]:
    """Make the tables of an evaluation, by name: a line for each row."""
    lines = [({"": name}, row) for name, row in evaluation.rows.items()]
    return _make_tables(lines, [evaluation])


def sweep_tables(
    results: list[tuple[dict[str, str], Evaluation]], row_name: str
) -> dict[str, Table]:
    """Make the tables of several evaluations, by name: one row of each.

    Args:
        results: evaluations with the options that were varied, in the order of the table.
    """
    lines = [(varied, evaluation.rows[row_name]) for varied, evaluation in results]
    return _make_tables(lines, [evaluation for _, evaluation in results])


def _make_tables(
    lines: list[tuple[dict[str, str], Row]], evaluations: list[Evaluation]
) -> dict[str, Table]:
    rows = [row for _, row in lines]
    protocols = [evaluation.protocol for evaluation in evaluations]

    def table(shown: list[Column], notes: list[str]) -> Table:
        names = list(lines[0][0])
        cells = [[*named.values()] + [column.cell(row) for column in shown] for named, row in lines]
        return Table([*names, *(column.head for column in shown)], cells, len(names), notes)

    over_time = columns_over_time(rows, protocols)
    made = {
        "evaluation": table(
            columns(rows, protocols),
            # One evaluation has several lines, several have one each.
            missing_notes(
                [
                    (", ".join(f"{key}={value}" for key, value in names.items()), e.missing)
                    for (names, _), e in zip(lines, evaluations, strict=False)
                ]
            ),
        )
    }
    if over_time:
        ratios = [column.metric.title for column in over_time if column.metric.better == "→1"]
        note = (
            f"{', '.join(dict.fromkeys(ratios))}: mean of the new frames divided by that of the "
            f"real ones."
        )
        made["evaluation over time"] = table(over_time, [note] if ratios else [])
    return made


def missing_notes(evaluations: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Say which metrics are missing and why, and where it is not in all evaluations, in which.

    Args:
        evaluations: what each is called, and why which metrics are missing.
    """
    lacking: dict[tuple[str, str], list[str]] = {}
    for name, missing in evaluations:
        for problem in missing.items():
            lacking.setdefault(problem, []).append(name)
    notes = []
    for (metric, why), where in lacking.items():
        place = "" if len(where) == len(evaluations) else f" for {'; '.join(where)}"
        notes.append(f"{metric} is missing{place}: {why}")
    return notes


def markdown(tables: dict[str, Table]) -> str:
    """Write tables one below the other."""
    return "\n\n".join(table.markdown() for table in tables.values())


def rollout_text(r: RolloutOptions) -> str:
    """Describe in words how frames are generated."""
    guided = r.guidance != "none" and r.guidance_scale != 1
    first = f" ({r.first_frame_steps} for the first new frame)" if r.first_frame_steps else ""
    return ", ".join(
        [
            f"{r.steps} step{'s' * (r.steps > 1)}" + first,
            r.solver,
            f"spacing {r.spacing}",
            *([f"temperature {r.temperature}"] if r.temperature != 1 else []),
            f"{r.guidance} guidance {r.guidance_scale}" if guided else "no guidance",
            f"window of {r.window} frames" if r.window else "all past frames",
            r.precision,
        ]
    )
