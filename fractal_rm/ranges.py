"""Valid ranges of numeric options: one table for commands, trainers and the `fractal` block.

Each configuration checks itself when it is made, before anything is loaded.
"""

import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fractal_rm.errors import wrong_choice


class Range(NamedTuple):
    """Numbers from `low` to `high`; an open end is excluded.

    Example:
        >>> str(Range(0, 1, open_low=True)), str(Range(1, 4096, whole=True))
        ('a number above 0, up to 1', 'a whole number from 1 to 4,096')
        >>> 0.0 in Range(0, 1, open_low=True), float("nan") in Range(0, 1)
        (False, False)
    """

    low: float
    high: float
    whole: bool = False
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or (self.whole and value != value // 1):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        low = f"above {low}," if self.open_low else f"from {low}"
        high = f"to below {high}" if self.open_high else f"to {high}"
        return f"a {'whole ' if self.whole else ''}number {low} {'up ' if self.open_low else ''}{high}"


# Values beyond these are never useful, and float32 or memory would run out first.
_MOST, _MANY = 10**6, 2**20

_TABLE: dict[Range, str] = {
    Range(0, 1): (
        "gamma lam step_lam step_gamma score_threshold gold_fraction top_entropy_quantile ref_model_mixup_alpha min_p "
        "warmup_ratio"
    ),
    # The next float above the highest score counts every step as wrong.
    Range(0, math.nextafter(1, 2)): "threshold",
    Range(0, 1, open_low=True): "top_p vllm_gpu_memory_utilization",
    Range(0, 1, open_high=True): "adam_beta1 adam_beta2 lora_dropout rm_original_share missed_good missed_bad",
    Range(0, 1, open_low=True, open_high=True): "rm_holdout_share",
    # Weights and penalties: 0 is off.
    Range(0, _MOST): (
        "step_weight outcome_weight vf_coef kl_coef missing_eos_penalty beta entropy_coef entropy_coef_min "
        "entropy_coef_max entropy_coef_delta router_aux_loss_coef bag_weight easyllp_weight instance_weight "
        "cosine_prior_weight negated_cosine_prior_weight correlation_prior_weight teacher_prior_weight "
        "likelihood_prior_weight hybrid_prior_weight pseudo_bag_weight weight_decay max_grad_norm neftune_noise_alpha "
        "adam_epsilon vllm_server_timeout off_policy_mask_threshold vllm_importance_sampling_clip_min"
    ),
    Range(-_MOST, _MOST): "step_reward_weights reward_weights label_scale bias",
    Range(0, 1000): "learning_rate value_learning_rate head_learning_rate",
    Range(0, 1000, open_low=True): "rm_learning_rate",
    Range(0, _MOST, open_low=True): (
        "step_reward_clip kl_target cliprange_value epsilon epsilon_high delta temperature repetition_penalty "
        "sharpness vllm_importance_sampling_clip_max vllm_importance_sampling_cap sapo_temperature_neg "
        "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg seconds header_seconds "
        "teraflops generated_per_second"
    ),
    # The factor of log-likelihoods is its exponential, which overflows float32 beyond this.
    Range(-80, 80): "log_weight",
    # Counts.
    Range(0, _MOST, whole=True): "top_k value_warmup_steps rm_update_every page_steps",
    Range(0, 1024, whole=True): "dataloader_num_workers",
    Range(0, 10**9, whole=True): (
        "save_total_limit num_eval_problems skip_prompts show num_completions_to_print vllm_max_model_length"
    ),
    Range(1, _MANY, whole=True): (
        "per_device_train_batch_size per_device_eval_batch_size batch_size reward_model_batch_size rm_batch_size "
        "num_generations num_generations_eval generation_batch_size steps_per_generation max_completion_length "
        "eval_accumulation_steps torch_empty_cache_steps guard_reference_batches guard_patience rm_update_steps "
        "rm_replay_size ref_model_sync_steps lora_r lora_alpha max_new_tokens samples prompt_length max_queued "
        "max_responses vllm_tensor_parallel_size dataloader_prefetch_factor ddp_bucket_cap_mb "
        "max_tool_calling_iterations pad_to_multiple_of"
    ),
    Range(1, 1000, whole=True): "pseudo_rounds jobs seeds",
    Range(1, 10**9, whole=True): (
        "limit num_prompts num_problems ddp_timeout max_characters max_body_bytes max_total_bytes max_values"
    ),
    Range(1, 65_536, whole=True): "max_connections",
    Range(2, 1024, whole=True): "num_grades",
    Range(2, 10**8, whole=True): "max_length",
    # NumPy takes 32-bit seeds, and processes add their index.
    Range(0, 2**31 - 1, whole=True): "seed data_seed",
    Range(0, 65_535, whole=True): "port vllm_server_port vllm_group_port",
    Range(-1, 10**9, whole=True): "max_steps local_rank",
    # Values that would train nothing are reported elsewhere, with their own message.
    Range(-1, _MOST): "num_train_epochs",
    Range(-1, _MOST, whole=True): "gradient_accumulation_steps num_iterations",
    Range(0, 10**9): "warmup_steps logging_steps eval_steps eval_delay save_steps",
    Range(0, 60): "wait",
    # Response labels are not classes to smooth: use `missed_good` and `missed_bad` for wrong labels.
    Range(0, 0): "label_smoothing_factor",
}
RANGES = {name: allowed for allowed, names in _TABLE.items() for name in names.split()}


# Types checked in every configuration. Options of other types are checked where they are read.
_PLAIN = {int, float, bool, type(None)}


def check_types(kind: type, values: Mapping[str, Any], *, within: str = "") -> None:
    """Raise unless values have a dataclass's annotated types; unknown names pass.

    Raises:
        ValueError: Names the first value of another type, and what to give.
    """
    for name, hint in get_type_hints(kind).items():
        if name in values:
            _check_type(f"{within}{name}", values[name], hint)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise ValueError(f"`{name}` is {reprlib.repr(value)}. Give {_wanted(hint)}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type; the choices of a `Literal` are checked elsewhere."""
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return isinstance(value, str)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list | tuple) and all(_fits(one, parts[0]) for one in value)
    if kind is dict or is_dataclass(hint):
        return isinstance(value, dict) and (is_dataclass(hint) or all(_fits(one, parts[1]) for one in value.values()))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    """An annotated type in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_wanted, parts))
    if kind is list:
        return "a list"
    simple = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return "a text" if kind is Literal else simple.get(hint, "an object")


def _leaves(hint: Any) -> Iterator[Any]:
    """The innermost types of an annotation."""
    parts = () if get_origin(hint) is Literal else get_args(hint)
    for part in parts:
        yield from _leaves(part)
    if not parts:
        yield hint


def check_ranges(config: Any) -> None:
    """Raise unless the numbers, booleans and choices of a configuration dataclass are valid.

    Numbers must be in their range; numbers without a range must be finite.

    Raises:
        ValueError: Names the option, its value and what to give.
    """
    hints = get_type_hints(type(config))
    for one in fields(config):
        given, hint = getattr(config, one.name, None), hints[one.name]
        leaves = set(_leaves(hint))
        is_text = isinstance(given, str | os.PathLike | bool)  # a path may be given for a text
        if leaves <= _PLAIN or (leaves <= _PLAIN | {str} and not is_text):
            _check_type(one.name, given, hint)
        if all(get_origin(leaf) is Literal for leaf in leaves - {type(None)}):
            choices = [choice for leaf in leaves for choice in get_args(leaf)] + [None] * (type(None) in leaves)
            takes_list = list in [get_origin(part) for part in (hint, *get_args(hint))]
            for value in given if takes_list and isinstance(given, list) else [given]:
                if value not in choices:
                    raise ValueError(wrong_choice(one.name, value, choices))
        numbers = given if isinstance(given, list | tuple) else [given]
        for place, value in enumerate(numbers, 1):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            allowed = RANGES.get(one.name)
            if not (math.isfinite(value) if allowed is None else value in allowed):
                what = f"`{one.name}`" if numbers is not given else f"Number {place} of `{one.name}`"
                raise ValueError(f"{what} is {value}. Give {allowed or 'a finite number'}.")
