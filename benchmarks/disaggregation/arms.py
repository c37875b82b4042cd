"""Arms of the benchmark `disaggregation`: for each, the configurations that compete on validation bag labels.

Every arm has the same number of trials, so none wins by having more: two sets of learning rates and epochs, times
two variants of the arm. All arms of the embedding scorer use the head `pair`, which scores each step separately. The
head whose steps see each other (`set`) fits response labels better but ranks steps worse, because any step can carry
the information of all; bag labels would choose it for the wrong reason. It and the paper's head (`mlp`) have separate
arms.
"""

from benchmarks.disaggregation.data import Data
from fractal_rm.reward_training.trials import HARD, SOFT, Options
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY

GOLD_SHARES = (1, 5, 10, 20, 50)
PSEUDO_ROUNDS = 3
# Fast and short, slow and long; the likelihood and the token scorer train the language model itself.
PACES = {
    "embedding": (
        {"head_learning_rate": 1e-3, "num_train_epochs": 4},
        {"head_learning_rate": 3e-4, "num_train_epochs": 8},
    ),
    "likelihood": (
        {"learning_rate": 2e-3, "num_train_epochs": 3},
        {"learning_rate": 1e-3, "num_train_epochs": 4},
    ),
    "token": (
        {"learning_rate": 2e-3, "num_train_epochs": 3},
        {"learning_rate": 1e-3, "num_train_epochs": 4},
    ),
}
LCA = {"min": "softmin", "max": "softmax", "mean": "softmin"}


def arms(data: Data) -> dict[str, list[Options]]:
    """Arms that are trained, each with its trials; options are those of `FractalConfig`."""
    hard, soft = {"aggregation": HARD[data.rule]}, {"aggregation": SOFT[data.rule]}
    if data.num_grades is not None:
        # The maximum of grades is already exact: there is no softer form and no other aggregation.
        hard = soft = {"aggregation": "max", "num_grades": data.num_grades}
    paper, ours = prior_variants(data)
    pseudo_hard = {"pseudo_labels": "hard"}
    # Preferences and grades have hard pseudo-labels only.
    only_hard = data.preferences or data.num_grades is not None
    pseudo_soft = pseudo_hard if only_hard else {"pseudo_labels": "soft"}
    going_on = {"pseudo_bag_weight": 1.0, "pseudo_start": "warm"}
    noise: Options = {"missed_bad": 0.15} if data.noisy else {}
    found = {f"bag_{HARD[data.rule]}": plain(hard)}
    if data.scorer == "embedding":
        found["response_level"] = plain(hard)
    if data.rule != "mean" and data.num_grades is None:
        found[f"bag_{SOFT[data.rule]}"] = plain(soft)
    if data.noisy:
        found["bag_noise_tolerant"] = [{**soft, "missed_bad": rate} for rate in (0.1, 0.25)]
    found["bag_priors"] = [{**hard, **paper}, {**hard, **ours}]
    found["pseudo_hard"] = [{**hard, **pseudo_hard}, {**hard, **pseudo_hard, **going_on}]
    if not only_hard:
        found["pseudo_soft"] = [{**soft, **pseudo_soft}, {**soft, **pseudo_soft, **going_on}]
    found["fractal"] = [
        {**hard, **paper, **pseudo_hard},  # the paper's own
        {**soft, **ours, **pseudo_soft, **going_on, **noise},
    ]
    if data.num_grades is None:
        found["lca"] = plain({"aggregation": LCA[data.rule]})
    if data.proportions:
        found["easyllp"] = plain({**hard, "bag_weight": 0.0, "easyllp_weight": 1.0})
    if data.has_gold:
        gold = {"instance_weight": 1.0, "gold_fraction": 0.1}
        found["fractal_gold_10"] = [
            {**hard, **gold, **paper, "hybrid_prior_weight": 0.3, **pseudo_hard},
            {**soft, **gold, **ours, **pseudo_soft, **going_on, **noise},
        ]
        found["supervised"] = plain({**hard, "bag_weight": 0.0, "instance_weight": 1.0})
    return {
        arm: [{**pace, **variant} for pace in PACES[data.scorer] for variant in variants]
        for arm, variants in found.items()
    }


def plain(options: Options) -> list[Options]:
    """The two variants of an arm that has no options of its own."""
    return [{**options, "weight_decay": decay} for decay in (0.01, 0.3)]


def prior_variants(data: Data) -> tuple[Options, Options]:
    """The paper's priors, and our own: a rule as teacher, or the language model's own likelihood."""
    if data.scorer != "embedding":
        likelihood = {"likelihood_prior_weight": 0.1, "reference_model": str(SHIPPED_POLICY)}
        return likelihood, {**likelihood, "prior_schedule": "linear"}
    paper = {"cosine_prior_weight": 0.1, "correlation_prior_weight": 0.1}
    if data.num_grades is not None:
        # These grades say how wrong a step is, so the belief that good steps are close to the question is reversed.
        paper = {"negated_cosine_prior_weight": 0.1, "correlation_prior_weight": 0.1}
        return paper, {"correlation_prior_weight": 0.2, "prior_schedule": "linear"}
    if data.rule == "min" and data.name not in ("summedits", "aquamuse_swap"):
        # Steps of a proof need not resemble the question: only the prior that similar steps get similar scores is used.
        return paper, {"correlation_prior_weight": 0.2, "prior_schedule": "linear"}
    return paper, {"cosine_prior_weight": 0.5, "teacher_prior_weight": 0.5}


def derived_arms(data: Data, arm: str, chosen: Options) -> dict[str, Options]:
    """Arms without trials of their own: another arm's chosen configuration, with one thing changed.

    These are the other gold fractions, the choice of gold responses by uncertainty, the cosine prior with the sign of
    the paper's released code, pseudo-labels in several rounds, and the other two heads.
    """
    found: dict[str, Options] = {}
    if arm in ("pseudo_hard", "pseudo_soft"):
        found[f"{arm}_iterated"] = {**chosen, "pseudo_rounds": PSEUDO_ROUNDS}
    if arm == "fractal_gold_10":
        for share in GOLD_SHARES:
            if share != 10:
                found[f"fractal_gold_{share}"] = {**chosen, "gold_fraction": share / 100}
        found["fractal_gold_10_uncertain"] = {**chosen, "gold_selection": "uncertainty"}
    if arm == "bag_priors" and "cosine_prior_weight" in chosen:
        changed = {"cosine_prior_weight": 0.0, "negated_cosine_prior_weight": chosen["cosine_prior_weight"]}
        found["bag_priors_negated_cosine"] = {**chosen, **changed}
    if data.scorer == "embedding" and arm in (f"bag_{HARD[data.rule]}", "fractal", "supervised"):
        found |= {f"{arm}_{head}": {**chosen, "head_type": head} for head in ("mlp", "set")}
    return found
