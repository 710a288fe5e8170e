"""Runs that are killed, told to stop, fed with NaN or drift apart: see scd/training/README.md.

In its short form a part of the whole test suite; in full, with figures: scripts/test_faults.sh.
"""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scd.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint
from scd.training.run_log import read_log
from tests.faults.runs import Fault, Runs

FULL = os.environ.get("SCD_FAULTS") == "full"
QUARTERS = 4  # in full, that many tests of some minutes
KILLED = -signal.SIGKILL
STOPPED = 75


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def straight(runs: Runs) -> Path:
    """Four steps without a fault."""
    assert runs.run("name=straight") == 0, runs.output()
    return runs.folder / "straight"


@pytest.fixture(scope="module")
def half(runs: Runs, straight: Path) -> Path:
    """The same run as it was after two of its steps; to copy."""
    folder = runs.folder / "half"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(straight / "checkpoints/step-00000002", folder / "checkpoints/step-00000002")
    shutil.copy(straight / "log.jsonl", folder)
    return folder


def state_of(folder: Path) -> TrainingState:
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    return load_checkpoint(newest)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(folder / "log.jsonl") if "loss" in entry]


def assert_same_run(one: Path, other: Path) -> None:
    """To the bit: weights, mean, moments, logged losses. And nothing half-written lies about."""
    a, b = state_of(one), state_of(other)
    assert (a.step, a.bad_steps) == (b.step, b.bad_steps)
    moments = [
        {f"{i}.{k}": v for i, s in state.optimizer["state"].items() for k, v in s.items()}
        for state in (a, b)
    ]
    for left, right in ((a.model, b.model), (a.ema, b.ema), moments):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert a.optimizer["param_groups"] == b.optimizer["param_groups"]
    assert losses(one) == losses(other)
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    assert not list(other.rglob(".*"))


def told(what: str, survived: list[bool]) -> None:
    """The figures; what went wrong has been told."""
    wrong = survived.count(False)
    print(f"\n{what}: {len(survived) - wrong} of {len(survived)} kills survived, {wrong} wrong")
    assert survived and not wrong


def survives(runs: Runs, half: Path, straight: Path, fault: Fault, died_of: int) -> bool:
    """Kill the second half of the run as told, look at what is left, and finish it."""
    name = f"{fault.kind}-{fault.at}"
    folder = shutil.copytree(half, runs.folder / name)
    (runs.folder / f"{name}.saved").write_text("2")
    try:
        assert runs.run(f"name={name}", "train.keep_checkpoints=1", faults=[fault]) == died_of
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None and int(newest.name[-8:]) >= runs.saved(name)
        assert runs.run(f"name={name}", "train.keep_checkpoints=1") == 0
        left = {p.name for p in (folder / "checkpoints").iterdir()}
        assert left - {"step-00000002"} == {"step-00000004"}  # the older one: killed before it went
        assert_same_run(straight, folder)
    except AssertionError as error:
        print(f"{fault}: {error}\n{runs.output()}")
        return False
    shutil.rmtree(folder)
    return True


# Killed anywhere


