"""Tables of the study in docs/evidence.md and docs/evidence_tables.md, from its rows."""

from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.claims import claims
from benchmarks.evidence.statistics import Evidence, area, area_difference, end_difference, evidence, largest_fall
from fractal_rm.evaluation.intervals import Estimate
from fractal_rm.report.tables import MISSING, format_number
from fractal_rm.study.arms import CEILING
from fractal_rm.study.page import DEFAULT, by_setting, end, iqm, points, table_lines
from fractal_rm.study.statistics import Curves, Rows, Runs, curves, finished_runs, shared_seeds
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS

DEFAULT_ARMS = (DEFAULT, f"{DEFAULT}_own_rate", "fractal", "fractal_online")
# The arm that the others vary or rival, paired seed by seed.
REFERENCE = "fractal"
# Shares of the rollouts at which a table shows the accuracy: after 10, 20 and 40 updates of the study.
PROGRESS = (0.25, 0.5, 1.0)
# Results of `evidence`, for several arms.
Found = Mapping[str, Mapping[str, Evidence]]
UNDECIDED = "No setting has five seeds yet, which an interval needs."


def tables(rows: Rows) -> dict[str, str]:
    """Each table of the page by its name; a table without rows says so."""
    runs = finished_runs(rows)
    found = {arm: evidence(runs, arm) for arm in DEFAULT_ARMS}
    ours = {DEFAULT: found[DEFAULT]}

    def shown(cell: Callable[[str, str], str]) -> str:
        return by_setting(runs, ARMS, cell)

    def last(metric: str, digits: int = 3) -> str:
        return shown(lambda setting, arm: iqm(curves(runs, setting, arm, metric), end, digits))

    def area_of(setting: str, arm: str) -> str:
        return iqm(curves(runs, setting, arm), lambda one: area(one.rollouts, one.values), 3)

    def against(difference: Callable[[Curves | None, Curves | None], Estimate | None]) -> str:
        return shown(lambda setting, arm: _against(runs, setting, arm, difference))

    def gap(setting: str, arm: str) -> str:
        return _gaps(curves(runs, setting, arm, "rm_score"), curves(runs, setting, arm))

    def fall(setting: str, arm: str) -> str:
        return _falls(curves(runs, setting, arm), curves(runs, setting, arm, "alarms"))

    return {
        "summary": _summary(runs, found[DEFAULT]),
        "claims": _claims(runs, found),
        "claims_default": _claims(runs, ours),
        "gains": _gains(found),
        "accuracy": last("accuracy"),
        "progress": shown(lambda setting, arm: _progress(curves(runs, setting, arm))),
        "area": shown(area_of),
        "greedy": last("accuracy_greedy"),
        "step_accuracy": last("step_accuracy"),
        "against": against(end_difference),
        "against_area": against(area_difference),
        "equal_cost": _equal_cost(runs, found),
        "costs": _costs(found[DEFAULT]),
        "cost": shown(lambda setting, arm: _seconds(curves(runs, setting, arm))),
        "length": last("response_tokens", 1),
        "kl": last("kl", 1),
        "hacking": shown(gap),
        "falls": shown(fall),
    }


def _share(found: Estimate) -> str:
    """A share of rollouts with its interval, if it has one."""
    if np.isnan(found.low):
        return _percent(found.value)
    return f"{_percent(found.value)} [{_percent(found.low)}, {_percent(found.high)}]"


def _percent(share: float) -> str:
    return f"{share:.0%}" if np.isfinite(share) else "never"


def _claims(runs: Runs, found: Found) -> str:
    body = []
    for arm, settings in found.items():
        for claim in claims(settings):
            if claim.known:
                state = "**met**" if claim.state == "met" else claim.state
                learning = sum(name in claim.learning for name in claim.holds)
                body.append([
                    arm, claim.text, str(claim.asked), f"{len(claim.holds)} of {len(claim.known)}", state,
                    f"{learning} of {len(claim.learning)}", ", ".join(claim.holds) or MISSING,
                ])  # fmt: skip
    if runs and not body:
        return UNDECIDED
    header = ["arm", "claim", "settings asked", "settings met", "state", "met where outcome-only learns", "where"]
    return table_lines(header, body)


