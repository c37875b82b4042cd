"""Signs of reward hacking, measured on every rollout batch and compared with the first batches of the run.

A policy that games its reward model leaves traces: scores rise while checked outcomes do not, responses grow by steps
that say nothing new, or become empty. No threshold fits every task, so a run is its own reference: its first batches,
before there was time to learn a trick. An alarm is a reason to look at completions, not a proof.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fractal_rm.credit.moments import RunningMoments

# Steps with at least this score are at the ceiling: the reward model cannot rank them any further.
CEILING = 0.99
# Four tokens are the usual n-gram length for measuring repetition: shorter n-grams repeat in any text.
NGRAM = 4
# Minimum width of a signal's limit, in standard deviations of the first batches.
SPREAD = 4.0
# Words that sound confident without content. They are English; in another language the signal stays at 0.
CONFIDENCE = re.compile(
    r"\b(clearly|obviously|certainly|definitely|undoubtedly|surely|evidently|indeed|therefore|thus|hence|of course"
    r"|without (a )?doubt|no doubt)\b",
    re.IGNORECASE,
)
# Number of most frequent words whose usual position in a response is stored.
REMEMBERED_WORDS = 1000
# Variances of positions below this are rounding errors.
ROUNDING = 1e-9


class Place(NamedTuple):
    """Positions of a word, from 0 (first step) to 1 (last step): count, sum and sum of squares."""

    count: int
    total: float
    squares: float

    def plus(self, other: "Place") -> "Place":
        """The sum of both counts and sums."""
        return Place(self.count + other.count, self.total + other.total, self.squares + other.squares)


NOWHERE = Place(0, 0.0, 0.0)
Places = Mapping[str, Place]


@dataclass(frozen=True)
class GuardInputs:
    """A rollout batch as the guards see it: one entry per response in every list.

    Attributes:
        token_ids: Tokens that the policy wrote, without EOS and padding.
        ended: Whether the response ended by itself; False: it was cut at the length limit.
        steps: Text of each step; no steps at all without a reward model.
        step_scores: P(step is good) of each step.
        scores: P(response is good) by the reward model; NaN where it could not score.
        outcomes: Checked outcome; NaN where there is none.
        kl: KL divergence from the reference over the response, in nats; NaN where unknown.
        prompts: The prompt.
        unscored: Whether a reward model could not judge the response; empty if unknown.
        steps_beyond_limit: Number of steps that it did not read; empty if unknown.
    """

    token_ids: Sequence[Sequence[int]]
    ended: Sequence[bool]
    steps: Sequence[Sequence[str]]
    step_scores: Sequence[Sequence[float]]
    scores: Sequence[float]
    outcomes: Sequence[float]
    kl: Sequence[float]
    prompts: Sequence[str]
    unscored: Sequence[bool] = ()
    steps_beyond_limit: Sequence[int] = ()


# A rise of the mean outcome by this much is progress, which excuses some otherwise suspicious signals.
PROGRESS = 0.1


class Limit(NamedTuple):
    """How far a signal may deviate from the first batches, up or down: by `margin`, or by the share `factor`.

    A factor of 1 allows doubling and halving. With `excuses`, a batch with better outcomes than the first batches is
    not beyond the limit. An `absolute` limit is `margin` in every batch, including the first ones: a run that is wrong
    from its start is not a reference.
    """

    up: bool
    down: bool
    margin: float
    factor: float
    excuses: bool = False
    absolute: bool = False


# The watched signals. The margins are this package's choice, wide enough for the tests' scripted honest policies.
# Correlation falls in honest runs too: mistakes that the reward model sees go first, and those that it does not see
# stay. In a quickstart run (seed 0, 60 updates) it fell from .86 to .45 while held-out accuracy rose from .35 to .68;
# so progress excuses it.
LIMITS = {
    "score_outcome_correlation": Limit(up=False, down=True, margin=0.4, factor=0.0, excuses=True),
    "score_outcome_gap": Limit(up=True, down=False, margin=0.2, factor=0.0),
    "steps_per_response": Limit(up=True, down=True, margin=0.5, factor=1.0),
    "tokens_per_step": Limit(up=True, down=True, margin=1.0, factor=1.0),
    "repeated_steps": Limit(up=True, down=False, margin=0.15, factor=0.0),
    "repeated_ngrams": Limit(up=True, down=False, margin=0.2, factor=0.0),
    "generic_steps": Limit(up=True, down=False, margin=0.2, factor=0.0),
    "confidence_markers": Limit(up=True, down=False, margin=0.2, factor=0.0),
    "step_order": Limit(up=False, down=True, margin=0.2, factor=1.0),
    "truncated": Limit(up=True, down=False, margin=0.3, factor=0.0),
    "empty": Limit(up=True, down=False, margin=0.1, factor=0.0),
    "kl_per_token": Limit(up=True, down=False, margin=0.5, factor=0.0),
    "ceiling_over_outcome": Limit(up=True, down=False, margin=0.5, factor=0.0),
    "unscored": Limit(up=True, down=False, margin=0.2, factor=0.0, absolute=True),
    "steps_beyond_limit": Limit(up=True, down=False, margin=0.2, factor=0.0, absolute=True),
}


def _mean(values: Sequence[float]) -> float:
    """Mean of the known values; NaN if none is known."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def agreement(scores: Sequence[float], outcomes: Sequence[float]) -> tuple[float, float]:
    """Correlation and gap of reward-model scores and checked outcomes.

    Args:
        scores: P(response is good) of each response; NaN is left out.
        outcomes: Checked outcome of each response; NaN is left out.

    Returns:
        Pearson's correlation, NaN where either is constant, and mean score minus mean outcome, NaN where outcomes are
        not in [0, 1]: on another scale a gap says nothing.

    Example:
        >>> agreement([0.9, 0.9, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0])
        (0.5773..., 0.25)
    """
    pairs = [(s, o) for s, o in zip(scores, outcomes, strict=True) if not (math.isnan(s) or math.isnan(o))]
    if not pairs:
        return math.nan, math.nan
    (score, outcome) = torch.tensor(pairs, dtype=torch.float64).T
    correlation = math.nan
    if len(pairs) > 1 and score.std() > 0 and outcome.std() > 0:
        correlation = float(torch.corrcoef(torch.stack([score, outcome]))[0, 1])
    in_range = bool(((outcome >= 0) & (outcome <= 1)).all())
    return correlation, float((score - outcome).mean()) if in_range else math.nan


