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

from accelerate import PartialState
from torch.distributed import TCPStore

BEAT_SECONDS = 5.0
# Beats are counted, not seconds: a job that its scheduler suspends wakes up with nobody lost.
SILENT_BEATS = 24
DONE, LOST = "done", "scd/lost"


@contextmanager
def lost_process_ends_run(state: PartialState) -> Iterator[None]:
    """Watch over the other processes within the block; one that is lost ends this one as well.

    It ends by `os._exit`: the main thread may wait for the lost one, and cannot be reached.
    """
    if state.num_processes == 1:
        yield
        return
    watch = _Watch(state.process_index, state.num_processes)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.leave.set()
        thread.join()


class _Watch:
    """One process's beat, in the key-value store that `torchrun` and accelerate's launcher start.

    A connection of its own, because the process group's may wait for minutes for a key.
    """

    def __init__(self, index: int, processes: int):
        self.index = index
        self.names = [f"scd/process-{i}" for i in range(processes)]
        self.leave = threading.Event()
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
                    self._end("process 0, or the launcher beside it, cannot be reached any more")
        with suppress(RuntimeError):  # nobody may be there to hear it
            self._beat(DONE)

    def _beat(self, text: str) -> None:
        self.beats += 1
        self.store.set(self.names[self.index], text)

    def _listen(self) -> None:
        if self.store.check([LOST]):
            self._end(self.store.get(LOST).decode())
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
            self.store.set(LOST, message)
        print(
            f"\nerror: {message}; this run ends here, and started again it goes on from its newest "
            f"checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
