"""`fractal-rm doctor`: check before a run that versions, device, models and rows fit together.

Each check prints a line: `ok`, `warn` or `fail`, its subject, and what to do. Versions come first and are checked
without importing any package, because incompatible versions may fail to import.
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
# The name of this package for pip.
_OURS = "fractal-rm"


def doctor(argv: Sequence[str]) -> None:
    """Check versions, TRL's private names and the device; with a model and rows, also how they work together.

    Exits with status 1 if a check fails; raises ValueError if a flag is wrong.
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
    """The packages that this one requires without extras; those that results depend on come first."""
    found = [Requirement(text) for text in importlib.metadata.requires(_OURS) or []]
    by_name = {one.name: one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})}
    return {name: by_name[name] for name in sorted(by_name, key=lambda name: (name not in PACKAGES, name))}


def check_version(requirement: Requirement) -> Finding:
    """Check that a package is installed in a supported version; raises ImportError if not."""
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
    """Check that this Python is supported; raises ImportError if not."""
    wanted = SpecifierSet(importlib.metadata.metadata(_OURS)["Requires-Python"])
    version = platform.python_version()
    if not wanted.contains(version, prereleases=True):
        raise ImportError(f"This is Python {version}, and fractal-rm needs {wanted}. Use another interpreter.")
    return Finding(f"{version} ({wanted})")


def import_all() -> Finding:
    """Import what the commands import: even versions within their ranges may be incompatible."""
    import fractal_rm.ppo.trainer
    import fractal_rm.reward_training.trainer  # noqa: F401
    from fractal_rm.cli.options.parser import parse

    return Finding("The packages can be imported together.", parse)


# The engine and the machine -------------------------------------------------------------------------------------------


def check_names() -> Finding:
    """Check TRL's private names that the trainer relies on; raises ImportError with the first that moved."""
    from fractal_rm.ppo.contract import TESTED_TRL, check_contract

    moved, (oldest, *_, newest) = list(check_contract()), TESTED_TRL
    if moved:
        also = f" ({len(moved) - 1} more.)" if len(moved) > 1 else ""
        raise ImportError(f"{moved[0]}{also}")
    installed = importlib.metadata.version("trl")
    if Version(installed) > Version(newest):
        return Finding(
            f"All names exist, but TRL {installed} is newer than any that StepPPOTrainer is tested with ({oldest} to "
            f"{newest}). Compare a short run with {newest} before a long one.",
            status="warn",
        )
    return Finding(f"All names that StepPPOTrainer overrides or calls exist (tested with TRL {oldest} to {newest}).")


def check_device() -> Finding:
    """List the GPUs that torch sees."""
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
    """Check whether training can compute in bfloat16 here, by the rule of transformers."""
    import torch
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    if is_torch_bf16_gpu_available():
        return Finding("The GPU supports it: `--bf16 true` halves the memory of activations.")
    if torch.cuda.is_available():
        return Finding("The GPU does not support it. Give `--bf16 false`, and `--fp16 true` for speed.")
    return Finding("Not without a GPU: models compute in float32, and `--bf16 true` is rejected.")