@pytest.mark.parametrize("part", range(QUARTERS) if FULL else [0])
def test_killed_before_any_file_operation(runs, half, straight, part):
    """Of a save and what follows it: pruning, log, export. In full, of the whole resumed run."""
    step, name = (0, f"counted-{part}") if FULL else (4, "counted")
    shutil.copytree(half, runs.folder / name)
    assert runs.run(f"name={name}", "train.keep_checkpoints=1", faults=[Fault("kill", step)]) == 0
    count = runs.operations()
    assert count > 40
    chosen = range(1 + part, count + 1, QUARTERS) if FULL else range(9, count + 1, count // 4)
    told(
        f"killed before file operation {chosen[0]}, {chosen[1]} … {chosen[-1]} of {count}",
        [survives(runs, half, straight, Fault("kill", step, n), KILLED) for n in chosen],
    )


def test_killed_in_the_middle_of_writing_a_file(runs, half, straight):
    """By the kernel, when a file of the checkpoint has so many bytes."""
    sizes = [p.stat().st_size for p in (straight / "checkpoints/step-00000004").iterdir()]
    largest = max(sizes)
    cuts = [2000 + n * (largest - 2001) // 23 for n in range(24)] if FULL else [largest - 1]
    told(
        "killed in the middle of writing a file",
        [survives(runs, half, straight, Fault("cut", 4, n), -signal.SIGXFSZ) for n in cuts],
    )


def test_killed_at_random_times(runs):
    """Again and again, a random moment after a save, until the run has come to its end: inside
    epochs and at their ends, with accumulation, in full with data workers."""
    extra = ["train.save_every=1", "train.batch_size=1", "train.gradient_accumulation=2"]
    extra += ["train.steps=12", "train.workers=1"] if FULL else ["train.steps=6"]
    assert runs.run("name=unharmed", *extra) == 0
    seconds = random.Random(0)
    survived: list[bool] = []
    for name in ("random-a", "random-b", "random-c") if FULL else ("random",):
        folder, saved = runs.folder / name, runs.folder / f"{name}.saved"
        saved.write_text("0")
        for step in range(1, 12) if FULL else (2, 5):
            [process] = runs.start(f"name={name}", *extra)
            while runs.saved(name) < step and process.is_alive():
                time.sleep(0.005)
            time.sleep(seconds.uniform(0, 0.3))
            process.kill()
            code = runs.exit_code(process)
            if code == 0:
                continue  # it was quicker
            newest = latest_checkpoint(folder / "checkpoints")
            kept = int(newest.name[-8:]) if newest else 0
            survived.append(code == KILLED and kept >= runs.saved(name))
        assert runs.run(f"name={name}", *extra) == 0
        assert_same_run(runs.folder / "unharmed", folder)
    told("killed at random times", survived)


# Told to stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_a_stop_signal_saves_and_stops(runs, half, straight, name):
    number = signal.Signals[name]
    folder = shutil.copytree(half, runs.folder / name)
    workers = "train.workers=1" if number == signal.SIGTERM else "train.workers=0"
    assert runs.run(f"name={name}", workers, faults=[Fault("signal", 3, number)]) == STOPPED
    last = runs.output().splitlines()[-1]
    assert last.endswith(f"stopped by {name}, saved at step 3 of 4; run the same command to resume")
    beat = json.loads((folder / "heartbeat.json").read_text())
    assert (beat["state"], beat["step"]) == ("stopped", 3)
    assert state_of(folder).step == 3
    assert runs.run(f"name={name}") == 0
    assert runs.output().splitlines()[-1].endswith(": finished; its model is in exported/")
    assert json.loads((folder / "heartbeat.json").read_text())["state"] == "finished"
    shutil.rmtree(folder / "checkpoints/step-00000003")
    assert_same_run(straight, folder)


def test_a_second_interrupt_stops_at_once(runs, half):
    """By launchers, which pass on what the scheduler sent: as once. At the keyboard: at once."""
    shutil.copytree(half, runs.folder / "twice")
    fault = Fault("signal", 3, signal.SIGINT, times=2)
    assert runs.run("name=twice", faults=[fault]) == 130
    assert runs.output().splitlines()[-1] == "interrupted"
    assert state_of(runs.folder / "twice").step == 2
    assert runs.run("name=twice", faults=[replace(fault, at=signal.SIGTERM)]) == STOPPED


def test_a_second_run_is_refused_while_the_first_lives(runs, half, straight):
    folder = shutil.copytree(half, runs.folder / "one-of-two")
    [first] = runs.start("name=one-of-two", faults=[Fault("wait", 3)])
    while not (runs.folder / "waiting").exists():
        time.sleep(0.02)
    before = (folder / "heartbeat.json").read_text()
    assert runs.run("name=one-of-two") == 1
    assert f"another run is active here (process {first.pid} on " in runs.output()
    assert (folder / "heartbeat.json").read_text() == before
    first.kill()
    first.join()
    assert runs.run("name=one-of-two") == 0
    assert_same_run(straight, folder)


# Numbers


def test_a_bad_step_is_left_out_exactly(runs, half):
    """The same with a kill right after it, from a checkpoint in the middle of two bad steps."""
    bad = Fault("nan", 3, times=2)
    steps = "train.steps=7"
    whole = shutil.copytree(half, runs.folder / "bad")
    assert runs.run("name=bad", steps, "train.save_every=9", faults=[bad]) == 0
    assert "step 3 was not applied: loss nan" in runs.output()
    entries = [json.loads(line) for line in (whole / "bad-steps.jsonl").read_text().splitlines()]
    assert [(e["step"], e["in_a_row"]) for e in entries] == [(3, 1), (4, 2)]
    assert [clip["sample"] for clip in entries[0]["batches"][0]["clips"]] == [4, 5]
    names = {clip["name"] for clip in entries[0]["batches"][0]["clips"]}
    assert names < {f"{number}.npz" for number in range(5)}
    log = [entry for entry in read_log(whole / "log.jsonl") if "loss" in entry]
    assert [entry.get("applied", True) for entry in log] == [True, True, False, False, *[True] * 3]
    assert log[2]["loss"] is None

    resumed = shutil.copytree(half, runs.folder / "bad-again")
    extra = ["name=bad-again", steps, "train.save_every=3", "train.keep_checkpoints=9"]
    assert runs.run(*extra, faults=[bad]) == 0
    shutil.rmtree(resumed / "checkpoints/step-00000006")
    shutil.rmtree(resumed / "checkpoints/step-00000007")
    assert state_of(resumed).bad_steps == 1
    assert runs.run(*extra, faults=[replace(bad, step=4, times=1)]) == 0
    assert_same_run(whole, resumed)
    lines = [(folder / "bad-steps.jsonl").read_text() for folder in (whole, resumed)]
    assert lines[0] == lines[1]


def test_bad_steps_in_a_row_end_the_run(runs, half):
    """At step 6 of 3, 4 and 5 good ones: the last good state is step 3's."""
    folder = shutil.copytree(half, runs.folder / "ended")
    extra = ["name=ended", "train.steps=9", "train.save_every=9"]
    assert runs.run(*extra, faults=[Fault("nan", 4, times=3)]) == 1
    last = runs.output().splitlines()[-1]
    assert last.startswith("error: step 6: 3 steps in a row could not be applied, the last with")
    assert "the weights of step 3 are saved" in last and ".npz" in last
    state = state_of(folder)
    assert (state.step, state.bad_steps) == (3, 0)
    assert json.loads((folder / "heartbeat.json").read_text())["state"] == "failed"
    assert runs.run(*extra) == 0  # the data were mended, say


def test_an_exploding_gradient_is_a_bad_step(runs, half):
    shutil.copytree(half, runs.folder / "exploding")
    code = runs.run("name=exploding", "optim.skip_grad_norm=1e-6", "train.max_bad_steps=2")
    assert code == 1
    assert "2 steps in a row could not be applied" in runs.output()


# Several processes


def test_processes_stop_skip_and_go_on_together(runs):
    """NaN in one of two; a signal to one of them, then a kill of one, change nothing more."""
    two = ["train.batch_size=1", "train.steps=5"]
    bad = Fault("nan", 2, rank=1)
    assert runs.run("name=both", *two, faults=[bad], processes=2) == (0, 0)
    whole = runs.folder / "both"
    [entry] = [json.loads(line) for line in (whole / "bad-steps.jsonl").read_text().splitlines()]
    assert [batch["loss"] == "nan" for batch in entry["batches"]] == [False, True]

    told_one = [bad, Fault("signal", 3, signal.SIGTERM, rank=1)]
    assert runs.run("name=both-again", *two, faults=told_one, processes=2) == (STOPPED, STOPPED)
    assert "stopped by a signal to another process, saved at step 3 of 5" in runs.output()
    killed, other = runs.run("name=both-again", *two, faults=[Fault("kill", 4, 9)], processes=2)
    assert killed == KILLED and other != 0
    assert state_of(runs.folder / "both-again").step == 3
    assert runs.run("name=both-again", *two, processes=2) == (0, 0)
    assert_same_run(whole, runs.folder / "both-again")


def test_one_process_resumes_where_two_stopped(runs, half, straight):
    """The clips of a step stay the same, in the same order; sums are in another order."""
    seen = []
    for name, processes in (("one", 1), ("two", 2)):
        folder = shutil.copytree(half, runs.folder / f"from-two-{name}")
        extra = [f"name={folder.name}", f"train.batch_size={2 // processes}", "train.steps=7"]
        last = [Fault("nan", 3, rank=rank, times=9) for rank in range(processes)]
        runs.run(*extra, faults=last, processes=processes)
        lines = (folder / "bad-steps.jsonl").read_text().splitlines()
        batches = [json.loads(line)["batches"] for line in lines]
        seen.append([[clip for batch in step for clip in batch["clips"]] for step in batches])
    assert seen[0] == seen[1] and [len(step) for step in seen[0]] == [2, 2, 2]


def test_processes_that_drift_apart_are_detected(runs):
    extra = ["name=drift", "train.batch_size=1", "train.check_weights_every=1"]
    assert runs.run(*extra, faults=[Fault("drift", 2, rank=1)], processes=2) == (1, 1)
    assert "error: step 2: process 1 holds other weights than process 0" in runs.output()
