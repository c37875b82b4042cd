"""Does a reward model trained on outcome labels only choose better among n sampled solutions than a vote?

Data: `gsm8k_solutions` (four solutions per question, test split) and the embedded arithmetic task (64 solutions per
problem, sampled from the shipped policy, whose mistakes are beliefs that the majority shares). Arms: step reward models
(an embedding scorer, a likelihood scorer, existing models by `--models NAME=FOLDER`), an outcome model (the same
scorer, trained on the same labels, every response one step), scores without learning, the majority, and the ceiling.

    python -m benchmarks.evaluation.best_of_n --data-dir DATA --models likelihood=runs/gsm8k_solutions/likelihood-0

One row per arm, data set and seed goes to `benchmarks/results/best_of_n.jsonl`: `accuracy@n` by the model's own
aggregation, `min@n`, `product@n`, `mean@n`, `last@n` by other aggregations of the step scores. Intervals are bootstraps
over questions; `gain@n` is over the majority, paired.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.floors import position, score_by, short
from benchmarks.common.places import RESULTS, default_encoder
from benchmarks.evaluation.judged_models import (
    EMBEDDING,
    LIKELIHOOD,
    arithmetic_bags,
    arithmetic_rows,
    data_dir_of,
    encoder,
    models_at_hand,
    solutions,
    train,
)
from fractal_rm.data.bag import StepScores
from fractal_rm.data.readers import read_jsonl
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.benchmarks import as_learned, score_whole
from fractal_rm.evaluation.best_of_n import Questions, measure_best_of_n, read_questions
from fractal_rm.evaluation.intervals import Measurement, as_columns, differences, estimates
from fractal_rm.evaluation.responses import score_bags
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY

PROBLEMS, SAMPLES, PROBLEM_SEED = 200, 64, 21
DATASETS = ("gsm8k_solutions", "arithmetic")
# How solutions state their final answer.
ANSWERS = {"gsm8k_solutions": r"A: (.+)", "arithmetic": r"Answer: (\d)"}
SMOKE = 8


class SolutionsJudge:
    """Judges arms on one data set and appends their rows.

    Args:
        dataset: Its name.
        questions: Its sampled solutions.
        results: Where rows go.
    """

    def __init__(self, dataset: str, questions: Questions, results: ResultsFile) -> None:
        self.dataset, self.questions, self.results = dataset, questions, results
        constant = measure_best_of_n(score_by(lambda bag: [0.5] * len(bag.steps), questions.bags), questions)
        # The vote and the ceiling are the same for every model.
        self.rival = self.pick(constant, "majority")
        for arm, reading in (("floor_random", "own"), ("floor_majority", "majority"), ("ceiling_pass", "pass")):
            self.append(arm, None, self.pick(constant, reading), {}, 0.0)

    @staticmethod
    def pick(judgement: Measurement, reading: str) -> Measurement:
        """A judgement by one reading alone, called `accuracy@n`."""
        chosen = {
            f"accuracy@{name.partition('@')[2]}": statistic
            for name, statistic in judgement.statistics.items()
            if name.startswith(f"{reading}@")
        }
        return Measurement(judgement.items, chosen, judgement.counts)

    def scores(
        self, arm: str, seed: int | None, scored: Sequence[StepScores], config: Mapping[str, Any], start: float
    ) -> None:
        """Judge scores."""
        judgement = measure_best_of_n(scored, self.questions)
        others = {
            name: estimate.value
            for name, estimate in estimates(judgement).items()
            if not name.startswith(("own@", "majority@", "pass@"))
        }
        self.append(arm, seed, self.pick(judgement, "own"), config, time.monotonic() - start, others)

    def append(
        self, arm: str, seed: int | None, judgement: Measurement, config: Mapping[str, Any], seconds: float,
        others: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Write the row of an arm."""
        gains = {
            f"gain{name.removeprefix('accuracy')}": gain for name, gain in differences(judgement, self.rival).items()
        }
        found = {**as_columns(estimates(judgement)), **as_columns(gains), **(others or {}), **judgement.counts}
        self.results.append(
            benchmark="best_of_n", arm=arm, dataset=self.dataset, seed=seed, split="test", metrics=found, config=config,
            seconds=seconds,
        )  # fmt: skip
        shown = ", ".join(f"{name} {found[name]:.3f}" for name in judgement.statistics)
        print(f"{self.dataset} {arm} {seed}: {shown} ({seconds:.0f} s)", flush=True)

    def model(
        self, arm: str, seed: int | None, model: StepRewardModel, config: Mapping[str, Any], start: float
    ) -> None:
        """Judge a step reward model; of an outcome model, its score of the whole response."""
        bags = self.questions.bags
        scored = score_whole(model, bags) if arm == "outcome_model" else score_bags(model, as_learned(model, bags))
        self.scores(arm, seed, scored, config, start)

    def floors(self) -> None:
        """Judge rules that learn nothing: few steps, short steps."""
        for arm, rule in (("floor_position", position), ("floor_length", short)):
            self.scores(arm, None, score_by(rule, self.questions.bags), {}, time.monotonic())