def repeated(items: Sequence[Any]) -> float:
    """Share of the items that occurred earlier in the list; NaN without items.

    Example:
        >>> repeated(["a", "b", "a", "a"])
        0.5
    """
    return 1.0 - len(set(items)) / len(items) if items else math.nan


def generic(steps: Sequence[Sequence[str]], prompts: Sequence[str]) -> float:
    """Share of the steps that also occur, word for word, in a response to another prompt; NaN with a single prompt.

    Filler fits any question, and so do the pieces of a finely split step.

    Example:
        >>> generic([["2+2=4.", "Let me think."], ["Let me think.", "1+6=7."]], ["2+2?", "1+6?"])
        0.5
    """
    found = defaultdict(set)
    for row, prompt in zip(steps, prompts, strict=True):
        for text in row:
            found[text].add(prompt)
    if len(set(prompts)) < 2:
        return math.nan
    return _mean([float(len(found[text]) > 1) for row in steps for text in row])


def word_places(steps: Sequence[Sequence[str]]) -> dict[str, Place]:
    """Positions of each word in responses of two or more steps; all numbers count as one word.

    Args:
        steps: Text of each step of each response.

    Returns:
        Positions of each word: 0 in the first step, 1 in the last.

    Example:
        >>> word_places([["First 12", "so 17"]])
        {'first': Place(count=1, total=0.0, squares=0.0), '#': Place(count=2, total=1.0, squares=1.0), 'so': ...}
    """
    places: dict[str, Place] = {}
    for row in steps:
        for number, text in enumerate(row if len(row) > 1 else ()):
            place = number / (len(row) - 1)
            for word in re.sub(r"\d+", "#", text.lower()).split():
                places[word] = places.get(word, NOWHERE).plus(Place(1, place, place**2))
    return places


def most_frequent(several: Iterable[Places]) -> dict[str, Place]:
    """Positions of the most frequent words in several batches, or on several processes."""
    sums: dict[str, Place] = {}
    for places in several:
        for word, place in places.items():
            sums[word] = sums.get(word, NOWHERE).plus(place)
    # Ties are broken alphabetically, so the words are the same on every process and after resuming.
    kept = sorted(sums, key=lambda word: (-sums[word].count, word))[:REMEMBERED_WORDS]
    return {word: sums[word] for word in kept}


