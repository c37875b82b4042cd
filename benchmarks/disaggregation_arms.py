"""Arms of `benchmarks/disaggregation.py`: for each, the configurations that compete on validation bag labels.

Every arm has the same number of trials (`TRIALS`), so that none wins by trying more often.
"""

from typing import Any

from disaggregation_data import Data

from fractal_rm.tasks.base_policy import SHIPPED_POLICY

TRIALS = 4
GOLD_SHARES = (1, 5, 10, 20, 50)
# Learning rate of the head and passes over the data: fast and short, slow and long.
FAST = {"head_learning_rate": 1e-3, "num_train_epochs": 4}
SLOW = {"head_learning_rate": 3e-4, "num_train_epochs": 8}
# The likelihood and the token scorer train the language model itself.
LM_FAST = {"learning_rate": 2e-3, "num_train_epochs": 3}
LM_SLOW = {"learning_rate": 1e-3, "num_train_epochs": 4}
HARD = {"min": "min", "max": "max", "mean": "mean"}
SOFT = {"min": "product", "max": "noisy_or", "mean": "mean"}
LCA = {"min": "softmin", "max": "softmax", "mean": "softmin"}

Options = dict[str, Any]


def trials(data: Data, *variants: Options) -> list[Options]:
    """Two variants for each of two heads; on the embedded task for each of two ways to train."""
    if data.scorer == "embedding":
        bases: tuple[Options, ...] = ({"head_type": "mlp"}, {"head_type": "set"})
        variants = tuple({**FAST, **variant} for variant in variants)
    else:
        bases = (LM_FAST, LM_SLOW)
    found = [{**base, **variant} for base in bases for variant in variants]
    if len(found) != TRIALS:
        raise ValueError(f"An arm has {len(found)} trials, others have {TRIALS}.")
    return found


def arms(data: Data) -> dict[str, list[Options]]:
    """Arms that are trained, each with its trials; options are those of `FractalConfig`."""
    hard, soft = {"aggregation": HARD[data.rule]}, {"aggregation": SOFT[data.rule]}
    # What an arm without options of its own varies: how fast the head learns, or the likelihood's reduction.
    paces: tuple[Options, Options] = (FAST, SLOW)
    if data.scorer == "likelihood":
        paces = ({"reduction": "sum"}, {"reduction": "mean"})
    priors = prior_variants(data)
    found: dict[str, list[Options]] = {}
    if data.scorer == "token":
        paces = ({"weight_decay": 0.01}, {"weight_decay": 0.1})
    if data.scorer == "embedding":
        found["response_level"] = trials(data, *({**hard, **pace} for pace in paces))
    found[f"bag_{HARD[data.rule]}"] = trials(data, *({**hard, **pace} for pace in paces))
    if data.rule != "mean":
        found[f"bag_{SOFT[data.rule]}"] = trials(data, *({**soft, **pace} for pace in paces))
    if data.noisy:
        found["bag_noise_tolerant"] = trials(data, *({**soft, "missed_bad": rate} for rate in (0.1, 0.25)))
    found["bag_priors"] = trials(data, *({**hard, **prior} for prior in priors))
    found["pseudo_hard"] = trials(data, *({**hard, **pace, "pseudo_labels": "hard"} for pace in paces))
    if not data.preferences:
        found["pseudo_soft"] = trials(data, *({**soft, **pace, "pseudo_labels": "soft"} for pace in paces))
    soft_kind = "hard" if data.preferences else "soft"
    found["fractal"] = trials(
        data,
        {**hard, **priors[0], "pseudo_labels": "hard"},  # the paper's own
        {**soft, **priors[1], "pseudo_labels": soft_kind, "pseudo_bag_weight": 1.0, "pseudo_start": "warm"},
    )
    found["lca"] = trials(data, *({"aggregation": LCA[data.rule], **pace} for pace in paces))
    if data.proportions:
        found["easyllp"] = trials(data, *({**hard, **pace, "bag_weight": 0.0, "easyllp_weight": 1.0} for pace in paces))
    if data.has_gold:
        gold = {"instance_weight": 1.0, "gold_fraction": 0.1}
        found["fractal_gold_10"] = trials(
            data,
            {**hard, **gold, **priors[0], "hybrid_prior_weight": 0.3, "pseudo_labels": "hard"},
            {**soft, **gold, **priors[1], "pseudo_labels": "soft", "pseudo_bag_weight": 1.0, "pseudo_start": "warm"},
        )
        supervised = {**hard, "bag_weight": 0.0, "instance_weight": 1.0}
        found["supervised"] = trials(data, *({**supervised, **pace} for pace in paces))
    return found


def prior_variants(data: Data) -> tuple[Options, Options]:
    """The paper's priors, and our own: a rule as teacher, or the language model's own likelihood."""
    if data.scorer != "embedding":
        likelihood = {"likelihood_prior_weight": 0.1, "reference_model": str(SHIPPED_POLICY)}
        return likelihood, {**likelihood, "prior_schedule": "linear"}
    paper = {"cosine_prior_weight": 0.1, "correlation_prior_weight": 0.1}
    if data.rule == "min" and data.name not in ("summedits", "aquamuse_swap"):
        # Steps of a proof are not made of the question's words: similar steps get similar scores, and that is all.
        return paper, {"correlation_prior_weight": 0.2, "prior_schedule": "linear"}
    return paper, {"cosine_prior_weight": 0.1, "teacher_prior_weight": 0.3}


def derived_arms(arm: str, chosen: Options) -> dict[str, Options]:
    """Arms without trials of their own: another arm's chosen configuration, with one thing changed.

    These are the other gold fractions, the choice of gold responses by uncertainty, and the cosine prior with the sign
    of the paper's released code.
    """
    found: dict[str, Options] = {}
    if arm == "fractal_gold_10":
        for share in GOLD_SHARES:
            if share != 10:
                found[f"fractal_gold_{share}"] = {**chosen, "gold_fraction": share / 100}
        found["fractal_gold_10_uncertain"] = {**chosen, "gold_selection": "uncertainty"}
    if arm == "bag_priors" and "cosine_prior_weight" in chosen:
        weight = chosen["cosine_prior_weight"]
        found["bag_priors_negated_cosine"] = {
            **chosen,
            "cosine_prior_weight": 0.0,
            "negated_cosine_prior_weight": weight,
        }
    return found
