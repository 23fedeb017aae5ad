"""README, results/README.md and docs say what is in results/ and in the code."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from pm_hf import merging

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
README, MEASURED = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, RESULTS))
STREAM_FILES = sorted((RESULTS / "streams").glob("*/*.json"))
ABLATION_FILES = sorted((RESULTS / "ablation").glob("*/*.json"))
TABLES = [
    *(f"streams/{name}/table.md" for name in ("clinc150", "smollm2-text-sets", "smollm2-domains")),
    "coefficient/table.md",
]


def section(text, title):
    """The text below a heading of the second level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)[1]


def rows_of(text):
    """Lines of tables."""
    return [line for line in text.split("\n") if line.startswith("|")]


def load(path):
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("table", TABLES)
def test_table_of_results_is_the_one_the_benchmark_wrote(table):
    assert (RESULTS / table).read_text(encoding="utf-8").strip() in MEASURED


@pytest.mark.parametrize("path", STREAM_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_results_say_where_they_come_from(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["versions"]["torch"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", result["commit"])
    assert "threads" in result["hardware"]
    last = result["scores"][-1]
    assert result["metrics"]["ACC"] == pytest.approx(fmean(last))
    assert path.stem == f"{result['method']}-seed{result['seed']}"


@pytest.mark.parametrize("path", ABLATION_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_cells_say_where_they_come_from(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["versions"]["torch"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", result["commit"])
    assert path.stem == f"{result['cell']}-seed{result['seed']}"
    assert result["cell"] in result["ACC"]


def test_results_were_found():
    assert len(STREAM_FILES) == 167
    assert len(ABLATION_FILES) == 90


def test_every_folder_of_results_is_a_stream():
    paths = list((ROOT / "configs").rglob("*.yaml"))
    configs = {name for path in paths for name in (path.stem, f"{path.parent.name}-{path.stem}")}
    folders = {path.parent.name for path in (*STREAM_FILES, *ABLATION_FILES)}
    assert folders - configs == {"four-sets", "smollm2-text-sets"}  # the latter had half the rows


def test_results_of_the_readme_are_lines_of_the_overview():
    head, rule, *rows = rows_of(section(README, "Results"))
    overview = rows_of(section(MEASURED, "Classifiers"))
    assert [head, rule] == overview[:2]
    assert len(rows) == 5
    assert set(rows) <= set(overview)


@pytest.mark.parametrize("text", [section(README, "Results"), MEASURED], ids=["README", "results"])
def test_numbers_of_the_text_are_in_the_tables(text):
    tables = "\n".join(rows_of(MEASURED))
    told = re.findall(r"\d\.\d{3}\b", "\n".join(line for line in text.split("\n") if not line.startswith("|")))
    assert len(told) >= 2
    assert [number for number in told if number not in tables] == []


def test_what_is_said_of_the_defaults_is_what_was_measured():
    runs = load("defaults/confirm.json")["rows"]
    for line in rows_of(section(MEASURED, "Defaults"))[2:]:
        name, seeds, *told = (cell.strip() for cell in line.strip("|").split("|"))
        scores = [
            [r["ACC"] for r in runs if (r["stream"], r["settings"]) == (name, kind)] for kind in ("default", "by hand")
        ]
        assert [f"{sum(of_kind) / int(seeds):.3f}" for of_kind in scores] == told


def test_what_is_said_of_running_is_what_was_measured():
    text = " ".join(section(MEASURED, "Running").split())
    kills, tasks, cost = (load(f"running/{name}.json") for name in ("kill-60", "long-stream-50", "overhead"))
    assert kills["different"] == {}
    assert f"{kills['kills']} SIGKILLs aimed at ten phases" in text
    assert f"{sum(kills['damaged'].values())} of them followed by damage" in text
    assert len(kills["landed"]) == 10
    ratios = tasks["ratios"]
    assert tasks["tasks"] == 50
    assert f"takes {ratios['step_seconds']:.2f} times" in text
    assert ratios["curvature_bytes"] == 1
    assert f"peak memory is {ratios['peak_memory']:.2f} times" in text
    runs = [run["ratios"] for kind in cost["kinds"].values() for run in kind.values()]
    step, fisher = (sorted(run[key] for run in runs) for key in ("step", "fisher"))
    assert f"takes {step[0]:.2f} to {step[-1]:.2f} times one of Trainer" in text
    assert f"takes {fisher[0]:.1f} to {fisher[-1]:.1f} times a training step" in text
    assert {f"{run['memory']:.2f}" for run in runs if "memory" in run} == {"1.00"}


def test_what_is_said_of_merging_is_what_was_measured():
    text = " ".join(section(MEASURED, "Merging").split())
    rows = {(row["shape"], row["dtype"], row["what"]): row for row in load("merging/speed.json")["rows"]}
    ours, svd = (rows["one layer", "float32", what] for what in ("ours compressed", "PEFT svd"))
    assert f"same error {ours['error']:.4f} | {ours['seconds']:.3f} s | {svd['seconds']:.1f} s" in text
    assert f"{svd['seconds'] / ours['seconds']:.0f} times as long" in text
    whole, exact, cat, fold = (
        rows["7B", "float32", what] for what in ("ours compressed", "ours exact", "PEFT cat", "ours, Fisher fold")
    )
    minutes = whole["matrices"] * svd["seconds"] / 60
    assert f"{whole['seconds']:.2f} s | {minutes:.0f} minutes (`svd`, extrapolated)" in text
    assert f"{exact['seconds']:.2f} s, checked and synced; memory {exact['increase_mb']:.0f} MB" in text
    assert f"{cat['seconds']:.2f} s (`cat`)" in text
    assert f"{fold['file_mb'] / 1000:.1f} GB diagonal Fisher" in text
    assert f"{fold['seconds']:.1f} s, {fold['increase_mb']:.0f} MB" in text
    times = sorted(row["of disk, synced"] for row in rows.values() if "of disk, synced" in row)
    assert f"takes {times[0]:.1f} to {times[-1]:.1f} times as long as copying" in text


def test_what_is_said_of_exactness_is_what_was_measured():
    text = " ".join(section(MEASURED, "Merging").split())
    kinds = load("merging/exactness.json")["rows"]
    assert f"within 7e-8 for all {len(kinds)} kinds" in text
    assert max(kind["ours"]["reloaded"] for kind in kinds.values()) < 7.5e-8
    peers = load("merging/peers.json")["peers"].values()
    differences = {name: value for peer in peers for name, value in peer["differences"].items() if value < 1e-3}
    low = [value for name, value in differences.items() if name.endswith("low rank")]
    full = [value for name, value in differences.items() if not name.endswith("low rank")]
    assert f"to {max(full):.1e}".replace("e-07", "e-7") in text
    assert f"{max(low):.1e}".replace("e-07", "e-7") in text


def test_every_merging_method_is_named():
    named = re.findall(
        r"`([\w+]+)`", "".join(re.findall(r"^- .*$", section(README, "Merge adapters that you have"), re.M))
    )
    assert sorted(named) == sorted(merging.METHODS)


def test_the_demo_shown_is_of_the_demo():
    tasks = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))["stream"]["class_groups"]
    shown = re.search(r"^```text\n(best, seed 0: .*?)^```", section(README, "Install and try"), flags=re.M | re.S)[1]
    _, _, *rows, metrics = shown.strip().split("\n")
    assert [row.split()[0] for row in rows] == list(tasks)
    assert all(set(name.split("+")) == set(labels) for name, labels in tasks.items())
    accuracy = fmean(float(row.split()[-1]) for row in rows)
    assert f"ACC {accuracy:.3f}" in metrics
