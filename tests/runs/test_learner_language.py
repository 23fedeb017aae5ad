"""Streams of prompts and of plain text end to end, on tiny models."""

import json
import math

import pytest
import torch
from helpers import interrupt_second_call, refusal
from helpers.models import OLD_NAME, greedy, log_probabilities, mean_log_probability
from helpers.streams import LANGUAGE_TASKS, loaded, same_tensors, steps
from helpers.streams import language_settings as settings

from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.rows import Rows
from pm_hf.data.stream import load_stream
from pm_hf.measuring.language_scores import LanguageScorer
from pm_hf.merging.curvature import Curvature
from pm_hf.runs.learner import evaluate, learn
from pm_hf.runs.records import Report

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
PLAIN = ["loss", "perplexity", "bits_per_byte", "token_accuracy"]
ANSWERED = [*PLAIN, "exact_match", "class_incremental", "task_incremental"]
QUICK = {"training__max_steps": 2}


def chats(language_data, output, **changes):
    tasks = [{"name": n, "train": f"{n}-chat-train.jsonl", "test": f"{n}-chat-test.jsonl"} for n in LANGUAGE_TASKS]
    return settings(
        language_data,
        output,
        "qwen2",
        stream__prompt_template=None,
        stream__max_length=64,
        stream__tasks=tasks,
        **changes,
    )


def domains(language_data, output, **changes):
    """Plain text of two domains, scored beside a held-out text."""
    config = settings(language_data, output, **changes)
    held = [{"name": "dark", "test": "held.jsonl"}]
    files = {"train": "domains-train.jsonl", "test": "domains-test.jsonl", "domain_column": "source"}
    config["stream"] = {"kind": "causal-lm", **files, "held_out": held, "max_length": 24}
    return config


