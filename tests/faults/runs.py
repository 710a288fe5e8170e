"""Tiny training runs with faults in them, each a process of its own that may be killed.

A fork server imports everything once; a run is a fork of it and takes a fraction of a second.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from scd.data.lists import ClipEntry, write_list
from scd.options import Options, load_options
from scd.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
PREPARED = "tests.faults.imports"


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run, at `step`, on process `rank`.

    `kind`: `kill` (before file operation `at` from the beginning of the save of `step` on; of the
    run, if `step` is 0), `cut` (in the middle of writing any file, after `at` bytes, in that save),
    `signal` (number `at`, sent to itself `times` times while the step is computed), `nan` (the
    loss, for `times` steps), `drift` (other weights than the other processes), `wait` (for ever;
    the file `waiting` tells).
    """

    kind: str
    step: int
    at: int = 0
    rank: int = 0
    times: int = 1


def fork_server() -> ForkServerContext:
    """The context whose processes are forks of one that has imported `PREPARED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PREPARED])
    return context


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Runs:
    """Starts runs of one tiny experiment; their folders lie below `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = fork_server()
        root = folder / "data"
        root.mkdir(parents=True)
        entries = []
        for clip in range(5):  # with 2 clips a step: every epoch ends in the middle of a step
            rng = np.random.default_rng(clip)
            video = rng.integers(256, size=(8, 16, 16, 3), dtype=np.uint8)
            np.savez(root / f"{clip}.npz", video=video, actions=rng.integers(4, size=8))
            entries.append(ClipEntry(video_path=f"{clip}.npz"))
        for name in ("train.json", "val.json"):
            write_list(root / name, entries)
        self.options = [
            *(f"data.root={root}", f"output_root={folder}", "autoencoder.path=null"),
            *("data.source=video", "data.frame_size=16", "data.frames=3", "model.patch_size=8"),
            *("model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1"),
            *("train.steps=4", "train.save_every=2", "train.log_every=1", "train.batch_size=2"),
            *("train.workers=0", "train.mixed_precision=fp32", "optim.schedule=constant"),
            *("eval.context_frames=2", "eval.new_frames=2", "eval.videos=2", "optim.lr=1e-3"),
        ]

    def start(
        self, *overrides: str, faults: Sequence[Fault] = (), processes: int = 1
    ) -> list[BaseProcess]:
        """Start a run and leave it alone. What it prints goes to `output(rank)`."""
        port = free_port()
        options = load_options(ROOT / "options/scd_doom_tiny.yml", [*self.options, *overrides])
        started = []
        for rank in range(processes):
            place = (rank, processes, port)
            arguments = (self.folder, options, faults, place)
            started.append(self.context.Process(target=_train, args=arguments))
            started[-1].start()
        return started

    def run(
        self, *overrides: str, faults: Sequence[Fault] = (), processes: int = 1
    ) -> int | tuple[int, ...]:
        """The exit code of a run, of each process of several; negative: the signal it died of."""
        started = self.start(*overrides, faults=faults, processes=processes)
        codes = tuple(self.exit_code(process) for process in started)
        return codes[0] if processes == 1 else codes

    @staticmethod
    def exit_code(process: BaseProcess) -> int:
        process.join(120)
        code = process.exitcode
        if code is None:
            process.kill()
            raise TimeoutError("the run hangs")
        return code

    def output(self, rank: int = 0) -> str:
        """What the newest run printed, in the order of stdout and stderr."""
        return (self.folder / f"output-{rank}.txt").read_text()

    def saved(self, name: str) -> int:
        """The last step whose save came back, by the runs' own note."""
        return int((self.folder / f"{name}.saved").read_text())

    def operations(self) -> int:
        """File operations from a `kill` fault's step on, of the newest run that had one."""
        return int((self.folder / "operations").read_text())


def _train(
    folder: Path, options: Options, faults: Sequence[Fault], place: tuple[int, int, int]
) -> None:
    rank, _, _ = place
    settle(folder, place)
    _inject(folder, options.name, [fault for fault in faults if fault.rank == rank])
    from scd import cli
    from scd import options as options_module

    # Resolved already, which takes a while.
    options_module.load_training_options = lambda *_: options
    sys.exit(cli.main(["train", "--opt", "resolved"]))


def start_processes(
    folder: Path, count: int, function: Callable[..., object], arguments: Sequence[str]
) -> list[BaseProcess]:
    """Start a function in several processes; what each prints goes to `output-RANK.txt`."""
    port = free_port()
    started = []
    for rank in range(count):
        place = (rank, count, port)
        target = (folder, place, function, arguments)
        started.append(fork_server().Process(target=_settled, args=target))
        started[-1].start()
    return started


def run_processes(
    count: int, function: Callable[..., object], arguments: Sequence[str]
) -> list[str]:
    """Run a function in several processes, none of which may fail; return what each printed."""
    with TemporaryDirectory() as folder:
        started = start_processes(Path(folder), count, function, arguments)
        running = {process.sentinel: process for process in started}
        while running and not any(process.exitcode for process in started):
            ended = wait(running, timeout=300)
            if not ended:
                break
            for sentinel in ended:
                running.pop(sentinel).join()
        for process in running.values():  # they would wait for the one that failed
            process.kill()
        printed = [path.read_text() for path in sorted(Path(folder).iterdir())]
    codes = [process.exitcode for process in started]
    assert codes == [0] * count, "\n".join(text[-3000:] for text in printed)
    return printed


def _settled(
    folder: Path,
    place: tuple[int, int, int],
    function: Callable[..., object],
    arguments: Sequence[str],
) -> None:
    settle(folder, place)
    function(*arguments)


def settle(folder: Path, place: tuple[int, int, int]) -> None:
    """Make this fork the process `rank` of `processes` that meet at `port`, printing to a file."""
    rank, processes, port = place
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    out = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # its data workers are its own children
    if processes > 1:
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }


def _inject(folder: Path, name: str, faults: list[Fault]) -> None:
    from scd.training import checkpoint, run_log, trainer

    # matplotlib takes longer than everything else of such a run
    run_log.draw_loss_curve = lambda log, picture: picture.write_bytes(b"")
    saved = os.open(folder / f"{name}.saved", os.O_WRONLY | os.O_CREAT)
    for fault in faults:
        if fault.kind == "kill" and fault.step == 0:
            _kill_at_operation(folder, fault.at)
    plain_save, plain_step = checkpoint.save_checkpoint, trainer.Trainer._train_step

    def save_checkpoint(where, state, keep):
        for fault in faults:
            if fault.step == state.step and fault.kind in WHILE_SAVING:
                WHILE_SAVING[fault.kind](folder, fault.at)
        path = plain_save(where, state, keep)
        os.pwrite(saved, f"{state.step:8d}".encode(), 0)
        return path

    def train_step(self, *arguments):
        for fault in faults:
            if fault.step == self.step + 1 and fault.kind in BEFORE_A_STEP:
                BEFORE_A_STEP[fault.kind](folder, fault, self)
        return plain_step(self, *arguments)

    checkpoint.save_checkpoint, trainer.Trainer._train_step = save_checkpoint, train_step


def _signal(folder: Path, fault: Fault, trainer: Trainer) -> None:
    for _ in range(fault.times):
        os.kill(os.getpid(), fault.at)


def _not_a_number(folder: Path, fault: Fault, trainer: Trainer) -> None:
    forward = trainer.task.objective.forward

    def disturbed(batch):
        values = forward(batch)
        if fault.step <= trainer.step + 1 < fault.step + fault.times:
            values["loss"] = values["loss"] * float("nan")
        return values

    trainer.task.objective.forward = disturbed


def _drift(folder: Path, fault: Fault, trainer: Trainer) -> None:
    with torch.no_grad():
        next(trainer.task.network.parameters()).add_(1e-3)


def _wait(folder: Path, fault: Fault, trainer: Trainer) -> None:
    (folder / "waiting").touch()
    time.sleep(600)


def _kill_at_operation(folder: Path, at: int) -> None:
    """Die just before the `at`-th operation below `folder` from now on; write down their number."""
    done = 0
    counter = os.open(folder / "operations", os.O_WRONLY | os.O_CREAT)

    def count() -> None:
        nonlocal done
        done += 1
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.pwrite(counter, f"{done:6d}".encode(), 0)

    def operation(event: str, arguments: tuple) -> None:
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and str(arguments[0]).startswith(str(folder))
        ):
            count()

    sys.addaudithook(operation)
    plain: Callable[[int], None] = os.fsync

    def fsync(number: int) -> None:  # the only one without an audit event
        count()
        plain(number)

    os.fsync = fsync


def _kill_in_write(folder: Path, at: int) -> None:
    """Let the kernel kill this process when it has written `at` bytes of any file."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))


WHILE_SAVING = {"kill": _kill_at_operation, "cut": _kill_in_write}
BEFORE_A_STEP = {"signal": _signal, "nan": _not_a_number, "drift": _drift, "wait": _wait}
