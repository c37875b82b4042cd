"""The figures of docs/concepts.md, computed by the package from one invented example.

`python docs/tools/figures.py [OUTPUT_DIR]` draws them (default: docs/figures).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from fractal_rm.credit.advantages import gae
from fractal_rm.credit.placement import place_outcome, place_step_rewards, step_end_tokens, token_end_characters
from fractal_rm.credit.shaping import shape_step_scores
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.files import write_atomic
from fractal_rm.objectives.aggregation import aggregate
from fractal_rm.report.drawing import PICTURE, new_figure, style_axes, to_bytes
from fractal_rm.report.palette import ink_on, score_colour
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

FOLDER = Path(__file__).resolve().parents[1] / "figures"
# A response whose second step is wrong, and scores as a good reward model might give them.
RESPONSE = "1: add 4 -> 7\n2: multiply by 3 -> 2\nAnswer: 2"
SCORES = (0.95, 0.1, 0.9)
# Probabilities of steps for the figure of aggregations.
PROBS = (0.9, 0.7, 0.3, 0.8)


def _text(axes: "Axes", x: float, y: float, text: str, colour: str = PICTURE.ink, **options: object) -> None:
    axes.text(x, y, text, color=colour, **{"ha": "center", "va": "center", "fontsize": 10, **options})  # type: ignore[arg-type]


def _box(axes: "Axes", x: float, y: float, title: str, note: str, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch((x - 0.85, y - 0.36), 1.7, 0.72, boxstyle="round,pad=0.04", fc="none", ec=colour, lw=1.6)
    axes.add_patch(box)
    _text(axes, x, y + 0.13, title, fontsize=10.5, weight="bold")
    _text(axes, x, y - 0.15, note, PICTURE.muted, fontsize=8.5)


def _arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": PICTURE.muted, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def data_flow(figure: "Figure") -> None:
    """From labels of responses to step scores, and from those to a policy."""
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(-1.0, 9.6), ylim=(-0.7, 2.9))
    learn, use = PICTURE.series[0], PICTURE.series[2]
    above = [("bags", "steps, one label"), ("scorer", "a logit a step"), ("aggregation", "a logit a response"),
             ("loss", "against the label")]  # fmt: skip
    below = [("step scores", "of rollouts"), ("shaping", "a reward a step"), ("placement", "on the policy's tokens"),
             ("advantages", "and PPO")]  # fmt: skip
    for row, (y, boxes, colour) in enumerate(((2.2, above, learn), (0.2, below, use))):
        for number, (title, note) in enumerate(boxes):
            x = 2.5 * number + 0.3
            _box(axes, x, y, title, note, colour)
            if number:
                _arrow(axes, (x - 1.58, y), (x - 0.92, y))
        _text(axes, -0.55, y + 0.58, ("learning", "using")[row], colour, ha="left", weight="bold")
    _arrow(axes, (2.6, 1.78), (0.5, 0.62))
    _text(axes, 2.5, 1.15, "the trained scorer", PICTURE.muted, fontsize=8.5)


def placement(figure: "Figure") -> None:
    """Which token carries a step's reward: the one that holds the step's last character."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_POLICY)
    ids = tokenizer(RESPONSE)["input_ids"]
    ends = token_end_characters(ids, tokenizer)
    spans = Segmentation("lines")(RESPONSE)
    last = step_end_tokens(ends, spans)
    axes = figure.add_subplot()
    axes.set_axis_off()
    starts = [0, *ends[:-1]]
    lines = [next(n for n, (_, stop) in enumerate(spans) if start <= stop) for start in starts]
    widest = 0.0
    for line, (_, score) in enumerate(zip(spans, SCORES, strict=True)):
        x, y = 0.0, -1.5 * line
        for token, (start, end, where) in enumerate(zip(starts, ends, lines, strict=True)):
            if where != line:
                continue
            text = RESPONSE[start:end].replace("\n", "↵").replace(" ", "·")
            width = 0.24 + 0.17 * len(text)
            holds = token == last[line]
            colour = score_colour(score) if holds else PICTURE.paper
            edge = PICTURE.ink if holds else PICTURE.rule
            axes.add_patch(_rectangle(x, y, width, colour, edge))
            _text(axes, x + width / 2, y, text, ink_on(colour), family="DejaVu Sans Mono")
            if holds:
                _text(axes, x + width / 2, y - 0.62, f"{score:.2f}", PICTURE.ink, fontsize=9, weight="bold")
            x += width + 0.06
        widest = max(widest, x)
    axes.set(xlim=(-0.1, widest + 0.1), ylim=(-1.5 * len(spans) + 0.5, 0.5))


def _rectangle(x: float, y: float, width: float, colour: str, edge: str) -> "Rectangle":
    from matplotlib.patches import Rectangle

    return Rectangle((x, y - 0.35), width, 0.7, facecolor=colour, edgecolor=edge, lw=1.0)


