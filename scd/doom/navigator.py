"""Exploration policies: walk to random places of the maze, with pauses and detours on the way.

A random walk mostly faces walls. These plan over the free space of the map, so they cross corridors
and visit every room, and they wander enough that all four actions occur everywhere.
"""

import math
from collections import deque

import numpy as np

from scd.doom.simulator import (
    FORWARD,
    NONE,
    ONE_KEY,
    TURN_DEGREES,
    TURN_LEFT,
    TURN_RIGHT,
    Action,
    Pose,
)

CELL = 8.0  # map units
CLEARANCE = 26.0  # from walls; the player's own radius is 16
ITEM_CLEARANCE = 44.0  # touching the vest would end the episode
ARRIVED = 28.0
LOOK_AHEAD = 6  # cells
SHARPEST_CURVE = 40.0  # degrees; up to this angle, `KeyNavigator` turns while walking


class FreeSpace:
    """A grid of places where the player can stand, with shortest paths over it.

    Args:
        walls: (n, 4) segments x1, y1, x2, y2 in map units.
        items: (m, 2) places to avoid.
        inside: (x, y) of a place known to be free; cells not connected to it are outside the maze.
    """

    def __init__(self, walls: np.ndarray, items: np.ndarray, inside: tuple[float, float]):
        self.origin = walls.reshape(-1, 2).min(axis=0)
        extent = walls.reshape(-1, 2).max(axis=0) - self.origin
        self.shape = tuple((np.ceil(extent / CELL) + 1).astype(int))
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij"), -1)
        places = self.origin + (grid + 0.5) * CELL
        free = _distance_to_segments(places, walls) > CLEARANCE
        for item in items:
            free &= np.linalg.norm(places - item, axis=-1) > ITEM_CLEARANCE
        self.free = free
        self.free = np.isfinite(self.distances_to(inside))
        self.cells = np.argwhere(self.free)

    def cell(self, place: tuple[float, float]) -> tuple[int, int]:
        """Find the free cell that is nearest to a place."""
        wanted = (np.asarray(place) - self.origin) / CELL - 0.5
        free = np.argwhere(self.free)
        i, j = free[np.abs(free - wanted).sum(axis=1).argmin()]
        return int(i), int(j)

    def center(self, cell: np.ndarray | tuple[int, int]) -> tuple[float, float]:
        """Return the place in the middle of a cell, in map units."""
        x, y = self.origin + (np.asarray(cell) + 0.5) * CELL
        return float(x), float(y)

    def distances_to(self, place: tuple[float, float]) -> np.ndarray:
        """Count the steps over free cells from every cell to a place; infinite without a path."""
        distance = np.full(self.shape, np.inf)
        start = self.cell(place)
        distance[start] = 0
        queue = deque([start])
        while queue:
            i, j = queue.popleft()
            for di, dj in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                a, b = i + di, j + dj
                inside = 0 <= a < self.shape[0] and 0 <= b < self.shape[1]
                if inside and self.free[a, b] and distance[a, b] == np.inf:
                    distance[a, b] = distance[i, j] + 1
                    queue.append((a, b))
        return distance


class Navigator:
    """A policy of one action per step, which depends only on the pose and its own generator.

    It walks to uniformly drawn free places. On the way it sometimes stops (`none`), looks around (a
    run of turns) or takes a few random actions.
    """

    def __init__(self, space: FreeSpace, rng: np.random.Generator):
        self.space = space
        self.rng = rng
        self._forced: deque[Action] = deque()
        self._new_target()

    def act(self, pose: Pose) -> Action:
        """Choose the next action."""
        if not self._forced:
            self._maybe_wander()
        if self._forced:
            return self._forced.popleft()
        if math.dist((pose.x, pose.y), self.target) < ARRIVED:
            self._new_target()
        x, y = self._waypoint(pose)
        wanted = math.degrees(math.atan2(y - pose.y, x - pose.x))
        return self._towards((wanted - pose.heading + 180) % 360 - 180)

    def _towards(self, error: float) -> Action:
        """Choose the action for a direction that many degrees to the left."""
        if abs(error) <= 0.75 * TURN_DEGREES:
            return FORWARD
        return TURN_LEFT if error > 0 else TURN_RIGHT

    def _new_target(self) -> None:
        self.target = self.space.center(self.rng.choice(self.space.cells))
        self._distance = self.space.distances_to(self.target)

    def _maybe_wander(self) -> None:
        chance = self.rng.random()
        if chance < 0.015:
            turn = int(self.rng.choice([TURN_LEFT, TURN_RIGHT]))
            self._forced.extend([turn] * int(self.rng.integers(4, 17)))
        elif chance < 0.03:
            self._forced.extend([NONE] * int(self.rng.integers(1, 5)))
        elif chance < 0.08:
            self._forced.extend([int(self.rng.integers(4))] * int(self.rng.integers(1, 4)))

    def _waypoint(self, pose: Pose) -> tuple[float, float]:
        """Find a place a few cells along the shortest path, so near that nothing is in between."""
        i, j = self.space.cell((pose.x, pose.y))
        for _ in range(LOOK_AHEAD):
            window = self._distance[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            di, dj = np.unravel_index(window.argmin(), window.shape)
            i, j = max(i - 1, 0) + int(di), max(j - 1, 0) + int(dj)
        return self.space.center((i, j))


class KeyNavigator(Navigator):
    """A policy that holds several keys at once; an action is one number per key of `KEYS`.

    It turns while walking where the path bends gently, looks around while walking or standing, and
    its random actions are any set of keys.
    """

    def _towards(self, error: float) -> Action:
        left, right, _ = ONE_KEY[TURN_LEFT if error > 0 else TURN_RIGHT]
        if abs(error) <= 0.75 * TURN_DEGREES:
            return ONE_KEY[FORWARD]
        return left, right, int(abs(error) <= SHARPEST_CURVE)

    def _maybe_wander(self) -> None:
        chance = self.rng.random()
        if chance < 0.015:
            left, walking = (int(self.rng.integers(2)) for _ in range(2))
            self._forced.extend([(left, 1 - left, walking)] * int(self.rng.integers(4, 17)))
        elif chance < 0.03:
            self._forced.extend([ONE_KEY[NONE]] * int(self.rng.integers(1, 5)))
        elif chance < 0.1:
            keys = tuple(int(key) for key in self.rng.integers(2, size=3))
            self._forced.extend([keys] * int(self.rng.integers(1, 5)))


def _distance_to_segments(places: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Compute the distance of each place (..., 2) to the nearest of n segments (n, 4)."""
    nearest = np.full(places.shape[:-1], np.inf)
    for x1, y1, x2, y2 in segments:
        a, ab = np.array([x1, y1]), np.array([x2 - x1, y2 - y1])
        along = ((places - a) @ ab / max(ab @ ab, 1e-9)).clip(0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(places - a - along[..., None] * ab, axis=-1))
    return nearest
