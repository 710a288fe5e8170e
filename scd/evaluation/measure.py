"""Second stage of an evaluation: the metrics of every saved clip. Needs no model and no data."""

import torch
from torch import Tensor
from tqdm import tqdm

from scd.evaluation.frame_metrics import SMALLEST_LPIPS, SMALLEST_SSIM
from scd.evaluation.fvd import FRAMES_AT_ONCE, SHORTEST
from scd.evaluation.measures import Measures
from scd.evaluation.protocol import AUTOENCODED_SET, OTHER_SET, REAL_SET, REPEAT_SET
from scd.evaluation.samples import SampleFolder, batches, siblings
from scd.utils.processes import error_barrier, processes, split_between_processes

FEATURES = "i3d"  # of a whole clip, for FVD; the other entries of a measurement are one a frame


def metrics_of(samples: SampleFolder) -> Measures:
    """The metrics that can be computed here for these samples."""
    measures = Measures(samples.fvd_precision)
    if not samples.context_frames:
        why = "videos made from nothing have no real counterpart"
        measures.missing |= dict.fromkeys(("psnr", "ssim", "lpips"), why)
    for metric, smallest in (("ssim", SMALLEST_SSIM), ("lpips", SMALLEST_LPIPS)):
        if samples.frame_size < smallest:
            measures.missing[metric] = f"{metric} needs frames of {smallest} pixels a side or more"
    if samples.frames < SHORTEST:
        measures.missing["fvd"] = f"FVD needs clips of {SHORTEST} frames or more"
    elif samples.videos < 2:
        measures.missing["fvd"] = "FVD needs 2 videos or more"
    return measures


def measure_samples(samples: SampleFolder, measures: Measures, again: bool = False) -> None:
    """Measure every clip that has no measurement yet; the work is shared by all processes.

    A batch always holds the same clips, and is measured as a whole if one of them is missing, so
    the numbers are a function of the saved pixels.

    Args:
        again: measure all clips, as if there were no measurements.

    Raises:
        ScdError: a clip is missing or damaged; see also `error_barrier`.
    """
    with error_barrier():
        if processes().is_main_process and not again:
            _take_over(samples, measures)
    with error_barrier():
        sets = [REAL_SET, *dict.fromkeys(set_ for sets in samples.rows.values() for set_ in sets)]
        todo = [
            (set_, numbers)
            for set_ in sets
            for numbers in batches(samples.videos, max(1, FRAMES_AT_ONCE // samples.frames))
            if again
            or not all(samples.is_measured(set_, number, measures.hashes) for number in numbers)
        ]
    with error_barrier():
        mine = split_between_processes(todo)
        with tqdm(
            total=sum(len(numbers) for _, numbers in mine),
            desc="measure",
            unit="clip",
            dynamic_ncols=True,
            disable=not mine or not processes().is_main_process,
        ) as bar:
            for set_, numbers in mine:
                values = _measure(samples, measures, set_, numbers)
                for position, number in enumerate(numbers):
                    of_clip = {name: value[position].clone() for name, value in values.items()}
                    samples.write_measurement(set_, number, of_clip, measures.hashes)
                bar.update(len(numbers))


def _take_over(samples: SampleFolder, measures: Measures) -> None:
    """Copy measurements that no model has a say in from other evaluations of the same clips.

    Under a sweep, and for one checkpoint after another, those are three quarters of the work.
    """
    for other in siblings(samples):
        sets = [REAL_SET, OTHER_SET, REPEAT_SET]
        if other.autoencoder == samples.autoencoder:
            sets.append(AUTOENCODED_SET)
        for set_ in sets:
            for number in range(samples.videos):
                if not samples.is_measured(set_, number, measures.hashes) and other.is_measured(
                    set_, number, measures.hashes
                ):
                    samples.copy_measurement(other, set_, number)


def _measure(
    samples: SampleFolder, measures: Measures, set_: str, numbers: list[int]
) -> dict[str, Tensor]:
    """Metrics (n, new frames) of predicted clips, and the features (n, 400) of any."""
    known, device = samples.context_frames, processes().device

    def read(set_: str) -> Tensor:
        return torch.stack([samples.read_clip(set_, number) for number in numbers]).to(device)

    real = read(REAL_SET)
    if set_ == REPEAT_SET:
        clips = real.clone()
        clips[:, known:] = real[:, known - 1 : known]
    else:
        clips = real if set_ == REAL_SET else read(set_)
    values = {}
    if known and set_ not in (REAL_SET, OTHER_SET):
        values = measures.frames(clips[:, known:], real[:, known:])
    features = measures.features(clips)
    return values if features is None else {**values, FEATURES: features}
