"""Question: which recipe should the default be? Variations of the arms on development seeds, which are never reported.

The winners here went through the trials and the study of `dense_vs_outcome.py`; `docs/evidence.md` has the results.

    python -m benchmarks.evidence.dense_vs_outcome_development --settings easy medium --variants mix supervised

Rows go to `benchmarks/results/dense_vs_outcome_development.jsonl` as they are made; finished runs are skipped.
"""

from collections import defaultdict

from benchmarks.evidence.development_arguments import ROWS, TASKS, parse_arguments
from fractal_rm.study.arms import ARMS, Arm, Options
from fractal_rm.study.run import Budget
from fractal_rm.study.statistics import latest
from fractal_rm.study.study import Study, Unit

_GAE: Options = {"advantage": "gae", "learning_rate": 8e-4}
_ONLINE: Options = {"rm_update_every": 4, "rm_learning_rate": 5e-4}
# Each is an arm of the study with other settings.
VARIANTS: dict[str, tuple[Arm, Options]] = {
    "outcome": (ARMS["outcome_ppo"], {"lam": 1.0}),
    "supervised": (ARMS["supervised"], {}),
    "supervised+outcome": (Arm("supervised+outcome", steps="supervised", outcome=True), {}),
    "steps": (ARMS["fractal"], {}),
    "mix": (ARMS["fractal_mix"], {}),
    "mix_0.3": (ARMS["fractal_mix"], {"outcome_weight": 0.3}),
    "mix_online": (ARMS["fractal_mix"], _ONLINE),
    # Forms of step rewards with a sum or bound that does not grow with the number of steps.
    "mix_response": (ARMS["fractal_mix"], {"center": "response"}),
    "mix_min_form": (ARMS["fractal_mix"], {"shaping": "min_form", "step_lam": 1.0}),
    "mix_cap": (ARMS["fractal_mix"], {"length_neutral": "cap"}),
    "steps_response": (ARMS["fractal"], {"center": "response"}),
    "steps_min_form": (ARMS["fractal"], {"shaping": "min_form", "step_lam": 1.0}),
}


def main() -> None:
    """Run what is missing and print the mean accuracy over evaluations, and that at the end, of each run."""
    arguments = parse_arguments(__doc__, "variants", VARIANTS)
    study = Study(
        ROWS,
        arguments.output_dir,
        Budget(),
        chosen={name: _GAE | options for name, (_, options) in VARIANTS.items()},
        tasks=TASKS,
        arms={name: arm for name, (arm, _) in VARIANTS.items()},
        split="development",
    )
    study.run_all([Unit(s, n, v) for n in arguments.seeds for s in arguments.settings for v in arguments.variants], 1)
    found = defaultdict(list)
    for row in latest(study.rows(), split="development"):
        if row["metrics"]["rollouts"]:
            found[row["dataset"], row["arm"], row["seed"]].append(row["metrics"]["accuracy"])
    for run, points in sorted(found.items()):
        print(*run, f"mean {sum(points) / len(points):.3f}, end {points[-1]:.3f}")


if __name__ == "__main__":
    main()
