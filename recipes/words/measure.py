"""Evaluates a policy: accuracy, pass@n and majority votes of responses from `fractal-rm sample`.

    python recipes/words/measure.py runs/words/held_out.jsonl --arm sft --results benchmarks/results/words.jsonl

Intervals are over prompts. With `step_labels` (`--gold_steps true`) it also counts right answers that were reached
through a wrong line: the share of luck, `missed_bad` of a reward model.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fractal_rm.cli.sample import read_rows_of
from fractal_rm.evaluation.best_of_n import majority_of, pass_at
from fractal_rm.evaluation.intervals import Measurement, as_columns, estimates
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.evaluation.statistics import mean_of, ratio_of


def measure(rows: Sequence[dict[str, Any]], samples: int) -> Measurement:
    """Metrics of sampled responses; a blank response, which has no row, counts as wrong."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["prompt"]), []).append(row)
    right, answers = [], []
    for group in groups.values():
        blank = samples - len(group)
        right.append(np.array([row["label"] >= 0.5 for row in group] + [False] * blank))
        answers.append([row["answer"] for row in group] + [None] * blank)
    statistics = {
        "accuracy": mean_of([of_prompt.mean() for of_prompt in right]),
        f"pass_{samples}": mean_of([pass_at(of_prompt, samples) for of_prompt in right]),
        f"majority_{samples}": mean_of(
            [majority_of(stated, of_prompt, samples) for stated, of_prompt in zip(answers, right, strict=True)]
        ),
        "without_answer": mean_of([sum(answer is None for answer in stated) / samples for stated in answers]),
    }
    if all("step_labels" in row for row in rows):
        lucky = [sum(r["label"] >= 0.5 and 0.0 in r["step_labels"] for r in group) for group in groups.values()]
        statistics["right_through_a_wrong_line"] = ratio_of(lucky, [of_prompt.sum() for of_prompt in right])
    return Measurement(len(groups), statistics, {"prompts": len(groups), "responses": len(rows), "samples": samples})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("file", help="file that `fractal-rm sample` wrote")
    parser.add_argument("--arm", default="sft", help="name of the policy in the rows")
    parser.add_argument("--dataset", default="gsm_symbolic")
    parser.add_argument("--results", help="append the row to this file")
    arguments = parser.parse_args(argv)
    path, start = Path(arguments.file), time.monotonic()
    rows = read_rows_of(path)
    settings = path.with_name(f"{path.name}.settings.json")
    if not rows or not settings.is_file():
        sys.exit(f"measure: {path} holds no responses of `fractal-rm sample`. Give the file that it wrote.")
    config = json.loads(settings.read_text(encoding="utf-8"))
    measured = measure(rows, config["samples"])
    found = estimates(measured)
    for name, (value, low, high) in found.items():
        print(f"{name:<28}{value:.3f}  [{low:.3f}, {high:.3f}]")
    if arguments.results:
        config["model"] = Path(config["model"])
        ResultsFile(arguments.results).append(
            benchmark="words",
            arm=arguments.arm,
            dataset=arguments.dataset,
            seed=config["seed"],
            split=config["split"],
            metrics={**measured.counts, **as_columns(found)},
            config=config,
            seconds=time.monotonic() - start,
        )


if __name__ == "__main__":
    main()
