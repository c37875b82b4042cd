"""Dense step rewards in SkyRL: a wrapper of a generator, whose `rewards` are lists of numbers, one per token."""

from typing import Any

from step_rewards import from_environment, mean_score, placed_scores, token_rewards


class StepRewardGenerator:
    """Replaces the rewards in another generator's output with step rewards.

    In the experiment class: `def get_generator(self, cfg, tokenizer, client): return StepRewardGenerator(
    super().get_generator(cfg, tokenizer, client), tokenizer)`. A step earns its score minus the mean of the batch;
    what cannot be scored earns the mean. More steps above the mean earn more: watch the number of steps.

    Args:
        generator: A `GeneratorInterface`.
        tokenizer: The policy's tokenizer.
    """

    def __init__(self, generator: Any, tokenizer: Any) -> None:
        self.generator, self.tokenizer = generator, tokenizer

    async def generate(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """As the generator's; `rewards` is a `list[list[float]]` of the lengths of `response_ids`.

        Raises:
            ValueError: If the numbers of prompts and responses differ, `loss_masks` say that others wrote a part of a
                response, or nothing can be scored.
        """
        output = await self.generator.generate(input_batch, *args, **kwargs)
        ids, prompts = output["response_ids"], input_batch["prompts"]
        if len(prompts) != len(ids):
            raise ValueError(
                f"{len(ids)} responses came for {len(prompts)} prompts. Set `generator.step_wise_trajectories` off."
            )
        placed = placed_scores(prompts, ids, self.tokenizer, from_environment(), output.get("loss_masks"))
        rewards = token_rewards(placed, list(map(len, ids)), baseline=mean_score(placed))
        return output | {"rewards": rewards}
