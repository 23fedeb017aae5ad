"""Streams with written rows of earlier tasks: what is in the pool, what α is searched for, and what a kill changes."""

import json
import os
import random
import shutil
import signal
from collections import Counter
from statistics import fmean

import pytest
import torch
import transformers
from helpers import refusal
from helpers.kills import assert_same, die, killed_until_done
from helpers.models import OLD_NAME
from helpers.processes import forked, run
from helpers.rehearsal import TASKS, assert_searched, expected_labels, pool_of, rows_of, settings
from helpers.streams import LANGUAGE_TASKS, same_tensors, steps, write_yaml

import pm_hf.data.pool
import pm_hf.training.writer
from pm_hf.cli import main
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.pool import Pool, targets
from pm_hf.data.stream import load_stream
from pm_hf.reports.canvas import escape
from pm_hf.reports.card import model_card
from pm_hf.reports.page import write_report
from pm_hf.reports.release import read_finished_run
from pm_hf.runs.learner import learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


def test_the_pool_has_one_size_and_as_many_rows_of_each_task_and_answer(rehearsal_runs):
    folder, two = rehearsal_runs
    assert [step["replay"]["pool_rows"] for step in steps(folder)] == [6, 12, 12]  # the second would cut 12 to 6
    kept = sorted(path.parent.name for path in folder.glob("task-*/pool.jsonl"))
    assert kept == ["task-01-second", "task-02-third"]  # the one before, so that the last task may be removed
    for path, share in ((two, 6), (folder, 4)):
        rows = rows_of(path)
        assert Counter(row.task for row in rows) == dict.fromkeys(list(TASKS)[: 12 // share], share)
        asked = Counter((row.task, row.asked.strip()) for row in rows)
        assert set(asked.values()) == {share // 2}
        assert all(answer in TASKS[task] for task, answer in asked)


def test_rows_are_stored_once_and_are_no_copies(rehearsal_runs, language_data):
    folder, two = rehearsal_runs
    earlier = {json.dumps(row.prompt): row for row in rows_of(two)}
    kept = [row for row in rows_of(folder) if row.task != "third"]
    assert [earlier[json.dumps(row.prompt)] for row in kept] == kept
    texts = [tuple(row.prompt.removeprefix("Text: ").removesuffix("\nAnswer:").split()) for row in rows_of(folder)]
    assert len(set(texts)) == len(texts)
    for name in TASKS:
        for line in (language_data / f"{name}-train.jsonl").read_text().splitlines():
            trained = json.loads(line)["text"].split()
            for row, text in zip(rows_of(folder), texts, strict=True):
                shared = (Counter(trained) & Counter(text)).total()
                assert row.task != name or shared < 0.8 * max(len(trained), len(text))


def test_counts_and_seconds_stand_in_step_json_and_in_the_notes(rehearsal_runs):
    folder, _ = rehearsal_runs
    for step, task in zip(steps(folder), TASKS, strict=True):
        replay = step["replay"]
        assert replay["written"] == sum(replay[key] for key in ("kept", "copies", "doubles", "empty"))
        assert set(replay["seconds"]) == {"pool", "writer", "write", "label"}
        assert 0 <= replay["longest_common_run"] <= 8
        assert 0 <= replay["agreement"] <= 1
        (note,) = [note for note in step["notes"] if "synthetic" in note]
        assert f"{replay['kept']} synthetic rows of {replay['written']} written are kept" in note
        assert "at least 64 a task are advised" in note
        assert f"task {task}: {note}" in json.loads((folder / "report.json").read_text())["notes"]


def test_labels_are_the_merge_s_distribution_over_the_answers_seen(rehearsal_runs, language_data):
    folder, _ = rehearsal_runs
    seen = [f" {answer}" for kinds in TASKS.values() for answer in kinds]
    assert all(set(row.answers) <= set(seen) for row in rows_of(folder))
    newest = [row for row in rows_of(folder) if row.task == "third"]
    expected = expected_labels(settings(language_data, folder), folder / "task-02-third" / "merged", newest, seen)
    for row, p in zip(newest, expected, strict=True):
        assert [row.answers.get(answer, 0.0) for answer in seen] == pytest.approx(p, abs=1e-5)
        assert row.completion == seen[p.index(max(p))]
    agreeing = [row.completion == row.asked for row in newest]
    assert steps(folder)[2]["replay"]["agreement"] == pytest.approx(fmean(agreeing))


def test_the_coefficient_is_the_smallest_within_one_error_of_the_best_merge(rehearsal_runs, language_data, tmp_path):
    folder, two = rehearsal_runs
    assert len(load_stream(load_config(settings(language_data, folder))).tasks[2].eval) == 2
    assert_searched(settings(language_data, folder), folder, 2, pool_of(two), tmp_path)
    assert "search" not in steps(folder)[0]  # the first task is taken as it is


def test_a_run_that_was_extended_is_the_run_that_had_all_tasks_at_once(rehearsal_runs, language_data, tmp_path):
    folder, _ = rehearsal_runs
    learn(settings(language_data, tmp_path / "run"))
    assert same_tensors(tmp_path / "run" / "merged", folder / "merged")
    assert pool_of(tmp_path / "run") == pool_of(folder)


def dying(monkeypatch, where):
    """From now on this process dies at a place of the second task's writing."""
    task = "task-01-second"
    if where == "writer's training":
        train, calls = pm_hf.training.writer.train, []

        def second_time(*args, **kwargs):
            calls.append(1)
            return die() if len(calls) == 2 else train(*args, **kwargs)

        monkeypatch.setattr(pm_hf.training.writer, "train", second_time)
        return
    write = pm_hf.data.pool.write_text

    def write_and_die(path, text):
        if where == "before the pool" and task in str(path):
            die()
        write(path, text)
        if where == "after the pool" and task in str(path):
            die()

    monkeypatch.setattr(pm_hf.data.pool, "write_text", write_and_die)


def test_a_run_that_is_killed_while_it_writes_ends_with_the_same_pool_and_adapters(
    rehearsal_runs, language_data, tmp_path, monkeypatch
):
    config, (_, whole) = settings(language_data, tmp_path / "run", tasks=list(TASKS)[:2]), rehearsal_runs
    for where in ("writer's training", "before the pool", "after the pool"):

        def work(where=where):
            with monkeypatch.context() as patch:
                dying(patch, where)
                learn(config)

        status, said = forked(work)
        assert status == -signal.SIGKILL, said
        assert len(steps(tmp_path / "run")) == 1
        assert (tmp_path / "run" / "task-01-second" / "pool.jsonl").is_file() == (where == "after the pool")
    learn(config)
    assert_same(tmp_path / "run", whole)
    assert pool_of(tmp_path / "run") == pool_of(whole)


def test_a_run_that_is_stopped_in_the_writers_training_goes_on(rehearsal_runs, language_data, tmp_path, monkeypatch):
    config, (_, whole) = settings(language_data, tmp_path / "run", tasks=list(TASKS)[:2]), rehearsal_runs
    path = write_yaml(tmp_path / "c.yaml", config)

    class AskToStop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    def work():
        train = pm_hf.training.writer.train

        def stopped(*args, callbacks=(), **kwargs):
            return train(*args, callbacks=[AskToStop(), *callbacks], **kwargs)

        monkeypatch.setattr(pm_hf.training.writer, "train", stopped)
        return main(["train", "--config", str(path)])

    status, said = forked(work)
    assert status == 1, said
    assert "stopped by SIGTERM" in said
    assert (tmp_path / "run" / "task-00-first" / "writer" / "checkpoint-2").is_dir()
    learn(config)
    assert_same(tmp_path / "run", whole)
    assert pool_of(tmp_path / "run") == pool_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_is_killed_at_random_ends_with_the_same_pool_and_adapters(
    seed, rehearsal_runs, language_data, tmp_path
):
    _, whole = rehearsal_runs
    path = write_yaml(tmp_path / "c.yaml", settings(language_data, tmp_path / "run", tasks=list(TASKS)[:2]))
    rng = random.Random(seed)
    kills = killed_until_done(path, tmp_path / "run", lambda done: rng.randrange(400))
    assert kills
    assert_same(tmp_path / "run", whole)
    assert pool_of(tmp_path / "run") == pool_of(whole)


def test_two_processes_write_one_pool(language_data, tmp_path):
    config = settings(language_data, tmp_path / "run", tasks=list(TASKS)[:2], training__per_device_train_batch_size=4)

    def work(rank):
        return learn(config).scores

    ends = run(work, tmp_path / "ends")
    assert [end.error for end in ends] == [None, None]
    assert Counter(row.task for row in rows_of(tmp_path / "run")) == {"first": 6, "second": 6}


def chat_tasks(data):
    return [
        {
            "name": n,
            "train": str(data / f"{n}-chat-train.jsonl"),
            "test": str(data / f"{n}-chat-test.jsonl"),
        }
        for n in LANGUAGE_TASKS
    ]


def free_tasks(data):
    """The label is asked, the text is the completion: more texts than answers to choose among."""
    return [
        {"name": n, "train": str(data / f"{n}-train.jsonl"), "test": str(data / f"{n}-test.jsonl")}
        | {"text_column": "label", "label_column": "text"}
        for n in LANGUAGE_TASKS
    ]


def plain_tasks(data):
    named = {"train": str(data / "domains-train.jsonl"), "test": str(data / "domains-test.jsonl")}
    return [{"name": name, "prompt_template": "", **named} for name in ("one", "two")]


OTHERS = {
    "chat": ("qwen2", chat_tasks, {"stream__prompt_template": None, "stream__max_length": 64}),
    "free": ("llama", free_tasks, {}),
    "plain": ("llama", plain_tasks, {"stream__prompt_template": None}),
    "t5": ("t5", lambda data: settings(data, "")["stream"]["tasks"][:2], {}),
    "gpt2": ("gpt2", lambda data: settings(data, "")["stream"]["tasks"][:2], {}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_of_every_kind_are_written_and_rehearsed(kind, language_data, tmp_path):
    model, tasks, changes = OTHERS[kind]
    config = settings(language_data, tmp_path / "run", model, **changes, training__max_steps=2)
    config["stream"]["tasks"] = tasks(language_data)
    learn(config)
    encoder, pool = make_encoder(load_config(config)), pool_of(tmp_path / "run")
    assert len(pool.tasks) == 2
    assert len(pool.of_tasks.rows) <= 12
    assert len(pool.of_base.rows) == (0 if kind == "t5" else 3)
    for row, example in zip(pool.of_tasks.rows, pool.of_tasks.examples(encoder), strict=True):
        assert isinstance(row.prompt, str) == (kind != "chat")
        assert bool(row.answers) == (kind not in ("free", "plain"))
        assert (row.prompt == "") == (kind == "plain")
        assert len(example["soft"]) == len(targets(example))
        if row.tokens:
            assert len(row.tokens) == len(targets(example))
        for target in example["soft"]:
            likeliest, others = (len(target) == 20, sum(target.values()))
            assert others == pytest.approx(1, abs=1e-4) if row.answers or not likeliest else 20 / 60 < others < 1
    assert len(steps(tmp_path / "run")[1]["search"]) == 11


def test_perturbation_and_curvature_are_as_without_rehearsal(language_data, tmp_path):
    config = settings(
        language_data, tmp_path / "run", tasks=list(TASKS)[:2], merge__coefficient=None, training__max_steps=4
    )
    learn(config | {"method": "pm"})
    second = steps(tmp_path / "run")[1]
    assert second["coefficient"]["source"] == "closed_form"
    assert set(second["factors"]) > {"1"}
    assert second["curvature_bytes"] > 0
    assert len(rows_of(tmp_path / "run")) == 12


def test_a_released_adapter_goes_on_with_its_pool(rehearsal_runs, language_data, tmp_path):
    folder, two = rehearsal_runs
    third = settings(
        language_data, tmp_path / "run", tasks=["third"], start_from=str(two / "merged"), training__max_steps=2
    )
    learn(third)
    assert pool_of(tmp_path / "run").tasks == list(TASKS)
    shutil.copytree(two / "merged", tmp_path / "alone" / "merged")
    message = refusal(
        learn, third | {"start_from": str(tmp_path / "alone" / "merged"), "output_dir": str(tmp_path / "b")}
    )
    assert "strategy.replay generated needs pool.jsonl beside it" in message


def test_where_nothing_could_be_written_the_coefficient_is_the_average(language_data, tmp_path, monkeypatch):
    monkeypatch.setattr(pm_hf.training.writer.Writer, "write", lambda self, prompts, key: [" "] * len(prompts))
    learn(settings(language_data, tmp_path / "run", tasks=list(TASKS)[:2], training__max_steps=2))
    second = steps(tmp_path / "run")[1]
    assert second["coefficient"]["used"] == 0.5
    assert "no written row of an earlier task" in second["coefficient"]["note"]
    assert second["replay"]["kept"] == 0
    assert second["replay"]["empty"] == second["replay"]["written"] > 0


def test_report_and_card_say_what_was_written_and_searched(rehearsal_runs, tmp_path):
    folder = shutil.copytree(rehearsal_runs[0], tmp_path / "run")
    page = write_report([folder], tmp_path / "page")[0].read_text()
    assert "Search of the coefficient of task 3, third" in page
    assert "Written rows" in page
    sample = steps(folder)[2]["replay"]["samples"][0]
    assert escape(sample["prompt"]) in page
    replays = [step["replay"] for step in steps(folder)]
    card = model_card(read_finished_run(folder, "owner/base"), "me/kept")
    assert "also trained on synthetic rows, at most 12 at a time" in card
    assert f"{sum(replay['copies'] for replay in replays)} exact or near copies were dropped" in card
    assert f"shares with a training row is {max(replay['longest_common_run'] for replay in replays)}" in card


def test_the_line_of_a_finished_task_says_what_was_written(language_data, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(settings(language_data, tmp_path / "run", tasks=["first"], training__max_steps=2)))
    assert main(["train", "--config", str(path)]) == 0
    replay = steps(tmp_path / "run")[0]["replay"]
    assert f", {replay['kept']} of {replay['written']} written rows kept (" in capsys.readouterr().err


# ---- samples of the base


def test_samples_of_the_base_are_written_once_and_belong_to_no_task(rehearsal_runs, language_data):
    folder, two = rehearsal_runs
    first = Pool.load(two / "task-00-first" / "pool.jsonl")
    second, third = pool_of(two), pool_of(folder)
    assert first.of_base == second.of_base == third.of_base
    assert len(third.of_base.rows) == 3
    assert [step["replay"]["base_rows"] for step in steps(folder)] == [3, 3, 3]  # from the first task on
    config = settings(language_data, folder)
    encoder = make_encoder(load_config(config))
    base = transformers.AutoModelForCausalLM.from_pretrained(config["model"]["base"]).eval()
    for row, example in zip(third.of_base.rows, third.of_base.examples(encoder), strict=True):
        assert (row.task, row.asked, row.prompt, row.answers) == ("", "", "", {})
        assert len(targets(example)) <= 24
        ids = example["input_ids"]
        assert ids[0] == encoder.prompt("")[0]
        with torch.no_grad():
            p = base(input_ids=torch.tensor([ids])).logits[0, :-1].softmax(-1)
        for place, soft in zip(p, example["soft"], strict=True):
            best = place.topk(20)
            expected = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            assert soft == pytest.approx(expected, abs=1e-4)


def test_no_sample_of_the_base_is_asked_for(language_data, tmp_path):
    learn(
        settings(
            language_data, tmp_path / "run", tasks=list(TASKS)[:2], strategy__base_samples=0, training__max_steps=2
        )
    )
    assert pool_of(tmp_path / "run").of_base == Pool()
    assert [step["replay"]["base_rows"] for step in steps(tmp_path / "run")] == [0, 0]
