"""A causal language model's own log-likelihood of a step, learned: the scorer that starts from what a model believes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Rows of (chunk, V) float32 logits alive at a time: 1024 x 150k is 0.6 GB, the whole (B, T, V) would be tens of GB.
CHUNK_TOKENS = 1024


def target_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Log-probabilities of `targets` (N,) under `head(hidden)` with `hidden` (N, H), in float32, chunk by chunk.

    With gradients on, each chunk's logits are computed again in the backward pass instead of being kept.
    """

    def chunk_log_probs(rows: Tensor, ids: Tensor) -> Tensor:
        return -F.cross_entropy(head(rows).float(), ids, reduction="none")

    parts = []
    for rows, ids in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk_log_probs, rows, ids, use_reentrant=False))
        else:
            parts.append(chunk_log_probs(rows, ids))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class LikelihoodScorer(nn.Module):
    """Step logit = `weight` * (sum or mean of the log-probabilities of the step's tokens) + `bias`.

    The language model, the weight and the bias are all learned by the losses. Before any training a step is judged by
    how likely the model finds it. The weight is learned as its logarithm and so stays positive: without that, a large
    step of the optimizer can turn the likeliest steps into the worst ones, from where training does not come back.

    Args:
        model: A causal language model, or a PEFT model around one.
        reduction: `"sum"` or `"mean"` over the step's tokens.
        log_weight: Logarithm of the initial factor.
        bias: Initial offset.
    """

    def __init__(
        self, model: PreTrainedModel | nn.Module, *, reduction: str = "sum", log_weight: float = 0.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.reduction = reduction
        self.log_weight = nn.Parameter(torch.tensor(float(log_weight)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        self._plain_head: bool | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without a PEFT wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # type: ignore[union-attr, return-value, operator]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, step_ids: Tensor, step_ends: Tensor, mask: Tensor
    ) -> Tensor:
        """Step logits (B, S) in float32 from tensors of [`~fractal_rm.scorers.encoding.pad_encoded`]."""
        # The first token of a text has no predecessor that could predict it.
        rows, columns = (step_ids[:, 1:] >= 0).nonzero(as_tuple=True)
        targets = input_ids[rows, columns + 1]
        if self._head_is_plain(input_ids):
            hidden = self.base.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            log_probs = target_log_probs(hidden[rows, columns], targets, self.base.get_output_embeddings())
        else:
            logits = self.base(input_ids=input_ids, attention_mask=attention_mask).logits
            log_probs = target_log_probs(logits[rows, columns], targets, nn.Identity())
        steps = step_ids[rows, columns + 1]
        slots = rows * mask.size(1) + steps
        total = torch.zeros(mask.numel(), device=log_probs.device).index_add(0, slots, log_probs)
        if self.reduction == "mean":
            count = torch.zeros_like(total).index_add(0, slots, torch.ones_like(log_probs))
            total = total / count.clamp(min=1.0)
        return self.log_weight.exp() * total.view(mask.shape) + self.bias

    @torch.no_grad()
    def _head_is_plain(self, input_ids: Tensor) -> bool:
        """Whether logits are just `head(hidden)`. Some models cap or scale them: those keep their own forward."""
        if self._plain_head is None:
            probe, training = input_ids[:1, :4], self.base.training
            self.base.eval()  # dropout would make two forwards differ
            hidden = self.base.base_model(input_ids=probe).last_hidden_state
            own = self.base(input_ids=probe).logits
            self.base.train(training)
            self._plain_head = torch.allclose(self.base.get_output_embeddings()(hidden), own, rtol=1e-3, atol=1e-3)
        return self._plain_head
