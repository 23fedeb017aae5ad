"""The package as it is installed: its metadata, its wheel, and a run from the wheel without the repository."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from helpers.streams import settings, write_data

ROOT = Path(__file__).parents[2]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def command(*words, **more):
    ended = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=280, check=False, **more)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a copy of what it is built from."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "pm_hf"):
        command("cp", "-r", ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    command(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", built, source)
    return next(built.iterdir())


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as packed:
        name = next(name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(packed.read(name).decode())


def test_wheel_holds_every_file_of_the_package_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    files = {path for path in (ROOT / "pm_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    packed_files = {name for name in names if name.startswith("pm_hf/")}
    assert {path.relative_to(ROOT).as_posix() for path in files} == packed_files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_metadata_say_whose_what_and_for_which_pythons(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    said = [line.removeprefix("Programming Language :: Python :: ") for line in metadata.get_all("Classifier")]
    assert [version for version in said if re.fullmatch(r"3\.\d+", version)] == PYTHONS
    extras = {"demo", "plots", "gguf", "trl", "quantized", "eval", "docs", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_workflow_runs_the_targets_of_ci_on_the_declared_pythons():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    test = workflow["jobs"]["test"]
    assert test["strategy"]["matrix"]["python"] == PYTHONS
    asked = re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.M)
    assert test["steps"][-1]["run"] == "make check package test PYTHON=python"
    assert set(asked) <= {"check", "package", "test"}
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert set(asked) <= set(targets)


@pytest.mark.slow
def test_a_stream_runs_from_the_wheel_without_the_repository(wheel, tiny_base, tmp_path):
    """Its libraries are those of this environment, pm_hf is the wheel's."""
    place = tmp_path / "venv"
    venv.create(place, symlinks=True)
    python, site = place / "bin" / "python", next((place / "lib").glob("python*")) / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")  # its own .pth are not read
    command(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    config = settings(tiny_base, write_data(tmp_path / "data"), tmp_path / "run", "best", groups=2)
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    imported = command(python, "-c", "import pm_hf; print(pm_hf.__file__)", cwd=tmp_path, env=own)
    assert Path(imported.strip()).is_relative_to(place)
    printed = command(place / "bin" / "pm-hf", "train", "--config", "stream.yaml", cwd=tmp_path, env=own)
    assert f"merged adapter: {tmp_path / 'run' / 'merged'}" in printed
    page = command(place / "bin" / "pm-hf", "report", "run", cwd=tmp_path, env=own)
    assert f"written: {Path('run') / 'report.html'}" in page
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
