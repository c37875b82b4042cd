"""How well do response labels alone work on ProcessBench, by its official rule, on all of its 3,400 cases?

Arms: an embedding scorer (22 M parameters, frozen, with a small head) trained here on the outcome labels of
`gsm8k_solutions` in seconds; existing reward models (`--models NAME=FOLDER`); rivals without learning: random scores,
position, length, word overlap with the prompt, "no step is ever wrong" and "the first step is always wrong".

    python -m benchmarks.evaluation.processbench --data-dir DATA --models likelihood=runs/gsm8k_solutions/likelihood-0

One row per arm and seed goes to `benchmarks/results/processjudge.jsonl`. `f1` uses a threshold chosen on response
labels of the validation split of `gsm8k_solutions`; `tuned_f1` the one that is best on the gold labels of the subset
gsm8k, as in the official evaluation of reward models; `best_f1` reads all gold labels. Speed is measured on every 20th
case, on one thread, with embeddings computed again: `responses_per_second` of wall time, `responses_per_cpu_second` of
CPU time, and `cpu_minutes_of_all` cases extrapolated from it.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.floors import Rule, at_random, few_new_words, position, score_by, short
from benchmarks.common.places import RESULTS, default_encoder
from benchmarks.evaluation.judged_models import EMBEDDING, data_dir_of, encoder, models_at_hand, solutions, train
from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.readers import read_jsonl
from fractal_rm.evaluation.benchmarks import as_learned
from fractal_rm.evaluation.intervals import as_columns, estimates
from fractal_rm.evaluation.processbench import SUBSETS, Cases, measure_processbench, read_cases
from fractal_rm.evaluation.responses import choose_threshold, score_bags
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.sentence_encoder import SentenceEncoder

RANDOM_SEEDS = range(5)
SMOKE_CASES = 8
# Speed is measured on every 20th case: a sample of all subsets and lengths.
SPEED_STRIDE = 20


def never(bag: Bag) -> list[float]:
    """No step is ever called wrong."""
    return [1.0] * len(bag.steps)


def always_the_first(bag: Bag) -> list[float]:
    """The first step is called wrong, whatever it says."""
    return [0.0] + [1.0] * (len(bag.steps) - 1)


def floors() -> dict[tuple[str, int | None], Rule]:
    """Rules that learn nothing, by arm and seed."""
    rules: dict[tuple[str, int | None], Rule] = {("floor_random", seed): at_random(seed) for seed in RANDOM_SEEDS}
    named = {"position": position, "length": short, "overlap": few_new_words, "none": never, "first": always_the_first}
    return rules | {(f"floor_{name}", None): rule for name, rule in named.items()}


def metrics_of(scored: Sequence[StepScores], cases: Cases, threshold: float) -> dict[str, float]:
    """Every figure of a judgement; intervals of those that are over all subsets."""
    judgement = measure_processbench(scored, cases, threshold)
    found = estimates(judgement)
    subsets = tuple(f"_{name}" for name in SUBSETS)
    whole = {name: value for name, value in found.items() if not name.endswith(subsets)}
    parts = {name: value.value for name, value in found.items() if name not in whole}
    return {**as_columns(whole), **parts, **judgement.counts}


class CasesJudge:
    """Judges arms and appends their rows.

    Args:
        arguments: Those of the command line.
        data_dir: Folder of the data sets.
    """

    def __init__(self, arguments: argparse.Namespace, data_dir: Path) -> None:
        self.results = ResultsFile(arguments.results)
        most = SMOKE_CASES if arguments.smoke else None
        rows = read_jsonl(data_dir / "processbench" / "test.jsonl.gz")
        if most is not None:  # a few of each subset
            rows = [row for name in SUBSETS for row in [r for r in rows if r["meta"]["subset"] == name][:most]]
        self.cases = read_cases(rows, source="processbench")
        self.validation = solutions(data_dir, "validation", most)

    def floor(self, arm: str, seed: int | None, rule: Rule) -> None:
        """Judge a rule."""
        start = time.monotonic()
        threshold = choose_threshold(score_by(rule, self.validation), self.validation)
        if arm in ("floor_none", "floor_first"):
            threshold = 0.5  # what the rule says is the prediction
        self.append(arm, seed, score_by(rule, self.cases.bags), threshold, start, {})

    def model(self, arm: str, seed: int | None, model: StepRewardModel, config: Mapping[str, Any]) -> None:
        """Judge a model."""
        scored = score_bags(model, as_learned(model, self.validation))
        threshold = choose_threshold(scored, self.validation, aggregation=model.settings.aggregation)
        start = time.monotonic()
        scored = score_bags(model, as_learned(model, self.cases.bags))
        self.append(arm, seed, scored, threshold, start, config, self.speed(model))

    def speed(self, model: StepRewardModel) -> dict[str, float]:
        """Cases a second of processor time, on every 20th case; an encoder finds no embedding in a cache."""
        if isinstance(model.processor, SentenceEncoder):
            fresh = SentenceEncoder(model.processor.name_or_path, cache_dir="", dtype="bfloat16")
            model = StepRewardModel(model.scorer, fresh, model.settings)
        cases = as_learned(model, self.cases.bags[::SPEED_STRIDE])
        start, cpu_start = time.monotonic(), time.process_time()
        score_bags(model, cases)
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
        return {
            "responses_per_second": len(cases) / seconds,
            "responses_per_cpu_second": len(cases) / cpu_seconds,
            "cpu_minutes_of_all": cpu_seconds / len(cases) * len(self.cases.bags) / 60,
        }

    def append(
        self, arm: str, seed: int | None, scored: Sequence[StepScores], threshold: float, start: float, config: Any,
        speed: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Write the row of an arm; `start` is when its scoring began."""
        seconds = time.monotonic() - start
        found = {**metrics_of(scored, self.cases, threshold), **(speed or {})}
        self.results.append(
            benchmark="processbench", arm=arm, dataset="processbench", seed=seed, split="test", metrics=found,
            config={**config, "threshold_from": "response labels of gsm8k_solutions, validation"}, seconds=seconds,
        )  # fmt: skip
        print(f"{arm} {seed}: F1 {found['f1']:.3f}, tuned {found['tuned_f1']:.3f} ({seconds:.0f} s)", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data-dir", default=None, help="folder of the data sets; default: FRACTAL_RM_DATA")
    parser.add_argument("--results", default=RESULTS / "processjudge.jsonl", type=Path)
    parser.add_argument("--arms", nargs="*", default=["floors", "embedding"], choices=["floors", "embedding"])
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER", help="reward models at hand")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the embedding scorer")
    parser.add_argument("--encoder", default=default_encoder(), help="a sentence-transformers model")
    parser.add_argument("--cache", default="", help="folder that keeps embeddings; default: none")
    parser.add_argument("--smoke", action="store_true", help="a few cases and two steps")
    arguments = parser.parse_args(argv)
    data_dir = data_dir_of(arguments.data_dir)
    if data_dir is None:
        parser.error("where is the data? Give --data-dir, or set FRACTAL_RM_DATA")
    judge = CasesJudge(arguments, data_dir)
    for (arm, seed), rule in floors().items() if "floors" in arguments.arms else ():
        judge.floor(arm, seed, rule)
    for seed in arguments.seeds if "embedding" in arguments.arms else ():
        options = EMBEDDING | ({"max_steps": 2} if arguments.smoke else {})
        begun = time.monotonic()
        bags = solutions(data_dir, "train", SMOKE_CASES if arguments.smoke else None)
        model = train(encoder(arguments.encoder, arguments.cache), bags, judge.validation, options, seed)
        shown = {name: options[name] for name in ("aggregation", "num_train_epochs", "head_learning_rate")}
        trained = {"responses": len(bags), "train_seconds": round(time.monotonic() - begun, 1)}
        judge.model("embedding", seed, model, {"scorer": "embedding", **shown, **trained})
    for arm, seed, model in models_at_hand(arguments.models):
        settings = model.settings
        described = {"scorer": settings.scorer, "aggregation": settings.aggregation, "max_length": settings.max_length}
        judge.model(arm, seed, model, described | {"trained_by": "recipes/gsm8k_solutions"})


if __name__ == "__main__":
    main()
