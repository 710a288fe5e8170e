"""A game's past: the timeline of frames up to now, and the branches that one can return to."""

from collections.abc import Sequence
from dataclasses import dataclass

from scd.errors import ScdError
from scd.play.starts import Action
from scd.play.worlds import View

MAX_FRAMES = 3000  # of the timeline and all branches together
MAX_BRANCHES = 8
DROPPED_AT_ONCE = 100  # oldest frames, when there are too many


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of all worlds.

    Args:
        number: counted from 0, the first frame of the start clip.
        action: the action that led to it.
        views: one per world.
        made: when it was generated, in seconds of a monotonic clock; None for the start clip.
    """

    number: int
    action: Action
    views: tuple[View, ...]
    made: float | None = None


@dataclass(frozen=True, eq=False)
class Branch:
    """Another timeline, to whose end one can return; kept by the player, or left by a rewind."""

    number: int
    frames: list[Frame]
    kept: bool


class History:
    """A timeline of frames, and its branches.

    Frames are shared between branches. Above `MAX_FRAMES` the oldest frames are dropped everywhere,
    or a branch, if the frames that only branches hold are more than half.
    """

    def __init__(self, start: Sequence[Frame]):
        self.timeline = list(start)
        self.branches: list[Branch] = []
        self._branches_so_far = 0
        self._frames = len(start)  # at most, of the timeline and all branches

    @property
    def newest(self) -> Frame:
        return self.timeline[-1]

    @property
    def oldest(self) -> int:
        """The number of the first frame that is still stored."""
        return self.timeline[0].number

    def append(self, frame: Frame) -> None:
        """Add the next frame to the timeline."""
        self.timeline.append(frame)
        self._frames += 1
        if self._frames > MAX_FRAMES:
            self._make_room()

    def rewind(self, number: int) -> None:
        """Go back to a frame of the timeline; what came after it becomes a branch.

        Raises:
            ScdError: the timeline has no such frame.
        """
        if not self.oldest <= number <= self.newest.number:
            raise ScdError(
                f"frame {number} is not available: the timeline has frames {self.oldest} to "
                f"{self.newest.number}"
            )
        if number < self.newest.number:
            self._leave()
            self.timeline = self.timeline[: number - self.oldest + 1]

    def keep(self) -> None:
        """Keep a branch that ends at the newest frame; it stays when the player returns to it."""
        if not any(branch.kept and branch.frames[-1] is self.newest for branch in self.branches):
            self._add(kept=True)

    def return_to(self, number: int) -> None:
        """Go to the end of a branch; the timeline that is left becomes a branch.

        Raises:
            ScdError: there is no such branch.
        """
        branch = next((branch for branch in self.branches if branch.number == number), None)
        if branch is None:
            raise ScdError(f"branch {number} does not exist (any more)")
        if not branch.kept:
            self.branches.remove(branch)
        self._leave()
        self.timeline = list(branch.frames)

    def last_shared(self, branch: Branch) -> int:
        """Find the newest frame number that a branch shares with the timeline; -1: none."""
        first = max(self.oldest, branch.frames[0].number)
        low, high = first - 1, min(self.newest.number, branch.frames[-1].number)
        while low < high:
            middle = (low + high + 1) // 2
            here = self.timeline[middle - self.oldest]
            there = branch.frames[middle - branch.frames[0].number]
            low, high = (middle, high) if here is there else (low, middle - 1)
        return low if low >= first else -1

    def _make_room(self) -> None:
        while True:
            stored = [self.timeline, *(branch.frames for branch in self.branches)]
            self._frames = len({id(frame) for frames in stored for frame in frames})
            if self._frames <= MAX_FRAMES:
                return
            if self._frames - len(self.timeline) > MAX_FRAMES // 2:
                self._drop_branch(self.branches)
                continue
            del self.timeline[:DROPPED_AT_ONCE]
            for branch in self.branches:
                del branch.frames[: max(self.oldest - branch.frames[0].number, 0)]
            self.branches = [branch for branch in self.branches if branch.frames]

    def _leave(self) -> None:
        """Make the timeline a branch, unless a branch contains all of it already."""
        if not any(self.last_shared(branch) == self.newest.number for branch in self.branches):
            self._add(kept=False)

    def _add(self, kept: bool) -> None:
        self._branches_so_far += 1
        self.branches.append(Branch(self._branches_so_far, list(self.timeline), kept))
        if len(self.branches) > MAX_BRANCHES:
            self._drop_branch(self.branches[:-1])

    def _drop_branch(self, candidates: list[Branch]) -> None:
        """Drop the oldest branch; those that the player kept go last."""
        unkept = (branch for branch in candidates if not branch.kept)
        self.branches.remove(next(unkept, candidates[0]))
