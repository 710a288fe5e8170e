"""The Doom recorder: determinism, which frame an action leads to, pictures, and where it goes."""

import json
import math
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from scipy import ndimage

from scd.data import video_checks
from scd.data.lists import read_list, write_list
from scd.data.video import VideoFile
from scd.doom import record
from scd.doom.navigator import CELL, FreeSpace, KeyNavigator, Navigator
from scd.doom.record import ATTEMPT_SEED, SPLIT_SEEDS, SPLIT_SIZE_LIMIT, record_dataset
from scd.doom.replay import Replay
from scd.doom.simulator import (
    ACTIONS,
    FORWARD,
    KEYS,
    NONE,
    ONE_KEY,
    TURN_DEGREES,
    TURN_LEFT,
    TURN_RIGHT,
    DoomSimulator,
    Pose,
)
from scd.errors import ScdError, Stopped
from scd.utils.files import read_json, read_npz


@pytest.fixture(scope="module")
def simulator() -> Iterator[DoomSimulator]:
    simulator = DoomSimulator(64)
    yield simulator
    simulator.close()


@pytest.fixture(scope="module")
def space(simulator: DoomSimulator) -> FreeSpace:
    simulator.reset(0)
    pose = simulator.pose
    return FreeSpace(simulator.walls(), simulator.items(), (pose.x, pose.y))


def episode(root: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames as the video file has them, actions and poses."""
    video = VideoFile(root / f"{name}.mp4")
    with np.load(root / f"{name}.npz") as file:
        return video.frames(np.arange(len(video))), file["actions"], file["poses"]


def replay(simulator: DoomSimulator, seed: int, actions: np.ndarray) -> np.ndarray:
    """The frames that actions lead to; the first action leads to nothing."""
    frames = [simulator.reset(seed), *(simulator.step(action) for action in actions[1:])]
    return np.stack([frame for frame in frames if frame is not None])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each frame, in dB; equal ones count as 99."""
    error = ((a.astype(float) - b) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 10**-5))


def test_a_recording_is_complete(doom_root: Path) -> None:
    for split, count in {"train": 3, "val": 2}.items():
        entries = read_list(doom_root / f"{split}.json")
        assert len(entries) == count
        for entry in entries:
            frames, actions, poses = episode(doom_root, str(entry.video_path)[:-4])
            assert frames.shape == (40, 64, 64, 3)
            assert actions.shape == (40,) and actions.dtype == np.int64 and actions[0] == NONE
            assert poses.shape == (40, 3)
    assert Image.open(doom_root / "coverage.png").size[0] > 500
    note = json.loads((doom_root / "recording.json").read_text())
    assert note == {"frames": 40, "frame_size": 64, "actions": list(ACTIONS)}


def test_one_video_of_a_split_is_checked_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    def counting(path: Path, identity: str) -> video_checks.VideoCheck:
        checked.append(path.relative_to(tmp_path).as_posix())
        return in_full(path, identity)

    in_full = video_checks.check_video
    monkeypatch.setattr(video_checks, "check_video", counting)
    record_dataset(tmp_path, train_episodes=3, val_episodes=1, frames=40, size=64)
    assert checked == ["train/00000.mp4", "val/00000.mp4"]
    kept = read_json(tmp_path / video_checks.KEPT)["videos"]
    assert len(kept) == 4
    for name, check in kept.items():
        path = tmp_path / name
        assert check == asdict(in_full(path, video_checks.identity_of(path)))
    # A video that was there before is somebody else's.
    (tmp_path / video_checks.KEPT).unlink()
    record_dataset(tmp_path, train_episodes=4, val_episodes=1, frames=40, size=64)
    assert sorted(checked[2:]) == [f"train/0000{n}.mp4" for n in range(4)]


def test_a_seed_decides_its_episode(doom_root: Path, tmp_path: Path) -> None:
    """Recorded alone, an episode is the same to the byte; another seed gives another one."""
    record_dataset(tmp_path, train_episodes=1, val_episodes=1, frames=40, size=64)
    for name in ("train/00000", "val/00000"):
        for ending in (".mp4", ".npz"):
            again, before = tmp_path / (name + ending), doom_root / (name + ending)
            assert again.read_bytes() == before.read_bytes()
    names = ["train/00000", "train/00001", "train/00002", "val/00000", "val/00001"]
    episodes = [episode(doom_root, name) for name in names]
    assert len({frames[0].tobytes() for frames, _, _ in episodes}) == 5
    assert len({actions.tobytes() for _, actions, _ in episodes}) == 5


