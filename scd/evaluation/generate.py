"""First stage of an evaluation: save the clips that a folder of samples lacks."""

import torch
from tqdm import tqdm

from scd.data.clips import ClipFolder
from scd.evaluation.protocol import (
    AUTOENCODED_SET,
    OTHER_KEYS_AUTOENCODED_SET,
    OTHER_KEYS_SET,
    OTHER_SET,
    REAL_SET,
    autoencode_frames,
    not_finite,
    play_with_other_keys,
    predict_frames,
    predictions,
    read_evaluation_batch,
    read_evaluation_clip,
    swap_new_actions,
)
from scd.evaluation.samples import SampleFolder, batches
from scd.models.autoencoder import Codec
from scd.models.world_model import WorldModel
from scd.options import Options
from scd.utils.processes import error_barrier, processes, split_between_processes


def generate_samples(
    model: WorldModel, codec: Codec, data: ClipFolder, options: Options, samples: SampleFolder
) -> None:
    """Save every clip of the protocol that `samples` lacks; the work is shared by all processes.

    A batch always holds the same videos, and is predicted as a whole if one of them is missing: so
    the pixels depend neither on interruptions nor on the number of processes.

    Raises:
        ScdError: too few clips, or a prediction that is not finite (those of other videos are
            saved before); see also `error_barrier`.
    """
    count = samples.videos
    sets_of_reals = {REAL_SET: 0, OTHER_SET: count}  # set -> number of its first clip
    if [OTHER_SET] not in samples.rows.values():
        del sets_of_reals[OTHER_SET]
    sets_to_make = [prediction.name for prediction in predictions(options)]
    for made in (AUTOENCODED_SET, OTHER_KEYS_SET, OTHER_KEYS_AUTOENCODED_SET):
        if [made] in samples.rows.values():
            sets_to_make.append(made)
    with error_barrier():
        # Read the last clip that is needed: report too few now, not after hours.
        read_evaluation_clip(data, max(sets_of_reals.values()) + count - 1, options)
        to_make = [
            (set_, numbers)
            for set_ in sets_to_make  # one after another, so that all processes get as much of each
            for numbers in batches(count, options.eval.batch_size)
            if _lacking(samples, set_, numbers)
        ]
        to_copy = [
            (set_, number, first + number)
            for set_, first in sets_of_reals.items()
            for number in _lacking(samples, set_, range(count))
        ]
    with error_barrier():
        for set_, number, source in split_between_processes(to_copy):
            clip = read_evaluation_clip(data, source, options)
            samples.write_clip(set_, number, clip["video"])
        mine = split_between_processes(to_make)
        with tqdm(
            total=sum(len(numbers) for _, numbers in mine),
            desc="generate",
            unit="video",
            dynamic_ncols=True,
            disable=not mine or not processes().is_main_process,
        ) as bar:
            for set_, numbers in mine:
                _make(model, codec, data, options, samples, set_, numbers)
                bar.update(len(numbers))


def _lacking(samples: SampleFolder, set_: str, numbers: list[int] | range) -> list[int]:
    return [number for number in numbers if not samples.clip_path(set_, number).exists()]


def _make(
    model: WorldModel,
    codec: Codec,
    data: ClipFolder,
    options: Options,
    samples: SampleFolder,
    set_: str,
    numbers: list[int],
) -> None:
    """Generate a batch of a set and save those of its clips that the folder lacks."""
    batch = read_evaluation_batch(data, numbers, options, model.device)
    known = samples.context_frames
    if set_ == AUTOENCODED_SET:
        new = autoencode_frames(codec, batch["video"][:, known:])
    elif set_ in (OTHER_KEYS_SET, OTHER_KEYS_AUTOENCODED_SET):
        new = play_with_other_keys(data, options, numbers, model.device)
        if set_ == OTHER_KEYS_AUTOENCODED_SET:
            new = autoencode_frames(codec, new)
    else:
        (prediction,) = (p for p in predictions(options) if p.name == set_)
        if prediction.swapped:
            batch["actions"] = swap_new_actions(batch["actions"], options)
        new = predict_frames(model, codec, options, batch, numbers, prediction.seed)
    whole = torch.cat([batch["video"][:, :known], new], dim=1).cpu()
    broken = []
    for number in _lacking(samples, set_, numbers):
        clip = whole[numbers.index(number)]
        if torch.isfinite(clip).all():
            samples.write_clip(set_, number, clip)
        else:
            broken.append(number)
    if broken:
        raise not_finite(set_, broken)
