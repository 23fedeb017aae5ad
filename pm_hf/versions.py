"""Versions of what a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("pm_hf", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "safetensors")


def versions() -> dict[str, str]:
    """{package: version} of pm_hf and what it stands on, and Python's; packages not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