def test_simulators_side_by_side_record_the_same(
    doom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "usable_cores", lambda: list(range(6)))
    record_dataset(tmp_path, train_episodes=3, val_episodes=2, frames=40, size=64)
    for split in ("train", "val"):
        for path in [doom_root / f"{split}.json", *(doom_root / split).iterdir()]:
            assert (tmp_path / path.relative_to(doom_root)).read_bytes() == path.read_bytes()


def test_a_stopped_recording_goes_on(doom_root: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    write = record._write_episode

    def stopped(stem: Path, *played: np.ndarray) -> None:
        write(stem, *played)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(record, "_write_episode", stopped)
    monkeypatch.setattr(record, "usable_cores", lambda: [0])
    with pytest.raises(Stopped):
        record_dataset(tmp_path, train_episodes=9, val_episodes=1, frames=40, size=64)
    assert "record train: stopped by SIGTERM; run the same command" in capfd.readouterr().err
    assert len(list((tmp_path / "train").glob("*.mp4"))) < 9
    assert not [c for c in psutil.Process().children() if "vizdoom" in c.name()]
    monkeypatch.setattr(record, "_write_episode", write)
    record_dataset(tmp_path, train_episodes=3, val_episodes=2, frames=40, size=64)
    name = "train/00002.mp4"
    assert (tmp_path / name).read_bytes() == (doom_root / name).read_bytes()


def test_a_half_written_episode_is_not_recorded(tmp_path: Path, monkeypatch) -> None:
    """Both its files would have to be there."""

    def full(path: Path, **arrays: np.ndarray) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.np, "savez_compressed", full)
    with pytest.raises(ScdError, match="No space left"):
        record_dataset(tmp_path, train_episodes=1, val_episodes=1, frames=4, size=64)
    assert not list((tmp_path / "train").glob("*"))


def test_no_seed_is_in_both_splits() -> None:
    starts = sorted(SPLIT_SEEDS.values())
    ends = [*starts[1:], ATTEMPT_SEED]  # further attempts add multiples of it
    assert all(end - start >= SPLIT_SIZE_LIMIT for start, end in zip(starts, ends, strict=True))


def test_action_i_leads_to_frame_i(doom_root: Path, simulator: DoomSimulator) -> None:
    for name, seed in {"train/00001": 1, "val/00000": 1_000_000}.items():
        frames, actions, poses = episode(doom_root, name)
        again = replay(simulator, seed, actions)
        assert psnr(frames, again).min() > 36  # the pictures are clean, too
        assert [simulator.pose.x, simulator.pose.y, simulator.pose.heading] == list(poses[-1])
        for wrong in (np.roll(actions, 1), np.roll(actions, -1)):
            assert np.median(psnr(frames, replay(simulator, seed, wrong))) < 25


def test_recorded_turns_turn_the_recorded_heading(doom_root: Path) -> None:
    _, actions, poses = episode(doom_root, "train/00000")
    turned = (np.diff(poses[:, 2]) + 180) % 360 - 180
    degrees = {TURN_LEFT: TURN_DEGREES, TURN_RIGHT: -TURN_DEGREES, NONE: 0, FORWARD: 0}
    expected = [degrees[action] for action in actions[1:]]
    np.testing.assert_allclose(turned, expected, atol=0.01)  # Doom's angles are 1/2^32 turns
    moved = np.linalg.norm(np.diff(poses[:, :2], axis=0), axis=1)
    assert moved[actions[1:] == FORWARD].max() > 20  # map units


def test_a_recorded_episode_is_entered_again(doom_root: Path) -> None:
    """Under its own keys it goes on as it was recorded, under others it does not."""
    episode = doom_root / "val/00001.mp4"
    actions = read_npz(episode.with_suffix(".npz"), "actions")
    recorded = VideoFile(episode).frames(np.arange(10, 40)).astype(float)
    with closing(Replay(doom_root)) as replay:
        played = replay.play_on(episode, 9, actions[10:])
        others = replay.play_on(episode, 9, np.where(actions[10:] == 1, 2, 1))
    assert played is not None and others is not None
    of_compression = np.abs(played - recorded).mean()
    assert of_compression < 6
    assert np.abs(others - recorded).mean() > 3 * of_compression


