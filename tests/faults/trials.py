"""Try damaged files in a forked process: what hangs, swells or crashes is counted, not suffered."""

import faulthandler
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from scd.errors import ScdError
from tests.faults.mutate import mutated

FULL = os.environ.get("SCD_FAULTS") == "full"
LONGEST_SECONDS = 10.0  # of one trial
MOST_GROWTH = 300 * 2**20  # bytes of memory that one trial may add to its process
ADDRESSES = 8 * 2**30  # of address space, beyond what the process has: a crash instead of a freeze
# A refusal for want of memory came too late.
WANTING = ("t allocate", "not allocate", "out of memory", "unable to allocate")


@dataclass
class Kind:
    """One kind of foreign input.

    Args:
        files: name -> content, of which one is damaged in every trial.
        read: reads them by the project's own entry point, given their folder.
        damage: (name, content, random numbers) -> damaged content.
        finish: makes the rest of the folder agree with the damage, sometimes.
    """

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], object]
    damage: Callable[[str, bytes, Random], bytes] = mutated
    finish: Callable[[Path, Random], None] = lambda folder, rng: None


@dataclass
class Tally:
    accepted: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.wrong)


def try_damage(kind: Kind, folder: Path, trials: int) -> Tally:
    """Read `trials` damaged inputs of a kind; trial n is the same in every run."""
    tally = Tally()
    while tally.tried < trials:
        begin = tally.tried
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(source)
            _child(kind, folder, range(begin, trials), sink)
        os.close(sink)
        with os.fdopen(source) as lines:
            for line in lines:
                outcome, told = json.loads(line)
                if outcome == "wrong":
                    tally.wrong.append(f"{kind.name} {tally.tried}: {told}")
                else:
                    setattr(tally, outcome, getattr(tally, outcome) + 1)
        _, status = os.waitpid(child, 0)
        if status:  # by a signal: of the alarm, or a crash
            told = f"hangs or dies ({signal.strsignal(os.waitstatus_to_exitcode(status) * -1)})"
            tally.wrong.append(f"{kind.name} {tally.tried}: {told}")
    return tally


def _child(kind: Kind, folder: Path, numbers: range, sink: int) -> None:
    """Never returns. Ends early after a trial that swelled, so that the next starts small."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        faulthandler.disable()  # pytest's: a crash is counted, its stack would be noise
        torch.set_num_threads(1)  # a forked process has no pool of threads
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = _most_memory()
        for number in numbers:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS)
            outcome, told = _trial(kind, folder / kind.name, number)
            signal.setitimer(signal.ITIMER_REAL, 0)
            growth = _most_memory() - before
            if growth > MOST_GROWTH:
                outcome, told = "wrong", f"takes {growth / 2**20:.0f} MiB, then: {outcome} {told}"
            os.write(sink, (json.dumps([outcome, told]) + "\n").encode())
            if growth > MOST_GROWTH:
                break
    finally:
        os._exit(0)


def _trial(kind: Kind, folder: Path, number: int) -> tuple[str, str]:
    rng = Random(f"{kind.name} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    names = sorted(kind.files)
    victim = rng.choice(names)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = kind.files[name]
        path.write_bytes(kind.damage(name, data, rng) if name == victim else data)
    kind.finish(folder, rng)
    try:
        kind.read(folder)
    except ScdError as error:
        told = str(error)
        if "\n" in told or any(word in told.lower() for word in WANTING):
            return "wrong", f"{victim}: {told[:300]}"
        return "refused", ""
    except BaseException as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in where if "/scd/" in frame.filename] or where
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return "wrong", f"{victim}: {place}: {type(error).__name__}: {str(error)[:200]}"
    return "accepted", ""


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
