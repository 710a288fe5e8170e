"""Splits of UCF-101 (arXiv 1212.0402) as its archive unpacks: one folder a class, 13 320 videos.

Videos are called `v_<Class>_g<group>_c<clip>.avi`; the clips of a group were cut from one source.
Official test lists take whole groups: list 3 is groups 15 to 21, 3 696 videos.
"""

import re
from itertools import chain, zip_longest
from pathlib import PurePosixPath

from scd.errors import ScdError

TEST_GROUPS = range(15, 22)
EVERY = 10
BALANCED_VIDEOS = 2048


def mcvd_split(videos: list[str]) -> tuple[list[str], list[str]]:
    """For prediction, as in MCVD (arXiv 2205.09853): official split 3, every tenth test video.

    Training: all 9 624 videos outside groups 15 to 21. Validation: of the others, by class, group
    and clip, those at places 0, 10, 20, … as long as ten remain: 369 of 3 696.

    Raises:
        ScdError: a video has another name than UCF-101's.
    """
    placed = sorted(videos, key=_place)
    train = [video for video in placed if _place(video)[1] not in TEST_GROUPS]
    test = [video for video in placed if _place(video)[1] in TEST_GROUPS]
    return train, test[: len(test) // EVERY * EVERY : EVERY]


def latte_split(videos: list[str]) -> tuple[list[str], list[str]]:
    """For generation by class, as in Latte (arXiv 2401.03048): everything is training data.

    FVD is measured against videos of the same set, as usual for generation: 2 048 of them. Here
    the classes take turns (first the first of each class, then the second of each …), so that any
    first n videos hold every class equally often, give or take one.

    Raises:
        ScdError: a video has another name than UCF-101's.
    """
    placed = sorted(videos, key=_place)
    by_class: dict[str, list[str]] = {}
    for video in placed:
        by_class.setdefault(_place(video)[0], []).append(video)
    turns = chain.from_iterable(zip_longest(*by_class.values()))
    return placed, [video for video in turns if video is not None][:BALANCED_VIDEOS]


SPLITS = {"ucf101-mcvd": mcvd_split, "ucf101-latte": latte_split}


def _place(video: str) -> tuple[str, int, int]:
    """Class, group and clip of a path; classes sort as in the official numbering, without case."""
    path = PurePosixPath(video)
    match = re.fullmatch(r"v_\w+_g(\d+)_c(\d+)", path.stem)
    if match is None:
        raise ScdError(f"{video}: not named as UCF-101's videos are (v_<Class>_g01_c01.avi)")
    return path.parent.name.casefold(), int(match[1]), int(match[2])
