"""Labels on whole responses go in; a reward model that scores every step comes out; TRL trains on its dense rewards.

Public names are loaded when they are first used (PEP 562): `import fractal_rm` is instant and imports neither TRL, nor
transformers, nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fractal_rm.data.bag import Bag, StepScores
    from fractal_rm.data.readers import read_bags
    from fractal_rm.data.segmentation import Segmentation
    from fractal_rm.ppo.config import StepPPOConfig
    from fractal_rm.ppo.trainer import StepPPOTrainer
    from fractal_rm.report.rollout_pages import StepScoresCallback
    from fractal_rm.reward_model import FractalReward, StepRewardModel
    from fractal_rm.reward_training.config import FractalConfig
    from fractal_rm.reward_training.trainer import FractalTrainer
    from fractal_rm.serving.client import ScoringClient

__version__ = "0.1.0"

__all__ = [
    "Bag",
    "FractalConfig",
    "FractalReward",
    "FractalTrainer",
    "ScoringClient",
    "Segmentation",
    "StepPPOConfig",
    "StepPPOTrainer",
    "StepRewardModel",
    "StepScores",
    "StepScoresCallback",
    "__version__",
    "read_bags",
]

# Where each public name is defined.
_MODULES = {
    "Bag": "fractal_rm.data.bag",
    "FractalConfig": "fractal_rm.reward_training.config",
    "FractalReward": "fractal_rm.reward_model",
    "FractalTrainer": "fractal_rm.reward_training.trainer",
    "ScoringClient": "fractal_rm.serving.client",
    "Segmentation": "fractal_rm.data.segmentation",
    "StepPPOConfig": "fractal_rm.ppo.config",
    "StepPPOTrainer": "fractal_rm.ppo.trainer",
    "StepRewardModel": "fractal_rm.reward_model",
    "StepScores": "fractal_rm.data.bag",
    "StepScoresCallback": "fractal_rm.report.rollout_pages",
    "read_bags": "fractal_rm.data.readers",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _MODULES:
        raise AttributeError(
            f"module 'fractal_rm' has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use does not come here again
    return value


def __dir__() -> list[str]:
    """List the public names too, although they are not loaded yet: completion in a shell shows them."""
    return sorted({*globals(), *__all__})
