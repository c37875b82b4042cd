"""Question: does the policy know more of its steps than its likelihood says, and do answers alone bring it out?

The policy stays as it is. Linear heads read what it computes at each step, and learn from right and wrong answers:

- `frozen_likelihood`: the log-likelihood of the step, with a scale and an offset.
- `frozen_confidence`: six numbers of the step's tokens: log-likelihood, its lowest, mean and highest entropy, how far
  the tokens are behind the likeliest ones, how many they are.
- `frozen_states`: these and the hidden states at the end of the step, learned by the bag loss.
- `frozen_states_pairs`: the same, learned from pairs of a right and a wrong response to one prompt, so that nothing is
  gained by knowing which prompts are easy.

    python -m benchmarks.evidence.words_heads --policy runs/words/policy/model \
        --train runs/words/solutions/train.jsonl --validation runs/words/solutions/validation.jsonl \
        --data gsm_symbolic=runs/words/held_out.jsonl --features runs/words/features

Layer and penalty are those with the best AUC of validation responses, for pairs the best one among responses to the
same prompt. Features are kept in a folder, so only the first run needs the forward passes. Rows go to
`benchmarks/results/words.jsonl`.
"""

import argparse
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
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
from fractal_rm.data.bag import Bag
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.best_of_n import read_questions
from fractal_rm.evaluation.intervals import Measurement, as_columns, estimates
from fractal_rm.evaluation.responses import choose_threshold
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.evaluation.statistics import auc_of
from fractal_rm.objectives.aggregation import bag_log_probs
from fractal_rm.objectives.bag_loss import bag_loss
from fractal_rm.reward_model import Step, StepScores

LAYERS = (10, 15, 20, 25, 30)
PENALTIES = (3e-3, 1e-2, 3e-2, 1e-1)
CONFIDENCE = ("log_prob", "lowest", "mean_entropy", "highest_entropy", "behind_the_likeliest", "tokens")
MISSED_BAD = 0.02
BATCH = 32
# Of the numbers of the tokens: few of them, so little is needed.
_LIGHT = 1e-3


