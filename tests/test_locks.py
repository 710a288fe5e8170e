"""One process at a time: who is kept out, for how long, and what is said."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scd.errors import ScdError
from scd.utils import locks
from scd.utils.locks import hold_lock

ROOT = Path(__file__).parents[1]
HOLDER = """
    import os, sys, time
    from pathlib import Path
    from scd.utils.locks import hold_lock

    with hold_lock(Path(sys.argv[1]), "", ""):
        child = os.fork() if sys.argv[2] == "forks" else os.getpid()
        if child:
            print(child, flush=True)
        time.sleep(60)
"""


@contextmanager
def holder_of(path: Path, how: str = "") -> Iterator[subprocess.Popen]:
    """Another process that holds a lock; killed in the end.

    Args:
        how: `forks`: it has a child, whose number is the attribute `child`.
    """
    code = textwrap.dedent(HOLDER)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.child = int(process.stdout.readline())  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def free(path: Path) -> bool:
    try:
        with hold_lock(path, "somebody is here", "go away"):
            return True
    except ScdError:
        return False


def test_another_process_is_kept_out_until_the_holder_is_dead(tmp_path):
    path = tmp_path / "new folder" / "lock"
    assert free(path)  # an earlier holder's name is not the next one's
    with holder_of(path) as holder:
        told = rf"^somebody is here \(process {holder.pid} on \S+ since 2\S+\); go away$"
        with pytest.raises(ScdError, match=told), hold_lock(path, "somebody is here", "go away"):
            pass
        holder.kill()
        holder.wait()
        assert free(path)
    assert free(path)


def test_a_child_that_outlives_the_holder_keeps_nobody_out(tmp_path):
    """As data workers may, for a moment; a lock of `flock` would still be held."""
    path = tmp_path / "lock"
    with holder_of(path, "forks") as holder:
        assert holder.child != holder.pid and not free(path)
        holder.kill()
        holder.wait()
        try:
            os.kill(holder.child, 0)  # it lives
            assert free(path)
        finally:
            os.kill(holder.child, signal.SIGKILL)


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    assert free(tmp_path / "lock")
    assert "no locks ([Errno 37] No locks available): nothing keeps" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ScdError, match="file: cannot be written"),
        hold_lock(tmp_path / "file" / "lock", "", ""),
    ):
        pass