def train_and_judge(
    judge: SolutionsJudge, start_from: Any, splits: Sequence[Any], options: dict[str, Any], seeds: Sequence[int]
) -> None:
    """Train a step reward model and an outcome model with each seed, and judge both."""
    shown = {name: options[name] for name in ("scorer", "aggregation", "num_train_epochs")}
    for arm in (options["scorer"], "outcome_model"):
        for seed in seeds:
            start = time.monotonic()
            model = train(start_from, *splits, options, seed, whole=arm == "outcome_model")
            judge.model(arm, seed, model, {**shown, "responses": len(splits[0])}, start)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data-dir", default=None, help="folder of the data sets; default: FRACTAL_RM_DATA")
    parser.add_argument("--results", default=RESULTS / "best_of_n.jsonl", type=Path)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER", help="for gsm8k_solutions, at hand")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of what is trained; may be none")
    parser.add_argument("--encoder", default=default_encoder(), help="a sentence-transformers model")
    parser.add_argument("--cache", default="", help="folder of embeddings; default: none are kept")
    parser.add_argument("--smoke", action="store_true", help="a few questions and two steps")
    arguments = parser.parse_args(argv)
    results, most = ResultsFile(arguments.results), SMOKE if arguments.smoke else None
    brief = {"max_steps": 2} if arguments.smoke else {}
    if "arithmetic" in arguments.datasets:
        rows = arithmetic_rows(most or PROBLEMS, PROBLEM_SEED, samples=most or SAMPLES)
        questions = read_questions(rows, Segmentation(), source="arithmetic", answer_pattern=ANSWERS["arithmetic"])
        judge = SolutionsJudge("arithmetic", questions, results)
        judge.floors()
        if arguments.seeds:
            splits = [arithmetic_bags(split, most) for split in ("train", "validation")]
            train_and_judge(judge, SHIPPED_POLICY, splits, LIKELIHOOD | brief, arguments.seeds)
    if "gsm8k_solutions" in arguments.datasets:
        data_dir = data_dir_of(arguments.data_dir)
        if data_dir is None:
            parser.error("where is the data? Give --data-dir, set FRACTAL_RM_DATA, or choose --datasets arithmetic")
        rows = read_jsonl(data_dir / "gsm8k_solutions" / "test.jsonl.gz")[: most and 4 * most]
        pattern = ANSWERS["gsm8k_solutions"]
        questions = read_questions(rows, Segmentation("given"), source="gsm8k_solutions", answer_pattern=pattern)
        judge = SolutionsJudge("gsm8k_solutions", questions, results)
        judge.floors()
        if arguments.seeds:
            splits = [solutions(data_dir, split, most) for split in ("train", "validation")]
            reader = encoder(arguments.encoder, arguments.cache)
            train_and_judge(judge, reader, splits, EMBEDDING | brief, arguments.seeds)
        for arm, seed, model in models_at_hand(arguments.models):
            described = {"scorer": model.settings.scorer, "aggregation": model.settings.aggregation}
            judge.model(arm, seed, model, described | {"trained_by": "recipes/gsm8k_solutions"}, time.monotonic())


if __name__ == "__main__":
    main()
