import json
import re
import shutil
from statistics import fmean
from types import SimpleNamespace

import pytest
from helpers import refusal
from helpers.streams import settings, steps
from helpers.trackers import fake_trackio, fake_wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pm_hf.runs.learner import learn

SHORT = {"training__num_train_epochs": 2, "training__save_strategy": "no"}
NAMES = ["first", "second", "third"]


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture(scope="module")
def logged(tiny_base, data, tmp_path_factory):
    """A stream of two tasks that is continued by a third, in three trackers: its folder, settings and their calls."""
    folder = tmp_path_factory.mktemp("logged") / "run"
    trackers = {"training__report_to": ["tensorboard", "wandb", "trackio"]}
    with pytest.MonkeyPatch.context() as patch:
        wandb, trackio = fake_wandb(patch), fake_trackio(patch)
        for groups in (2, 3):
            config = settings(tiny_base, data, folder, groups=groups, **trackers, **SHORT)
            learn(config)
    return SimpleNamespace(folder=folder, config=config, wandb=wandb, trackio=trackio)


def points(folder):
    """{tag: [(step, value)]} of all event files in a folder, as TensorBoard reads them."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(e.step, pytest.approx(e.value, abs=1e-6)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]
    }


def expected(folder):
    """{name: [(tasks learned, value)]} from the scores in step.json, by the definitions."""
    found, R = {}, []
    for t, step in enumerate(steps(folder)):
        R.append(step["scores"]["class_incremental"])
        earlier = range(t)
        values = {
            "test/ACC": fmean(R[t]),
            "test/AAA": fmean(fmean(row) for row in R),
            **{f"test/score/{i:02d}-{NAMES[i]}": score for i, score in enumerate(R[t])},
            "merge/coefficient": step["coefficient"]["used"],
            "merge/one_over_t": 1 / (t + 1),
        }
        if t:
            values["test/BWT"] = fmean(R[t][i] - R[i][i] for i in earlier)
            values["test/forgetting"] = fmean(max(R[s][i] for s in range(i, t)) - R[t][i] for i in earlier)
        for name, value in values.items():
            found.setdefault(name, []).append((t + 1, value))
    return found


def rows(calls, key):
    """What was logged with a key, in its order."""
    return [row for call, row in calls if call == "log" and key in row]


def test_tensorboard_has_every_scalar_of_the_stream_once_over_the_number_of_tasks(logged):
    assert len(steps(logged.folder)) == 3
    assert points(logged.folder / "logs" / "stream") == expected(logged.folder)


def test_tensorboard_keeps_one_training_curve_for_each_task(logged):
    for folder in sorted(logged.folder.glob("task-*")):
        curves = points(logged.folder / "logs" / folder.name)
        last = json.loads((folder / "step.json").read_text())["optimizer_steps"]
        assert [step for step, _ in curves["train/loss"]] == [last // 2, last]
        assert not any(tag.startswith(("test/", "merge/")) for tag in curves)
        assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_has_the_stream_over_tasks_and_the_trainings_one_after_another(logged, tracker):
    calls = getattr(logged, tracker).calls
    names = expected(logged.folder).keys()
    found = {name: [(row["test/tasks"], row[name]) for row in rows(calls, name)] for name in names}
    assert found == {name: [(t, pytest.approx(v)) for t, v in v] for name, v in expected(logged.folder).items()}
    counts = [step["optimizer_steps"] for step in steps(logged.folder)]
    ends = [sum(counts[: t + 1]) for t in range(3)]
    curve = [row["train/global_step"] for row in rows(calls, "train/loss")]
    assert curve == sorted({*ends, *(end - count // 2 for end, count in zip(ends, counts, strict=True))})
    assert [row["train/global_step"] for row in rows(calls, "test/ACC")] == ends


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_has_one_run_that_a_later_command_continues(logged, tracker):
    calls = getattr(logged, tracker).calls
    assert [call for call, _ in calls if call in ("init", "finish")] == ["init", "finish"] * 2
    one, two = (arguments for call, arguments in calls if call == "init")
    assert one["name"] == two["name"]
    assert one["name"].startswith("run-")
    assert two["resume"] == "allow"
    assert one.get("id") == two.get("id")
    settings = getattr(logged, tracker).config
    assert settings["pm_hf"]["method"] == "pm"
    assert "training" not in settings["pm_hf"]
    assert settings["num_train_epochs"] == 2


def test_wandb_draws_each_scalar_of_the_stream_over_tasks_from_its_first_row_on(logged):
    axes = {}
    for call, content in logged.wandb.calls:
        if call == "init":
            axes = {}
        elif call == "define":
            axes[content["name"]] = content.get("step_metric")
        elif call == "log" and "test/tasks" in content:
            of_stream = content.keys() - {"test/tasks", "train/global_step"}
            assert {axes[name] for name in of_stream} == {"test/tasks"}
    assert axes["*"] == "train/global_step"
    assert axes["test/tasks"] is None


def test_what_a_killed_run_had_not_logged_is_logged_at_the_next_start(logged, tmp_path, monkeypatch):
    folder = shutil.copytree(logged.folder, tmp_path / "run")
    shutil.rmtree(folder / "logs" / "stream")
    path = folder / "logs" / "trackers.json"
    state = json.loads(path.read_text())
    assert state["logged"] == dict.fromkeys(("tensorboard", "wandb", "trackio"), 3)
    path.write_text(json.dumps(state | {"logged": {"wandb": 2, "trackio": 3}}))
    wandb, trackio = fake_wandb(monkeypatch), fake_trackio(monkeypatch)
    learn(logged.config, output_dir=str(folder))
    assert points(folder / "logs" / "stream") == expected(folder)
    assert [row["test/tasks"] for row in rows(wandb.calls, "test/ACC")] == [3]
    assert rows(trackio.calls, "test/ACC") == []
    assert json.loads(path.read_text()) == state


def test_a_wandb_run_of_the_callers_own_is_used_and_left_open(logged, monkeypatch):
    wandb = fake_wandb(monkeypatch)
    fake_trackio(monkeypatch)
    wandb.run = mine = SimpleNamespace(summary={})
    learn(logged.config)
    assert wandb.run is mine
    assert not {"init", "finish"} & {call for call, _ in wandb.calls}


def test_a_run_that_fails_is_a_failed_run_in_wandb(tiny_base, data, tmp_path, monkeypatch):
    def train(*args, **more):
        raise RuntimeError("no memory")

    wandb = fake_wandb(monkeypatch)
    monkeypatch.setattr("pm_hf.runs.learner.train", train)
    with pytest.raises(RuntimeError, match="no memory"):
        learn(settings(tiny_base, data, tmp_path / "run", training__report_to="wandb"))
    assert wandb.calls[-1] == ("finish", {"exit_code": 1})


def test_tensorboard_logs_where_its_variable_says(logged, tmp_path, monkeypatch):
    folder = shutil.copytree(logged.folder, tmp_path / "copy")
    shutil.rmtree(folder / "logs")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    learn(logged.config, output_dir=str(folder), **{"training.report_to": "tensorboard"})
    assert points(tmp_path / "board" / "copy" / "stream") == expected(folder)


@pytest.mark.parametrize(("name", "said"), [("wandb", "pip install wandb"), ("tensorbord", "trackio")])
def test_a_tracker_that_is_not_there_is_one_error_before_anything_is_read(tiny_base, tmp_path, monkeypatch, name, said):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    message = refusal(learn, settings(tiny_base, tmp_path / "no data", tmp_path / "run", training__report_to=[name]))
    assert re.search(rf"^training\.report_to: .*{name}.*{said}", message)
    assert not (tmp_path / "run").exists()
