"""Versions of what a result depends on."""

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("pm_hf", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "safetensors")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """{package: version} of pm_hf and what it stands on, and Python's; packages not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            # reading a package's metadata takes milliseconds, so an imported one is asked first
            found[package] = getattr(sys.modules.get(package), "__version__", None) or version(package)
        except PackageNotFoundError:
            continue
    return found
