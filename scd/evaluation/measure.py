"""Second stage of an evaluation: measure every saved clip, without model and data.

What is stored of a clip is a number of named quantities: the values of a frame metric or of a clip
statistic, one a frame, and the features that set metrics compare. Only those that a clip lacks are
computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from scd.evaluation.i3d import FRAMES_AT_ONCE
from scd.evaluation.metrics import (
    EXTRACTORS,
    AvailableMetrics,
    ClipStatistic,
    FrameMetric,
    SetMetric,
    TrajectoryMetric,
    by_window,
)
from scd.evaluation.protocol import (
    AUTOENCODED_SET,
    OTHER_KEYS_AUTOENCODED_SET,
    REAL_SET,
    REPEAT_SET,
    UNPAIRED_SETS,
)
from scd.evaluation.samples import SampleFolder, batches, siblings
from scd.utils.processes import error_barrier, processes, split_between_processes


@dataclass(frozen=True)
class Quantity:
    """Something to store of every clip of a set.

    Attributes:
        compute: clips and others of the same numbers, (n, F, 3, H, W) each -> (n, …).
        weights: SHA-256 of the weights that it needs; None: none.
        against: the set that the others are of.
    """

    compute: Callable[[Tensor, Tensor], Tensor]
    weights: str | None
    against: str = REAL_SET


def quantities(
    samples: SampleFolder, available: AvailableMetrics, set_: str
) -> dict[str, Quantity]:
    """List the quantities of a set's clips by name."""
    known = samples.setting.context_frames
    compared, other = set_ not in (REAL_SET, *UNPAIRED_SETS), samples.next_trajectory(set_)
    wanted: dict[str, Quantity] = {}
    for key, metric in available.metrics.items():
        weights = None if metric.weights is None else available.hashes[metric.weights]
        if isinstance(metric, FrameMetric) and compared:
            wanted[key] = Quantity(partial(_compare_new_frames, metric, known), weights)
        elif isinstance(metric, ClipStatistic):
            wanted[key] = Quantity(partial(_describe_new_frames, metric, known), weights)
        elif isinstance(metric, TrajectoryMetric) and other is not None:
            wanted[key] = Quantity(partial(_compare_new_frames, metric, known), weights, other)
        elif isinstance(metric, SetMetric):
            extract = partial(EXTRACTORS[metric.features], precision=samples.fvd_precision)
            wanted[metric.features] = Quantity(partial(_extract, extract), weights)
            if samples.setting.windows and by_window(key) not in available.missing:
                slices = samples.setting.window_slices()
                compute = partial(_extract_windows, extract, slices)
                wanted[window_features(metric.features, len(slices))] = Quantity(compute, weights)
    return wanted


def window_features(features: str, windows: int) -> str:
    """Name the features (n, windows, D) of windows of the new frames."""
    return f"{features}_in_{windows}_windows"


