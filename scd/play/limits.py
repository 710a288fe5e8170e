"""What a player may take of the server."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of a session; seconds where nothing else is said."""

    idle: float = 300.0  # without input from the player
    away: float = 60.0  # a cut-off player can come back
    stalled: float = 20.0  # a picture that cannot be sent
    alive: float = 2.0  # between two signs of life
    unseen: int = 3  # pictures under way; no further one is made before one of them was seen
    messages: float = 200.0  # a second
    commands: int = 16  # waiting to be carried out
    min_fps: float = 1.0
    max_fps: float = 60.0
    fps: float = 10.0  # at the beginning


class Allowance:
    """So many a second, of which those of one second can be saved up."""

    def __init__(self, rate: float):
        self.rate = rate
        self._left = rate
        self._at = time.monotonic()

    def take(self) -> bool:
        """One; or False where nothing is left."""
        now = time.monotonic()
        self._left = min(self.rate, self._left + self.rate * (now - self._at)) - 1
        self._at = now
        return self._left >= 0
