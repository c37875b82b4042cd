"""`fractal-rm doctor`: whether versions, device, models and rows suit each other, before a run.

A line for each check: `ok`, `warn` or `fail`, what was looked at, and what to do. Versions are looked at first, and
without importing any of the packages: a set of versions that does not go together may not even be imported.
"""

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fractal_rm.cli.examination.findings import Examination, Finding
from fractal_rm.versions import PACKAGES

if TYPE_CHECKING:  # for `--help`, which looks for them here; the command imports them when versions are known
    from fractal_rm.cli.examination.model_checks import DoctorArguments  # noqa: F401
    from fractal_rm.cli.options.arguments import DataArguments  # noqa: F401

# Exit status if a check fails.
FAILED = 1
# The packages that this one needs, by the name that pip knows it by.
_OURS = "fractal-rm"


def doctor(argv: Sequence[str]) -> None:
    """Check versions, the engine's names and the device; with a model and rows also what they do together.

    Raises:
        SystemExit: With status 1 if a check fails.
        ValueError: If a flag is wrong.
    """
    examination = Examination()
    for name, requirement in needed().items():
        examination.check(name, check_version, requirement)
    examination.check("python", check_python)
    if not examination.has_failed:
        parse = examination.check("import", import_all)
        if parse is not None:
            from fractal_rm.cli.examination.model_checks import DoctorArguments, check_arguments, examine
            from fractal_rm.cli.options.arguments import DataArguments

            arguments, data = parse("doctor", [DoctorArguments, DataArguments], argv)
            check_arguments(arguments, data)
            examination.check("trl names", check_names)
            examination.check("device", check_device)
            examination.check("bfloat16", check_bfloat16)
            examine(examination, arguments, data)
            if arguments.model is None and not examination.has_failed:
                print("`--model` and `--train_file` also check that a model loads, and how it reads your rows.")
    if examination.has_failed:
        raise SystemExit(FAILED)


# Versions -------------------------------------------------------------------------------------------------------------


def needed() -> dict[str, Requirement]:
    """What this package needs without extras, those that results depend on first."""
    found = [Requirement(text) for text in importlib.metadata.requires(_OURS) or []]
    by_name = {one.name: one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})}
    return {name: by_name[name] for name in sorted(by_name, key=lambda name: (name not in PACKAGES, name))}


def check_version(requirement: Requirement) -> Finding:
    """Whether a package is installed in a version of the range.

    Raises:
        ImportError: If it is not, and which to install.
    """
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"It is not installed. Install it: pip install '{requirement}'.") from None
    if not requirement.specifier.contains(version, prereleases=True):
        raise ImportError(
            f"{version} is installed, and fractal-rm needs {requirement.specifier}: pip install '{requirement}'."
        )
    return Finding(f"{version} ({requirement.specifier})")


def check_python() -> Finding:
    """Whether this Python is in the range.

    Raises:
        ImportError: If it is not.
    """
    wanted = SpecifierSet(importlib.metadata.metadata(_OURS)["Requires-Python"])
    version = platform.python_version()
    if not wanted.contains(version, prereleases=True):
        raise ImportError(f"This is Python {version}, and fractal-rm needs {wanted}. Use another interpreter.")
    return Finding(f"{version} ({wanted})")


def import_all() -> Finding:
    """Import what the commands import: versions in range may still not go together."""
    import fractal_rm.ppo.trainer
    import fractal_rm.reward_training.trainer  # noqa: F401
    from fractal_rm.cli.options.parser import parse

    return Finding("The packages can be imported together.", parse)


# The engine and the machine -------------------------------------------------------------------------------------------


def check_names() -> Finding:
    """Whether the private names of TRL that the trainer relies on are there, and do what it expects.

    Raises:
        ImportError: Names the first one that moved.
    """
    from fractal_rm.ppo.contract import TESTED_TRL, check_contract

    moved, (oldest, *_, newest) = list(check_contract()), TESTED_TRL
    if moved:
        also = f" ({len(moved) - 1} more.)" if len(moved) > 1 else ""
        raise ImportError(f"{moved[0]}{also}")
    installed = importlib.metadata.version("trl")
    if Version(installed) > Version(newest):
        return Finding(
            f"All are there, but TRL {installed} is newer than any that StepPPOTrainer is tested with ({oldest} to "
            f"{newest}). Compare a short run with {newest} before a long one.",
            status="warn",
        )
    return Finding(f"All that StepPPOTrainer overrides or calls are there (tested with TRL {oldest} to {newest}).")


def check_device() -> Finding:
    """Which GPUs torch sees."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Finding("; ".join(f"{card.name}, {card.total_memory / 1e9:.0f} GB" for card in cards))
    if torch.version.cuda is not None or torch.version.hip is not None:
        return Finding(
            f"CPU, {torch.get_num_threads()} threads: torch {torch.__version__} is built for GPUs and sees none. If "
            "there should be one, check its driver (`nvidia-smi`) and CUDA_VISIBLE_DEVICES.",
            status="warn",
        )
    return Finding(f"CPU, {torch.get_num_threads()} threads: torch {torch.__version__} is built without CUDA.")


def check_bfloat16() -> Finding:
    """Whether training can compute in bfloat16 here, as transformers decides it."""
    import torch
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    if is_torch_bf16_gpu_available():
        return Finding("The GPU computes in it: `--bf16 true` trains in half the memory for activations.")
    if torch.cuda.is_available():
        return Finding("The GPU does not compute in it. Give `--bf16 false`, and `--fp16 true` if it is to be fast.")
    return Finding("Not without a GPU: models compute in float32, and `--bf16 true` is refused.")
