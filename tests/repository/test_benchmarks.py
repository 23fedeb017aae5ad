import importlib.util
import json
import re
import sys
from argparse import Namespace
from concurrent.futures import Executor, Future
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml

from pm_hf.config.loading import load_config
from pm_hf.config.presets import PRESETS
from pm_hf.errors import InputError
from pm_hf.files import write_json
from pm_hf.runs.right_rows import RightRows

ROOT = Path(__file__).parents[2]


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
def suite():
    return load(ROOT / "benchmarks" / "streams" / "suite.py")


@pytest.fixture(scope="module")
def tables(suite):
    return sys.modules["tables"]


@pytest.fixture(scope="module")
def common(suite):
    return sys.modules["common"]


@pytest.fixture
def elsewhere(suite, tables, tmp_path, monkeypatch):
    """Results are read and written in a folder of their own."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def domains():
    return load(ROOT / "recipes" / "make_domains.py")


def write_result(root, stream, method, seed, ACC, joint=False):
    """A result of two tasks whose metrics all follow from ACC."""
    scores = [[ACC, ACC]] if joint else [[ACC, None], [ACC, ACC]]
    path = root / "results" / "streams" / stream / f"{method}-seed{seed}.json"
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


def test_spread_is_the_standard_deviation_or_the_95_percent_interval(tables):
    values = [0.5, 0.6, 0.9]
    assert tables.spread(values, interval=False) == f"0.667 ± {stdev(values):.3f}"
    half = 4.302653 * stdev(values) / 3**0.5  # Student's t with two degrees of freedom
    assert tables.spread(values, interval=True) == f"0.667 ± {half:.3f}"
    assert tables.spread([0.25, None], interval=True) == "0.250"
    assert tables.spread([None], interval=True) == "–"


def test_difference_has_the_p_of_a_paired_t_test(tables):
    pairs = [(0.5, 0.4), (0.7, 0.5), (0.6, 0.5)]
    gaps = [0.1, 0.2, 0.1]
    t = fmean(gaps) / (stdev(gaps) / 3**0.5)
    p = 1 - t / (2 + t**2) ** 0.5  # both tails of Student's t with two degrees of freedom
    assert tables.difference(pairs, interval=False) == f"+0.133 ± {stdev(gaps):.3f} (p {p:.3f})"
    assert tables.difference([(0.5, 0.7)], interval=False) == "-0.200"
    assert tables.difference([], interval=False) == "–"
    assert tables.difference([(0.75, 0.5), (0.5, 0.25)], interval=False) == "+0.250 ± 0.000"


def test_table_has_means_intervals_and_paired_differences(tables, elsewhere):
    for seed, ACC in enumerate((0.4, 0.5, 0.6)):
        write_result(elsewhere, "smollm2-text", "sequential", seed, ACC)
        write_result(elsewhere, "smollm2-text", "pm", seed, ACC + 0.25)
    write_result(elsewhere, "smollm2-text", "joint", 1, 0.9, joint=True)
    head, rule, *lines = tables.table("smollm2-text").splitlines()
    assert head.startswith("| method | orders | choice among all answers | forgetting |")
    assert head.endswith("| choice among all answers: minus P&M | minus joint | minus control, by rows |")
    assert rule.count("---") == head.count("|") - 1
    assert lines[0].split(" | ")[1:4] == ["3", "0.500 ± 0.248", "0.250 ± 0.124"]
    assert lines[0].endswith("| -0.250 ± 0.000 | -0.400 | – |")
    assert lines[1].split(" | ")[1:] == ["3", *["0.750 ± 0.248", "0.375 ± 0.124", "0.850 ± 0.248"]] + [
        *["0.650 ± 0.248", "0.250 ± 0.248", "–", "–", "", "-0.150", "– |"]
    ]
    assert lines[2].split(" | ")[1:4] == ["1", "0.900", "–"]
    assert lines[2].endswith("| +0.150 |  | – |")
    assert len(lines) == 3


def test_overview_has_every_accuracy_and_the_best_without_old_rows_in_bold(tables, elsewhere):
    for stream, best in (("pacs", 0.4), ("cifar10", 0.6)):
        write_result(elsewhere, stream, "frozen", 0, 0.5)
        write_result(elsewhere, stream, "best", 0, best - 0.1)
        write_result(elsewhere, stream, "best", 1, best + 0.1)
        write_result(elsewhere, stream, "joint", 0, 0.9, joint=True)
    write_result(elsewhere, "pacs", "opcm", 0, 0.1)
    write_result(elsewhere, "smollm2-text", "pm", 0, 0.8)
    head, _, *lines = tables.overview().splitlines()
    assert head == "| method | PACS, 4 domains | CIFAR-10, 5 x 2 classes |"
    assert [line.split(" | ")[1:] for line in lines] == [
        ["0.400 ± 0.141", "**0.600 ± 0.141** |"],
        ["0.900", "0.900 |"],
        ["0.500", "0.500 |"],  # the best of PACS has one seed
    ]


def test_rows_beside_the_control_are_paired_over_the_seeds(tables):
    right = {0: ("1110", "1000"), 1: ("1111", "0011")}
    ours, theirs = (
        {
            seed: {"right": {"a": asdict(RightRows.of([c == "1" for c in pair[of]], "x"))}}
            for seed, pair in right.items()
        }
        for of in (0, 1)
    )
    error = (0.25 / 4 + 0.25 / 4) ** 0.5 / 2  # of each seed: two of four rows differ, all to one side
    assert tables.by_rows(ours, theirs) == f"+0.500 ± {error:.3f} (p {2 * 0.5**4:.3f})"
    assert tables.by_rows(ours, {2: theirs[0]}) == "–"
    others = {0: {"right": {"a": theirs[0]["right"]["a"] | {"rows": "y"}}}}
    assert tables.by_rows(ours, others) == "–"
    assert tables.by_rows(ours, ours) == "+0.000 ± 0.000 (p 1.000)"


def test_picture_leaves_out_what_has_one_row(tables, elsewhere, monkeypatch):
    drawn = []
    monkeypatch.setattr(tables, "plot_means", lambda reports, path: drawn.extend(report.method for report in reports))
    write_result(elsewhere, "smollm2-text", "joint", 0, 0.9, joint=True)
    tables.picture("smollm2-text")
    assert drawn == []
    write_result(elsewhere, "smollm2-text", "pm", 0, 0.6)
    tables.picture("smollm2-text")
    assert drawn == ["pm"]


def test_committed_tables_are_those_of_the_committed_results(suite, tables):
    names = [name for name in suite.STREAMS if (ROOT / "results" / "streams" / name).is_dir()]
    assert "clinc150" in names
    for name in names:
        assert (ROOT / "results" / "streams" / name / "table.md").read_text(encoding="utf-8") == tables.table(name), (
            name
        )
    readme = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert tables.with_tables(readme) == readme
    assert tables.overview() in readme


class OneAfterTheOther(Executor):
    """A pool of this process."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        done = Future()
        try:
            done.set_result(function(*arguments))
        except InputError as error:
            done.set_exception(error)
        return done


