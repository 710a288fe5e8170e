"""The actions that a player holds or taps, and the action that they mean for the next frame."""

from typing import Any

from scd.play.catalog import Catalog
from scd.play.messages import CloseCode, CloseConnection
from scd.play.starts import Action

TAP_SECONDS = 1.0  # that a tap is remembered; or a frame's time, if that is longer


class HeldActions:
    """The actions that are held now, and those tapped since the last frame.

    A tap is an action that was pressed and released between two frames: it still moves one frame.
    """

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.seq = 0  # of the newest input
        self._held: frozenset[int] = frozenset()  # numbers of actions
        self._tapped: frozenset[int] = frozenset()
        self._tapped_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._held)

    def update(self, fields: dict[str, Any], now: float, fps: float) -> None:
        """Take over an input message.

        Raises:
            CloseConnection: it does not fit the actions of the catalog.
        """
        vectors = self.catalog.action_vectors
        expected, other = ("held", "action") if vectors else ("action", "held")
        if other in fields:
            raise CloseConnection(
                CloseCode.BAD_MESSAGE, f"input: this world takes {expected}, not {other}"
            )
        given = fields.get(expected, [])
        held = frozenset(given if vectors else [given] if expected in fields else [])
        if any(number >= len(self.catalog.actions) for number in held):
            raise CloseConnection(CloseCode.BAD_MESSAGE, "input: no such action")
        held -= {self.catalog.idle}
        # Of actions that exclude each other the newest counts; else a key held before is no tap.
        pressed = held - self._held if vectors else held
        if pressed:
            before = self._recent_taps(now, fps) if vectors else frozenset()
            self._tapped, self._tapped_at = before | pressed, now
        self._held, self.seq = held, fields["seq"]

    def action(self, now: float, fps: float) -> Action | None:
        """Choose the action of the next frame; None: nothing is held, and no action means that."""
        taps = self._recent_taps(now, fps)
        vectors = self.catalog.action_vectors
        return self.catalog.action(self._held | taps if vectors else self._held or taps)

    def clear_taps(self) -> None:
        """Forget the taps, once a frame has used them."""
        self._tapped = frozenset()

    def _recent_taps(self, now: float, fps: float) -> frozenset[int]:
        recent = now - self._tapped_at < max(TAP_SECONDS, 1 / fps)
        return self._tapped if recent else frozenset()