def _summary(runs: Runs, settings: Mapping[str, Evidence]) -> str:
    """What a reader wants first: a line a setting, the default arm against the better outcome-only one."""
    body = []
    for setting, found in settings.items():
        supervised = curves(runs, setting, CEILING)
        ceiling = MISSING if supervised is None else f"{100 * supervised.values[:, -1].mean():.1f}"
        if supervised is not None and len(supervised.seeds) != found.seeds:
            ceiling += f" (seeds: {len(supervised.seeds)})"
        body.append([
            setting, str(found.seeds), *(f"{100 * value:.1f}" for value in reversed(found.means)), ceiling,
            points(found.half), points(found.end), _percent(found.reach.value) if found.learns else MISSING,
        ])  # fmt: skip
    header = [
        "setting", "seeds", "outcome only", DEFAULT, CEILING, "gain half-way", "gain at the end",
        "rollouts to reach outcome-only's end",
    ]  # fmt: skip
    return table_lines(header, body)


def _lines_of(found: Found) -> list[tuple[str, str, Evidence]]:
    """Setting, arm and comparison, setting by setting."""
    return [(name, arm, found[arm][name]) for name in CONDITIONS for arm in found if name in found[arm]]


def _gains(found: Found) -> str:
    body = [
        [
            setting, arm, one.rival, str(one.seeds), format_number(int(one.half_rollouts)), points(one.half),
            points(one.end), points(one.area), f"{one.improvement:.2f}",
            _share(one.reach) if one.learns else MISSING, points(one.ceiling), f"{100 * one.drop:.1f}",
        ]
        for setting, arm, one in _lines_of(found)
    ]  # fmt: skip
    header = [
        "setting", "arm", "better outcome-only arm", "seeds", "rollouts at half of its gain", "difference there",
        "difference at the end", "difference of areas", "P(better)", "share of rollouts to reach its end",
        "to supervised steps", "largest fall of a run",
    ]  # fmt: skip
    return table_lines(header, body)


def _costs(settings: Mapping[str, Evidence]) -> str:
    """What is left of the default arm's gain as its reward model's rollouts, then all its seconds are counted."""
    body = [
        [setting, points(one.end), points(one.longer), points(one.with_seconds)] for setting, one in settings.items()
    ]
    header = ["setting", "at equal rollouts", "reward model's rollouts counted", "processor seconds counted"]
    return table_lines(header, body)


def _equal_cost(runs: Runs, found: Found) -> str:
    body = []
    for setting, arm, one in _lines_of(found):
        ours, theirs = curves(runs, setting, arm), curves(runs, setting, one.rival)
        if ours is not None and theirs is not None:
            seconds = (ours.rm_seconds, ours.seconds[-1], theirs.seconds[-1])
            body.append([
                setting, arm, format_number(int(ours.rm_rollouts)), *(f"{value:.0f}" for value in seconds),
                points(one.end), points(one.longer), points(one.with_rollouts), points(one.with_seconds),
            ])  # fmt: skip
    header = [
        "setting", "arm", "rollouts of the reward model", "its seconds", "seconds of our run",
        "seconds of outcome-only", "at equal rollouts", "outcome-only has those rollouts too",
        "our arm has those less", "outcome-only has all those seconds",
    ]  # fmt: skip
    return table_lines(header, body)


def _against(
    runs: Runs,
    setting: str,
    arm: str,
    difference: Callable[[Curves | None, Curves | None], Estimate | None],
) -> str:
    """What an arm is better than the reference by, and how many seeds both have."""
    ours, theirs = (curves(runs, setting, name) for name in (arm, REFERENCE))
    found = difference(ours, theirs)
    if arm == REFERENCE or found is None or ours is None or theirs is None:
        return MISSING
    return f"{points(found)} ({len(shared_seeds(ours, theirs))})"


def _progress(found: Curves | None) -> str:
    """Mean accuracy at shares of the rollouts."""
    if found is None:
        return MISSING
    shares = np.isin(found.rollouts, [share * found.rollouts[-1] for share in PROGRESS])
    return " / ".join(f"{value:.2f}" for value in found.values.mean(axis=0)[shares])


def _seconds(found: Curves | None) -> str:
    """Processor seconds of training, and those of the reward model and its responses."""
    if found is None:
        return MISSING
    return f"{found.seconds[-1]:.0f}" + (f" + {found.rm_seconds:.0f}" if found.rm_seconds else "")


def _gaps(score: Curves | None, truth: Curves | None) -> str:
    """What the reward model thinks of held-out responses, less their accuracy, at the start and at the end."""
    if score is None or truth is None:
        return MISSING
    gaps = score.values.mean(axis=0) - truth.values.mean(axis=0)
    return f"{gaps[0]:+.2f} to {gaps[-1]:+.2f}"


def _falls(truth: Curves | None, alarms: Curves | None) -> str:
    """Points that a run ends below its best, at most; alarms of a run, where there were any."""
    if truth is None or alarms is None:
        return MISSING
    raised = alarms.values[:, -1].mean()
    return f"{100 * largest_fall(truth.values):.1f}" + (f", {raised:.1f} alarms" if raised else "")