def aggregations(figure: "Figure") -> None:
    """The response's probability, and how much of the gradient each step gets when the label says "bad"."""
    names = ("min", "product", "softmin", "mean", "noisy_or", "max")
    for number, name in enumerate(names):
        logits = torch.logit(torch.tensor([PROBS])).requires_grad_()
        mask = torch.ones_like(logits, dtype=torch.bool)
        bag = aggregate(logits, mask, aggregation=name)  # type: ignore[arg-type]
        torch.nn.functional.softplus(bag).sum().backward()  # the loss of the label 0
        assert logits.grad is not None
        axes = figure.add_subplot(2, 3, number + 1)
        style_axes(axes, PICTURE)
        axes.bar(
            range(len(PROBS)), logits.grad[0].tolist(), color=[score_colour(p) for p in PROBS], ec=PICTURE.ink, lw=0.6
        )
        axes.set_xticks(range(len(PROBS)), [f"{p:.1f}" for p in PROBS])
        axes.set_ylim(0, 1)
        axes.set_title(f"{name}: {bag.sigmoid().item():.2f}", fontsize=10.5, color=PICTURE.ink, loc="left")


def shapings(figure: "Figure") -> None:
    """Rewards of the steps by every form, from the same scores."""
    scores = torch.tensor([SCORES])
    mask = torch.ones_like(scores, dtype=torch.bool)
    forms = ("centered", "raw", "log_odds", "delta", "min_form", "first_mistake")
    for number, name in enumerate(forms):
        rewards = shape_step_scores(scores, mask, shaping=name, center="threshold")[0]  # type: ignore[arg-type]
        axes = figure.add_subplot(1, len(forms), number + 1)
        style_axes(axes, PICTURE)
        axes.axhline(0, color=PICTURE.muted, lw=0.8)
        axes.bar(range(len(SCORES)), rewards.tolist(), color=[score_colour(s) for s in SCORES], ec=PICTURE.ink, lw=0.6)
        axes.set_xticks(range(len(SCORES)), [f"{s:.2f}" for s in SCORES])
        axes.set_title(f"{name}\nsum {rewards.sum().item():.2f}", fontsize=10, color=PICTURE.ink, loc="left")


def advantages(figure: "Figure") -> None:
    """What tokens are told: step rewards name the place of the mistake, an outcome blames every token alike."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_POLICY)
    ids = tokenizer(RESPONSE)["input_ids"]
    ends = step_end_tokens(token_end_characters(ids, tokenizer), Segmentation("lines")(RESPONSE))
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    shaped = shape_step_scores(torch.tensor([SCORES]), torch.ones(1, 3, dtype=torch.bool), center="threshold")
    dense = place_step_rewards(shaped.tolist(), [ends], mask).rewards
    outcome = place_outcome(torch.tensor([-0.5]), mask)
    zero = torch.zeros_like(dense)
    for number, (title, rewards) in enumerate((("rewards of steps", dense), ("reward of the outcome", outcome))):
        axes = figure.add_subplot(1, 2, number + 1, sharey=figure.axes[0] if number else None)
        style_axes(axes, PICTURE)
        axes.bar(range(len(ids)), rewards[0].tolist(), color=PICTURE.rule, ec=PICTURE.muted, lw=0.6, label="reward")
        for lam, style, colour in ((1.0, "--", PICTURE.series[1]), (0.8, "-", PICTURE.series[0])):
            line = gae(rewards, zero, mask, lam=lam)[0][0].tolist()
            axes.plot(range(len(ids)), line, style, color=colour, lw=1.8, label=f"advantage, lam={lam}")
        for end in ends[:-1]:
            axes.axvline((end or 0) + 0.5, color=PICTURE.rule, lw=0.8)
        axes.axhline(0, color=PICTURE.muted, lw=0.8)
        axes.set_title(title, fontsize=10.5, color=PICTURE.ink, loc="left")
        axes.set_xlabel("token of the response")
        axes.set_xticks(range(0, len(ids), 4))
        if not number:
            axes.legend(fontsize=8.5, frameon=False)


# File name -> the function that draws it, and its size in inches.
FIGURES: dict[str, tuple[Callable[["Figure"], None], tuple[float, float]]] = {
    "data_flow": (data_flow, (9.0, 3.2)),
    "placement": (placement, (8.0, 3.0)),
    "aggregation": (aggregations, (8.0, 4.4)),
    "shaping": (shapings, (10.6, 2.6)),
    "advantages": (advantages, (9.0, 3.0)),
}


def draw(name: str) -> str:
    """One figure as SVG."""
    function, size = FIGURES[name]
    with new_figure(*size) as figure:
        function(figure)
        return to_bytes(figure, "svg").decode()


def main(argv: Sequence[str]) -> None:
    """Draw all figures into a folder."""
    folder = Path(argv[0]) if argv else FOLDER
    for name in FIGURES:
        write_atomic(folder / f"{name}.svg", draw(name))


if __name__ == "__main__":
    main(sys.argv[1:])
