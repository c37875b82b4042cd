"""Log-probabilities that TRL's engine asks for, with less padding and fewer forward passes."""

from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.grpo_trainer import GRPOTrainer

from fractal_rm.hf.length_buckets import LengthBuckets, bucketed_log_probs, may_be_sorted
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.kept_forward import ROWS, KeptForward, updates_once
from fractal_rm.ppo.value_learning import ValueLearning


class LeanForwards(GRPOTrainer):
    """`GRPOTrainer` whose log-probabilities are computed in parts of like length, and not twice where once is enough.

    Attributes:
        value_learning: The value model in training, which may read the policy's states; None without one.
    """

    args: StepPPOConfig
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.value_learning: ValueLearning | None = None
        self._kept_log_probs, self._taken_log_probs = KeptForward(), ()
        super().__init__(*args, **kwargs)

    def rollout_log_probs(self, output: dict[str, Any]) -> Tensor:
        """Log-probabilities of the policy that sampled a rollout (B, T); its update takes them over, where it can."""
        texts = (
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
            output["completion_ids"].size(1),
        )
        shared = self.value_learning is not None and self.value_learning.shared is not None
        if updates_once(self.args, self.accelerator) and not (shared or self.aux_loss_enabled):
            log_probs, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model_wrapped, *texts, compute_entropy=True
            )
            self._kept_log_probs.keep(log_probs, entropies)
            return log_probs.detach()
        with torch.no_grad():
            rows = self.args.per_device_train_batch_size
            return self._get_per_token_logps_and_entropies(self.model, *texts, batch_size=rows)[0]

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._taken_log_probs = self._kept_log_probs.take(inputs[ROWS]) if ROWS in inputs else ()
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> Any:
        if self._taken_log_probs:
            (log_probs, entropies), self._taken_log_probs = self._taken_log_probs, ()
            return log_probs, entropies, None
        log_probs_of = super()._get_per_token_logps_and_entropies
        texts, parts = (input_ids, attention_mask), None
        if not any(value is not None and value is not False for value in others.values()):  # images, experts: TRL's way
            sort, prompt_width = may_be_sorted(model, self.accelerator), input_ids.size(1) - logits_to_keep
            parts = LengthBuckets(attention_mask, prompt_width, most_rows=batch_size, sort=sort)

        def compute() -> Any:
            if parts is None:
                options = others | {"batch_size": batch_size, "compute_entropy": compute_entropy}
                return log_probs_of(model, *texts, logits_to_keep, **options)
            return bucketed_log_probs(log_probs_of, parts, model, *texts, compute_entropy=compute_entropy)

        if self.value_learning is None or self.value_learning.shared is None or not self.model.training:
            return compute()
        return self.value_learning.shared.read(compute, torch.cat if parts is None else parts.join)
