"""The one exception type this project raises for mistakes a user can fix, and one that is none."""


class ScdError(Exception):
    """A wrong option, file or environment, told in one line: what, where, and what to do."""

    def __init__(self, message: str):
        # A data loading process hands its error on as a traceback in text: keep the last line.
        if message.startswith("Caught ScdError in "):
            message = message.rpartition("ScdError: ")[2]
        super().__init__(" ".join(message.split("\n")).strip())


class Stopped(Exception):
    """A run was told to stop, has saved its state and leaves; started again, it goes on."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


def reason(error: BaseException) -> str:
    """What another library's exception says, as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
