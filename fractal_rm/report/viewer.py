"""A page for reading scored responses: every step with its score, sorted and filtered in the browser, without a
server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fractal_rm.report.pages import response_view, write_page


def write_viewer(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    title: str = "Step scores",
    *,
    threshold: float = 0.5,
    models: tuple[str, str] | None = None,
) -> None:
    """Write scored responses as one HTML page that needs only a browser.

    Args:
        path: Where to write the page.
        rows: One mapping per response: `prompt` (text or chat), `steps` (each with `text`, `score` and, where known,
            `gold`: 1 right, 0 wrong), `score` of the response, and optionally `id`, `label`, `response` (with `start`
            and `end` in the steps, text outside the steps is shown too), `truncated_steps` (how many steps beyond
            `max_length` were not scored), `error`, which replaces the steps, and `other_score`, of the response and of
            each step: a second model's scores.
        title: Heading of the page.
        threshold: Score below which a step counts as wrong; it defines false alarms and missed errors.
        models: Names of the two models if rows have scores of a second one.

    Raises:
        ValueError: If a row has neither steps nor an error.

    Example:
        >>> import pathlib, tempfile
        >>> step = {"text": "2+2=5", "start": 0, "end": 5, "score": 0.08, "gold": 0}
        >>> row = {"id": "a", "prompt": "2+2?", "response": "2+2=5", "label": 0, "steps": [step], "score": 0.08}
        >>> page = pathlib.Path(tempfile.mkdtemp()) / "view.html"
        >>> write_viewer(page, [row])
        >>> "2+2=5" in page.read_text(encoding="utf-8")
        True
    """
    responses = [response_view(row, number, threshold=threshold) for number, row in enumerate(rows, start=1)]
    write_page(
        path,
        "viewer.html.j2",
        script="viewer.js",
        title=title,
        responses=responses,
        step_count=sum(len(response.steps) for response in responses),
        any_label=any(response.label is not None for response in responses),
        any_error=any(response.error for response in responses),
        any_gold=any(response.judged for response in responses),
        threshold=threshold,
        models=models,
    )
