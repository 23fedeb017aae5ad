"""The README says what is in results/ and in the code."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from pm_hf import merging
from pm_hf.config.presets import PRESETS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = [
    "overview.md",
    *(f"{name}/table.md" for name in ("clinc150-quick", "smollm2-text", "smollm2-domains", "coefficient")),
]
RESULTS = sorted((ROOT / "results").glob("*/*/*.json"))


@pytest.mark.parametrize("table", TABLES)
def test_table_of_results_is_the_one_the_benchmark_wrote(table):
    assert (ROOT / "results" / table).read_text(encoding="utf-8").strip() in README


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_results_say_where_they_come_from(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["versions"]["torch"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", result["commit"])
    assert "threads" in result["hardware"]
    last = result["scores"][-1]
    assert result["metrics"]["ACC"] == pytest.approx(fmean(last))
    assert result["seed"] == int(path.stem)


def test_results_were_found():
    assert len(RESULTS) >= 21


def test_every_method_is_in_the_table_of_methods():
    rows = re.findall(r"^\| `([\w+]+)` \|", README, flags=re.M)
    assert rows == [*merging.METHODS, *PRESETS]


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).exists()] == []
