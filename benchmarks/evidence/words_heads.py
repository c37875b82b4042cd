"""Question: does the policy know more about its steps than its likelihood says, and do answer labels bring it out?

The policy is frozen. Linear heads read its features of each step, and learn from right and wrong answers:

- `frozen_likelihood`: the log-likelihood of the step, with a scale and an offset.
- `frozen_confidence`: six statistics of the step's tokens: log-likelihood, lowest, mean and highest entropy, distance
  to the most likely tokens, number of tokens.
- `frozen_states`: these and the hidden states at the end of the step, trained with the bag loss.
- `frozen_states_pairs`: the same, trained on pairs of a right and a wrong response to one prompt: knowing which prompts
  are easy does not help.
- `frozen_agreement`: agreement with the other responses to the same prompt: two numbers, the shares of responses with
  the same result, and with the same results up to this step (`fractal_rm.tasks.agreement`). No hidden states.
- `frozen_likelihood_agreement`: these and the log-likelihood.
- `frozen_states_likelihood_prior`: `frozen_states`, with the step scores of `frozen_likelihood` as prior.
- `frozen_states_pseudo_labels`: the most likely step labels under `frozen_likelihood`, given the answers, learned as
  if they were known.

Two arms also learn from gold step labels, if the training responses have them (`fractal-rm sample --gold_steps true`);
nothing else reads these labels:

- `frozen_states_gold_10`: `frozen_states`, and the gold step labels of a tenth of the responses.
- `frozen_states_supervised`: the gold step labels of all responses, the ceiling of these heads.

    python -m benchmarks.evidence.words_heads --policy runs/words/policy/model \
        --train runs/words/solutions/train.jsonl --validation runs/words/solutions/validation.jsonl \
        --data gsm_symbolic=runs/words/held_out.jsonl --features runs/words/features

Layer, penalty and weights have the best AUC on validation responses (for pairs, the best AUC among responses to the
same prompt). Features are kept in a folder, so only the first run needs the forward passes. Rows go to
`benchmarks/results/words.jsonl`.
"""

import argparse
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.places import RESULTS
from benchmarks.evidence.words_reward_models import comparisons, judge, policy_level, read
from fractal_rm.cli.sample import read_rows_of
from fractal_rm.data.bag import Bag, Step, StepScores
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.best_of_n import Questions, read_questions
from fractal_rm.evaluation.intervals import Measurement, as_columns, estimates
from fractal_rm.evaluation.responses import choose_threshold
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.evaluation.statistics import auc_of
from fractal_rm.objectives.aggregation import bag_log_probs
from fractal_rm.objectives.bag_loss import bag_loss
from fractal_rm.objectives.pseudo_labels import pseudo_labels
from fractal_rm.tasks.agreement import agreement, result_agreement

LAYERS = (10, 15, 20, 25, 30)
PENALTIES = (3e-3, 1e-2, 3e-2, 1e-1)
AGREEMENT = ("log_agreement", "log_result_agreement")
CONFIDENCE = ("log_prob", "lowest", "mean_entropy", "highest_entropy", "behind_the_likeliest", "tokens")
PRIOR_WEIGHTS = (0.1, 0.5)
GOLD_SHARE = 0.1
MISSED_BAD = 0.02
BATCH = 32
# Penalty for the token statistics: there are few, so it can be small.
_LIGHT = 1e-3
# Share for a step that no other response has: about one response of eight.
_UNSHARED = 0.1


@dataclass(frozen=True)
class Features:
    """What a policy computes at the steps of responses.

    Args:
        numbers: The numbers named in `CONFIDENCE` (N, 6), and those of `AGREEMENT` where a prompt's responses are known
            (N, 8), of all N steps, response after response.
        states: Hidden states at the last token of each step, by layer (N, H).
        counts: Steps of each response (R,).
    """

    numbers: np.ndarray
    states: Mapping[int, np.ndarray]
    counts: np.ndarray

    @property
    def mask(self) -> Tensor:
        """True where a step is real (R, S)."""
        return torch.arange(int(self.counts.max())) < torch.tensor(self.counts)[:, None]


