"""Exceptions: a mistake that a user can fix, and a run that was stopped in order."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ScdError(Exception):
    """A wrong option, file or environment, in one line: what, where, and what to do."""

    def __init__(self, message: str):
        # A data loading process hands its error on as a traceback in text: keep the last line.
        if message.startswith("Caught ScdError in "):
            message = message.rpartition("ScdError: ")[2]
        super().__init__(" ".join(message.split("\n")).strip())


@contextmanager
def naming_option(name: str) -> Iterator[None]:
    """Put an option's name before an error about the path that is its value."""
    try:
        yield
    except ScdError as error:
        raise ScdError(f"{name}={error}") from error


class Stopped(Exception):
    """A run that got a stop signal has saved its state and exits; started again, it resumes."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest of the known names, to be put behind an error; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def reason(error: BaseException) -> str:
    """Shorten the message of any exception to one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
