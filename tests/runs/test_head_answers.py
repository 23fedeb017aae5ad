"""Analytic answers: the control `frozen` of a language model."""

import json
import random
import shutil

import pytest
import torch
from helpers import refusal
from helpers.kills import assert_same, killed_until_done
from helpers.models import OLD_NAME
from helpers.streams import LANGUAGE_TASKS, loaded, steps, tasks, words, write_lines, write_yaml
from helpers.streams import language_settings as settings

import pm_hf.runs.learner
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.measuring.analytic_head import HeadStatistics
from pm_hf.reports.page import write_report
from pm_hf.reports.release import read_finished_run
from pm_hf.runs.head import best_layer
from pm_hf.runs.learner import evaluate, learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
CHOICES = ["class_incremental", "task_incremental"]
STATISTICS = "head_statistics.safetensors"
HELD_OUT = {"stream__held_out": [{"name": "dark", "test": "held.jsonl", "prompt_template": ""}]}


def frozen(data, output, model="llama", **changes):
    return settings(data, output, model, "frozen", **changes)


def chats(data, output, **changes):
    listed = [{"name": n, "train": f"{n}-chat-train.jsonl", "test": f"{n}-chat-test.jsonl"} for n in LANGUAGE_TASKS]
    changes = {"stream__prompt_template": None, "stream__max_length": 64, "stream__tasks": listed} | changes
    return frozen(data, output, "qwen2", **changes)


RUNS = {"llama": frozen, "t5": lambda data, output: frozen(data, output, "t5"), "chat": chats}


@pytest.fixture(scope="module", params=RUNS)
def run(request, language_data, tmp_path_factory):
    """(settings, folder, report) of a finished run of both tasks."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    config = RUNS[request.param](language_data, folder)
    return config, folder, learn(config)


def states(base, encoder, rows):
    """Hidden states of each prompt's last token, (layers, rows, d), one prompt after the other and by transformers
    alone."""
    part, found = base.get_encoder() if base.config.is_encoder_decoder else base, []
    for prompt in rows.inputs:
        ids = torch.tensor([encoder.prompt(prompt)])
        with torch.no_grad():
            found.append(torch.stack([h[0, -1] for h in part(ids, output_hidden_states=True).hidden_states[1:]]))
    return torch.stack(found, 1)


def test_answers_are_those_of_one_discriminant_over_the_hidden_states_of_all_tasks(run):
    config, folder, report = run
    learned, encoder = load_stream(load_config(config)).tasks, make_encoder(load_config(config))
    base = loaded(config, folder / "merged").get_base_model()
    targets = torch.tensor([learned[0].own.index(answer) for answer in learned[0].train.labels])
    trained = [states(base, encoder, task.train) for task in learned]
    layer, _ = best_layer(trained[0], targets)
    features = torch.cat([found[layer - 1] for found in trained])
    answers = [answer for task in learned for answer in task.own]
    truth = [answer for task in learned for answer in task.train.labels]
    statistics = HeadStatistics().added(features, torch.tensor(list(map(answers.index, truth))), answers)
    weight, bias = statistics.solve()
    for at, task in enumerate(learned):
        logits = states(base, encoder, task.test)[layer - 1].double() @ weight.T + bias
        own = [answers.index(answer) for answer in task.own]
        right = [answers[i] == answer for i, answer in zip(logits.argmax(1), task.test.labels, strict=True)]
        inside = [task.own[i] == answer for i, answer in zip(logits[:, own].argmax(1), task.test.labels, strict=True)]
        assert report.scores[1][at] == sum(right) / len(right)
        assert report.task_incremental[1][at] == sum(inside) / len(inside)
    saved = HeadStatistics.load(folder / "task-01-second" / STATISTICS)
    assert saved.layer == layer
    assert saved.labels == answers
    torch.testing.assert_close(saved.means, statistics.means, atol=1e-5, rtol=1e-5)
    assert report.metrics["ACC"] > 0.5  # 0.25 by chance


def test_the_base_is_not_trained_and_nothing_is_generated(run):
    config, folder, report = run
    assert report.metric == "class_incremental"
    assert list(report.matrices) == CHOICES
    assert report.method == "frozen"
    assert all(step["optimizer_steps"] == 0 for step in steps(folder) if "optimizer_steps" in step)
    model = loaded(config, folder / "merged")
    assert all(not value.any() for name, value in model.state_dict().items() if "lora_B" in name)
    (note,) = [note for note in report.notes if "answers are chosen by the hidden states after layer" in note]
    assert note.startswith("task first: ")
    assert note in report.table()
    assert STATISTICS in steps(folder)[1]["files"]


def test_a_saved_run_is_scored_again_from_its_folder_alone(run, tmp_path):
    config, folder, report = run
    again = evaluate(load_config(config), folder / "merged")
    assert again == {
        task: {name: report.matrices[name][1][at] for name in CHOICES} for at, task in enumerate(report.tasks)
    }
    first = evaluate(load_config(config), folder / "task-00-first" / "merged")
    assert list(first) == ["first"]
    assert "the adapter has no row for" in first.left_out["second"]
    shutil.copytree(folder / "merged", tmp_path / "alone")
    message = refusal(evaluate, load_config(config), tmp_path / "alone")
    assert f"the {STATISTICS} beside its adapter, found none; use head.kind: none" in message


@pytest.fixture(scope="module")
def whole(language_data, tmp_path_factory):
    """(settings, folder, report) of a run of the tiny Llama that nothing disturbed, with held-out texts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = frozen(language_data, folder, **HELD_OUT)
    return config, folder, learn(config)


