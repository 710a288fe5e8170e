"""End a run when one of its processes is lost, with a line that names it.

A process that is killed, or whose machine is gone, leaves the others in a collective operation
until that times out, and then they say what they waited for, not for whom. So every process beats
in a thread of its own, which also runs while the training waits: the first process listens to all,
and the others to what it says.
"""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from torch.distributed import TCPStore

from scd.errors import Stopped, reason
from scd.training.heartbeat import Heartbeat

BEAT_SECONDS = 5.0
LOST_STATE = "lost"  # of the heartbeat
# Beats are counted, not seconds: a job that its scheduler suspends wakes up with nobody lost.
SILENT_BEATS = 24
DONE = "done"


@contextmanager
def lost_process_ends_run(state: PartialState, output: Path) -> Iterator[None]:
    """Watch over the other processes within the block; one that is lost ends this one as well.

    It ends by `os._exit`: the main thread may wait for the lost one, and cannot be reached. A
    process that leaves the block by an error is lost to the others, too.

    Args:
        output: the run's folder, whose heartbeat then says `lost`.
    """
    if state.num_processes == 1:
        yield
        return
    watch = _Watch(state.process_index, state.num_processes, output)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        watch.failure = reason(error)
        raise
    finally:
        watch.leave.set()
        thread.join()


class _Watch:
    """Beats and listens, in the key-value store that `torchrun` and accelerate's launcher start.

    A connection of its own, because the process group's may wait for minutes for a key.
    """

    def __init__(self, index: int, processes: int, output: Path):
        self.index = index
        self.output = output
        # The store of a launcher that starts processes anew holds what the last ones said.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.names = [f"scd/{attempt}/process-{i}" for i in range(processes)]
        self.lost = f"scd/{attempt}/lost"
        self.leave = threading.Event()
        self.failure: str | None = None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = TCPStore(
            *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self.where = f"{socket.gethostname()}, process id {os.getpid()}"
        self.beats = 0
        self.last = [""] * processes  # what was heard of each
        self.silent = [0] * processes  # beats since then

    def run(self) -> None:
        unreached = 0
        while not self.leave.wait(BEAT_SECONDS):
            try:
                self._beat(f"{self.beats} {self.where}")
                self._listen()
                unreached = 0
            except RuntimeError:  # torch's errors of a store are of this kind
                unreached += 1
                if unreached == SILENT_BEATS:
                    self._end("the launcher on the first machine cannot be reached any more")
        with suppress(RuntimeError):  # nobody may be there to hear it
            if self.failure is not None:
                self.store.set(self.lost, f"process {self.index} failed ({self.failure})")
            self._beat(DONE)

    def _beat(self, text: str) -> None:
        self.beats += 1
        self.store.set(self.names[self.index], text)

    def _listen(self) -> None:
        if self.store.check([self.lost]):
            self._end(self.store.get(self.lost).decode())
        heard_of = range(len(self.names)) if self.index == 0 else [0]
        for process in heard_of:
            name = self.names[process]
            heard = self.store.get(name).decode() if self.store.check([name]) else ""
            changed = heard != self.last[process] or heard == DONE
            self.silent[process] = 0 if changed else self.silent[process] + 1
            self.last[process] = heard
            if self.silent[process] >= SILENT_BEATS:
                where = heard.partition(" ")[2] or "it never began"
                seconds = round(SILENT_BEATS * BEAT_SECONDS)
                self._end(f"process {process} ({where}) is lost: no sign of it for {seconds} s")

    def _end(self, message: str) -> None:
        if self.index == 0:
            with suppress(RuntimeError):
                self.store.set(self.lost, message)
            Heartbeat(self.output, True).beat(LOST_STATE, None, message)
        print(
            f"\nerror: {message}; this run ends here, and started again it goes on from its newest "
            f"checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