def test_only_missing_runs_are_made_and_failures_counted(suite, common, elsewhere, monkeypatch, capsys):
    write_result(elsewhere, "pacs", "pm", 0, 0.5)
    made = []

    def run(job, options):
        made.append(tuple(job))
        if job.method == "best":
            raise InputError("no such file")

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(common, "ProcessPoolExecutor", OneAfterTheOther)
    options = Namespace(preset=None, streams=["pacs"], seeds=[0, 1], methods=["pm", "best"], jobs=1, runs=elsewhere)
    options.data = elsewhere
    assert suite.run_missing(suite.jobs(options), options) == 2
    assert made == [("pacs", "best", 0), ("pacs", "pm", 1), ("pacs", "best", 1)]
    said = capsys.readouterr().err
    assert "pacs best 0 failed: InputError('no such file')" in said
    assert "4/4" in said


def test_presets_name_every_run(suite):
    known = {"streams": None, "methods": None, "seeds": None}
    quick = suite.jobs(Namespace(preset="quick", **known))
    assert len(quick) == 3 * 7
    assert {job.seed for job in quick} == {0}
    standard = suite.jobs(Namespace(preset="standard", **known))
    assert {job.stream for job in standard} == {name for name, stream in suite.STREAMS.items() if not stream.tasks}
    assert {job.seed for job in standard} == {0, 1, 2}
    methods = suite.jobs(Namespace(preset="methods", **known))
    asked = {job.method for job in quick + methods}
    assert asked == suite.NAMES.keys() - {"untouched", "classifier", "replay_8"}  # which are for language models


def test_what_this_machine_lacks_is_said_before_any_run(common, tmp_path):
    options = Namespace(data=tmp_path, models=tmp_path / "models")
    assert str(tmp_path / "text") in common.lacking_input(["ten-sets", "pacs"], options)
    (tmp_path / "image").mkdir()
    assert "--models" in common.lacking_input(["pacs"], options)
    (options.models / "vit-tiny-imagenet150").mkdir(parents=True)
    assert common.lacking_input(["pacs"], options) is None


def test_every_stream_names_a_config_and_known_methods(suite):
    assert PRESETS.keys() <= suite.NAMES.keys()
    assert suite.NAMES.keys() == PRESETS.keys() | suite.VARIANTS.keys()
    for name, stream in suite.STREAMS.items():
        path = ROOT / "configs" / stream.config
        assert path.is_file(), name
        assert name in (path.stem, f"{path.parent.name}-{path.stem}") or stream.tasks, "a stream is named as its file"
        for method in [*stream.methods, *(() if stream.orders else suite.PRESETS["methods"].methods)]:
            load_config(path, values=suite.VARIANTS.get(method, {"method": method}))


def test_a_seed_is_the_order_that_starts_with_its_task(common):
    config = ROOT / "configs" / "smollm2" / "text.yaml"
    tasks = [task["name"] for task in yaml.safe_load(config.read_text())["stream"]["tasks"]]
    assert [task["name"] for task in common.tasks(config, 0, None)] == tasks
    assert [task["name"] for task in common.tasks(config, 2, None)] == tasks[2:] + tasks[:2]
    assert common.tasks(config, len(tasks), None) == common.tasks(config, 0, None)
    assert [task["name"] for task in common.tasks(config, 1, 2)] == tasks[1:3]


def test_every_script_is_in_the_table_of_the_benchmarks():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+/\w+\.py)` ", text, flags=re.M)
    scripts = [
        path for path in (ROOT / "benchmarks").glob("*/*.py") if "def main()" in path.read_text(encoding="utf-8")
    ]
    workers = {path.with_name(f"{path.stem}_worker.py") for path in scripts}
    assert sorted(named) == sorted(f"{path.parent.name}/{path.name}" for path in {*scripts} - workers)
    for place in re.findall(r"`(results/[\w/.-]+)`", text):
        assert (ROOT / place).exists(), place


def test_pieces_are_whole_lines_of_the_right_length_that_do_not_overlap(domains):
    lines = [f"line {i} " + "x" * (i % 50) for i in range(300)]
    pieces = list(domains.pieces("\n".join(lines[:150] + ["", "y" * 500] + lines[150:])))
    assert 1 < len(pieces) <= domains.PER_FILE
    taken = [line for piece in pieces for line in piece.splitlines()]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(lines)
    low, high = domains.LENGTHS
    assert all(low <= len(piece) <= high for piece in pieces)


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