RUNS = {
    "llama": {},
    "gpt2": {"curvature__kind": "factored"},
    "qwen2": {"curvature__kind": "gram"},
    "t5": {},
    "sequential": {"model": "llama", "method": "sequential"},
    "average": {"model": "llama", "method": "average"},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, language_data, tmp_path_factory):
    """(settings, folder, report) of a finished run of both tasks."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    config = settings(language_data, folder, **{"model": request.param, **RUNS[request.param]})
    return config, folder, learn(config)


def test_stream_is_learned_and_merged(run):
    config, folder, report = run
    first, second = steps(folder)
    assert report.metric == "class_incremental"
    assert list(report.matrices) == ANSWERED
    assert report.scores[0][0] > 0.7  # 0.5 by chance
    assert report.task_incremental[1][1] > 0.7
    assert first["labels"] == [" blue", " red"]
    assert first["coefficient"]["used"] == pytest.approx(1, abs=1e-6)
    expected = {"sequential": 1.0, "average": 0.5}.get(config["method"])
    used = second["coefficient"]["used"]
    assert used == expected if expected else 0 < used < 1


def test_curvature_is_of_the_asked_kind_and_the_same_size_for_every_task(run):
    config, folder, _ = run
    sizes = [step["curvature_bytes"] for step in steps(folder)]
    if config["method"] != "pm":
        assert sizes == [0, 0]
        return
    curvature = Curvature.load(folder / "task-01-second" / "curvature.safetensors")
    assert curvature.settings.kind == config["curvature"].get("kind", "fisher")
    assert sizes[0] == sizes[1] > 0


def test_merged_adapter_loads_without_pm_hf_and_has_the_reported_scores(run):
    config, folder, report = run
    model, encoder = loaded(config, folder / "merged"), make_encoder(load_config(config))
    tasks = load_stream(load_config(config)).tasks
    seen = [answer for task in tasks for answer in task.own]
    for at, task in enumerate(tasks):
        pairs = list(zip(task.test.inputs, task.test.labels, strict=True))
        losses = [-log_probabilities(model, encoder.prompt(p), encoder.completion(p, a))[0] for p, a in pairs]
        said = [greedy(model, encoder.prompt(p), encoder.tokenizer.eos_token_id, 3) for p, _ in pairs]
        right = [encoder.tokenizer.decode(s).strip() == a.strip() for s, (_, a) in zip(said, pairs, strict=True)]
        likely = [{a: mean_log_probability(model, encoder, p, a) for a in seen} for p, _ in pairs]
        chosen = [max(found, key=found.get) == a for found, (_, a) in zip(likely, pairs, strict=True)]
        found = {name: report.matrices[name][1][at] for name in ANSWERED}
        assert found["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
        assert found["exact_match"] == sum(right) / len(right)
        assert found["class_incremental"] == sum(chosen) / len(chosen)


def test_report_names_its_scores(run):
    _, folder, report = run
    saved = json.loads((folder / "report.json").read_text())
    assert saved["metric"] == "class_incremental"
    assert saved["scores"] == saved["matrices"]["class_incremental"]
    assert set(saved["metrics"]["final"]) == set(ANSWERED)
    assert "accuracy on each task" in report.table()
    assert "at the end: loss " in report.table()
    assert "exact match" in report.table()
    assert all("almost no weight" in note for note in saved["notes"])


def test_interrupted_stream_ends_with_the_same_adapter(language_data, tmp_path, monkeypatch):
    quick = {"training__max_steps": 3, "training__save_strategy": "steps", "training__save_steps": 1}
    whole, broken = (settings(language_data, tmp_path / name, **quick) for name in ("whole", "broken"))
    learn(whole)
    import pm_hf.runs.learner

    calls = interrupt_second_call(monkeypatch, pm_hf.runs.learner, "estimate_curvature")
    with pytest.raises(KeyboardInterrupt):
        learn(broken)
    assert len(steps(tmp_path / "broken")) == 1
    learn(broken)
    assert len(calls) == 3
    assert same_tensors(tmp_path / "broken" / "merged", tmp_path / "whole" / "merged")
    assert [s["scores"] for s in steps(tmp_path / "broken")] == [s["scores"] for s in steps(tmp_path / "whole")]


def test_plain_text_is_judged_by_bits_per_byte_beside_a_held_out_text(language_data, tmp_path):
    config = domains(language_data, tmp_path / "run")
    report = learn(config)
    model, encoder = loaded(config, tmp_path / "run" / "merged"), make_encoder(load_config(config))
    assert report.metric == "bits_per_byte"
    assert list(report.matrices) == PLAIN
    assert report.tasks == ["red", "gold"]
    texts = [json.loads(line) for line in (language_data / "domains-test.jsonl").read_text().splitlines()]
    held = [json.loads(line)["text"] for line in (language_data / "held.jsonl").read_text().splitlines()]

    def bits(texts):
        ids = [encoder.completion("", text) for text in texts]
        nats = sum(-float(log_probabilities(model, encoder.prompt(""), found)[0].sum()) for found in ids)
        return nats / math.log(2) / sum(map(len, texts))

    for at, name in enumerate(report.tasks):
        own = bits([row["text"] for row in texts if row["source"] == name])
        assert report.scores[1][at] == pytest.approx(own, rel=1e-4)
    assert report.held_out[1]["dark"]["bits_per_byte"] == pytest.approx(bits(held), rel=1e-4)
    with model.disable_adapter():
        assert report.untouched["dark"]["bits_per_byte"] == pytest.approx(bits(held), rel=1e-4)
        assert report.scores[0][0] < 0.8 * bits([row["text"] for row in texts if row["source"] == "red"])
    assert report.metrics["forgetting"] == pytest.approx(report.scores[1][0] - report.scores[0][0])
    table = report.table()
    assert "bits per byte on each task" in table
    before, after = (scores["dark"]["bits_per_byte"] for scores in (report.untouched, report.held_out[1]))
    change = f"; the base {before:.3f}, {100 * (after - before) / before:+.1f} %"
    assert f" {after:.3f}{change}\n" in table[table.index("held out, dark: bits per byte ") :]
    assert Report.load(tmp_path / "run").table() == table
    again = evaluate(load_config(config), tmp_path / "run" / "merged")
    assert again["gold"] == pytest.approx({name: report.matrices[name][1][1] for name in PLAIN}, rel=1e-6)
    assert list(again) == ["red", "gold", "dark"]
    assert again["dark"] == pytest.approx(report.held_out[1]["dark"], rel=1e-6)


def test_chats_are_learned_turn_by_turn(language_data, tmp_path):
    held = [{"name": "dark", "test": "held.jsonl"}]
    config = chats(language_data, tmp_path / "run", stream__held_out=held)
    report = learn(config)
    assert list(report.matrices) == ANSWERED
    assert [list(scores) for scores in (report.untouched, *report.held_out)] == [["dark"]] * 3
    model, encoder = loaded(config, tmp_path / "run" / "merged").unload(), make_encoder(load_config(config))
    texts = [json.loads(line)["text"] for line in (language_data / "held.jsonl").read_text().splitlines()]
    expected = LanguageScorer(model, encoder).token_scores(Rows([""] * len(texts), texts))
    assert report.untouched["dark"] == pytest.approx(expected, rel=1e-4)
    assert report.test_rows == [8, 8]  # two conversations of each kind, two turns each
    assert report.scores[0][0] > 0.8
    assert report.matrices["exact_match"][0][0] > 0.8


def test_prompt_has_the_task_s_name_where_the_template_asks_for_it(language_data, tmp_path):
    named = settings(language_data, tmp_path, stream__prompt_template="{task}: {text}\nAnswer:")
    without, with_name = (load_stream(load_config(c)).tasks for c in (settings(language_data, tmp_path), named))
    for plain, named_task in zip(without, with_name, strict=True):
        expected = [prompt.replace("Text", plain.name, 1) for prompt in plain.train.inputs]
        assert named_task.train.inputs == expected
        assert named_task.train.labels == plain.train.labels


def test_rows_that_were_cut_stand_in_the_report(language_data, tmp_path):
    report = learn(settings(language_data, tmp_path / "run", stream__max_length=10, **QUICK))
    rows = [
        len(json.loads(line)["text"].split()) for line in (language_data / "first-train.jsonl").read_text().splitlines()
    ]
    long = rows.count(4)  # Text : four words, Answer : and the answer's two: 11 tokens with [BOS]
    note = f"task first: {long} of 24 training rows are longer than stream.max_length and were cut"
    assert 0 < long < 24
    assert note in report.notes
    assert any("test rows of second are longer" in note for note in report.notes)
    assert note in report.table()


def test_free_text_and_answers_in_one_stream_are_judged_by_bits_per_byte(language_data, tmp_path):
    tasks = [
        {"name": "plain", "train": "domains-train.jsonl", "test": "domains-test.jsonl", "prompt_template": ""},
        {"name": "first", "train": "first-train.jsonl", "test": "first-test.jsonl"},
    ]
    held = [{"name": "dark", "test": "held.jsonl", "prompt_template": ""}]
    report = learn(settings(language_data, tmp_path / "run", stream__tasks=tasks, stream__held_out=held, **QUICK))
    assert report.metric == "bits_per_byte"
    assert report.matrices["class_incremental"][1][0] is None
    assert report.matrices["class_incremental"][1][1] is not None
    assert list(report.held_out[0]) == ["dark"]
    inheriting = [{"name": "dark", "test": "held.jsonl"}, {"name": "first", "test": "held.jsonl"}]
    config = settings(language_data, tmp_path / "other", stream__held_out=inheriting[:1])
    message = refusal(learn, config)
    assert "stream.held_out: dark: " in message
    assert 'it has the stream\'s prompt_template, a plain text needs its own: ""' in message
    config["stream"]["held_out"] = inheriting
    assert "stream.held_out: two texts or tasks are named 'first'" in refusal(learn, config)


@pytest.mark.parametrize("method", ["joint", "individual", "replay"])
def test_upper_bounds_and_replay_take_prompts(language_data, tmp_path, method):
    report = learn(settings(language_data, tmp_path / "run", method=method, **QUICK))
    assert report.metric == "class_incremental"
    assert len(report.scores[-1]) == 2
    assert None not in report.scores[-1]
    replayed = load_stream(load_config(settings(language_data, tmp_path, method=method))).tasks[-1].replayed
    assert len(replayed) == (10 if method == "replay" else 0)  # five of each answer


def test_size_of_the_curvature_is_printed_and_limited(language_data, tmp_path, capsys, no_training):
    message = refusal(learn, settings(language_data, tmp_path / "run", curvature__max_gib=1e-6))
    assert "curvature.kind fisher needs " in message
    assert "use kind: factored" in message
    assert "curvature: " in capsys.readouterr().err


def test_what_cannot_be_learned_is_refused_before_training(language_data, tmp_path, no_training):
    run = tmp_path / "run"
    assert "stream.max_length must be at least 2" in refusal(learn, settings(language_data, run, stream__max_length=1))
    long = refusal(learn, settings(language_data, run, "gpt2", stream__max_length=65))
    assert f"stream.max_length 65 is more than the 64 positions of {language_data / 'gpt2'}" in long
    tokens = refusal(learn, chats(language_data, run, model__base=str(language_data / "t5"), stream__kind="seq2seq-lm"))
    assert "chat messages need stream.kind causal-lm" in tokens
    other = settings(language_data, run, model__base=str(language_data / "t5"), stream__kind="causal-lm")
    message = refusal(learn, other)
    assert f"model.base {language_data / 't5'} cannot be loaded: Unrecognized configuration class" in message
