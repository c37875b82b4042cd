"""A step reward model as verl's custom reward function: P(response is good), from a server.

FRACTAL_RM_URL=http://reward-machine:8000 python -m verl.trainer.main_ppo \
    custom_reward_function.path=recipes/remote_reward/verl_reward.py ...

verl calls `compute_score` for one response at a time; `extra_info` must hold the question, as `prompt` or `question`.
"""

import functools
import os
from typing import Any

from fractal_rm import ScoringClient

URL_VARIABLE = "FRACTAL_RM_URL"


@functools.cache
def client(url: str) -> ScoringClient:
    """The client of a server."""
    return ScoringClient(url)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """Score one response.

    Args:
        data_source: Name of the data set; not read.
        solution_str: The response, as verl decoded it.
        ground_truth: Reference answer; not read.
        extra_info: Holds the prompt, a text or a chat, as `prompt` or `question`.
        kwargs: Whatever else a version of verl passes; not read.

    Returns:
        P(response is good); 0 for a response that cannot be scored, such as an empty one.

    Raises:
        ValueError: If the variable with the server's address is not set, or there is no prompt.
    """
    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise ValueError(f"{URL_VARIABLE} is not set. Set it to the address that `fractal-rm serve` printed.")
    known = extra_info or {}
    prompt = known.get("prompt", known.get("question"))
    if prompt is None:
        raise ValueError("`extra_info` holds no `prompt` and no `question`. Write one there when preparing the data.")
    prompt = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    (reward,) = client(url).rewards([prompt], [solution_str])
    return 0.0 if reward is None else reward
