"""Loss and perturbation factor of a training's steps, in a bounded number of points."""

from collections.abc import Iterable

LIMIT = 256  # points kept of one training


class LossLog:
    """[step, loss, factor] of steps 1, 1 + k, 1 + 2k, …; k doubles when there are more than LIMIT points.

    step counts optimizer steps from 1; loss is the sum over the micro-steps of the step, as Trainer divides it; factor
    the mean of the factors they drew. Both are those of one process.
    """

    def __init__(self, points: Iterable[Iterable[float]] = ()) -> None:
        self.points = [list(point) for point in points]
        self._stride = int(self.points[1][0] - self.points[0][0]) if len(self.points) > 1 else 1
        self._micro = 1  # micro-steps in the newest point

    def add(self, step: int, loss: float, factor: float) -> None:
        """Count in one micro-step; a step before the newest point starts the log anew (a training that is retried)."""
        if self.points and step < self.points[-1][0]:
            self.points, self._stride = [], 1
        if (step - 1) % self._stride:
            return
        if self.points and step == self.points[-1][0]:
            newest = self.points[-1]
            self._micro += 1
            newest[1] += loss
            newest[2] += (factor - newest[2]) / self._micro
            return
        self._micro = 1
        self.points.append([step, loss, factor])
        if len(self.points) > LIMIT:
            self._stride *= 2
            self.points = [point for point in self.points if not (point[0] - 1) % self._stride]