def same_statistics(left, right):
    """Whether two files hold the same, bit for bit (safetensors writes what stands in its header in any order)."""
    one, two = HeadStatistics.load(left / STATISTICS), HeadStatistics.load(right / STATISTICS)
    named = (one.labels, one.layer, one.temperature) == (two.labels, two.layer, two.temperature)
    return named and all(torch.equal(getattr(one, n), getattr(two, n)) for n in ("counts", "means", "scatter"))


def test_its_report_is_shown_and_its_adapter_is_not_published(whole, tmp_path):
    page = write_report([whole[1]], tmp_path)[0].read_text(encoding="utf-8")
    assert "answers are chosen by the hidden states after layer" in page
    assert "method frozen of a language model trains nothing" in refusal(read_finished_run, whole[1], "owner/base")


def test_any_order_of_tasks_ends_alike(whole, language_data, tmp_path, monkeypatch):
    _, folder, report = whole
    last = HeadStatistics.load(folder / "task-01-second" / STATISTICS)
    monkeypatch.setattr("pm_hf.runs.head.best_layer", lambda states, targets: (last.layer, 1.0))
    turned = learn(frozen(language_data, tmp_path / "run", stream__order=["second", "first"]))
    assert turned.scores[1] == report.scores[1][::-1]
    other = HeadStatistics.load(tmp_path / "run" / "task-01-first" / STATISTICS)
    back = [other.labels.index(label) for label in last.labels]
    for ours, theirs in zip(last.solve(), other.solve(), strict=True):
        torch.testing.assert_close(ours, theirs[back], rtol=1e-9, atol=1e-9)


