"""Runs that keep writers in place of what they wrote: what stands in their folders, and that it is written again."""

import json
import re
import shutil
import signal

import pytest
import transformers
from helpers import refusal
from helpers.kills import assert_same, die
from helpers.models import OLD_NAME
from helpers.processes import forked
from helpers.rehearsal import TASKS, settings
from helpers.streams import same_tensors, steps
from peft import PeftModel

import pm_hf.runs.rehearsal
import pm_hf.runs.writers
from pm_hf.config.loading import load_config
from pm_hf.data.pool import Pool
from pm_hf.reports.card import model_card
from pm_hf.reports.page import write_report
from pm_hf.reports.release import read_finished_run
from pm_hf.runs.learner import learn

pytestmark = [pytest.mark.filterwarnings(OLD_NAME), pytest.mark.slow]


@pytest.fixture(scope="module")
def kept(language_data, tmp_path_factory):
    """(run of three tasks that keeps writers, the folder that it was when two were finished, its pools)."""
    place, seen = tmp_path_factory.mktemp("kept"), []
    rehearsed = pm_hf.runs.rehearsal.Rehearsal.rehearsed

    def watched(self, *args):
        seen.append(rehearsed(self, *args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pm_hf.runs.rehearsal.Rehearsal, "rehearsed", watched)
        learn(settings(language_data, place / "run", tasks=list(TASKS)[:2], strategy__replay_pool=False))
        two = shutil.copytree(place / "run", place / "two")
        learn(settings(language_data, place / "run", strategy__replay_pool=False))
    return place / "run", two, [one.pool for one in seen]


def test_kept_writers_write_the_pool_s_rows_again(kept, rehearsal_runs):
    """The second task rehearses what it would with a pool, bit for bit; the third the same texts with newer labels."""
    pools, (folder, two) = kept[2], rehearsal_runs
    first, second = (Pool.load(two / f"task-0{at}-{name}" / "pool.jsonl") for at, name in enumerate(list(TASKS)[:2]))
    assert pools[0] == first.of_base
    assert pools[1].of_tasks == first.of_tasks
    assert pools[2].of_base == second.of_base
    assert [row.prompt for row in pools[2].of_tasks.rows] == [row.prompt for row in second.of_tasks.rows]
    mine, theirs = ([row for row in pool.rows if row.task == "second"] for pool in (pools[2], second))
    assert mine == theirs  # the same merge says what they mean
    assert [row for row in pools[2].rows if row.task == "first"] != [row for row in second.rows if row.task == "first"]
    assert same_tensors(kept[1] / "merged", two / "merged")
    assert not same_tensors(kept[0] / "merged", folder / "merged")


def test_kept_are_the_writers_alone(kept, rehearsal_runs):
    folder, _, pools = kept
    texts = [
        row.prompt.removeprefix("Text: ").removesuffix("\nAnswer:") for pool in pools for row in pool.of_tasks.rows
    ]
    texts += [row.completion for pool in pools for row in pool.of_base.rows]
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(texts) > 20
    assert not [text for text in texts if any(json.dumps(text)[1:-1].encode() in content for content in files)]
    for step, pooled, number in zip(steps(folder), steps(rehearsal_runs[0]), range(3), strict=True):
        assert (step["replay"]["pool_rows"], step["replay"]["samples"]) == (0, [])
        same = ("written", "kept", "copies", "doubles", "empty", "longest_common_run", "rows_asked", "base_rows")
        assert number == 2 or [step["replay"][key] for key in same] == [pooled["replay"][key] for key in same]
        assert any("no text is kept but the task's writer" in note for note in step["notes"])
    writers = sorted((folder / "task-02-third" / "writers").iterdir())
    assert [path.name for path in writers] == ["00", "01", "02"]
    assert sum(path.stat().st_size for path in writers[-1].iterdir()) == steps(folder)[2]["replay"]["writer_bytes"]
    assert not (folder / "task-00-first" / "writers").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(load_config(folder / "config.yaml").model.base)
    assert PeftModel.from_pretrained(base, str(writers[0])).peft_config["default"].r == 8


def test_a_run_that_keeps_writers_is_killed_and_ends_the_same(kept, language_data, tmp_path, monkeypatch):
    """Killed while the writer of the second task is saved, and while the third task's rows are written again."""
    config, (whole, _, _) = settings(language_data, tmp_path / "run", strategy__replay_pool=False), kept

    def in_saving():
        save = pm_hf.runs.writers.save_adapter
        monkeypatch.setattr(
            pm_hf.runs.writers,
            "save_adapter",
            lambda path, *rest: (save(path, *rest), die() if path.name == "01" else None),
        )
        learn(config)

    def in_writing():
        load, loaded = pm_hf.runs.rehearsal.load_kept, []

        def second_time(*args):
            loaded.append(args)
            return die() if len(loaded) == 3 else load(*args)

        monkeypatch.setattr(pm_hf.runs.rehearsal, "load_kept", second_time)
        learn(config)

    for work, finished in ((in_saving, 1), (in_writing, 2)):
        status, said = forked(work)
        assert status == -signal.SIGKILL, said
        assert len(steps(tmp_path / "run")) == finished
    learn(config)
    assert_same(tmp_path / "run", whole)


def test_texts_that_are_not_written_again_as_they_were_are_left_out(kept, language_data, tmp_path):
    """Another machine may write others, which were not compared with training rows."""
    _, two, pools = kept
    folder = shutil.copytree(two, tmp_path / "run")
    file = folder / "task-01-second" / "writers" / "00" / "assignment.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"texts": ["0" * 16, *content["texts"][1:]]}))
    message = refusal(learn, settings(language_data, folder, strategy__replay_pool=False))
    assert "assignment.json" in message
    start = settings(
        language_data, tmp_path / "new", tasks=["third"], strategy__replay_pool=False, training__max_steps=2
    )
    learn(start | {"start_from": str(folder / "merged")})
    (note,) = [note for note in steps(tmp_path / "new")[0]["notes"] if "as they were" in note]
    again = re.match(r"the writer of first wrote (\d) of 6 texts again as they were", note)
    assert 1 <= int(again[1]) <= 5
    writers = sorted((tmp_path / "new" / "task-00-third" / "writers").iterdir())
    assert len(writers) == 3
    shutil.rmtree(folder / "task-01-second" / "writers")
    assert "needs writers beside it" in refusal(
        learn, start | {"start_from": str(folder / "merged"), "output_dir": str(tmp_path / "none")}
    )


def test_card_and_report_say_that_writers_are_kept(kept, tmp_path):
    folder = shutil.copytree(kept[0], tmp_path / "run")
    page = write_report([folder], tmp_path / "page")[0].read_text()
    assert "Written rows" in page
    size = max(step["replay"]["writer_bytes"] for step in steps(folder))
    card = model_card(read_finished_run(folder, "owner/base"), "me/kept")
    assert f"no text of them is kept but of each task its writer, an adapter of at most {size} bytes" in card