@dataclass(frozen=True)
class Features:
    """What a policy computes at the steps of responses.

    Args:
        numbers: The numbers named in `CONFIDENCE` (N, 6), of all N steps, response after response.
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


class Head:
    """A linear head on standardized features."""

    def __init__(self, layer: int | None, penalty: float, numbers: Sequence[int]) -> None:
        self.layer, self.penalty, self.numbers = layer, penalty, list(numbers)

    def _columns(self, features: Features) -> np.ndarray:
        parts = [features.numbers[:, self.numbers], *([] if self.layer is None else [features.states[self.layer]])]
        return np.concatenate(parts, axis=1)

    def _standardized(self, features: Features) -> Tensor:
        return torch.tensor((self._columns(features) - self.mean) / self.deviation, dtype=torch.float32)

    def fit(self, features: Features, labels: Tensor, pairs: Tensor | None) -> "Head":
        """Learn from labels of responses (R,), or from pairs (P, 2) of a better and a worse response."""
        columns = self._columns(features)
        self.mean, self.deviation = columns.mean(0), columns.std(0) + 1e-6
        self.linear = nn.Linear(columns.shape[1], 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 1.5)  # most steps are good
        optimizer = torch.optim.LBFGS(self.linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")
        inputs, mask = self._standardized(features), features.mask

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = in_rows(self.linear(inputs)[:, 0], mask)
            if pairs is None:
                noise = (0.0, MISSED_BAD)
                loss = bag_loss(logits, labels, mask, aggregation="product", label_noise=noise).mean()
            else:
                good, bad = bag_log_probs(logits, mask, aggregation="product")
                odds = good - bad
                loss = F.softplus(odds[pairs[:, 1]] - odds[pairs[:, 0]]).mean() + 1e-4 * self.linear.bias.square().sum()
            light, heavy = self.linear.weight[0].tensor_split([len(self.numbers)])
            loss = loss + _LIGHT * light.square().sum() + self.penalty * heavy.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return self

    @torch.no_grad()
    def scores(self, features: Features) -> tuple[np.ndarray, list[np.ndarray]]:
        """P(good) of responses (R,), and of the steps of each."""
        mask = features.mask
        logits = in_rows(self.linear(self._standardized(features))[:, 0], mask)
        good, _ = bag_log_probs(logits, mask, aggregation="product")
        return good.exp().numpy(), [row[: int(n)].sigmoid().numpy() for row, n in zip(logits, mask.sum(1), strict=True)]


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
    # Step labels are not read here: a response is right or wrong.
    rows = [{k: v for k, v in row.items() if k != "step_labels"} for row in read_rows_of(arguments.train)]
    known = {
        "train": read_questions(rows, Segmentation("lines"), source=str(arguments.train)),
        "validation": read(arguments.validation),
        **{name: read(Path(path)) for name, _, path in (one.partition("=") for one in arguments.data)},
    }
    places, features, labels, prompts = {}, {}, {}, {}
    for name, questions in known.items():
        # A policy writes many responses more than once.
        places[name] = first_places([(str(bag.prompt), bag.response) for bag in questions.bags])
        different = sorted(set(places[name]))
        features[name] = kept(
            arguments.features / f"{name}.npz", model, tokenizer, [questions.bags[i] for i in different]
        )
        places[name] = [different.index(i) for i in places[name]]
        labels[name] = questions.right[different].astype(float)
        prompts[name] = [str(questions.bags[i].prompt) for i in different]
    right, pairs = torch.tensor(labels["train"], dtype=torch.float32), pairs_of(labels["train"], prompts["train"])

    def responses_auc(head: Head) -> float:
        return auc_of(head.scores(features["validation"])[0], labels["validation"]).value

    def within_auc(head: Head) -> float:
        return within_prompts(head.scores(features["validation"])[0], labels["validation"], prompts["validation"])

    layers, numbers = sorted(features["train"].states), range(len(CONFIDENCE))
    with_states = [(layer, penalty, numbers) for layer in layers for penalty in PENALTIES]
    arms = {
        "frozen_likelihood": ([(None, 0.0, [0])], None, responses_auc),
        "frozen_confidence": ([(None, 0.0, numbers)], None, responses_auc),
        "frozen_states": (with_states, None, responses_auc),
        "frozen_states_pairs": (with_states, pairs, within_auc),
    }
    rivals: dict[str, Measurement] = {}
    for arm, (tries, learned_from, worth) in arms.items():
        start = time.monotonic()
        head = max((Head(*one).fit(features["train"], right, learned_from) for one in tries), key=worth)

        def scored(name: str, head: Head = head) -> list[StepScores]:
            whole, steps = head.scores(features[name])
            return [made(bag, float(whole[i]), steps[i]) for bag, i in zip(known[name].bags, places[name], strict=True)]

        threshold = choose_threshold(scored("validation"), known["validation"].bags, aggregation="product")
        config = {"layer": head.layer, "penalty": head.penalty, "tried": len(tries), "policy": arguments.policy}
        for name in known.keys() - {"train", "validation"}:
            questions = known[name]
            measured, policy = judge(scored(name), questions, threshold), policy_level(questions)
            rivals.setdefault(name, measured)  # the first arm is the likelihood
            found = {**as_columns(estimates(measured)), **comparisons(measured, policy, rivals[name])}
            found |= {**measured.counts, **as_columns(estimates(policy))}
            found["responses_trained_on"] = len(right)
            results.append(
                benchmark="words", arm=arm, dataset=name, seed=0, split="held_out", metrics=found, config=config,
                seconds=time.monotonic() - start,
            )  # fmt: skip
            shown = ("bag_auc", "within_prompt_auc", "within_bag_auc", "same_position_auc", "first_error_accuracy")
            print(f"{name} {arm}: " + ", ".join(f"{metric} {found[metric]:.3f}" for metric in shown), flush=True)


if __name__ == "__main__":
    main()