def tokenize(tokenizer: Any, bag: Bag) -> tuple[list[int], np.ndarray]:
    """Ids of prompt and response (T,), and for each the step it belongs to with what follows it, -1 in the prompt."""
    prompt = tokenizer(str(bag.prompt))["input_ids"]
    response = tokenizer(bag.response, return_offsets_mapping=True, add_special_tokens=False)
    later = [start for start, _ in bag.step_spans[1:]]
    steps = np.searchsorted(later, [start for start, _ in response["offset_mapping"]], side="right")
    return prompt + response["input_ids"], np.concatenate([np.full(len(prompt), -1), steps])


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, bags: Sequence[Bag]) -> Features:
    """Features of the steps of responses, a forward pass for each response."""
    encoded = [tokenize(tokenizer, bag) for bag in bags]
    order = sorted(range(len(bags)), key=lambda i: len(encoded[i][0]))
    layers = [layer for layer in LAYERS if layer <= model.config.num_hidden_layers] or [model.config.num_hidden_layers]
    found: dict[int, list[tuple[list[float], list[np.ndarray]]]] = {}
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids = pad_sequence([torch.tensor(encoded[i][0]) for i in rows], batch_first=True)
        mask = pad_sequence([torch.ones(len(encoded[i][0]), dtype=torch.long) for i in rows], batch_first=True)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_hidden_states": True}
        out = model.base_model(**inputs)
        for row, i in enumerate(rows):
            owners = encoded[i][1]
            first = int((owners < 0).sum())
            log_probs = model.lm_head(out.last_hidden_state[row, first - 1 : len(owners) - 1]).float().log_softmax(-1)
            own = log_probs.gather(1, ids[row, first : len(owners), None])[:, 0].numpy()
            entropy = -(log_probs.exp() * log_probs).sum(-1).numpy()
            behind = own - log_probs.max(-1).values.numpy()
            steps = []
            for step in range(len(bags[i].steps)):
                at = np.flatnonzero(owners[first:] == step)
                likelihood, doubt = [own[at].sum(), own[at].min()], [entropy[at].mean(), entropy[at].max()]
                ends = [out.hidden_states[layer][row, first + at[-1]].float().numpy() for layer in layers]
                steps.append(([*likelihood, *doubt, behind[at].sum(), len(at)], ends))
            found[i] = steps
    steps = [step for i in range(len(bags)) for step in found[i]]
    states = {layer: np.stack([ends[place] for _, ends in steps]) for place, layer in enumerate(layers)}
    return Features(np.array([n for n, _ in steps]), states, np.array([len(found[i]) for i in range(len(bags))]))


def kept(path: Path, model: Any, tokenizer: Any, bags: Sequence[Bag]) -> Features:
    """Features of the steps of responses, from the file if it is there."""
    if not path.is_file():
        made = measure(model, tokenizer, bags)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"numbers": made.numbers, "counts": made.counts}
        arrays |= {f"layer_{layer}": values.astype(np.float16) for layer, values in made.states.items()}
        np.savez(path, **arrays)
    with np.load(path) as saved:
        states = {int(name[6:]): saved[name].astype(float) for name in saved.files if name.startswith("layer_")}
        found = Features(saved["numbers"].astype(float), states, saved["counts"])
    if found.counts.tolist() != [len(bag.steps) for bag in bags]:
        raise ValueError(f"{path} holds the features of other responses. Remove the file.")
    return found


# The loss of a head, from the logits of steps (R, S).
Loss = Callable[[Tensor], Tensor]


