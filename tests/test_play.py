"""Worlds, history, start clips and the wire format of play, without a server."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scd import cli
from scd.data.clips import clip_folder
from scd.doom.simulator import DoomSimulator
from scd.errors import ScdError
from scd.evaluation import psnr
from scd.options import load_options
from scd.pipeline import SCDPipeline
from scd.play import history, worlds
from scd.play.catalog import Catalog, load_catalog
from scd.play.game import Game
from scd.play.held_actions import HeldActions
from scd.play.history import Frame, History
from scd.play.messages import AGAIN, GIVEN, CloseCode, CloseConnection, pack_picture, parse_message
from scd.play.starts import Start, load_starts, make_starts
from scd.play.worlds import ModelWorld, RealWorld, Settings, View, load_pretrained
from tests.play import WINDOW, own_data, pretrained_folder, read, small_catalog, some_start

ROOT = Path(__file__).parents[1]
DOOM = load_options(ROOT / "options/scd_doom_tiny.yml")
pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4  # of latents of size 1: the same sums in another order


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, tiny_autoencoder_path: str) -> Catalog:
    return small_catalog(tmp_path_factory.mktemp("play"), tiny_autoencoder_path)


@pytest.fixture
def game(catalog: Catalog) -> Iterator[Game]:
    with closing(Game(catalog)) as game:
        yield game


def actions_of(count: int, seed: int = 1) -> list[int]:
    return [int(action) for action in np.random.default_rng(seed).integers(0, 4, count)]


def latents(frames: list[Frame], world: int = 0) -> torch.Tensor:
    latents = [frame.views[world].latents for frame in frames]
    return torch.stack([z for z in latents if z is not None])


def play(game: Game, actions: list[int]) -> list[Frame]:
    return [game.step(action) for action in actions]


# Worlds


def test_same_seed_and_keys_make_the_same_pictures(catalog, game):
    names, keys = ["model", "baseline"], actions_of(8)
    made = {}
    for label, seed, pressed in (
        ("a", 5, keys),
        ("b", 5, keys),
        ("c", 6, keys),
        ("d", 5, keys[::-1]),
    ):
        game.reset("here", names, seed)
        made[label] = play(game, pressed)
    for world in (0, 1):
        a, b, c, d = (latents(made[label], world) for label in "abcd")
        assert torch.equal(a, b)
        assert (a - c).abs().flatten(1).amax(1).min() > 0.01  # another seed
        assert keys[0] != keys[-1] and (a - d)[0].abs().max() > 0.001  # another key
    assert made["a"][0].views[0].picture.shape == (64, 64, 3)
    assert np.array_equal(made["a"][-1].views[0].picture, made["b"][-1].views[0].picture)
    assert all(time > 0 for time in made["a"][0].views[0].times)


@pytest.mark.parametrize("back_to", [20, 8, 2])
def test_going_on_after_a_rewind_repeats_the_frames(game, back_to):
    """Beyond the window, within it, and inside the start clip."""
    game.reset("here", ["model", "baseline"], 3)
    keys = actions_of(30)
    first = list(game.history.timeline) + play(game, keys)
    game.rewind(back_to)
    again = play(game, [frame.action for frame in first[back_to + 1 :]])
    if back_to < 6:  # the start's own frames are given, not made
        again, first = again[:1], first[: back_to + 2]
        assert torch.isfinite(latents(again)).all()
        return
    for world in (0, 1):
        one, other = latents(first[back_to + 1 :], world), latents(again, world)
        assert (one - other).abs().max() < TOLERANCE
        assert one.abs().max() > 0.1


def test_a_first_frame_after_a_rewind_takes_no_more_steps(tmp_path, tiny_autoencoder_path):
    changes = ["rollout.solver=consistency", "rollout.steps=1", "rollout.first_frame_steps=3"]
    model = load_pretrained(pretrained_folder(tmp_path, tiny_autoencoder_path), changes)
    with closing(Game(Catalog({"model": model}, [some_start()]))) as game:
        first = play(game, [1, 2])
        game.rewind(first[0].number)
        again = game.step(2)
    assert (latents(first[1:]) - latents([again])).abs().max() < TOLERANCE


def test_what_slid_out_of_the_window_still_counts(game):
    """Why a rewind takes in more than the window: with the window alone the frames differ."""
    game.reset("here", ["model"], 3)
    play(game, actions_of(24))
    rewound = list(game.history.timeline)
    expected = game.step(3)
    world = ModelWorld(game.catalog.models["model"])
    views = [frame.views[0] for frame in rewound]
    keys = [frame.action for frame in rewound]
    world.restore(views[-WINDOW:], keys[-WINDOW:], False, game.settings)
    short = world.step(3, expected.number)
    assert short.latents is not None and expected.views[0].latents is not None
    assert (short.latents - expected.views[0].latents).abs().max() > 10 * TOLERANCE


def test_settings(game):
    game.reset("here", ["model", "baseline"], 3)
    play(game, actions_of(6))
    here = game.history.newest.number
    made = {}
    for label, changes in (
        ("as before", {}),
        ("steps", {"steps": 5}),
        ("guidance", {"guidance_scale": 2.5}),
        ("seed", {"seed": 4}),
    ):
        before = game.settings
        game.change(**changes)
        made[label] = game.step(1)
        game.change(steps=before.steps, guidance_scale=before.guidance_scale, seed=before.seed)
        game.rewind(here)
    for world in (0, 1):
        plain = latents([made["as before"]], world)
        for label in ("steps", "guidance", "seed"):
            assert (latents([made[label]], world) - plain).abs().max() > TOLERANCE, label
    game.step(1)
    game.rewind(here)  # takes the past in again; with a new seed alone it is not
    game.change(seed=4)
    difference = latents([game.step(1)]) - latents([made["seed"]])
    assert difference.abs().max() < TOLERANCE
    for wrong in ({"steps": 0}, {"steps": 17}, {"guidance_scale": 0.5}, {"seed": 2**31}):
        before = game.settings
        with pytest.raises(ScdError, match=f"{next(iter(wrong))} is .*, but must be between"):
            game.change(**wrong)
        assert game.settings == before


def test_worlds_are_told_when_their_past_has_lost_its_beginning(game, monkeypatch):
    monkeypatch.setattr(history, "MAX_FRAMES", 8)
    monkeypatch.setattr(history, "DROPPED_AT_ONCE", 3)
    complete = []
    monkeypatch.setattr(ModelWorld, "restore", lambda self, *given: complete.append(given[2]))
    for actions in ([1, 1], [1]):  # 8 frames, then one too many
        play(game, actions)
        game.rewind(game.history.newest.number)
    assert game.history.oldest == 3 and complete == [True, False]
    assert game.step(1).number == 9


def test_each_model_begins_with_its_own_steps(tmp_path, tiny_autoencoder_path):
    """A student of one step beside its teacher of three; a chosen number then holds for both."""
    folder = pretrained_folder(tmp_path, tiny_autoencoder_path)
    models = {
        "model": load_pretrained(folder, ["rollout.solver=consistency", "rollout.steps=1"]),
        "baseline": load_pretrained(folder, ["rollout.steps=3"]),
    }
    catalog = Catalog(models, [some_start()])
    assert [model.about["steps"] for model in models.values()] == [1, 3]
    assert load_pretrained(folder, ["rollout.steps=20"]).steps == worlds.MAX_STEPS
    with closing(Game(catalog)) as game:
        made = {}
        for steps in (None, 1, 3):
            game.reset("here", ["model", "baseline"], 3)
            game.change(steps=steps)
            frame = game.step(1)
            made[steps] = [latents([frame], world) for world in (0, 1)]
    assert torch.equal(made[None][0], made[1][0]) and not torch.equal(made[None][0], made[3][0])
    assert torch.equal(made[None][1], made[3][1]) and not torch.equal(made[None][1], made[1][1])


def test_each_model_begins_with_its_own_guidance(tmp_path, tiny_autoencoder_path):
    """A guided model beside one that is not; a chosen scale then holds for both."""
    folder = pretrained_folder(tmp_path, tiny_autoencoder_path)
    guided = ["rollout.guidance=context", "rollout.guidance_scale=2.5"]
    models = {"model": load_pretrained(folder, guided), "baseline": load_pretrained(folder)}
    assert [model.about["guidance_scale"] for model in models.values()] == [2.5, 1.0]
    most = load_pretrained(folder, [guided[0], "rollout.guidance_scale=9.0"])
    assert most.guidance_scale == worlds.MAX_GUIDANCE
    with closing(Game(Catalog(models, [some_start()]))) as game:
        made = {}
        for scale in (None, 1.0, 2.5):
            game.reset("here", ["model", "baseline"], 3)
            game.change(guidance_scale=scale)
            frame = game.step(1)
            made[scale] = [latents([frame], world) for world in (0, 1)]
    assert torch.equal(made[None][0], made[2.5][0]) and torch.equal(made[None][1], made[1.0][1])
    assert not torch.equal(made[1.0][0], made[2.5][0])
    assert torch.equal(made[2.5][0], made[2.5][1])


def test_refused_starts_change_nothing(game, monkeypatch):
    game.reset("there", ["baseline"], 1)
    line = game.history.timeline
    closed = []
    monkeypatch.setattr(ModelWorld, "close", lambda self: closed.append(self.pretrained))
    for start, names, seed, match in (
        ("nowhere", ["model"], 0, "no start 'nowhere'; there are here, there"),
        ("here", ["model", "moon"], 0, "no world 'moon'"),
        ("here", ["real"], 0, "no world 'real' .not in this test"),
        ("here", ["model"], 2**31, "seed is 2147483648, but must be between 0 and 2147483647"),
    ):
        with pytest.raises(ScdError, match=match):
            game.reset(start, names, seed)
    assert game.history.timeline is line and game.names == ["baseline"]
    assert closed == [game.catalog.first]  # made before there was no moon
    game.reset("here", ["baseline", "model", "model"], 0)
    assert game.names == ["model", "baseline"]  # as the wire numbers them
    with pytest.raises(ScdError, match=r"action 4 is not in 0\.\.3"):
        game.step(4)


def test_a_world_that_fails_to_close_can_be_left(game, monkeypatch):
    def fail(self: ModelWorld) -> None:
        raise RuntimeError("it has died")

    monkeypatch.setattr(ModelWorld, "close", fail)
    game.reset("there", ["baseline"], 0)
    assert game.start.name == "there" and game.names == ["baseline"]


def test_the_real_world_is_the_recorded_episode(tmp_path):
    """Its frames are those that a recording shows, and a rewind finds them again."""
    make_starts(DOOM, tmp_path / "starts", {"one": 3}, frames=12, doom=True)
    (start,) = load_starts(tmp_path / "starts", 64, 4)
    assert start.seed == 1_000_003
    nothing = Settings(1, 1.0)
    with closing(RealWorld(64)) as world, closing(DoomSimulator(64)) as simulator:
        expected = [simulator.reset(start.seed)]
        keys = [*start.actions, *actions_of(10)]
        expected += [simulator.step(action) for action in keys[1:]]
        views = world.reset(start, nothing)
        error = np.stack([v.picture for v in views]).astype(float) - start.frames
        assert 10 * np.log10(255**2 / (error**2).mean()) > 28  # the clip is compressed
        views += [world.step(action, 0) for action in keys[12:]]
        assert all(map(np.array_equal, [v.picture for v in views], expected))
        world.restore(views[:15], keys[:15], True, nothing)
        again = [world.step(action, 0) for action in keys[15:]]
        assert all(map(np.array_equal, [v.picture for v in again], expected[15:]))
        # Where the beginning is not known, it cannot be put back: the picture stands still.
        world.restore(views[5:15], keys[5:15], False, nothing)
        assert world.step(3, 0).over and np.array_equal(world.step(1, 0).picture, expected[14])
        world.restore(views, keys, True, nothing)
        world._simulator.close()  # as if ViZDoom had died
        assert world.step(3, 0).over
        world.restore(views[:15], keys[:15], True, nothing)
        assert world.step(3, 0).over and np.array_equal(world.step(1, 0).picture, expected[14])


def test_a_long_replay_is_not_tried(monkeypatch):
    monkeypatch.setattr(worlds, "MAX_REPLAY", 3)
    with closing(RealWorld(64)) as world:
        start = Start("x", (0, 3, 3, 3), np.zeros((4, 64, 64, 3), np.uint8), 1)
        views = world.reset(start, Settings(1, 1.0))
        world.restore(views, start.actions, False, Settings(2, 1.0))  # where it is already
        views.append(world.step(3, 4))
        assert not views[-1].over
        world.restore(views[:4], start.actions, True, Settings(1, 1.0))
        assert world.step(3, 4).over
        world.restore(views[:3], start.actions[:3], True, Settings(1, 1.0))
        assert not world.step(3, 3).over


def test_what_is_there_already_is_not_replayed(monkeypatch):
    """After a rewind too, changes of the settings replay nothing."""
    begun = []

    class Doom:
        def __init__(self, size: int):
            self._frames = 0

        def reset(self, seed: int) -> np.ndarray:
            begun.append(seed)
            self._frames = 0
            return self.step(0)

        def step(self, action: int) -> np.ndarray:
            self._frames += 1
            return np.full((1, 1, 3), self._frames, np.uint8)

    monkeypatch.setattr(worlds, "DoomSimulator", Doom)
    world = RealWorld(1)
    start = Start("x", (0, 3, 3, 3), np.zeros((4, 1, 1, 3), np.uint8), 1)
    views = world.reset(start, Settings(1))
    for steps in (1, 2, 3):
        world.restore(views[:3], start.actions[:3], True, Settings(steps))
    assert len(begun) == 2  # the start, and one rewind
    assert world.step(3, 3).picture.max() == 4
    world.restore(views[:3], start.actions[:3], True, Settings(1))
    assert len(begun) == 3 and world.step(3, 3).picture.max() == 4


@pytest.mark.parametrize(("fps", "remembered"), [(10.0, 1.0), (0.5, 2.0)])
def test_a_tap_is_remembered_for_a_second_or_a_frame(catalog, fps, remembered):
    held = HeldActions(catalog)
    held.update({"action": 1, "seq": 1}, 0.0, fps)
    held.update({"seq": 2}, 0.1, fps)
    assert [held.action(remembered + late, fps) for late in (-0.1, 0.1)] == [1, catalog.idle]


# History


def some_line(count: int, first: int = 0) -> list[Frame]:
    view = View(np.zeros((1, 1, 3), np.uint8))
    return [Frame(number, 0, (view,)) for number in range(first, first + count)]


def test_branches_can_be_returned_to():
    past = History(some_line(10))
    for frame in some_line(10, 10):
        past.append(frame)
    left = list(past.timeline)
    past.rewind(12)
    assert past.newest.number == 12 and past.timeline[5] is left[5]
    (branch,) = past.branches
    assert branch.frames == left and not branch.kept and past.last_shared(branch) == 12
    other = some_line(3, 13)
    for frame in other:
        past.append(frame)
    assert past.last_shared(branch) == 12
    past.return_to(branch.number)
    assert past.timeline == left
    (left_behind,) = past.branches  # the branch returned to is the line now
    assert left_behind.frames[-1] is other[-1] and past.last_shared(left_behind) == 12
    past.keep()
    past.keep()
    assert [m.kept for m in past.branches] == [False, True]
    past.rewind(3)
    assert len(past.branches) == 2  # what was left is a branch already
    past.return_to(past.branches[1].number)
    assert past.timeline == left and past.branches[1].kept
    past.append(*some_line(1, 20))
    assert past.branches[1].frames == left  # playing on leaves it as it was kept
    for wrong in (-1, 21):
        with pytest.raises(ScdError, match="frames 0 to 20"):
            past.rewind(wrong)
    with pytest.raises(ScdError, match="branch 99 does not exist"):
        past.return_to(99)


def test_a_rewind_of_a_rewind_leaves_one_moment():
    past = History(some_line(200))
    for back in range(190, 100, -10):
        past.rewind(back)
    (branch,) = past.branches
    assert branch.frames[-1].number == 199


def test_where_a_branch_ends_can_be_kept():
    past = History(some_line(10))
    past.rewind(5)
    past.return_to(past.branches[0].number)
    past.rewind(5)
    past.keep()
    assert past.branches[-1].kept and past.branches[-1].frames[-1] is past.newest


def test_kept_moments_stay_longest():
    past = History(some_line(10))
    past.keep()
    for _ in range(12):
        past.rewind(5)
        past.append(*some_line(1, 6))
    assert [branch.kept for branch in past.branches] == [True] + [False] * 7
    for _ in range(9):
        past.append(*some_line(1, past.newest.number + 1))
        past.keep()
    assert [branch.kept for branch in past.branches] == [True] * 8
    assert past.branches[-1].frames[-1] is past.newest
    past.rewind(5)
    past.append(*some_line(1, 6))
    past.rewind(5)
    assert [branch.kept for branch in past.branches] == [True] * 7 + [False]


def test_history_is_bounded(monkeypatch):
    monkeypatch.setattr(history, "MAX_FRAMES", 300)
    past = History(some_line(200))
    for back in (150, 140, 130):
        past.rewind(back)
        for frame in some_line(30, back + 1):
            past.append(frame)
    assert len(past.branches) == 3
    for number in range(161, 1000):
        past.append(*some_line(1, number))
        lines = [past.timeline, *(m.frames for m in past.branches)]
        assert len({id(frame) for line in lines for frame in line}) <= 300
    assert not past.branches and past.newest.number == 999  # they ended long before
    assert past.oldest == past.timeline[0].number > 600
    with pytest.raises(ScdError, match=f"frames {past.oldest} to 999"):
        past.rewind(past.oldest - 1)
    for _ in range(20):
        past.rewind(past.newest.number - 1)
        past.append(*some_line(1, past.newest.number + 1))
    assert len(past.branches) == history.MAX_BRANCHES  # and all of them live beside a full line
    back_to = past.timeline[10]
    past.rewind(past.oldest + 10)
    assert past.newest is back_to
    for _ in range(400):  # a new line from there: what branches hold for themselves is bounded
        past.append(*some_line(1, past.newest.number + 1))
    assert (
        len({id(f) for line in [past.timeline, *(m.frames for m in past.branches)] for f in line})
        <= 300
    )
    assert len(past.timeline) >= 150


# Files


def test_pretrained_folders_that_cannot_be_played(tmp_path, tiny_autoencoder_path):
    with pytest.raises(ScdError, match="no such folder; expected the folder of"):
        load_pretrained(tmp_path / "none")
    folder = pretrained_folder(tmp_path / "good", tiny_autoencoder_path)
    for override, match in (
        ("rollout.window=0", "rollout.window must be at least 1"),
        ("rollout.sink_frames=1", "rollout.sink_frames 0"),
        ("data.action_names=[a,b]", "2 data.action_names for 4 actions"),
        ("model.heads=2", "does not fit the model"),
    ):
        with pytest.raises(ScdError, match=match):
            load_pretrained(folder, [override])
    for missing in ("options.yml", "transformer", "vae"):
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        path = broken / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(ScdError, match=str(path)):
            load_pretrained(broken)
        shutil.rmtree(broken)


def test_bidirectional_models_cannot_be_played(tmp_path, tiny_autoencoder_path):
    """With a window as well, which play asks of other models."""
    folder = pretrained_folder(tmp_path, tiny_autoencoder_path, "causal_dit")
    changes = ["model.type=bidirectional_dit", "flow.prefix_frames=[1,2]", "flow.context_noise=0"]
    for window in (0, 4):
        with pytest.raises(ScdError, match="a bidirectional_dit denoises all frames of a clip"):
            load_pretrained(folder, [*changes, f"rollout.window={window}"])


def test_starts_that_are_wrong(tmp_path):
    for name in ("starts.json", "lamps.mp4"):
        shutil.copy(ROOT / "assets/starts" / name, tmp_path)
    listed = json.loads((tmp_path / "starts.json").read_text())[:1]
    for changes, match in (
        ({}, None),
        ({"name": "../lamps"}, "start name '../lamps' is not letters"),
        ({"seed": "1"}, "seed '1'"),
        ({"actions": [4] * 24}, "numbers below 4"),
        ({"actions": [0] * 23}, "24 frames, but 23 actions"),
        ({"more": 1}, "expected name, actions and optionally seed"),
        ({"name": "nowhere"}, "nowhere.mp4: no such video"),
    ):
        (tmp_path / "starts.json").write_text(json.dumps([listed[0] | changes]))
        if match is None:
            assert len(load_starts(tmp_path, 64, 4)) == 1
            continue
        with pytest.raises(ScdError, match=match):
            load_starts(tmp_path, 64, 4)
    with pytest.raises(ScdError, match=r"starts\.json: no such file"):
        load_starts(tmp_path / "none", 64, 4)
    (tmp_path / "starts.json").write_text(json.dumps(listed))
    with pytest.raises(ScdError, match="but the model has 32"):
        load_starts(tmp_path, 32, 4)


def test_starts_of_ones_own_clips(tmp_path, tiny_autoencoder_path, capsys):
    """By the command: their frames and actions, and no Doom beside a model of something else."""
    own_data(tmp_path / "data", clips=3, frames=9, actions=3, size=96)
    actions = ["left", "right", "jump"]
    folder = pretrained_folder(tmp_path / "model", tiny_autoencoder_path, actions=actions)
    changes = [f"data.root={tmp_path / 'data'}", "data.resize_shorter=80"]
    out = tmp_path / "starts"

    def starts(*arguments: str) -> int:
        opt = ["--opt", str(folder / "options.yml"), *changes]
        return cli.main(["starts", *opt, "--out", str(out), *arguments])

    assert starts("--clips", "2,0", "--names", "second,first", "--frames", "4") == 0
    made = load_starts(out, 64, 3)
    assert [start.name for start in made] == ["second", "first"]
    options = load_options(folder / "options.yml", changes)
    clip = clip_folder(options, "val.json", "video").read(2, 4)
    assert made[0].actions == tuple(clip["actions"].tolist()) and made[0].seed is None
    error = made[0].frames - 255 * clip["video"].movedim(1, -1).numpy()
    assert 10 * np.log10(255**2 / (error**2).mean()) > 28  # the start is compressed once more
    catalog = load_catalog(folder, None, out)
    assert catalog.worlds == ["model"] and list(catalog.missing) == ["baseline"]
    with closing(Game(catalog)) as game:
        assert game.step(2).views[0].picture.shape == (64, 64, 3)

    assert starts("--clips", "1", "--frames", "5") == 0  # over the old ones
    assert [start.name for start in load_starts(out, 64, 3)] == ["clip_0"]
    assert sorted(path.name for path in out.iterdir()) == ["clip_0.mp4", "starts.json"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    for arguments, message in (
        (["--clips", "4"], "val.json has clips 0 to 2, but no clip 3"),
        (["--clips", "1,x"], "--clips 1,x: give how many"),
        (["--clips", "0"], "--clips 0: give how many"),
        (["--clips", "10000000000"], "--clips 10000000000: no data set has so many"),
        (["--clips", "1,1"], "different clip numbers"),
        (["--clips", "2,-1", "--names", "a,b"], "different clip numbers"),
        (["--clips", "2", "--names", "a"], "give 2 different names, one for each clip"),
        (["--clips", "2", "--names", "a,../b"], "'../b' must consist of letters"),
        (["--frames", "0"], "--frames 0"),
        (["--clips", "1", "--frames", "10"], "9 frames, but the clip needs 10"),
        (["--doom"], "--doom needs the data.action_names none, turn_left"),
        (["model.condition=none", "model.num_conditions=0"], "only a world model under actions"),
        (["--out", str(tmp_path / "data")], "exists and has no starts.json"),
    ):
        assert starts(*arguments) == 1
        assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_doom_beside_models_of_doom_alone(tmp_path, tiny_autoencoder_path):
    """Its actions alone do not make a model one of Doom, nor do starts in Doom."""
    own_data(tmp_path / "data", clips=1, frames=6, actions=4)
    folder = pretrained_folder(tmp_path / "doom", tiny_autoencoder_path)
    options = load_options(folder / "options.yml", [f"data.root={tmp_path / 'data'}"])
    make_starts(options, tmp_path / "starts", {"here": 0}, frames=6)
    assert load_catalog(folder, None, tmp_path / "starts").worlds == ["model"]
    other = pretrained_folder(tmp_path / "other", tiny_autoencoder_path, actions=["a", *"bcd"])
    catalog = load_catalog(other, None, ROOT / "assets/starts")
    assert catalog.worlds == ["model"] and list(catalog.missing) == ["baseline"]
    assert load_catalog(folder, None, ROOT / "assets/starts").worlds == ["model", "real"]
    mixed = shutil.copytree(ROOT / "assets/starts", tmp_path / "mixed") / "starts.json"
    listed = json.loads(mixed.read_text())
    del listed[-1]["seed"]
    mixed.write_text(json.dumps(listed))
    assert load_catalog(folder, None, mixed.parent).worlds == ["model"]


def test_the_shipped_starts_are_those_of_the_command(tmp_path):
    """As README.md says they were made; here two of them."""
    shipped = {start.name: start for start in load_starts(ROOT / "assets/starts", 64, 4)}
    make_starts(DOOM, tmp_path / "starts", {"lamps": 60, "red_gate": 12}, frames=24, doom=True)
    for start in load_starts(tmp_path / "starts", 64, 4):
        there = shipped[start.name]
        assert (start.seed, start.actions) == (there.seed, there.actions)
        error = start.frames.astype(float) - there.frames
        assert 10 * np.log10(255**2 / max((error**2).mean(), 1e-9)) > 35


def test_the_shipped_starts():
    starts = load_starts(ROOT / "assets/starts", 64, 4)
    assert len(starts) == 8 and len({start.seed for start in starts}) == 8
    assert all(start.frames.shape == (24, 64, 64, 3) for start in starts)
    assert sum(path.stat().st_size for path in (ROOT / "assets/starts").iterdir()) < 2**20


@pytest.mark.parametrize("name", ["scd_doom", "scd_doom_distilled"])
def test_the_shipped_models_obey(name):
    """Turning changes the picture more than standing does."""
    folder = ROOT / "assets/pretrained" / name
    catalog = load_catalog(folder, None, ROOT / "assets/starts")
    with closing(Game(catalog)) as game:
        standing = play(game, [0] * 4)[-1].views[0].picture.astype(float)
        game.rewind(len(game.start.actions) - 1)
        turned = play(game, [1] * 4)[-1].views[0].picture.astype(float)
        last = game.start.frames[-1]
    assert np.abs(standing - last).mean() < np.abs(turned - last).mean()


@pytest.mark.parametrize("name", ["scd_doom", "scd_doom_distilled"])
def test_the_shipped_pipelines_predict(name):
    """As the README says; the four frames to come, far better than repeating the last one."""
    pipeline = SCDPipeline.from_pretrained(ROOT / "assets/pretrained" / name)
    pipeline.set_progress_bar_config(disable=True)
    starts = load_starts(ROOT / "assets/starts", 64, 4)
    real = torch.from_numpy(np.stack([s.frames for s in starts])).movedim(-1, 2).float() / 255
    actions = torch.tensor(np.stack([s.actions for s in starts]))
    new = pipeline(
        real[:, :20],
        actions=actions,
        num_frames=4,
        generator=[torch.Generator().manual_seed(number) for number in range(len(starts))],
    ).frames[:, 20:]
    repeated = real[:, 19:20].expand_as(new)
    assert psnr(new, real[:, 20:]).mean() > psnr(repeated, real[:, 20:]).mean() + 3


def test_what_is_shipped_is_small():
    files = [path for path in (ROOT / "assets/pretrained").rglob("*") if path.is_file()]
    own = [path for path in files if not path.is_symlink()]
    assert sum(path.stat().st_size for path in own) < 40e6
    assert not [path for path in own if path.suffix in (".pt", ".pth", ".ckpt", ".bin")]


def test_what_an_offer_lacks(tmp_path, tiny_autoencoder_path):
    folder = pretrained_folder(tmp_path / "model", tiny_autoencoder_path)
    catalog = load_catalog(folder, None, ROOT / "assets/starts")
    assert catalog.worlds == ["model", "real"] and list(catalog.missing) == ["baseline"]
    with pytest.raises(ScdError, match="no such folder"):
        load_catalog(folder, tmp_path / "none", ROOT / "assets/starts")


def test_changed_options_hold_for_both_models(tmp_path, tiny_autoencoder_path):
    folder = pretrained_folder(tmp_path / "model", tiny_autoencoder_path)
    catalog = load_catalog(folder, folder, ROOT / "assets/starts", ["rollout.steps=3"])
    assert {name: model.steps for name, model in catalog.models.items()} == {
        "model": 3,
        "baseline": 3,
    }


def test_without_vizdoom(tmp_path, tiny_autoencoder_path, monkeypatch):
    folder = pretrained_folder(tmp_path / "model", tiny_autoencoder_path)
    monkeypatch.setattr("scd.play.catalog.importlib.util.find_spec", lambda name: None)
    catalog = load_catalog(folder, None, ROOT / "assets/starts")
    assert catalog.worlds == ["model"] and "vizdoom is not installed" in catalog.missing["real"]


# Wire format


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "input", "action": 3, "seq": 4294967295}',
        '{"type": "step"}',
        '{"type": "settings"}',
        '{"type": "settings", "guidance_scale": 1.5, "steps": 3}',
        '{"type": "start", "start": "here", "worlds": ["model", "real"], "seed": 1}',
    ],
)
def test_messages(text):
    message = parse_message(text)
    assert {"type": message.type, **message.fields} == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 4000,
        '{"type": "dance"}',
        '{"type": ["input"]}',
        '{"action": 1, "seq": 1}',
        '{"type": "input", "action": 1}',
        '{"type": "input", "action": 1, "seq": 1, "more": 1}',
        '{"type": "input", "action": true, "seq": 1}',
        '{"type": "input", "action": 1.0, "seq": 1}',
        '{"type": "input", "action": -1, "seq": 1}',
        '{"type": "input", "action": 1, "seq": 4294967296}',
        '{"type": "pause", "paused": 1}',
        '{"type": "settings", "fps": NaN}',
        '{"type": "settings", "fps": 1e999}',
        '{"type": "settings", "steps": null}',
        '{"type": "start", "start": "here", "worlds": []}',
        '{"type": "start", "start": "here", "worlds": "model"}',
        '{"type": "start", "start": 1, "worlds": ["model"]}',
        '{"type": "rewind", "frame": ' + "9" * 4000 + "}",
    ],
)
def test_messages_that_are_none(text):
    with pytest.raises(CloseConnection) as closed:
        parse_message(text)
    assert closed.value.code is CloseCode.BAD_MESSAGE and 0 < len(closed.value.reason) < 124


def test_pictures_on_the_wire(game):
    game.reset("here", ["model", "baseline"], 0)
    frame = game.step(2)
    frame = replace(frame, views=(frame.views[0], replace(frame.views[1], over=True)))
    flags = GIVEN | AGAIN
    sent = pack_picture(frame, [0, 2], serial=7, seq=9, flags=flags, made_ms=1.5)
    got = read(sent)
    assert [got[key] for key in ("protocol", "action", "flags", "frame", "serial", "seq")] == [
        2, 2, 3, 6, 7, 9,
    ]  # fmt: skip
    assert got["made_ms"] == 1.5 and [view["world"] for view in got["views"]] == [0, 2]
    assert [view["over"] for view in got["views"]] == [0, 1]
    for view, of_frame in zip(got["views"], frame.views, strict=True):
        assert np.array_equal(view["rgb"], of_frame.picture)
        assert view["times"] == pytest.approx(of_frame.times)


def test_a_model_world_is_its_rollout(catalog):
    """Against the engine itself, on the same noise."""
    from scd.rollout import Rollout
    from scd.utils.seeding import generator

    pretrained, start = catalog.first, catalog.starts[0]
    world = ModelWorld(pretrained)
    views = world.reset(start, Settings(2, 1.0, seed=11))
    made = [world.step(action, 6 + i).latents for i, action in enumerate([1, 3, 2])]
    rollout = Rollout(pretrained.model, replace(pretrained.options.rollout, steps=2))
    context = torch.stack([view.latents for view in views if view.latents is not None])[None]
    rollout.reset(context, torch.tensor([start.actions]))
    for i, action in enumerate([1, 3, 2]):
        noise = torch.randn(1, 8, 8, 8, generator=generator("cpu", "play", 11, 6 + i))
        frame = rollout.step(torch.tensor([action]), noise)
        assert torch.equal(frame[0], made[i])
