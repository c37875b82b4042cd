"""Running mean and variance of a stream of numbers."""

import math

from jaxtyping import Float
from torch import Tensor

# Below this variance, rewards are equal up to rounding errors, and must not be divided by their deviation.
MIN_VARIANCE = 1e-8


class RunningMoments:
    """Mean and variance of all values so far, updated batch by batch, equal to those of all values at once.

    Source:
        Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Example:
        >>> import torch
        >>> moments = RunningMoments()
        >>> moments.update(torch.tensor([1.0, 3.0]))
        >>> moments.update(torch.tensor([5.0]))
        >>> moments.mean, moments.std
        (3.0, 2.0)
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def update(self, values: Float[Tensor, " N"]) -> None:
        """Add a batch; an empty one changes nothing."""
        if not len(values):
            return
        values = values.double()
        mean, count = float(values.mean()), self.count + len(values)
        shift = mean - self.mean
        self._squares += float((values - mean).square().sum()) + shift**2 * self.count * len(values) / count
        self.mean += shift * len(values) / count
        self.count = count

    @property
    def variance(self) -> float:
        """Sample variance; 0 with fewer than two values."""
        return self._squares / max(self.count - 1, 1)

    @property
    def std(self) -> float:
        """Sample standard deviation; 1 if the variance is negligible, so that dividing by it is safe."""
        return math.sqrt(self.variance) if self.variance > MIN_VARIANCE else 1.0

    def state_dict(self) -> dict[str, int | float]:
        """The state to save, as numbers that JSON stores exactly."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """Restore a saved state."""
        self.count, self.mean, self._squares = int(state["count"]), state["mean"], state["squares"]
