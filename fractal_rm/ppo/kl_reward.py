"""KL divergence from the reference as part of the reward: what `StepPPOTrainer` needs of TRL for it.

TRL has a reference model and its log-probabilities where its own penalty in the loss, `beta`, is not 0. Here `beta` is
lent a value while the reference is made, and while a rollout is scored, and is 0 again when the loss is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fractal_rm.credit.kl import AdaptiveKL, kl_estimates
from fractal_rm.ppo.config import StepPPOConfig

# TRL only asks whether it is 0.
_ANY_BETA = 1.0


@contextmanager
def lent_beta(owner: Any, *, wanted: bool) -> Iterator[None]:
    """Give `owner.beta` (a trainer's, or a configuration's) a value for a while, if it is 0 and a reference is wanted.

    Args:
        owner: What TRL reads `beta` from.
        wanted: Whether a reference is needed beyond the loss.
    """
    beta = owner.beta
    if wanted and not beta:
        owner.beta = _ANY_BETA
    try:
        yield
    finally:
        owner.beta = beta


class KLReward:
    """The KL penalty of tokens, and its coefficient.

    Args:
        args: The configuration: coefficient, estimator, target.
    """

    def __init__(self, args: StepPPOConfig) -> None:
        self.args, self.on = args, args.kl_coef > 0
        self.adaptive = AdaptiveKL(args.kl_coef, target=args.kl_target)

    def measure(self, trainer: Any, output: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the policy that sampled, and its KL divergence from the reference, (B, T) each.

        Takes what only it needs from `output`.

        TRL has the policy's log-probabilities in the rollout where updates and rollouts are not in step; otherwise they
        are one more forward pass.
        """
        reference = output["ref_per_token_logps"] if trainer.beta else output.pop("ref_per_token_logps")
        logprobs = output.get("old_per_token_logps")
        if logprobs is None:
            logprobs = trainer.rollout_log_probs(output)
        return logprobs, kl_estimates(logprobs, reference, mask, estimator=self.args.kl_estimator)

    def penalty(self, kl: Tensor, accelerator: Any, log: Callable[[str, float], None]) -> Tensor:
        """What each token pays (B, T); the coefficient then follows its target."""
        mean: Any = accelerator.reduce(kl.sum(dim=1).mean(), reduction="mean")
        penalty = self.adaptive.coef * kl
        log("kl_reward/per_completion", mean.item())
        log("kl_reward/coef", self.adaptive.coef)
        self.adaptive.update(mean.item())
        return penalty