def test_a_word_that_answers_in_two_tasks_has_a_mean_in_each(language_data, tmp_path):
    rng, answers = random.Random(3), ("gold", "green")
    for split, count in (("train", 12), ("test", 6)):
        for name, kinds in (("one", ("red", "blue")), ("other", ("dark", "pale"))):
            pairs = [
                (words(kind, rng), answer) for _ in range(count) for kind, answer in zip(kinds, answers, strict=True)
            ]
            write_lines(tmp_path / f"{name}-{split}.jsonl", [{"text": text, "label": label} for text, label in pairs])
    listed = [{"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl"} for n in ("one", "other")]
    base = str(language_data / "llama")
    report = learn(frozen(tmp_path, tmp_path / "run", stream__tasks=listed, model__base=base))
    assert HeadStatistics.load(tmp_path / "run" / "task-01-other" / STATISTICS).labels == [" gold", " green"] * 2
    assert report.metrics["ACC"] > 0.75  # one mean for both texts of an answer would lie between them
    assert report.task_incremental == report.scores  # the answers are the same


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_files(whole, language_data, tmp_path):
    path = write_yaml(tmp_path / "c.yaml", frozen(language_data, tmp_path / "run", **HELD_OUT))
    kills = killed_until_done(path, tmp_path / "run", lambda attempt: 60 * (attempt + 1))
    assert len(kills) > 2
    assert_same(tmp_path / "run", whole[1])
    assert all(same_statistics(tmp_path / "run" / task.name, task) for task in tasks(whole[1]))


def test_a_stream_is_extended_and_goes_on_from_what_another_run_left(whole, language_data, tmp_path):
    listed, (_, folder, report) = whole[0]["stream"]["tasks"], whole
    run, start = tmp_path / "run", tmp_path / "released"
    learn(frozen(language_data, run, stream__tasks=listed[:1], **HELD_OUT))
    shutil.copytree(run / "merged", start / "merged")
    shutil.copy(run / "task-00-first" / STATISTICS, start)
    assert learn(frozen(language_data, run, **HELD_OUT)).scores == report.scores
    later = frozen(language_data, tmp_path / "later", stream__tasks=listed[1:], start_from=str(start / "merged"))
    assert learn(later).scores == [[report.scores[1][1]]]
    assert same_statistics(tmp_path / "later" / "task-00-second", folder / "task-01-second")
    (start / STATISTICS).unlink()
    later["output_dir"] = str(tmp_path / "other")
    assert f"head.kind lda needs {STATISTICS} beside it; use head.kind: none" in refusal(learn, later)


def test_half_precision_is_that_of_the_training(whole, language_data, tmp_path, monkeypatch):
    seen, make = [], pm_hf.measuring.scores.LanguageScorer

    def watched(*args):
        seen.append(args[3])
        return make(*args)

    monkeypatch.setattr(pm_hf.measuring.scores, "LanguageScorer", watched)
    report = learn(frozen(language_data, tmp_path / "run", training__bf16=True))
    assert set(seen) == {torch.bfloat16}
    assert report.metrics["ACC"] == pytest.approx(whole[2].metrics["ACC"], abs=0.1)


def test_held_out_texts_are_those_of_the_base(whole):
    _, folder, report = whole
    assert report.held_out[0] == report.held_out[1]
    assert json.loads((folder / "report.json").read_text())["held_out"][0]["dark"]["bits_per_byte"] > 0
    assert list(report.matrices) == CHOICES


def test_what_has_no_closed_list_of_answers_is_refused(language_data, tmp_path, no_training):
    files = {"train": "domains-train.jsonl", "test": "domains-test.jsonl", "prompt_template": ""}
    listed = [{"name": "plain", **files}, *frozen(language_data, tmp_path)["stream"]["tasks"]]
    message = refusal(learn, frozen(language_data, tmp_path / "run", stream__tasks=listed))
    assert "head.kind lda chooses among the answers of a closed list" in message
    assert "the completions of plain are free text" in message
    assert not (tmp_path / "run").exists()
    few = refusal(learn, frozen(language_data, tmp_path / "run", stream__train_rows=1))
    assert "task 'first' has no training row of" in few
    trained = refusal(load_config, frozen(language_data, tmp_path / "run", trains=True))
    assert "head.kind: causal-lm needs none, or with trains: false lda (method: frozen), found lda" in trained
    linear = refusal(load_config, frozen(language_data, tmp_path / "run", head__kind="linear"))
    assert "head.kind: causal-lm needs none, or with trains: false lda (method: frozen), found linear" in linear
