"""Written rows of an encoder-decoder model: the writer, labels, the pool, the search of α, a kill."""

import signal
from collections import Counter

import pytest
from helpers.kills import assert_same, die
from helpers.models import OLD_NAME
from helpers.processes import forked
from helpers.rehearsal import TASKS, assert_searched, expected_labels, pool_of, settings
from helpers.streams import same_tensors, steps

import pm_hf.training.writer
from pm_hf.data.pool import Pool
from pm_hf.runs.learner import learn

pytestmark = [pytest.mark.filterwarnings(OLD_NAME), pytest.mark.slow]
FEW = list(TASKS)[:2]


@pytest.fixture(scope="module")
def run(language_data, tmp_path_factory):
    """The folder of a run of two tasks."""
    folder = tmp_path_factory.mktemp("t5") / "run"
    learn(settings(language_data, folder, "t5", FEW))
    return folder


def test_rows_of_both_tasks_are_in_the_pool_and_the_base_says_nothing(run):
    pool = pool_of(run)
    assert Counter(row.task for row in pool.rows) == {"first": 6, "second": 6}
    assert pool.of_base == Pool()
    assert all(row.prompt.startswith("Text: ") and row.prompt.endswith("\nAnswer:") for row in pool.rows)
    assert [step["replay"]["pool_rows"] for step in steps(run)] == [6, 12]
    report = (run / "report.json").read_text()
    assert "strategy.base_samples is left out: an encoder-decoder says nothing of its own without an input" in report


def test_labels_are_the_merge_s_distribution(run, language_data):
    seen = [f" {answer}" for name in FEW for answer in TASKS[name]]
    newest = [row for row in pool_of(run).rows if row.task == "second"]
    expected = expected_labels(settings(language_data, run, "t5", FEW), run / "task-01-second/merged", newest, seen)
    for row, p in zip(newest, expected, strict=True):
        assert [row.answers.get(answer, 0.0) for answer in seen] == pytest.approx(p, abs=1e-5)
        assert row.completion == seen[p.index(max(p))]


def test_the_coefficient_is_the_smallest_within_one_error_of_the_best_merge(run, language_data, tmp_path):
    before = Pool.load(run / "task-00-first" / "pool.jsonl")
    assert_searched(settings(language_data, run, "t5", FEW), run, 1, before, tmp_path)


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "writers"])
def test_a_run_that_is_killed_goes_on_bit_for_bit(pool, run, language_data, tmp_path, monkeypatch):
    """In the second writer's training; a run that keeps writers has the same adapters, as it has two tasks."""
    config, kept = settings(language_data, tmp_path / "run", "t5", FEW, strategy__replay_pool=pool), tmp_path / "run"

    def work():
        train, calls = pm_hf.training.writer.train, []

        def second_time(*args, **kwargs):
            calls.append(1)
            return die() if len(calls) == 2 else train(*args, **kwargs)

        monkeypatch.setattr(pm_hf.training.writer, "train", second_time)
        learn(config)

    status, said = forked(work)
    assert status == -signal.SIGKILL, said
    learn(config)
    if pool:
        assert_same(kept, run)
        assert pool_of(kept) == pool_of(run)
    for task in ("task-00-first", "task-01-second"):
        assert same_tensors(kept / task / "adapter", run / task / "adapter")
        assert same_tensors(kept / task / "merged", run / task / "merged")