def test_an_episode_of_a_later_attempt_is_entered_again(
    doom_root: Path, tmp_path: Path, simulator: DoomSimulator
) -> None:
    root = shutil.copytree(doom_root, tmp_path / "doom")
    frames, poses = [simulator.reset(SPLIT_SEEDS["val"] + 2 * ATTEMPT_SEED)], [simulator.pose]
    for _ in range(5):
        frames.append(simulator.step(TURN_LEFT))
        poses.append(simulator.pose)
    places = [(pose.x, pose.y, pose.heading) for pose in poses]
    np.savez(root / "val/00000.npz", actions=[NONE] + [TURN_LEFT] * 5, poses=places)
    with closing(Replay(root)) as replay:
        played = replay.play_on(root / "val/00000.mp4", 3, [TURN_LEFT] * 2)
    assert np.array_equal(played, frames[4:])


def test_only_a_recording_can_be_entered(doom_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ScdError, match=r"recording\.json is missing"):
        Replay(tmp_path)
    (tmp_path / "recording.json").write_text("{}")
    with pytest.raises(ScdError, match="not the settings of a recording"):
        Replay(tmp_path)
    copied = shutil.copytree(doom_root, tmp_path / "renamed")
    (copied / "val/00000.npz").replace(copied / "val/00001.npz")
    with closing(Replay(copied)) as replay, pytest.raises(ScdError, match="renamed"):
        replay.play_on(copied / "val/00001.mp4", 5, [1])


def test_an_episode_may_end_under_other_keys(doom_root: Path, monkeypatch) -> None:
    with closing(Replay(doom_root)) as replay:
        step, steps = replay._simulator.step, iter([True] * 7 + [False])
        monkeypatch.setattr(
            replay._simulator, "step", lambda action: step(action) if next(steps) else None
        )
        assert replay.play_on(doom_root / "val/00000.mp4", 5, [1, 1, 1]) is None


def test_an_episode_that_ends_while_it_is_entered(doom_root: Path, monkeypatch) -> None:
    with closing(Replay(doom_root)) as replay:
        monkeypatch.setattr(replay._simulator, "step", lambda action: None)
        with pytest.raises(ScdError, match="the episode leads elsewhere now"):
            replay.play_on(doom_root / "val/00000.mp4", 5, [1])


def test_several_keys_at_once(tmp_path: Path, simulator: DoomSimulator) -> None:
    """A recording with keys: vectors beside the frames that they led to, and walked curves."""
    record_dataset(tmp_path, train_episodes=1, val_episodes=1, frames=120, size=64, keys=True)
    note = json.loads((tmp_path / "recording.json").read_text())
    assert note["actions"] == list(KEYS)
    with pytest.raises(ScdError, match="a recording with other settings"):
        record_dataset(tmp_path, train_episodes=1, val_episodes=1, frames=120, size=64)
    for name, seed in {"train/00000": 0, "val/00000": 1_000_000}.items():
        frames, actions, poses = episode(tmp_path, name)
        assert actions.shape == (120, 3) and actions.dtype == np.uint8 and not actions[0].any()
        assert psnr(frames, replay(simulator, seed, actions)).min() > 36
        assert np.median(psnr(frames, replay(simulator, seed, np.roll(actions, 1, 0)))) < 25
        left, right, forward = actions[1:].T.astype(int)
        turned = (np.diff(poses[:, 2]) + 180) % 360 - 180
        np.testing.assert_allclose(turned, TURN_DEGREES * (left - right), atol=0.01)
        moved = np.linalg.norm(np.diff(poses[:, :2], axis=0), axis=1)
        curve = (left != right) & (forward == 1)
        assert curve.sum() > 10 and moved[curve].max() > 20  # map units


def test_one_key_is_a_set_of_one(simulator: DoomSimulator) -> None:
    for action, keys in enumerate(ONE_KEY):
        frames = []
        for given in (action, keys, tuple(map(float, keys))):
            simulator.reset(5)
            frames.append(simulator.step(given))
        assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[0], frames[2])
    still = simulator.reset(5)
    assert np.array_equal(simulator.step((1, 1, 0)), still)  # left and right


def test_frames_are_the_averaged_middle_of_the_screen(
    simulator: DoomSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "frame_size", 60)
    frame = simulator.reset(3)
    screen = simulator._game.get_state().screen_buffer
    assert screen.shape == (240, 320, 3)
    averages = screen[:, 40:-40].reshape(60, 4, 60, 4, 3).mean((1, 3))
    assert np.abs(frame - averages).max() <= 1  # rounded along each side


@pytest.mark.parametrize("turn", [TURN_LEFT, TURN_RIGHT])
def test_turning_back_shows_the_same_frame(simulator: DoomSimulator, turn: int) -> None:
    first, pose = simulator.reset(3), simulator.pose
    turned = simulator.step(turn)
    assert turned is not None and (turned != first).mean() > 0.3
    back = simulator.step(TURN_RIGHT if turn == TURN_LEFT else TURN_LEFT)
    assert simulator.pose == pose and np.array_equal(back, first)
    for _ in range(32):  # a full circle
        around = simulator.step(turn)
    assert simulator.pose.heading == pytest.approx(pose.heading, abs=1e-6)
    assert np.array_equal(around, first)
    assert np.array_equal(simulator.step(NONE), first)


