"""The claims of the comparison, met or not: computed from paired differences, never typed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.evidence.arms import MAIN_CONDITIONS
from benchmarks.evidence.statistics import Evidence, evidence
from fractal_rm.study.statistics import Rows, finished_runs
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS

# The claims: points of accuracy, and shares.
GAIN, LONG_GAIN, LONG = 0.05, 0.15, 6
NEAR_CEILING = COLLAPSE = 0.02
WANTED, WANTED_WITH_COST = 5, 3


@dataclass(frozen=True)
class Claim:
    """A claim about some settings.

    Args:
        text: What is claimed.
        holds: Conditions where it holds.
        known: Conditions whose rows decide it.
        asked: On how many it should hold.
        undecided: How many settings have too few seeds.
        learning: Those of the known settings on which outcome-only learns something.
    """

    text: str
    holds: tuple[str, ...]
    known: tuple[str, ...]
    asked: int
    undecided: int
    learning: tuple[str, ...]

    @property
    def state(self) -> str:
        """Whether it holds on as many settings as it should: `"met"`, `"not met"`, or `"undecided"` so far."""
        if len(self.holds) >= self.asked:
            return "met"
        return "undecided" if len(self.holds) + self.undecided >= self.asked else "not met"


def claims(found: Mapping[str, Evidence]) -> list[Claim]:
    """The claims of the study about an arm, from the main settings that have enough seeds.

    Args:
        found: What [`evidence`] says of it, by setting.
    """
    long = tuple(name for name in MAIN_CONDITIONS if CONDITIONS[name].min_steps >= LONG)

    def claim(text: str, asked: int, what: Any, test: Any, among: Sequence[str] = MAIN_CONDITIONS) -> Claim:
        # A difference without an interval has too few seeds.
        known = tuple(n for n in among if n in found and (gap := what(found[n])) is not None and not np.isnan(gap.low))
        holds = tuple(name for name in known if test(found[name]))
        learning = tuple(name for name in known if found[name].learns)
        return Claim(text, holds, known, asked, len(among) - len(known), learning)

    return [
        claim(
            f"at half of the outcome-only gain: {GAIN:.0%} more, the interval above 0",
            WANTED,
            lambda r: r.half,
            lambda r: r.half.value >= GAIN and r.half.low > 0,
        ),
        claim("never significantly below at the end", len(MAIN_CONDITIONS), lambda r: r.end, lambda r: r.end.high >= 0),
        claim(
            f"problems of {LONG} or more steps: {LONG_GAIN:.0%} more at that point",
            len(long),
            lambda r: r.half,
            lambda r: r.half.value >= LONG_GAIN,
            long,
        ),
        claim(
            "at most half of the rollouts to reach its end",
            WANTED,
            lambda r: r.reach,
            lambda r: r.reach.value <= 0.5,
        ),
        claim(
            "ahead with the reward model's rollouts counted in, the interval above 0",
            WANTED_WITH_COST,
            lambda r: r.longer,
            lambda r: r.longer.low > 0,
        ),
        claim(
            f"within {NEAR_CEILING:.0%} of supervised steps",
            WANTED,
            lambda r: r.ceiling,
            lambda r: r.ceiling.value >= -NEAR_CEILING,
        ),
        claim(
            f"no collapse: every run ends within {COLLAPSE:.0%} of its best",
            len(MAIN_CONDITIONS),
            lambda r: r.end,
            lambda r: r.drop <= COLLAPSE,
        ),
    ]


def verdicts(rows: Rows, arms: Sequence[str]) -> list[str]:
    """A sentence for each claim and arm: met or not; none where no setting has enough seeds."""
    runs, lines = finished_runs(rows), []
    for arm in arms:
        for claim in claims(evidence(runs, arm)):
            if not claim.known:
                continue
            lines.append(
                f"{arm}: {claim.text}: {claim.state} ({len(claim.holds)} of {len(claim.known)} settings with rows, "
                f"{claim.asked} asked)."
            )
    return lines