def order_agreement(places: Places, usual: Places) -> float:
    """Correlation, over the words of a batch, of their positions with the usual positions of the same words.

    If a response says the same in another order, its words move: the correlation falls to 0, or below 0 if the order is
    reversed.

    Args:
        places: Words of a batch.
        usual: Words of the first batches.

    Returns:
        A number in [-1, 1]; NaN with fewer than two known words, or if all words have the same position.

    Example:
        >>> usual = word_places([["first 1", "then 2", "so 3"]])
        >>> round(order_agreement(word_places([["so 3", "then 2", "first 1"]]), usual), 2)
        -0.71
    """
    pairs = [(place, usual[word].total / usual[word].count) for word, place in places.items() if word in usual]
    count = sum(place.count for place, _ in pairs)
    if not count:
        return math.nan
    here, there = sum(p.total for p, _ in pairs) / count, sum(p.count * mean for p, mean in pairs) / count
    together = sum(p.total * mean for p, mean in pairs) / count - here * there
    spreads = (
        sum(p.squares for p, _ in pairs) / count - here**2,
        sum(p.count * mean**2 for p, mean in pairs) / count - there**2,
    )
    return together / math.sqrt(spreads[0] * spreads[1]) if min(spreads) > ROUNDING else math.nan


def measure_rollouts(rollouts: GuardInputs) -> dict[str, float]:
    """Measure the signals of [`LIMITS`], the mean outcome, and the plain share of steps at the ceiling.

    `step_order` is not among them, because it needs the first batches of the run ([`Guards.order`]).

    Args:
        rollouts: The batch.

    Returns:
        One number per signal, NaN if the batch cannot measure it. `outcome` is known if outcomes are in [0, 1];
        `repeated_steps` and `repeated_ngrams` are shares within a response, averaged over responses; `empty` counts
        responses without any token; `unscored` and `steps_beyond_limit` are shares of the responses and of the steps;
        `ceiling_over_outcome` is the share of steps at the ceiling that checked outcomes do not account for: a policy
        that is always right belongs there.
    """
    steps = [[text.strip() for text in row] for row in rollouts.steps]
    ngrams = [[tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)] for ids in rollouts.token_ids]
    correlation, gap = agreement(rollouts.scores, rollouts.outcomes)
    count, tokens = sum(map(len, steps)), sum(map(len, rollouts.token_ids))
    scored = [score for row in rollouts.step_scores for score in row]
    ceiling = _mean([float(score >= CEILING) for score in scored])
    outcome = math.nan if math.isnan(gap) else _mean(rollouts.outcomes)
    has_steps, beyond = count > 0, sum(rollouts.steps_beyond_limit)
    return {
        "score_outcome_correlation": correlation,
        "score_outcome_gap": gap,
        "outcome": outcome,
        "steps_per_response": count / len(steps) if has_steps else math.nan,
        "tokens_per_step": tokens / count if has_steps else math.nan,
        "repeated_steps": _mean([repeated([text for text in row if text]) for row in steps]),
        "repeated_ngrams": _mean([repeated(row) for row in ngrams]),
        "generic_steps": generic(steps, rollouts.prompts),
        "confidence_markers": _mean([float(bool(CONFIDENCE.search(text))) for row in steps for text in row]),
        "truncated": _mean([float(not ended) for ended in rollouts.ended]),
        "empty": _mean([float(not ids) for ids in rollouts.token_ids]),
        "kl_per_token": _mean(rollouts.kl) * len(rollouts.token_ids) / tokens if tokens else math.nan,
        "steps_at_ceiling": ceiling,
        "ceiling_over_outcome": ceiling - (0.0 if math.isnan(outcome) else outcome),
        "unscored": _mean(list(map(float, rollouts.unscored))),
        "steps_beyond_limit": beyond / (count + beyond) if count + beyond and rollouts.steps_beyond_limit else math.nan,
    }


class Alarm(NamedTuple):
    """A signal that has left its limits for several batches in a row.

    Attributes:
        signal: Its name in [`LIMITS`].
        value: The last measured value.
        usual: Its mean over the first batches; NaN if these are not a reference.
        limit: The limit that was passed.
        since: Training step of the first batch beyond it.
    """

    signal: str
    value: float
    usual: float
    limit: float
    since: int

    def __str__(self) -> str:
        if math.isnan(self.usual):
            return (
                f"`{self.signal}` is {self.value:.3g}, beyond {self.limit:.3g} since step {self.since}: the reward "
                "model cannot read what the policy writes; the log says why. Raise the reward model's `max_length`, "
                "or lower `max_completion_length`."
            )
        return (
            f"`{self.signal}` is {self.value:.3g}, beyond {self.limit:.3g} since step {self.since} (in the first "
            f"batches it was {self.usual:.3g}): the policy may be gaming its reward. Read some completions."
        )


