"""The forward pass of a rollout as the forward pass of its update.

Where every rollout is one minibatch of one epoch, the policy that is updated is still the one that sampled, and so is
the value model: what the rollout needs to know of them and what the update learns from are the same numbers.
"""

from accelerate import Accelerator
from torch import Tensor

from fractal_rm.hf.parallelism import is_sharded
from fractal_rm.ppo.config import StepPPOConfig

# Key of a rollout: the number of each row, so that an update knows which is which. TRL shuffles them.
ROWS = "rows"


def updates_once(args: StepPPOConfig, accelerator: Accelerator) -> bool:
    """Whether a rollout is followed by one backward pass over all of it, before any weight moves.

    Not where weights are sharded: they are gathered for a forward and its backward, and other models run in between.
    """
    return args.num_iterations == 1 and args.steps_per_generation == 1 and not is_sharded(accelerator)


class KeptForward:
    """Tensors of a rollout with their graph, until the update takes them."""

    def __init__(self) -> None:
        self._tensors: tuple[Tensor, ...] = ()

    def keep(self, *tensors: Tensor) -> None:
        """Keep tensors (B, ...) in the place of those of an earlier rollout."""
        self._tensors = tensors

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The tensors in the order of an update, once; empty if there are none.

        Args:
            rows: Which row of the rollout each row of the update is, (B,).
        """
        taken = tuple(tensor[rows] for tensor in self._tensors)
        self._tensors = ()
        return taken
