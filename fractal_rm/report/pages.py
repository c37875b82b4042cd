"""The display of scored responses, and writing a page: for the viewer and the quickstart report."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fractal_rm.data.segmentation import gaps
from fractal_rm.files import write_atomic
from fractal_rm.report.palette import score_class, score_css

TEMPLATES = Path(__file__).parent / "templates"
LONG_PROMPT = 400  # characters from which a prompt is folded
UNENCODABLE = re.compile("[\x00\ud800-\udfff]")  # NUL and lone surrogates, invalid in HTML and UTF-8


@dataclass(frozen=True)
class StepView:
    """A step as a page shows it."""

    number: int  # its place in the response, from 1
    text: str  # the step as written
    score: str  # its score as text
    css: str  # class of the score's colour
    gold: str | None  # `"right"`, `"wrong"` or None where no gold label is known
    first_wrong: bool  # whether it is the first step with a wrong gold label
    before: str  # response text between the previous step and this one, empty if only white space
    mistake: str  # `"false alarm"` or `"missed error"` if gold label and score disagree, else empty
    details: str  # score, probability and rank in words
    other: str | None  # the other model's score as text; None without another model
    other_css: str  # class of the colour of that score


@dataclass(frozen=True)
class ResponseView:
    """A response as a page shows it."""

    anchor: str  # name of its place in the page
    name: str  # its name on the page: its id, or its row
    prompt: str  # the prompt as text, a chat with its roles
    folded: bool  # whether the prompt is too long to be shown at once
    steps: tuple[StepView, ...]
    judged: bool  # whether a gold label is known for any of them
    after: str  # text after the last step, empty if only white space
    score: str  # the response score as text
    css: str  # class of the score's colour
    score_value: float | None  # the response score as a number, for sorting, None if there is none
    label: float | None  # the label as a number, None if it is unknown
    label_text: str  # the label as text
    disagrees: bool  # whether score and label are at least half the scale apart
    unscored: str  # note about steps beyond `max_length`, empty if there are none; their text is in `after`
    error: str | None  # why it has no scores, None if it has
    worst: float | None  # the lowest step score, None if there is none
    mistakes: str  # the kinds of mistakes among its steps, joined by commas
    apart: float | None  # difference of the two models' response scores, None without two
    other: str | None  # the other model's response score as text, None without another model
    other_css: str  # class of the colour of that score


def response_view(row: Mapping[str, Any], number: int, *, threshold: float = 0.5) -> ResponseView:
    """What the templates print of a scored response, whose columns `write_viewer` lists.

    `number` is its row, from 1; a step below `threshold` counts as wrong. Raises ValueError if the row has neither
    steps nor an error.

    Example:
        >>> view = response_view({"steps": [{"text": "1+1=3", "score": 0.1, "gold": 0}], "label": 0, "score": 0.1}, 1)
        >>> view.name, view.label_text, view.steps[0].score, view.steps[0].first_wrong
        ('response 1', 'bad', '0.10', True)
    """
    steps, error = row.get("steps"), row.get("error")
    if steps is None and not error:
        raise ValueError(f"Row {number} has neither `steps` nor `error`. Pass the rows that `fractal-rm score` writes.")
    steps = list(steps or [])
    golds = [_gold(step.get("gold")) for step in steps]
    first_wrong = golds.index("wrong") if "wrong" in golds else None
    between = _between(row.get("response"), steps)
    label, score, other = (_finite(row.get(name)) for name in ("label", "score", "other_score"))
    prompt = _prompt_text(row.get("prompt") or "")
    scores = [_finite(step.get("score")) for step in steps]
    known = [value for value in scores if value is not None]
    mistakes = [_mistake(value, gold, threshold) for value, gold in zip(scores, golds, strict=True)]
    return ResponseView(
        anchor=f"response-{number}",
        name=str(row.get("id") or f"response {number}"),
        prompt=prompt,
        folded=len(prompt) > LONG_PROMPT,
        steps=tuple(
            StepView(
                number=index + 1,
                text=step["text"],
                score=_score_text(scores[index]),
                css=score_class(scores[index]),
                gold=golds[index],
                first_wrong=index == first_wrong,
                before=between[index],
                mistake=mistakes[index],
                details=_details(scores[index], known, golds[index]),
                other=_score_text(_finite(step["other_score"])) if "other_score" in step else None,
                other_css=score_class(_finite(step.get("other_score"))),
            )
            for index, step in enumerate(steps)
        ),
        judged=any(golds),
        after=between[-1],
        score=_score_text(score),
        css=score_class(score),
        score_value=score,
        label=label,
        label_text={None: "unknown", 0: "bad", 1: "good"}.get(label, f"{label:g}" if label is not None else ""),
        disagrees=label is not None and score is not None and 0 <= label <= 1 and abs(label - score) >= 0.5,
        unscored=_unscored(row.get("truncated_steps") or 0),
        error=str(error) if error else None,
        worst=min(known, default=None),
        mistakes=",".join(sorted({mistake for mistake in mistakes if mistake})),
        apart=abs(score - other) if score is not None and other is not None else None,
        other=_score_text(other) if "other_score" in row else None,
        other_css=score_class(other),
    )


def write_page(path: str | Path, template: str, *, script: str = "", **context: Any) -> None:
    """Render a template of this package into one self-contained file, written atomically.

    All text is escaped. In addition, the page's content policy forbids loading anything and running any script except
    `script`, so a response's text stays text even if escaping fails.

    `template` and `script` (empty: none) are file names in `report/templates`; `context` is what the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # jinja2's choice by name does not know the ending .html.j2
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    code = (TEMPLATES / script).read_text(encoding="utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    page = environment.get_template(template).render(
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        light_scores=Markup(score_css("light")),
        dark_scores=Markup(score_css("dark")),
        script=Markup(code),
        script_policy=f"'sha256-{digest}'" if script else "'none'",
        **context,
    )
    write_atomic(path, UNENCODABLE.sub("\ufffd", page))


def _mistake(score: float | None, gold: str | None, threshold: float) -> str:
    if score is None or gold is None or (score >= threshold) == (gold == "right"):
        return ""
    return "missed error" if gold == "wrong" else "false alarm"


def _details(score: float | None, all_scores: Sequence[float], gold: str | None) -> str:
    """A step's score, probability and rank in words; equal scores share a rank."""
    if score is None:
        return "not scored"
    rank = 1 + sum(value < score for value in all_scores)
    label = f", labelled {gold}" if gold else ""
    return f"score {score:.4f}: right with {score:.1%}, rank {rank} of {len(all_scores)} from the worst{label}"


def _gold(value: float | None) -> str | None:
    known = _finite(value)
    return None if known is None else "right" if known >= 0.5 else "wrong"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _score_text(score: float | None) -> str:
    return "—" if score is None else f"{score:.2f}"


def _unscored(steps: int) -> str:
    if steps == 0:
        return ""
    return (
        "1 step beyond max_length was not scored" if steps == 1 else f"{steps} steps beyond max_length were not scored"
    )


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in prompt):
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return json.dumps(prompt, ensure_ascii=False, default=str)  # of a row that could not be read


def _between(response: str | None, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Text of the response outside its steps, before each step and after the last; white space counts as none."""
    if response is None or any("start" not in step or "end" not in step for step in steps):
        return [""] * (len(steps) + 1)
    texts = gaps(response, [(step["start"], step["end"]) for step in steps])
    return [text.strip() and text for text in texts]
