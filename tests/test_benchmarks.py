import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from statistics import stdev

import pytest
import yaml

from pm_hf.errors import InputError
from pm_hf.files import write_json

ROOT = Path(__file__).parents[1]


def load(path):
    """A script of benchmarks/ or recipes/ as a module, with its neighbours importable."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


@pytest.fixture(scope="module")
def streams():
    return load(ROOT / "benchmarks" / "streams.py")


@pytest.fixture(scope="module")
def domains():
    return load(ROOT / "recipes" / "domains.py")


def write_result(root, stream, method, seed, ACC, joint=False):
    """A result of two tasks whose metrics all follow from ACC."""
    scores = [[ACC, ACC]] if joint else [[ACC, None], [ACC, ACC]]
    path = root / "results" / stream / method / f"{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {
        "ACC": ACC,
        "forgetting": None if joint else ACC / 2,
        "task_incremental": {"ACC": ACC + 0.1},
        "final": {"exact_match": ACC - 0.1, "bits_per_byte": 1 - ACC},
    }
    told = {"method": method, "seed": seed, "scenario": "class_incremental", "tasks": ["a", "b"], "test_rows": [4, 4]}
    known = {"metric": "class_incremental", "matrices": {"class_incremental": scores, "task_incremental": scores}}
    more = {"scores": scores, "task_incremental": scores, "coefficients": [None, None], "seconds": 1.0}
    write_json(path, {**told, **known, **more, "metrics": metrics})


def test_spread_is_the_standard_deviation_or_the_95_percent_interval(streams):
    values = [0.5, 0.6, 0.9]
    assert streams.spread(values, interval=False) == f"0.667 ± {stdev(values):.3f}"
    half = 4.302653 * stdev(values) / 3**0.5  # Student's t with two degrees of freedom
    assert streams.spread(values, interval=True) == f"0.667 ± {half:.3f}"
    assert streams.spread([0.25, None], interval=True) == "0.250"
    assert streams.spread([None], interval=True) == "–"


def test_table_has_means_intervals_and_paired_differences(streams, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROOT", tmp_path)
    for seed, ACC in enumerate((0.4, 0.5, 0.6)):
        write_result(tmp_path, "smollm2-text", "sequential", seed, ACC)
        write_result(tmp_path, "smollm2-text", "pm", seed, ACC + 0.2)
    write_result(tmp_path, "smollm2-text", "joint", 1, 0.9, joint=True)
    head, rule, *lines = streams.table("smollm2-text").splitlines()
    assert head.startswith("| method | orders | choice among all answers | forgetting |")
    assert head.endswith("| choice among all answers: minus P&M |")
    assert rule.count("---") == head.count("|") - 1
    assert lines[0].split(" | ")[1:4] == ["3", "0.500 ± 0.248", "0.250 ± 0.124"]
    assert lines[0].endswith("| -0.200 ± 0.000 |")
    assert lines[1].split(" | ")[1:] == ["3", *["0.700 ± 0.248", "0.350 ± 0.124", "0.800 ± 0.248"]] + [
        *["0.600 ± 0.248", "0.300 ± 0.248", " |"]
    ]
    assert lines[2].split(" | ")[1:4] == ["1", "0.900", "–"]
    assert lines[2].endswith("| 0.200 |")
    assert len(lines) == 3


def test_picture_leaves_out_what_has_one_row(streams, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROOT", tmp_path)
    drawn = []
    monkeypatch.setattr(streams, "plot", lambda reports, path: drawn.extend(report.method for report in reports))
    write_result(tmp_path, "smollm2-text", "joint", 0, 0.9, joint=True)
    streams.picture("smollm2-text")
    assert drawn == []
    write_result(tmp_path, "smollm2-text", "pm", 0, 0.6)
    streams.picture("smollm2-text")
    assert drawn == ["pm"]


def test_committed_tables_are_those_of_the_committed_results(streams):
    found = [name for name in streams.STREAMS if (ROOT / "results" / name).is_dir()]
    assert "clinc150-quick" in found
    for name in found:
        assert (ROOT / "results" / name / "table.md").read_text(encoding="utf-8") == streams.table(name), name


def test_only_missing_runs_are_made_and_failures_counted(streams, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROOT", tmp_path)
    write_result(tmp_path, "pacs", "pm", 0, 0.5)
    made = []

    def run(name, method, seed, options):
        made.append((method, seed))
        if method == "best":
            raise InputError("no such file")

    monkeypatch.setattr(streams, "run", run)
    options = Namespace(stream="pacs", seeds=[0, 1], methods=["pm", "best"], jobs=1, runs=tmp_path / "runs")
    assert streams.run_missing(options) == 2
    assert made == [("best", 0), ("pm", 1), ("best", 1)]


def test_every_stream_names_a_config_and_known_methods(streams):
    from pm_hf.config import METHODS

    for name, stream in streams.STREAMS.items():
        assert (ROOT / "configs" / stream.config).is_file(), name
        assert set(stream.methods) <= set(streams.NAMES)
        assert set(stream.methods) - set(streams.CONTROLS) <= set(METHODS)


def test_a_seed_is_the_order_that_starts_with_its_task(streams):
    config = ROOT / "configs" / "smollm2" / "text.yaml"
    tasks = [task["name"] for task in yaml.safe_load(config.read_text())["stream"]["tasks"]]
    assert [task["name"] for task in streams.order(config, 0)] == tasks
    assert [task["name"] for task in streams.order(config, 2)] == tasks[2:] + tasks[:2]
    assert streams.order(config, len(tasks)) == streams.order(config, 0)


def test_pieces_are_whole_lines_of_the_right_length_that_do_not_overlap(domains):
    lines = [f"line {i} " + "x" * (i % 50) for i in range(300)]
    found = list(domains.pieces("\n".join(lines[:150] + ["", "y" * 500] + lines[150:])))
    assert 1 < len(found) <= domains.PER_FILE
    taken = [line for piece in found for line in piece.splitlines()]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(lines)
    low, high = domains.LENGTHS
    assert all(low <= len(piece) <= high for piece in found)


def test_split_keeps_files_apart_and_drops_texts_that_occur_twice(domains, monkeypatch):
    monkeypatch.setattr(domains, "TRAIN", 20)
    monkeypatch.setattr(domains, "TEST", 5)
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(100)]
    common = "the same licence " * 8
    files = [f"{common}\n\n" + "\n\n".join(f"{word * 65} {part * 5}" for part in "qrs") for word in words]
    train, test = domains.split("python", files)
    assert (len(train), len(test)) == (20, 5)
    starts = [{text[:2] for text in side if text != common} for side in (train, test)]
    assert not starts[0] & starts[1]
    assert [*train, *test].count(common) <= 1
    assert domains.split("python", files[::-1]) == (train, test)
    with pytest.raises(InputError, match="python has 4 and 0 texts for train and test, expected 20 and 5"):
        domains.split("python", files[:1])


def test_domains_of_this_machine_are_written(domains, tmp_path, monkeypatch):
    data = ROOT.parent / "shared" / "data" / "text"
    if not data.is_dir():
        pytest.skip(f"needs the real data sets in {data}")
    monkeypatch.setattr(domains, "TRAIN", 30)
    monkeypatch.setattr(domains, "TEST", 5)
    monkeypatch.setattr(domains, "FILES", 20)
    domains.write(data, tmp_path)
    tasks = yaml.safe_load((ROOT / "configs" / "smollm2" / "domains.yaml").read_text())["stream"]
    named = {task[side] for task in tasks["tasks"] + tasks["held_out"] for side in ("train", "test") if side in task}
    assert {path.name for path in tmp_path.iterdir()} == named
    for path in tmp_path.iterdir():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(row.keys() == {"text"} and row["text"] for row in rows)
