"""Clips that cannot be read: the run stops, or, with a limit, leaves them out and counts them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from scd.cli import main
from scd.data.clips import ClipFolder, clip_folder
from scd.data.lists import ClipEntry, read_list, write_list
from scd.data.loader import StepSampler, TrainingClips
from scd.errors import ScdError
from scd.models.autoencoder import load_codec
from scd.options import Options, load_options
from scd.training.encode import check_training_latents
from tests.faults.trials import FULL
from tests.test_processes import assert_close, on_two, state_of
from tests.test_training import assert_same_state, train

TINY = str(Path(__file__).parent.parent.parent / "options/scd_doom_tiny.yml")
SMALL = ["data.source=video", "data.frames=4", "autoencoder.path=null", "model.patch_size=16"]
SMALL += ["model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1", "train.steps=4"]
SMALL += ["train.batch_size=2", "train.save_every=2", "train.workers=0", "train.compile=false"]
SMALL += ["train.mixed_precision=fp32", "train.sample_every=0"]


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")


@pytest.fixture
def root(doom_root: Path, tmp_path: Path) -> Path:
    """Six clips, of which the second and the fifth are broken."""
    root = shutil.copytree(doom_root, tmp_path / "data")
    entries = read_list(root / "train.json") * 2
    for number in (1, 4):
        name = f"train/broken{number}.mp4"
        (root / name).write_bytes(b"no video")
        entries[number] = type(entries[0])(name, entries[number].action_path)
    write_list(root / "train.json", entries)
    return root


def options_of(root: Path, name: str, *overrides: str) -> Options:
    places = [f"data.root={root}", f"output_root={root.parent}", f"name={name}"]
    return load_options(TINY, [*SMALL, *places, *overrides])


def clips_of(root: Path, limit: int) -> TrainingClips:
    return TrainingClips(ClipFolder(root, "train.json", "video", "action", 4), 3, 2, 7, limit)


def test_a_stand_in_is_the_next_whole_clip_of_the_epoch(root: Path) -> None:
    clips = clips_of(root, 2)
    whole = [clips[sample] for sample in range(12)]
    order = clips._epoch
    assert order is not None
    passed = [{int(n) for n in clip["broken"] if n >= 0} for clip in whole]
    assert {n for numbers in passed for n in numbers} == {1, 4}
    for sample in range(6, 12):
        numbers = [int(n) for n in [*order[1][sample - 6 :], *order[1][: sample - 6]]]
        wanted = next(n for n in numbers if n not in (1, 4))
        assert passed[sample] == set(numbers[: numbers.index(wanted)])
        entry = clips.folder.entries[wanted]
        same = clips._read(sample, clips.folder.entries.index(entry))
        assert torch.equal(whole[sample]["video"], same["video"])
    assert "not a readable video" in clips.problem(0, 1)
    assert "could not be read for a while" in clips.problem(0, 0)


def test_the_last_clip_of_an_epoch_is_replaced_by_its_first(doom_root: Path) -> None:
    clips = clips_of(doom_root, 1)
    order = [int(number) for number in clips._order(0)]
    entries, last = clips.folder.entries, len(order) - 1
    entries[order[-1]] = replace(entries[order[-1]], video_path="train/missing.mp4")
    clip = clips[last]
    assert clip["broken"].tolist() == [order[-1]]
    assert torch.equal(clip["video"], clips._read(last, order[0])["video"])


def test_workers_and_processes_have_no_say_in_stand_ins(root: Path) -> None:
    def batches(rank: int, processes: int, size: int, workers: int) -> list:
        sampler = StepSampler(size, rank, processes, 0, 6)
        return list(DataLoader(clips_of(root, 3), batch_sampler=sampler, num_workers=workers))

    alone = batches(0, 1, 2, 0)
    for other in (
        batches(0, 1, 2, 2),
        [
            {key: torch.cat([one[key], two[key]]) for key in one}
            for one, two in zip(batches(0, 2, 1, 0), batches(1, 2, 1, 1), strict=True)
        ],
    ):
        for a, b in zip(alone, other, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_by_default_a_broken_clip_is_an_error(root: Path) -> None:
    assert "broken" not in clips_of(root, 0).folder.read(0, 3)
    with pytest.raises(ScdError, match=r"broken\d\.mp4: not a readable video"):
        train(options_of(root, "strict"))


def test_broken_clips_are_left_out_counted_and_reported_once(
    root: Path, capfd: pytest.CaptureFixture
) -> None:
    straight = train(options_of(root, "straight", "data.max_broken_clips=2"))
    told = capfd.readouterr().err
    lines = [line for line in told.splitlines() if "broken clip, skipped: " in line]
    assert len(lines) == 2 and all(f"{root}/train/broken" in line for line in lines)
    text = (straight.parent / "broken-clips.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert {entry["clip"] for entry in found} == {1, 4}
    # Interrupted, with workers, it gives the same batches, the same weights and the same count.
    two = options_of(root, "resumed", "data.max_broken_clips=2", "train.workers=2")
    train(two, stop_after=3)
    resumed = train(two)
    assert_same_state(straight, resumed)
    assert (resumed.parent / "broken-clips.jsonl").read_text() == text


@pytest.mark.skipif(not FULL, reason="launches processes: only with SCD_FAULTS=full")
def test_two_processes_leave_out_and_count_what_one_does(root: Path) -> None:
    one = train(options_of(root, "one", "data.max_broken_clips=2")).parent
    places = [f"data.root={root}", f"output_root={root.parent}", "name=two"]
    for workers in (0, 1):
        more = ["data.max_broken_clips=2", "train.batch_size=1", f"train.workers={workers}"]
        on_two("plain", [*SMALL, *places, *more])
        assert_close(state_of(root.parent / "two"), state_of(one))
        told = (root.parent / "two/broken-clips.jsonl").read_text()
        assert told == (one / "broken-clips.jsonl").read_text()
        shutil.rmtree(root.parent / "two")


def test_beyond_the_limit_the_run_stops_and_names_them(root: Path) -> None:
    for _ in range(2):  # also when it is started again
        with pytest.raises(ScdError) as caught:
            train(options_of(root, "few", "data.max_broken_clips=1"))
        assert "2 broken clips, but data.max_broken_clips is 1: " in str(caught.value)
        assert all(f"train/broken{number}.mp4: not a r" in str(caught.value) for number in (1, 4))
    train(options_of(root, "few", "data.max_broken_clips=2"))  # with a higher limit it goes on
    for entry in read_list(root / "train.json"):
        (root / str(entry.video_path)).write_bytes(b"")
    with pytest.raises(ScdError, match=r"6 broken clips, but data\.max_broken_clips is 50: "):
        clips_of(root, 50)[0]


def test_broken_latents_are_left_out(root: Path, tiny_autoencoder_path: str) -> None:
    for number in (1, 4):
        shutil.copy(root / "train/00000.mp4", root / f"train/broken{number}.mp4")
    settings = [*SMALL, f"data.root={root}", f"output_root={root.parent}", "name=latents"]
    settings += [f"autoencoder.path={tiny_autoencoder_path}", "model.patch_size=2"]
    settings += ["data.source=latents", "model.condition=none", "model.num_conditions=0"]
    settings += ["eval.swapped_actions=[]"]
    assert main(["encode", "--opt", TINY, *settings]) == 0
    latents = root / str(read_list(root / "train.json")[4].latent_path)
    latents.write_bytes(latents.read_bytes()[:-9])
    options = load_options(TINY, settings)
    folder, codec = clip_folder(options, "train.json", "latents"), load_codec(tiny_autoencoder_path)
    with pytest.raises(ScdError, match=r"broken4\.mp4\.safetensors: missing or damaged latents"):
        check_training_latents(folder, codec, options)
    options.data.max_broken_clips = 1
    check_training_latents(folder, codec, options)
    clips = TrainingClips(folder, 4, 1, 0, max_broken=1)
    broken = [int(clips[sample]["broken"]) for sample in range(6)]
    assert sorted(broken) == [-1] * 5 + [4]
    assert "broken4.mp4.safetensors: not a readable latent file" in clips.problem(0, 4)
    torch.save(torch.zeros(40, 8, 4, 4), latents.with_suffix(".pt"))  # of another size, unchecked
    folder.entries[4] = ClipEntry(latent_path=str(latents.relative_to(root).with_suffix(".pt")))
    assert "frames are 8x4x4, but those of other clips 8x8x8" in clips.problem(0, 4)
