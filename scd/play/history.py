"""What was played: the line of frames up to now, and other lines to go back to."""

from collections.abc import Sequence
from dataclasses import dataclass

from scd.errors import ScdError
from scd.play.starts import Action
from scd.play.worlds import View

MAX_FRAMES = 3000  # of all lines together
MAX_MOMENTS = 8
GIVEN_UP = 100  # frames at a time, where there are too many


@dataclass(frozen=True, eq=False)
class Frame:
    """One moment of all worlds.

    Args:
        number: in the video, the start's first frame is 0.
        action: that led to it.
        views: one a world.
        made: when, in seconds of a clock that only goes forward; of the start's frames: never.
    """

    number: int
    action: Action
    views: tuple[View, ...]
    made: float | None = None


@dataclass(frozen=True, eq=False)
class Moment:
    """The end of a line that one can return to; `kept` by the player, or left by a rewind."""

    number: int
    line: list[Frame]
    kept: bool


class History:
    """Frames are shared between lines. Beyond `MAX_FRAMES` the oldest frames are given up, in all
    lines; and a moment, where moments hold more than half of the frames for themselves."""

    def __init__(self, start: Sequence[Frame]):
        self.line = list(start)
        self.moments: list[Moment] = []
        self._moments_so_far = 0
        self._frames = len(start)  # of all lines, at most

    @property
    def newest(self) -> Frame:
        return self.line[-1]

    @property
    def oldest(self) -> int:
        """The first frame that can still be seen."""
        return self.line[0].number

    def append(self, frame: Frame) -> None:
        self.line.append(frame)
        self._frames += 1
        if self._frames > MAX_FRAMES:
            self._make_room()

    def rewind(self, number: int) -> None:
        """Go back to a frame of the line; what came after it becomes a moment.

        Raises:
            ScdError: the frame is not there.
        """
        if not self.oldest <= number <= self.newest.number:
            raise ScdError(
                f"frame {number} is not there: the line has frames {self.oldest} to "
                f"{self.newest.number}"
            )
        if number < self.newest.number:
            self._leave()
            self.line = self.line[: number - self.oldest + 1]

    def keep(self) -> None:
        """Make the newest frame a moment, which stays when one returns to it."""
        if not any(moment.kept and moment.line[-1] is self.newest for moment in self.moments):
            self._add(kept=True)

    def return_to(self, number: int) -> None:
        """Go to the end of a moment's line; what is left becomes a moment.

        Raises:
            ScdError: there is no such moment.
        """
        found = [moment for moment in self.moments if moment.number == number]
        if not found:
            raise ScdError(f"moment {number} is not there (any more)")
        if not found[0].kept:
            self.moments.remove(found[0])
        self._leave()
        self.line = list(found[0].line)

    def shared(self, moment: Moment) -> int:
        """The newest frame that a moment's line and the current one have in common; or -1."""
        first = max(self.oldest, moment.line[0].number)
        low, high = first - 1, min(self.newest.number, moment.line[-1].number)
        while low < high:
            middle = (low + high + 1) // 2
            here, there = (line[middle - line[0].number] for line in (self.line, moment.line))
            low, high = (middle, high) if here is there else (low, middle - 1)
        return low if low >= first else -1

    def _make_room(self) -> None:
        while True:
            lines = [self.line, *(moment.line for moment in self.moments)]
            self._frames = len({id(frame) for line in lines for frame in line})
            if self._frames <= MAX_FRAMES:
                return
            if self._frames - len(self.line) > MAX_FRAMES // 2:
                self._give_up_a_moment(self.moments)
                continue
            del self.line[:GIVEN_UP]
            for moment in self.moments:
                del moment.line[: max(self.oldest - moment.line[0].number, 0)]
            self.moments = [moment for moment in self.moments if moment.line]

    def _leave(self) -> None:
        """Make the line a moment, unless it is the beginning of one: a rewind finds it there."""
        if not any(self.shared(moment) == self.newest.number for moment in self.moments):
            self._add(kept=False)

    def _add(self, kept: bool) -> None:
        self._moments_so_far += 1
        self.moments.append(Moment(self._moments_so_far, list(self.line), kept))
        if len(self.moments) > MAX_MOMENTS:
            self._give_up_a_moment(self.moments[:-1])

    def _give_up_a_moment(self, of: list[Moment]) -> None:
        """The oldest, but those that the player kept last."""
        self.moments.remove(next((moment for moment in of if not moment.kept), of[0]))
