"""Dense step rewards in verl: a reward manager with scores of tokens, and an advantage estimator for them.

VERL_USE_EXTERNAL_MODULES=verl_steps FRACTAL_RM_URL=http://reward-machine:8000 PYTHONPATH=recipes/engines \
    python -m verl.trainer.main_ppo reward_manager.name=fractal_steps reward_model.use_reward_loop=False \
    algorithm.adv_estimator=fractal_step_group ...

For verl 0.7.0 (`make engines`). Later versions keep one number per response, and give estimators neither tokens nor
texts. verl's own group estimator compares the sums of the rewards of completions, so more steps earn more.
"""

from typing import Any

import torch
from step_rewards import Placed, from_environment, group_advantages, placed_scores, token_rewards
from verl.trainer.ppo.core_algos import register_adv_est
from verl.workers.reward_manager import register

# Distinguishes a step that scores 0 from a token at which no step ends.
_LEAST = 1e-6


@register("fractal_steps")
class StepRewardManager:
    """Step scores where steps end, 0 at other tokens.

    Args:
        tokenizer: The policy's tokenizer.
        num_examine: Not read: nothing is printed.
        compute_score: Not read: the server scores.
        kwargs: Whatever else a version of verl passes; not read.
    """

    def __init__(self, tokenizer: Any, num_examine: int = 0, compute_score: Any = None, **kwargs: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, data: Any, return_dict: bool = False) -> Any:
        """Score a `DataProto` with `prompts`, `responses` and `attention_mask`, and chats in `raw_prompt`.

        Raises:
            ValueError: If the data holds no `raw_prompt`, `response_mask` says that others wrote a part of a response,
                or nothing can be scored.
        """
        responses = data.batch["responses"]
        real = data.batch["attention_mask"][:, data.batch["prompts"].shape[-1] :].bool()
        if "raw_prompt" not in data.non_tensor_batch:
            raise ValueError("The batch holds no `raw_prompt`. Set `data.return_raw_chat=True`.")
        prompts = [[dict(message) for message in chat] for chat in data.non_tensor_batch["raw_prompt"]]
        ids = [row[mask].tolist() for row, mask in zip(responses, real, strict=True)]
        written = data.batch.get("response_mask", None)  # a TensorDict does not support `in`
        masks = None if written is None else [row[mask].tolist() for row, mask in zip(written, real, strict=True)]
        placed = placed_scores(prompts, ids, self.tokenizer, from_environment(), masks)
        kept = [Placed([max(score, _LEAST) for score in one.scores], one.ends) for one in placed]
        rewards = torch.zeros(responses.shape, dtype=torch.float32, device=responses.device)
        for row, (values, mask) in enumerate(zip(token_rewards(kept, list(map(len, ids))), real, strict=True)):
            rewards[row, mask] = torch.tensor(values, device=responses.device)
        return {"reward_tensor": rewards, "reward_extra_info": {}} if return_dict else rewards


@register_adv_est("fractal_step_group")
def step_group_advantages(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of steps against the steps of the same prompt's responses (B, T), twice: as returns too.

    Raises:
        ValueError: If there is no `index`, which says which responses belong together.
    """
    if index is None:
        raise ValueError("verl passed no `index` (the `uid` of prompts), so groups are not known.")
    mask = response_mask.bool()
    placed = []
    for rewards, real in zip(token_level_rewards.cpu(), mask.cpu(), strict=True):
        ends = (rewards.ne(0) & real).nonzero().flatten().tolist()
        placed.append(Placed([rewards[end].item() for end in ends], ends))
    advantages = group_advantages(placed, mask, list(index)).to(token_level_rewards)
    return advantages, advantages