def test_a_refused_recording_leaves_no_trace(tmp_path: Path, monkeypatch) -> None:
    """Whoever mistook the size, or stopped before the first episode, records with another."""
    root = tmp_path / "doom"
    with pytest.raises(ScdError, match="1 to 240 pixels"):
        record_dataset(root, 1, 1, 4, 300)
    assert not root.exists()
    root.mkdir()
    (root / "recording.json").write_text('{"frames": 4}')
    record_dataset(root, 1, 1, 4, 64)
    assert read_json(root / "recording.json")["frame_size"] == 64


@pytest.mark.parametrize("unrecorded", ["train", "val"])
def test_episodes_of_unknown_settings_are_left_alone(
    doom_root: Path, tmp_path: Path, unrecorded: str
) -> None:
    root = shutil.copytree(doom_root, tmp_path / "doom")
    shutil.rmtree(root / unrecorded)
    (root / "recording.json").unlink()
    with pytest.raises(ScdError, match="holds episodes of unknown settings"):
        record_dataset(root, 1, 1, 4, 32)
    assert not (root / "recording.json").exists()


def test_recording_again_writes_nothing(doom_root: Path, tmp_path: Path, capfd) -> None:
    root = tmp_path / "doom"
    shutil.copytree(doom_root, root)

    def written() -> dict[str, tuple[int, int]]:
        files = [path for path in root.rglob("*") if path.is_file()]
        return {str(p.relative_to(root)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}

    before = written()
    record_dataset(root, 3, 2, 40, 64)
    assert written() == before
    for other in [(3, 2, 41, 64), (3, 2, 40, 32)]:
        with pytest.raises(ScdError, match="holds a recording with other settings"):
            record_dataset(root, *other)
    assert written() == before
    entries = read_list(root / "train.json")  # as `scd encode` leaves it
    encoded = [type(e)(e.video_path, e.action_path, f"{n}.pt") for n, e in enumerate(entries)]
    write_list(root / "train.json", encoded)
    (root / "train/00001.mp4").unlink()
    before = written()
    record_dataset(root, 4, 2, 40, 64)
    new = {name for name, stamp in written().items() if before.get(name) != stamp}
    one, four = "train/00001", "train/00003"
    files = {f"{name}.{ending}" for name in (one, four) for ending in ("mp4", "npz")}
    assert new == {*files, "train.json", "coverage.png", "video_checks.json"}
    listed = read_list(root / "train.json")
    latents = [entry.latent_path for entry in listed]
    assert latents == ["0.pt", None, "2.pt", None]  # of episodes that stayed as they were
    before = written()
    record_dataset(root, 2, 1, 40, 64)  # fewer than there are
    assert read_list(root / "train.json") == listed and written() == before
    assert f"{root / 'train.json'}: keeps its 4 episodes, more than 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0, 1, 8, 64), "between 1 and"),
        ((1, SPLIT_SIZE_LIMIT + 1, 8, 64), "between 1 and"),
        ((1, 1, 1, 64), "at least 2 frames"),
        ((1, 1, 8, 0), "1 to 240 pixels"),
        ((1, 1, 8, 241), "1 to 240 pixels"),
    ],
)
def test_impossible_recordings_are_refused(tmp_path: Path, arguments, complaint: str) -> None:
    with pytest.raises(ScdError, match=complaint):
        record_dataset(tmp_path, *arguments)
    assert not [*tmp_path.rglob("*.mp4"), *tmp_path.rglob("*.png")]


def test_a_damaged_recording_is_named(doom_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "doom"
    shutil.copytree(doom_root, root)
    (root / "coverage.png").unlink()
    (root / "val/00001.npz").write_bytes(b"PK not really")
    with pytest.raises(ScdError, match=r"val/00001\.npz"):
        record_dataset(root, 3, 2, 40, 64)


def test_the_engine_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    simulator = DoomSimulator(8)
    assert simulator.reset(0).shape == (8, 8, 3)
    simulator.close()
    assert not list(tmp_path.iterdir())


def test_what_vizdoom_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScdError, match="no scenario 'my_way_out'"):
        DoomSimulator(64, "my_way_out")
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(ScdError, match="pip install vizdoom"):
        DoomSimulator(64)


