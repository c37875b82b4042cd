"""The installed packages: a table of licences, and a software bill of materials (CycloneDX 1.5).

    python docs/tools/inventory.py --sbom build/sbom.json

Reads the metadata of the running environment; needs no network and no package.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

UNKNOWN = "not stated"


def licence(package: Distribution) -> str:
    """The licence that a package's metadata state, by the first of the three fields that says one."""
    metadata = package.metadata
    stated = [metadata.get("License-Expression") or ""]
    stated += [
        one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier") or [] if one.startswith("License :: ")
    ]
    stated += [(metadata.get("License") or "").strip().partition("\n")[0]]
    return next((one for one in stated if one and one != "OSI Approved" and len(one) < 80), UNKNOWN)


def installed() -> dict[str, Distribution]:
    """Packages by name, in order."""
    found = {package.metadata["Name"].lower(): package for package in distributions() if package.metadata["Name"]}
    return dict(sorted(found.items()))


def bill_of_materials(packages: dict[str, Distribution]) -> dict[str, Any]:
    """The packages as a CycloneDX document."""
    components = [
        {
            "type": "library",
            "name": name,
            "version": package.version,
            "purl": f"pkg:pypi/{name}@{package.version}",
            "licenses": [{"license": {"name": licence(package)}}],
        }
        for name, package in packages.items()
    ]
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write the bill where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sbom", help="Where to write the bill of materials.")
    arguments = parser.parse_args(argv)
    packages = installed()
    for name, package in packages.items():
        print(f"{name:<32} {package.version:<16} {licence(package)}")
    if arguments.sbom:
        Path(arguments.sbom).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.sbom).write_text(json.dumps(bill_of_materials(packages), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