def measure_samples(
    samples: SampleFolder, available: AvailableMetrics, again: bool = False
) -> None:
    """Measure every clip that lacks a quantity; the work is shared by all processes.

    A batch always holds the same clips, and is measured as a whole if one of them lacks something,
    so the numbers are a function of the saved pixels.

    Args:
        again: measure all clips, as if there were no measurements.

    Raises:
        ScdError: a clip is missing or damaged; see also `error_barrier`.
    """
    sets = [REAL_SET, *dict.fromkeys(set_ for sets in samples.rows.values() for set_ in sets)]
    wanted = {set_: quantities(samples, available, set_) for set_ in sets}
    with error_barrier():
        if processes().is_main_process and not again:
            _copy_from_siblings(samples, wanted)
    with error_barrier():
        todo = []
        for set_ in sets:
            for numbers in batches(samples.videos, max(1, FRAMES_AT_ONCE // samples.frames)):
                names = list(wanted[set_]) if again else _lacking(samples, wanted, set_, numbers)
                if names:
                    todo.append((set_, numbers, names))
    with error_barrier():
        mine = split_between_processes(todo)
        with tqdm(
            total=sum(len(numbers) for _, numbers, _ in mine),
            desc="measure",
            unit="clip",
            dynamic_ncols=True,
            disable=not mine or not processes().is_main_process,
        ) as bar:
            for set_, numbers, names in mine:
                clips, real = _read(samples, set_, numbers)
                others, values = {REAL_SET: real}, {}
                for name in names:
                    quantity = wanted[set_][name]
                    if quantity.against not in others:
                        others[quantity.against], _ = _read(samples, quantity.against, numbers)
                    values[name] = quantity.compute(clips, others[quantity.against]).cpu()
                for position, number in enumerate(numbers):
                    of_clip = {name: value[position].clone() for name, value in values.items()}
                    samples.write_measurement(set_, number, of_clip, _weights(wanted[set_]))
                bar.update(len(numbers))


def _weights(wanted: dict[str, Quantity]) -> dict[str, str | None]:
    return {name: quantity.weights for name, quantity in wanted.items()}


def _lacking(
    samples: SampleFolder, wanted: dict[str, dict[str, Quantity]], set_: str, numbers: list[int]
) -> list[str]:
    """List the quantities that one or more clips of a batch lack."""
    weights = _weights(wanted[set_])
    there = [samples.measured_quantities(set_, number, weights) for number in numbers]
    return [name for name in weights if not all(name in names for names in there)]


def _copy_from_siblings(samples: SampleFolder, wanted: dict[str, dict[str, Quantity]]) -> None:
    """Copy the measurements of clips that no model made from other evaluations of the same videos.

    In a sweep, and for one checkpoint after another, those are three quarters of the work.
    """
    of_autoencoder = (AUTOENCODED_SET, OTHER_KEYS_AUTOENCODED_SET)
    weights = {
        set_: _weights(wanted[set_])
        for set_ in (REAL_SET, REPEAT_SET, AUTOENCODED_SET, *UNPAIRED_SETS)
        if set_ in wanted
    }
    lacking = {  # clip -> quantities
        (set_, number): missing
        for set_, needed in weights.items()
        for number in range(samples.videos)
        if (missing := needed.keys() - samples.measured_quantities(set_, number, needed))
    }
    for other in siblings(samples):
        for (set_, number), missing in list(lacking.items()):
            if set_ in of_autoencoder and other.autoencoder != samples.autoencoder:
                continue
            offered = missing & other.measured_quantities(set_, number, weights[set_])
            if not offered:
                continue
            values = other.read_measurement(set_, number)
            chosen = {name: values[name] for name in offered}
            samples.write_measurement(set_, number, chosen, weights[set_])
            lacking[set_, number] = missing - offered
            if not lacking[set_, number]:
                del lacking[set_, number]
        if not lacking:
            return


def _read(samples: SampleFolder, set_: str, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Read clips of a set and the real clips of the same numbers, (n, F, 3, H, W) each."""
    known, device = samples.setting.context_frames, processes().device

    def read(set_: str) -> Tensor:
        return torch.stack([samples.read_clip(set_, number) for number in numbers]).to(device)

    real = read(REAL_SET)
    if set_ == REPEAT_SET:
        clips = real.clone()
        clips[:, known:] = real[:, known - 1 : known]
    else:
        clips = real if set_ == REAL_SET else read(set_)
    return clips, real


def _compare_new_frames(
    metric: FrameMetric | TrajectoryMetric, known: int, clips: Tensor, others: Tensor
) -> Tensor:
    return metric.function(clips[:, known:], others[:, known:])


def _describe_new_frames(metric: ClipStatistic, known: int, clips: Tensor, real: Tensor) -> Tensor:
    return metric.function(clips[:, known:])


def _extract(extract: Callable[[Tensor], Tensor], clips: Tensor, real: Tensor) -> Tensor:
    return extract(clips)


def _extract_windows(
    extract: Callable[[Tensor], Tensor], slices: list[slice], clips: Tensor, real: Tensor
) -> Tensor:
    return torch.stack([extract(clips[:, frames]) for frames in slices], dim=1)