class Trapped:
    """A simulator whose episodes end at once, but for those of one seed."""

    pose = Pose(0.0, 0.0, 0.0)

    def __init__(self, good_seed: int):
        self.good_seed = good_seed
        self.seeds: list[int] = []

    def reset(self, seed: int) -> np.ndarray:
        self.seeds.append(seed)
        return np.zeros((4, 4, 3), np.uint8)

    def step(self, action: int) -> np.ndarray | None:
        good = self.seeds[-1] == self.good_seed
        return np.full((4, 4, 3), action, np.uint8) if good else None


def test_an_episode_that_ends_early_is_played_again(space: FreeSpace) -> None:
    trapped = Trapped(good_seed=7 + 2 * ATTEMPT_SEED)
    video, actions, poses = record._play_episode(trapped, space, 7, 5)  # type: ignore[arg-type]
    assert trapped.seeds == [7, 7 + ATTEMPT_SEED, 7 + 2 * ATTEMPT_SEED]
    assert list(video[:, 0, 0, 0]) == list(actions) and len(poses) == 5
    with pytest.raises(ScdError, match="seed 8 ended before 5 frames in 100 attempts"):
        record._play_episode(Trapped(-1), space, 8, 5)  # type: ignore[arg-type]


def view_distance(pose: Pose, walls: np.ndarray) -> float:
    """From a pose straight ahead to the next wall, in map units."""
    heading = math.radians(pose.heading)
    ahead = np.array([math.cos(heading), math.sin(heading)])
    to_start, along = walls[:, :2] - (pose.x, pose.y), walls[:, 2:] - walls[:, :2]
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = ahead[0] * along[:, 1] - ahead[1] * along[:, 0]
        distance = (to_start[:, 0] * along[:, 1] - to_start[:, 1] * along[:, 0]) / cross
        place = (to_start[:, 0] * ahead[1] - to_start[:, 1] * ahead[0]) / cross
    return float(distance[(distance > 0) & (place >= 0) & (place <= 1)].min(initial=np.inf))


def test_the_policy_visits_every_room(simulator: DoomSimulator, space: FreeSpace) -> None:
    """3000 steps. An opening by 80 x 80 map units leaves the rooms, but not the corridors."""
    rooms, count = ndimage.label(ndimage.binary_opening(space.free, np.ones((10, 10))))
    assert count == 8
    walls = simulator.walls()
    visits, actions = np.zeros(count + 1, int), np.zeros(len(ACTIONS), int)
    distances, moved = [], []
    for seed in range(3):
        simulator.reset(seed)
        navigator = Navigator(space, np.random.default_rng(seed))
        for _ in range(1000):
            before = simulator.pose
            action = navigator.act(before)
            assert simulator.step(action) is not None  # never touches the vest, which ends it
            pose = simulator.pose
            i, j = ((np.array([pose.x, pose.y]) - space.origin) // CELL).astype(int)
            visits[rooms[i, j]] += 1
            actions[action] += 1
            distances.append(view_distance(pose, walls))
            if action == FORWARD:
                moved.append(math.dist((before.x, before.y), (pose.x, pose.y)))
    assert (visits[1:] >= 10).all(), visits
    assert (actions / actions.sum() > [0.02, 0.15, 0.15, 0.15]).all(), actions
    # A random walk is stopped by a wall in 70 % of its steps and stares at one in 85 % of frames.
    assert np.mean(np.array(moved) < 4) < 0.03
    assert np.mean(np.array(distances) < 48) < 0.2


def test_a_player_with_keys_holds_every_set_of_them(
    simulator: DoomSimulator, space: FreeSpace
) -> None:
    """1000 steps. It is seldom stopped by a wall, and touches the vest once at most."""
    held: Counter[tuple[float, ...]] = Counter()
    moved, stopped = 0, 0
    ended = 0
    for seed in range(4):
        simulator.reset(seed)
        navigator = KeyNavigator(space, np.random.default_rng(seed))
        for _ in range(250):
            before = simulator.pose
            keys = navigator.act(before)
            if simulator.step(keys) is None:
                ended += 1
                break
            pose = simulator.pose
            assert isinstance(keys, tuple)
            held[keys] += 1
            if keys[2]:
                moved += 1
                stopped += math.dist((before.x, before.y), (pose.x, pose.y)) < 4
    assert ended <= 1
    assert len(held) == 8
    assert min(held[keys] for keys in held if keys[:2] != (1, 1)) > 20
    assert held[1, 0, 1] + held[0, 1, 1] > 200
    assert stopped < 0.1 * moved
