"""The KL divergence from a reference as a penalty: estimators, and a coefficient that follows a target."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KLEstimator = Literal["k1", "k3"]

# A log-ratio of 20 nats is a ratio of 5e8: beyond it, k3's exponential would dominate every other token of a batch.
MAX_LOG_RATIO = 20.0
# Adaptation rate of the KL penalty's coefficient, and the largest relative error it reacts to (Ziegler et al., 2019).
ADAPTIVE_KL_GAIN = 0.1
ADAPTIVE_KL_CLIP = 0.2


def kl_estimates(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    estimator: KLEstimator = "k1",
) -> Float[Tensor, "B T"]:
    """KL divergence of the policy from the reference, estimated at each sampled token.

    `"k1"` is the log-ratio, which is negative if the reference finds the token likelier; `"k3"` is never negative and
    has lower variance. Both have the KL divergence as their mean over tokens that the policy sampled.

    Args:
        logprobs: The policy's log-probability of each sampled token. Values at masked positions are ignored.
        ref_logprobs: The reference's.
        mask: True where the policy wrote the token.
        estimator: `"k1"` or `"k3"`.

    Returns:
        Nats per token, 0 at masked positions. Log-ratios are clamped to [-20, 20].

    Source:
        Schulman, "Approximating KL divergence", 2020.

    Example:
        >>> logprobs, ref_logprobs = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -2.0]])
        >>> kl_estimates(logprobs, ref_logprobs, torch.ones(1, 2, dtype=torch.bool), estimator="k3")
        tensor([[0.0000, 0.3679]])
    """
    ratios = (logprobs.float() - ref_logprobs.float()).masked_fill(~mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ratios if estimator == "k1" else torch.expm1(-ratios) + ratios


class AdaptiveKL:
    """Coefficient of the KL penalty, which rises while the policy is further from the reference than a target.

    Args:
        coef: The coefficient at the start.
        target: Target KL per response, in nats; None: the coefficient is constant.

    Source:
        Ziegler et al., "Fine-tuning language models from human preferences", 2019, section 2.2.

    Example:
        >>> kl = AdaptiveKL(0.1, target=6.0)
        >>> kl.update(12.0)  # twice too far; the relative error counts as 0.2
        >>> round(kl.coef, 6)
        0.102
    """

    def __init__(self, coef: float, *, target: float | None = None) -> None:
        self.coef, self.target = coef, target

    def update(self, kl: float) -> None:
        """Adapt to the mean KL per response of a rollout batch, in nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -ADAPTIVE_KL_CLIP), ADAPTIVE_KL_CLIP)
            self.coef *= 1.0 + ADAPTIVE_KL_GAIN * error

    def state_dict(self) -> dict[str, float]:
        """The state to save."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a saved state."""
        self.coef = state["coef"]
