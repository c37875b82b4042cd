"""Installed versions of the packages that results depend on."""

import functools
import importlib.metadata

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "fractal_rm")


@functools.cache
def package_versions() -> dict[str, str | None]:
    """The version of each package in `PACKAGES`; None if it is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