def _beyond(value: float, limit: Limit, usual: RunningMoments) -> float | None:
    """The limit that the value is beyond, if any."""
    if limit.absolute:
        return limit.margin if value > limit.margin else None
    spread, size = SPREAD * math.sqrt(usual.variance), abs(usual.mean)
    highest = usual.mean + max(limit.margin, limit.factor * size, spread)
    lowest = usual.mean - max(limit.margin, limit.factor / (1 + limit.factor) * size, spread)
    if limit.up and value > highest:
        return highest
    return lowest if limit.down and value < lowest else None


class Guards:
    """Compares each batch with the first ones, and raises an alarm if a signal stays beyond its limit.

    Args:
        reference_batches: First batches, which define the normal range. They raise no alarm, except for absolute
            limits.
        patience: Consecutive batches beyond a limit before an alarm. Each such streak raises one alarm.

    Attributes:
        raised: Number of alarms raised by this object.

    Example:
        >>> guards = Guards(reference_batches=1, patience=2)
        >>> [guards.update({"empty": share}, step=step) for step, share in enumerate([0.0, 0.9])]
        [[], []]
        >>> print(guards.update({"empty": 1.0}, step=2)[0])
        `empty` is 1, beyond 0.1 since step 1 (in the first batches it was 0): the policy may be gaming its reward...
    """

    def __init__(self, *, reference_batches: int = 8, patience: int = 3) -> None:
        self.reference_batches, self.patience = reference_batches, patience
        self._batches = self.raised = 0
        self._usual = {signal: RunningMoments() for signal in ("outcome", *LIMITS)}
        self._places: Places = {}  # word positions in the first batches
        self._since: dict[str, int] = {}  # first step of the current streak beyond the limit
        self._strikes: dict[str, int] = {}  # length of the streak

    def order(self, places: Places) -> float:
        """`step_order` of a batch: [`order_agreement`] with the first batches, which may include it.

        Args:
            places: Word positions in the batch that [`Guards.update`] gets next.
        """
        found = order_agreement(places, self._places)
        if self._batches < self.reference_batches:
            self._places = most_frequent([self._places, places])
        return found

    def update(self, measured: Mapping[str, float], *, step: int) -> list[Alarm]:
        """Add a batch and return its alarms.

        Args:
            measured: The result of [`measure_rollouts`].
            step: The training step, for the alarm.

        Returns:
            The alarms that this batch completes.
        """
        self._batches += 1
        reference = self._batches <= self.reference_batches
        if reference:
            for signal, usual in self._usual.items():
                value = measured.get(signal, math.nan)
                usual.update(torch.tensor([] if math.isnan(value) else [value], dtype=torch.float64))
        progress = measured.get("outcome", math.nan) > self._usual["outcome"].mean + PROGRESS
        alarms = []
        for signal, limit in LIMITS.items():
            value, usual = measured.get(signal, math.nan), self._usual[signal]
            if math.isnan(value) or (reference and not limit.absolute):
                continue
            beyond = _beyond(value, limit, usual) if usual.count or limit.absolute else None
            if beyond is None or (progress and limit.excuses):
                self._strikes[signal] = 0
                continue
            self._strikes[signal] = self._strikes.get(signal, 0) + 1
            if self._strikes[signal] == 1:
                self._since[signal] = step
            if self._strikes[signal] == self.patience:
                mean = math.nan if limit.absolute else usual.mean
                alarms.append(Alarm(signal, value, mean, beyond, self._since[signal]))
        self.raised += len(alarms)
        return alarms

    def forgive(self) -> None:
        """Reset all streaks beyond limits, because the policy was rolled back."""
        self._strikes = {}

    def state_dict(self) -> dict[str, Any]:
        """The state to save, for JSON."""
        usual = {signal: moments.state_dict() for signal, moments in self._usual.items()}
        places = {word: list(found) for word, found in self._places.items()}
        return {
            "batches": self._batches,
            "usual": usual,
            "since": self._since,
            "strikes": self._strikes,
            "places": places,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state. A signal that the state lacks has no reference and raises no alarm."""
        self._batches, self._since, self._strikes = state["batches"], dict(state["since"]), dict(state["strikes"])
        self._places = {word: Place(*found) for word, found in state.get("places", {}).items()}
        for signal, usual in self._usual.items():
            if signal in state["usual"]:
                usual.load_state_dict(state["usual"][signal])
