"""The likelihood scorer: a causal language model's log-likelihood of a step, trained; it starts from what the model
knows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fractal_rm.objectives.aggregation import Aggregation
from fractal_rm.objectives.bag_loss import bag_loss
from fractal_rm.scorers.base import StepScorer

# Rows of (chunk, V) float32 logits in memory at a time: 1024 x 150k is 0.6 GB, the whole (B, T, V) would be tens of GB.
CHUNK_TOKENS = 1024
# The two compared forward passes run the same kernels on the same numbers, so a larger difference means that the model
# scales its logits.
_SAME = 1e-2


def target_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Log-probabilities (N,) in float32 of tokens, chunk by chunk, from the hidden states (N, H) that predict them.

    With gradients, each chunk's logits are recomputed in the backward pass instead of stored. The head turns hidden
    states into logits over the vocabulary.
    """

    def chunk_log_probs(rows: Tensor, ids: Tensor) -> Tensor:
        return -F.cross_entropy(head(rows).float(), ids, reduction="none")

    parts = []
    for rows, ids in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk_log_probs, rows, ids, use_reentrant=False))
        else:
            parts.append(chunk_log_probs(rows, ids))
    return torch.cat(parts)


class LikelihoodScorer(StepScorer):
    """Step logit = `weight` * (sum or mean of the log-probabilities of the step's tokens) + `bias`.

    The losses train the language model, the weight and the bias. Before any training, a step's score is its likelihood
    under the model. The weight is learned as its logarithm, so it stays positive: otherwise a large optimizer step can
    turn the likeliest steps into the worst ones, and training does not recover.

    Args:
        model: A causal language model, or a PEFT model around one.
        reduction: `"sum"` or `"mean"` over the step's tokens.
        log_weight: Logarithm of the initial factor.
        bias: Initial offset.

    Raises:
        ValueError: If the model is not a causal language model.
    """

    def __init__(self, model: nn.Module, *, reduction: str = "sum", log_weight: float = 0.0, bias: float = 0.0) -> None:
        super().__init__(model)
        if not self.base.can_generate() or self.base.config.is_encoder_decoder:
            raise ValueError(
                f"The likelihood scorer got a {type(self.base).__name__}. Load the model with "
                "`AutoModelForCausalLM.from_pretrained(...)`."
            )
        self.reduction = reduction
        self.log_weight = nn.Parameter(torch.tensor(float(log_weight)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        self._plain_head: bool | None = None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, step_ids: Tensor, step_ends: Tensor, mask: Tensor
    ) -> Tensor:
        """Step logits (B, S) in float32 from tensors of [`~fractal_rm.scorers.inputs.TokenInputs.pad`]."""
        # The first token of a text has no predecessor to predict it.
        rows, columns = (step_ids[:, 1:] >= 0).nonzero(as_tuple=True)
        targets = input_ids[rows, columns + 1]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self._head_is_plain(input_ids):
            hidden = self.base.base_model(**inputs).last_hidden_state
            head: Any = self.base.get_output_embeddings()
            log_probs = target_log_probs(hidden[rows, columns], targets, head)
        else:
            logits = self.base(**inputs).logits
            log_probs = target_log_probs(logits[rows, columns], targets, nn.Identity())
        slots = rows * mask.size(1) + step_ids[rows, columns + 1]
        total = log_probs.new_zeros(mask.numel()).index_add(0, slots, log_probs)
        if self.reduction == "mean":
            count = torch.zeros_like(total).index_add(0, slots, torch.ones_like(log_probs))
            total = total / count.clamp(min=1.0)
        return self.log_weight.exp() * total.view(mask.shape) + self.bias

    def fit_scale(
        self,
        logits: list[Tensor],
        bag_labels: list[Tensor],
        masks: list[Tensor],
        *,
        aggregation: Aggregation,
        sharpness: float = 1.0,
        label_noise: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Fit weight and bias to bag labels, with the language model unchanged.

        A log-likelihood is never positive and its scale depends on the model, so with weight 1 and bias 0 training
        would first use the whole language model to shift one offset.

        Args:
            logits: Step logits (B, S) of this scorer, for each batch.
            bag_labels: Response labels (B,), for each batch.
            masks: True where a step is real (B, S), for each batch.
            aggregation: How step probabilities become a response probability.
            sharpness: Sharpness of the aggregation, if it has one.
            label_noise: Shares of good and of bad responses whose label is wrong.
        """
        # Undo the current scale to get the log-likelihood.
        likelihoods = [((x - self.bias) / self.log_weight.exp()).detach() for x in logits]
        optimizer = torch.optim.LBFGS([self.log_weight, self.bias], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = [
                bag_loss(
                    self.log_weight.exp() * x + self.bias,
                    labels,
                    mask,
                    aggregation=aggregation,
                    sharpness=sharpness,
                    label_noise=label_noise,
                )
                for x, labels, mask in zip(likelihoods, bag_labels, masks, strict=True)
            ]
            # A weak pull towards weight 1 keeps the fit finite if labels are separable.
            loss = torch.cat(losses).mean() + 1e-3 * self.log_weight**2 + 1e-4 * self.bias**2
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()

    @torch.no_grad()
    def _head_is_plain(self, input_ids: Tensor) -> bool:
        """Whether the model's logits are exactly `head(last hidden state)`; tested once.

        Some models scale or cap them, before or after the head: for these the model's own forward pass is used, with
        all logits. A freshly initialized model has logits too small for a cap to matter, so the test uses large ones.
        """
        if self._plain_head is None:
            self._plain_head = self._probe(input_ids[:1, :4])
        return self._plain_head

    def _probe(self, input_ids: Tensor) -> bool:
        seen: dict[str, Tensor] = {}
        head = self.base.get_output_embeddings()
        if head is None:
            return False

        def large_logits(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen["hidden"] = args[0]
            seen["logits"] = torch.linspace(-100, 100, output.size(-1)).to(output).expand_as(output)
            return seen["logits"]

        training = self.base.training
        self.base.eval()  # dropout would make two forwards differ
        handle = head.register_forward_hook(large_logits)
        try:
            own = self.base(input_ids=input_ids, use_cache=False).logits
            hidden = self.base.base_model(input_ids=input_ids, use_cache=False)[0]
        finally:
            handle.remove()
            self.base.train(training)
        return (
            "logits" in seen
            and torch.allclose(own.float(), seen["logits"].float(), rtol=_SAME)
            and hidden.shape == seen["hidden"].shape
            and torch.allclose(hidden.float(), seen["hidden"].float(), rtol=_SAME, atol=_SAME * hidden.std().item())
        )