class Head:
    """A linear head on standardized features."""

    def __init__(self, layer: int | None, penalty: float, numbers: Sequence[int]) -> None:
        self.layer, self.penalty, self.numbers = layer, penalty, list(numbers)

    def _columns(self, features: Features) -> np.ndarray:
        parts = [features.numbers[:, self.numbers], *([] if self.layer is None else [features.states[self.layer]])]
        return np.concatenate(parts, axis=1)

    def _standardized(self, features: Features) -> Tensor:
        return torch.tensor((self._columns(features) - self.mean) / self.deviation, dtype=torch.float32)

    def fit(self, features: Features, loss: Loss) -> "Head":
        """Minimize a loss of the logits of steps (R, S)."""
        columns = self._columns(features)
        self.mean, self.deviation = columns.mean(0), columns.std(0) + 1e-6
        self.linear = nn.Linear(columns.shape[1], 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 1.5)  # most steps are good
        optimizer = torch.optim.LBFGS(self.linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")
        inputs, mask = self._standardized(features), features.mask

        def closure() -> Tensor:
            optimizer.zero_grad()
            light, heavy = self.linear.weight[0].tensor_split([len(self.numbers)])
            penalty = _LIGHT * (light.square().sum() + 0.1 * self.linear.bias.square().sum())
            total = loss(in_rows(self.linear(inputs)[:, 0], mask)) + penalty + self.penalty * heavy.square().sum()
            total.backward()
            return total

        optimizer.step(closure)
        return self

    @torch.no_grad()
    def logits(self, features: Features) -> Tensor:
        """Logits of the steps (R, S)."""
        return in_rows(self.linear(self._standardized(features))[:, 0], features.mask)

    @torch.no_grad()
    def scores(self, features: Features) -> tuple[np.ndarray, list[np.ndarray]]:
        """P(good) of responses (R,), and of the steps of each."""
        logits, mask = self.logits(features), features.mask
        good, _ = bag_log_probs(logits, mask, aggregation="product")
        return good.exp().numpy(), [row[: int(n)].sigmoid().numpy() for row, n in zip(logits, mask.sum(1), strict=True)]


def of_answers(right: Tensor, mask: Tensor) -> Loss:
    """The bag loss of right and wrong responses (R,)."""

    def loss(logits: Tensor) -> Tensor:
        return bag_loss(logits, right, mask, aggregation="product", label_noise=(0.0, MISSED_BAD)).mean()

    return loss


def of_pairs(pairs: Tensor, mask: Tensor) -> Loss:
    """Pairs (P, 2) of a better and a worse response."""

    def loss(logits: Tensor) -> Tensor:
        good, bad = bag_log_probs(logits, mask, aggregation="product")
        odds = good - bad
        return F.softplus(odds[pairs[:, 1]] - odds[pairs[:, 0]]).mean()

    return loss


def of_steps(targets: Tensor) -> Loss:
    """Targets of steps (R, S), NaN where there is none."""
    known = ~targets.isnan()

    def loss(logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits[known], targets[known])

    return loss


def weighted(first: Loss, second: Loss, weight: float) -> Loss:
    """The first loss and a share of the second."""
    return lambda logits: (1 - weight) * first(logits) + weight * second(logits)


def gold_targets(bags: Sequence[Bag], mask: Tensor, share: float) -> Tensor:
    """Gold labels of the steps (R, S) of a share of responses, NaN elsewhere."""
    found = torch.full(mask.shape, torch.nan)
    order = torch.randperm(len(bags), generator=torch.Generator().manual_seed(0)).tolist()
    for row in order[: round(share * len(bags))]:
        labels = [math.nan if label is None else label for label in bags[row].step_labels or ()]
        found[row, : len(labels)] = torch.tensor(labels)
    return found


def in_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Values of steps (N,), response after response, as rows (R, S) of the mask."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def made(bag: Bag, score: float, steps: np.ndarray) -> StepScores:
    """Scores of a response as a reward model would give them."""
    cut = zip(bag.steps, bag.step_spans, steps, strict=True)
    return StepScores(bag.response, [Step(text, *span, float(one)) for text, span, one in cut], score=score)


def within_prompts(scores: np.ndarray, labels: np.ndarray, prompts: Sequence[str]) -> float:
    """AUC of responses among those to the same prompt, averaged over the prompts that have right and wrong ones."""
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    areas = np.array([auc_of(scores[at], labels[at]).value for at in places.values()])
    known = areas[~np.isnan(areas)]
    return float(known.mean()) if len(known) else math.nan


def first_places(values: Sequence[Hashable]) -> list[int]:
    """For each value where it stands first.

    Example:
        >>> first_places(["a", "b", "a"])
        [0, 1, 0]
    """
    found: dict[Hashable, int] = {}
    return [found.setdefault(value, place) for place, value in enumerate(values)]


def pairs_of(labels: np.ndarray, prompts: Sequence[str]) -> Tensor:
    """Places (P, 2) of a right and a wrong response to the same prompt, all pairs."""
    found = [
        (i, j)
        for i in np.flatnonzero(labels > 0.5).tolist()
        for j in np.flatnonzero(labels < 0.5).tolist()
        if prompts[i] == prompts[j]
    ]
    return torch.tensor(found)


@dataclass(frozen=True)
class Arm:
    """What a head learns from; the best of its shapes and losses is kept.

    Args:
        shapes: Layer, penalty and numbers of the heads that are tried.
        losses: The losses that each is tried with.
        worth: What a head is chosen by, of the validation responses.
    """

    shapes: Sequence[tuple[int | None, float, Sequence[int]]]
    losses: Sequence[Loss]
    worth: Callable[[Head], float]


@dataclass(frozen=True)
class Responses:
    """Responses of a file with what the policy computes at their steps.

    A policy writes many responses more than once: features, labels and prompts are those of the R different ones.

    Args:
        questions: All of them.
        places: For each of them its place among the different ones.
        different: Where the different ones stand first (R,).
        features: Of the different ones.
    """

    questions: Questions
    places: Sequence[int]
    different: Sequence[int]
    features: Features

    @property
    def bags(self) -> list[Bag]:
        """The different responses."""
        return [self.questions.bags[i] for i in self.different]

    @property
    def labels(self) -> np.ndarray:
        """1 for a right one, 0 for a wrong one (R,)."""
        return self.questions.right[list(self.different)].astype(float)

    @property
    def prompts(self) -> list[str]:
        """Their prompts."""
        return [str(bag.prompt) for bag in self.bags]

    def scored(self, head: Head) -> list[StepScores]:
        """Scores of all responses."""
        whole, steps = head.scores(self.features)
        return [made(bag, float(whole[i]), steps[i]) for bag, i in zip(self.questions.bags, self.places, strict=True)]


def agreements(questions: Questions) -> np.ndarray:
    """The numbers named in `AGREEMENT` of the steps of all responses (N, 2), which are those to each prompt."""
    prompts, steps = [str(bag.prompt) for bag in questions.bags], [bag.steps for bag in questions.bags]
    shares = [np.concatenate(rule(prompts, steps)) for rule in (agreement, result_agreement)]
    return np.log(np.stack(shares, axis=1) + _UNSHARED)


def with_features(questions: Questions, path: Path, model: Any, tokenizer: Any) -> Responses:
    """Responses with their features, which are read from the file if it is there."""
    first = first_places([(str(bag.prompt), bag.response) for bag in questions.bags])
    different = sorted(set(first))
    features = kept(path, model, tokenizer, [questions.bags[i] for i in different])
    counts = [len(bag.steps) for bag in questions.bags]
    shared = np.split(agreements(questions), np.cumsum(counts)[:-1])
    numbers = np.concatenate([features.numbers, np.concatenate([shared[i] for i in different])], axis=1)
    return Responses(questions, [different.index(i) for i in first], different, replace(features, numbers=numbers))


def make_arms(train: Responses, validation: Responses) -> dict[str, Arm]:
    """The arms of the docstring; those with gold step labels if all training responses have them."""
    features, right = train.features, torch.tensor(train.labels, dtype=torch.float32)
    mask = features.mask

    def responses_auc(head: Head) -> float:
        return auc_of(head.scores(validation.features)[0], validation.labels).value

    def within_auc(head: Head) -> float:
        return within_prompts(head.scores(validation.features)[0], validation.labels, validation.prompts)

    answers, pairs = of_answers(right, mask), of_pairs(pairs_of(train.labels, train.prompts), mask)
    likelihood = Head(None, 0.0, [0]).fit(features, answers).logits(features)
    prior = of_steps(likelihood.sigmoid().masked_fill(~mask, torch.nan))
    guessed = pseudo_labels(likelihood, right, mask, aggregation="product", label_noise=(0.0, MISSED_BAD))
    pseudo = of_steps(guessed.masked_fill(~mask, torch.nan))
    numbers = range(len(CONFIDENCE))
    shared = range(len(CONFIDENCE), len(CONFIDENCE) + len(AGREEMENT))
    with_states = [(layer, penalty, numbers) for layer in sorted(features.states) for penalty in PENALTIES]
    drawn = [weighted(answers, prior, weight) for weight in PRIOR_WEIGHTS]
    arms = {
        "frozen_likelihood": Arm([(None, 0.0, [0])], [answers], responses_auc),
        "frozen_confidence": Arm([(None, 0.0, numbers)], [answers], responses_auc),
        "frozen_agreement": Arm([(None, 0.0, shared)], [answers], responses_auc),
        "frozen_likelihood_agreement": Arm([(None, 0.0, [0, *shared])], [answers], responses_auc),
        "frozen_states": Arm(with_states, [answers], responses_auc),
        "frozen_states_pairs": Arm(with_states, [pairs], within_auc),
        "frozen_states_likelihood_prior": Arm(with_states, drawn, responses_auc),
        "frozen_states_pseudo_labels": Arm(with_states, [pseudo], responses_auc),
    }
    if all(bag.step_labels is not None for bag in train.bags):
        tenth, supervised = (of_steps(gold_targets(train.bags, mask, share)) for share in (GOLD_SHARE, 1.0))
        arms["frozen_states_gold_10"] = Arm(with_states, [weighted(answers, tenth, 0.5)], responses_auc)
        arms["frozen_states_supervised"] = Arm(with_states, [supervised], responses_auc)
    return arms


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="responses that heads learn from")
    parser.add_argument("--validation", type=Path, required=True, help="responses that choose layer and penalty")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FILE", help="responses with step labels")
    parser.add_argument("--features", type=Path, required=True, help="folder that keeps what the policy computes")
    parser.add_argument("--results", type=Path, default=RESULTS / "words.jsonl")
    arguments = parser.parse_args(argv)
    results = ResultsFile(arguments.results)
    tokenizer = AutoTokenizer.from_pretrained(arguments.policy, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=torch.bfloat16, trust_remote_code=False)
    rows = read_rows_of(arguments.train)
    questions = {
        "train": read_questions(rows, Segmentation("lines"), source=str(arguments.train)),
        "validation": read(arguments.validation),
        **{name: read(Path(path)) for name, _, path in (one.partition("=") for one in arguments.data)},
    }
    known = {
        name: with_features(found, arguments.features / f"{name}.npz", model, tokenizer)
        for name, found in questions.items()
    }
    train, validation = known.pop("train"), known.pop("validation")
    rivals: dict[str, Measurement] = {}
    for arm, learned in make_arms(train, validation).items():
        start = time.monotonic()
        heads = [Head(*shape).fit(train.features, loss) for shape in learned.shapes for loss in learned.losses]
        head = max(heads, key=learned.worth)
        threshold = choose_threshold(validation.scored(head), validation.questions.bags, aggregation="product")
        config = {"layer": head.layer, "penalty": head.penalty, "tried": len(heads), "policy": arguments.policy}
        for name, responses in known.items():
            measured = judge(responses.scored(head), responses.questions, threshold)
            policy = policy_level(responses.questions)
            rivals.setdefault(name, measured)  # the first arm is the likelihood
            found = {**as_columns(estimates(measured)), **comparisons(measured, policy, rivals[name])}
            found |= {**measured.counts, **as_columns(estimates(policy))}
            found["responses_trained_on"] = len(train.different)
            results.append(
                benchmark="words", arm=arm, dataset=name, seed=0, split="held_out", metrics=found, config=config,
                seconds=time.monotonic() - start,
            )  # fmt: skip
            shown = ("bag_auc", "within_prompt_auc", "within_bag_auc", "same_position_auc", "first_error_accuracy")
            print(f"{name} {arm}: " + ", ".join(f"{metric} {found[metric]:.3f}" for metric in shown), flush=True)


if __name__ == "__main__":
    main()
