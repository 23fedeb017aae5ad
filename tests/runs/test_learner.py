import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.streams import CLASSES, GROUPS, contents, dense, settings, steps, tensors, write_yaml
from safetensors.torch import load_file, save_file

from pm_hf import merge_adapters
from pm_hf.adapters.folder import open_adapter
from pm_hf.cli import main
from pm_hf.config.loading import load_config
from pm_hf.config.presets import PRESETS
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.errors import InputError
from pm_hf.measuring.analytic_head import HeadStatistics
from pm_hf.measuring.scores import Scorer
from pm_hf.models.loading import load_merged
from pm_hf.runs.learner import evaluate, learn

HEAD = "classifier"
# merges with one coefficient for the whole model; the others choose or mix entries
SCALED = ("pm", "average", "sequential", "coma")
TRAINED = [name for name, row in PRESETS.items() if name != "frozen" and row["merge"]["method"] in SCALED]
FRESH = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from peft import PeftModel

base_folder, texts_file, *folders = sys.argv[1:]
texts, tokenizer = json.load(open(texts_file)), AutoTokenizer.from_pretrained(base_folder)
found = {}
for folder in folders:
    labels = json.load(open(folder + "/labels.json"))["classifier"]
    base = AutoModelForSequenceClassification.from_pretrained(
        base_folder, num_labels=len(labels), id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        rows = [model(**tokenizer(t, return_tensors="pt", truncation=True, max_length=16)).logits[0] for t in texts]
    found[folder] = {"logits": torch.stack(rows).tolist(), "labels": labels}
assert "pm_hf" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(24)


@pytest.fixture(scope="module")
def runs(tiny_base, data, tmp_path_factory):
    """run(method) -> (its folder, its report, its settings); every method is trained once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(method):
        if method not in done:
            config = settings(tiny_base, data, folder / method, method, training__save_strategy="no")
            done[method] = (folder / method, learn(config), config)
        return done[method]

    return run


@pytest.mark.parametrize("method", PRESETS)
def test_method_learns_every_task(runs, method):
    _, report, _ = runs(method)
    inside = report.metrics["task_incremental"]
    assert inside["ACC" if method == "joint" else "AAA"] > 0.75  # 0.5 by chance
    assert report.metrics["ACC"] > 0.25  # 1/6 by chance
    assert report.tasks == list(GROUPS)
    seen = [3] if method == "joint" else [1, 2, 3]
    assert [[score is not None for score in row] for row in report.scores] == [
        [True] * n + [False] * (3 - n) for n in seen
    ]


def test_methods_that_were_run_are_all_there_are():
    assert len(PRESETS) == 21


def test_protecting_the_past_beats_sequential_training(runs):
    sequential, best = (runs(name)[1].metrics for name in ("sequential", "pm_gram_lda"))
    assert best["ACC"] > sequential["ACC"] + 0.1
    assert best["forgetting"] < sequential["forgetting"] - 0.1


@pytest.mark.parametrize("method", PRESETS)
def test_folder_holds_what_the_layout_says(runs, method):
    folder, _, _ = runs(method)
    tasks = ["task-00-joint"] if method == "joint" else [f"task-0{i}-{name}" for i, name in enumerate(GROUPS)]
    published = [] if method == "individual" else ["merged"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", *published, "report.json", *sorted(tasks)]
    row = PRESETS[method]
    curved, statistics = row["curvature"]["kind"] is not None, row["head"]["kind"] == "lda"
    for i, task in enumerate(tasks):
        kept, expected = i >= len(tasks) - 2, {"adapter", "merged", "step.json"}  # so that the last can be repeated
        expected |= {"curvature.safetensors"} if curved and kept else set()
        expected |= {"optimum"} if row["merge"]["method"] == "magmax" and kept else set()
        expected |= {"head_statistics.safetensors"} if statistics else set()
        assert {p.name for p in (folder / task).iterdir()} == expected
        plain = {"adapter_config.json", "adapter_model.safetensors", "labels.json"}
        assert {p.name for p in (folder / task / "adapter").iterdir()} == plain
        assert {p.name for p in (folder / task / "merged").iterdir()} == plain | {"merge_report.json"}
    if published:
        assert contents(folder / "merged") == contents(folder / tasks[-1] / "merged")


@pytest.mark.parametrize("method", ["pm", "frozen"])
def test_step_file_says_what_happened(runs, method):
    for i, step in enumerate(steps(runs(method)[0])):
        assert step["task"] == list(GROUPS)[i]
        assert step["labels"] == list(GROUPS.values())[i]
        assert step["head"] == HEAD
        assert step["test_rows"] == 16
        assert len(step["scores"]["class_incremental"]) == len(step["scores"]["task_incremental"]) == i + 1
        assert step["merge_error"] == 0
        assert step["seconds"] > 0
        assert step["process_peak_memory_mb"] > 50
        assert step["threads"] == 1
        assert ("training_loss" in step) is (method == "pm")
        assert set(step["coefficient"]) >= {"raw", "used", "numerator", "past", "current", "one_over_t"}
        if method == "pm":
            assert step["optimizer_steps"] == 36  # 48 rows in batches of 8, 6 epochs
            assert set(step["factors"]) == {"0.5", "1", "1.5"}
            assert sum(step["factors"].values()) == 36


def test_curvature_takes_the_same_room_after_every_task(runs):
    sizes = [step["curvature_bytes"] for step in steps(runs("pm")[0])]
    assert sizes == [2 * 4 * 4 * 32 * 32] * 3  # S and M of 4 matrices in float32


@pytest.mark.parametrize("method", PRESETS)
def test_resolved_config_was_saved(runs, method):
    folder, _, config = runs(method)
    assert load_config(folder / "config.yaml") == load_config(config)


def test_report_file_has_its_keys(runs):
    folder, report, _ = runs("pm")
    found = json.loads((folder / "report.json").read_text())
    expected = {
        "method",
        "seed",
        "tasks",
        "scores",
        "metrics",
        "task_incremental",
        "coefficients",
        "seconds",
        "versions",
    }
    assert expected <= set(found)
    assert (found["method"], found["seed"], found["tasks"]) == ("pm", 0, list(GROUPS))
    assert {"ACC", "AAA", "BWT", "forgetting", "ACC_samples", "task_incremental", "final"} == set(found["metrics"])
    assert found["metrics"] == report.metrics
    assert [step["scores"]["class_incremental"] for step in steps(folder)] == [
        row[: i + 1] for i, row in enumerate(found["scores"])
    ]
    assert found["metrics"]["ACC"] == pytest.approx(sum(found["scores"][-1]) / 3)
    assert [c["one_over_t"] for c in found["coefficients"]] == pytest.approx([1, 1 / 2, 1 / 3])
    assert {"python", "torch", "transformers", "peft", "pm_hf"} <= set(found["versions"])


@pytest.mark.parametrize("method", TRAINED)
def test_first_coefficient_is_one(runs, method):
    assert steps(runs(method)[0])[0]["coefficient"]["used"] == pytest.approx(1, abs=1e-6)


def test_coefficients_are_those_of_the_method(runs):
    assert [s["coefficient"]["used"] for s in steps(runs("sequential")[0])] == [1, 1, 1]
    assert [s["coefficient"]["used"] for s in steps(runs("average")[0])] == pytest.approx([1, 1 / 2, 1 / 3])
    pm = [s["coefficient"] for s in steps(runs("pm")[0])]
    for c in pm:
        assert c["raw"] == pytest.approx(c["numerator"] / (c["past"] + c["current"]))
        assert c["used"] == min(max(c["raw"], 0), 1)
    assert 0 < pm[1]["used"] < 1


@pytest.mark.parametrize("method", ["sequential", "average", "coma", "merge_only", "pm", "best"])
def test_running_merge_is_the_recursion_over_the_saved_task_vectors(runs, method):
    folder, _, _ = runs(method)
    reference = {}
    for task, step in zip(sorted(folder.glob("task-*")), steps(folder), strict=True):
        for module, delta in dense(task / "adapter").items():
            reference[module] = reference.get(module, 0) + step["coefficient"]["used"] * delta
        merged = dense(task / "merged")
        assert merged.keys() == reference.keys()
        assert len(merged) == 4
        for module, value in merged.items():
            assert torch.allclose(value, reference[module], rtol=1e-5, atol=1e-7)
            assert value.norm() > 0.01


def test_frozen_backbone_stays_as_it_was(runs):
    assert all(not value.any() for value in dense(runs("frozen")[0] / "merged").values())


@pytest.mark.parametrize("method", ["pm", "pm_gram_lda"])
def test_rows_of_new_classes_are_appended_in_order(runs, method):
    folder, _, _ = runs(method)
    seen = []
    for task, labels in zip(sorted(folder.glob("task-*")), GROUPS.values(), strict=True):
        seen += labels
        assert open_adapter(task / "merged").labels == {HEAD: seen}
        assert tensors(task / "merged")[f"{HEAD}.weight"].shape == (len(seen), 32)


def test_linear_rows_are_those_of_the_task_heads(runs):
    folder, _, _ = runs("pm")
    rows = [tensors(task / "adapter") for task in sorted(folder.glob("task-*"))]
    for name in ("weight", "bias"):
        assert torch.equal(tensors(folder / "merged")[f"{HEAD}.{name}"], torch.cat([r[f"{HEAD}.{name}"] for r in rows]))


@pytest.fixture(scope="module")
def fresh(runs, tiny_base, data, tmp_path_factory):
    """Logits of all test texts from a process that never saw pm_hf, one text at a time: {method: ...}."""
    stream = load_stream(load_config(runs("pm")[2]))
    texts = [text for task in stream.tasks for text in task.test.inputs]
    path = tmp_path_factory.mktemp("fresh") / "texts.json"
    path.write_text(json.dumps(texts))
    folders = {method: str(runs(method)[0] / "merged") for method in ("pm", "pm_gram_lda")}
    command = [sys.executable, "-c", FRESH, str(tiny_base), str(path), *folders.values()]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent, env=one_thread)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {method: found[folder] for method, folder in folders.items()}


@pytest.mark.parametrize("method", ["pm", "pm_gram_lda"])
def test_merged_folder_gives_the_same_logits_without_pm_hf(runs, fresh, method):
    folder, report, raw = runs(method)
    config = load_config(raw)
    labels = open_adapter(folder / "merged").labels[HEAD]
    assert fresh[method]["labels"] == labels
    # one text at a time there too: padding moves float32 logits of this size by about 1e-5
    scorer, tasks = Scorer(config, make_encoder(config), 1, None), load_stream(config).tasks
    model = load_merged(config.model, folder / "merged", labels)
    own = [scorer.logits(model, task, labels, HEAD) for task in tasks]
    theirs = torch.tensor(fresh[method]["logits"])
    assert theirs.shape == (48, 6)
    gap = (torch.cat([logits for logits, _ in own]) - theirs).abs().max()
    assert gap <= 1e-5
    truth = torch.tensor([index for _, indices in own for index in indices])
    right = (theirs.argmax(1) == truth).float().reshape(3, 16).mean(1).tolist()
    assert right == pytest.approx(report.scores[-1])  # and so are the scores in the report


def test_evaluate_gives_the_scores_of_the_report(runs):
    folder, report, config = runs("pm")
    found = evaluate(load_config(config), folder / "merged")
    assert [score["class_incremental"] for score in found.values()] == report.scores[-1]
    assert list(found) == list(GROUPS)


def test_evaluate_of_names_that_peft_would_not_find_is_refused(runs, tmp_path):
    folder, _, config = runs("pm")
    shutil.copytree(folder / "merged", tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="has not the name that PEFT looks for; .* pm-hf merge .*odd --output NEW"):
        evaluate(load_config(config), tmp_path / "odd")
    merge_adapters(tmp_path / "odd", tmp_path / "new")
    assert evaluate(load_config(config), tmp_path / "new") == evaluate(load_config(config), folder / "merged")


def test_evaluate_of_an_earlier_merge_skips_tasks_it_does_not_know(runs):
    folder, report, config = runs("pm")
    found = evaluate(load_config(config), folder / "task-01-second" / "merged")
    assert {name: score["class_incremental"] for name, score in found.items()} == dict(
        zip(["first", "second"], report.scores[1], strict=False)
    )
    assert found.left_out == {"third": "the adapter has no row for 'egg', 'fog'"}


def test_the_command_evaluate_says_what_it_leaves_out_and_fails_unless_that_is_allowed(runs, tmp_path, capsys):
    folder, _, config = runs("pm")
    path = write_yaml(tmp_path / "c.yaml", config)
    earlier = ["evaluate", "--config", str(path), "--adapter", str(folder / "task-01-second" / "merged")]
    assert main(earlier) == 1
    out, error = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["first", "second"]
    assert error.splitlines()[-2:] == [
        "pm-hf: third is left out: the adapter has no row for 'egg', 'fog'",
        "pm-hf: not every task was scored; --allow-missing takes that as it is",
    ]
    assert main([*earlier, "--allow-missing"]) == 0
    assert "third is left out" in capsys.readouterr().err
    assert main([*earlier[:-1], str(folder / "merged")]) == 0
    assert "left out" not in capsys.readouterr().err


def test_evaluate_of_an_adapter_that_knows_no_task_says_what_it_lacks(runs):
    folder, _, config = runs("pm")
    unknown = config | {"stream": config["stream"] | {"class_groups": {"third": ["egg", "fog"]}}}
    with pytest.raises(InputError, match="third: the adapter has no row for 'egg', 'fog'"):
        evaluate(load_config(unknown), folder / "task-01-second" / "merged")


def test_evaluate_of_texts_longer_than_the_model_has_positions_is_refused(runs):
    folder, _, config = runs("pm")
    longer = config | {"stream": config["stream"] | {"max_length": 1000}}
    with pytest.raises(InputError, match="stream.max_length 1000 is more than the"):
        evaluate(load_config(longer), folder / "merged")


def test_a_typo_in_a_label_is_told(runs, tmp_path, data):
    folder, _, config = runs("pm")
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text((data / f"{name}.csv").read_text().replace(",apple", ",aple"))
    groups = config["stream"]["class_groups"] | {"first": ["aple", "bird"]}
    wrong = config | {"data_dir": str(tmp_path), "stream": config["stream"] | {"class_groups": groups}}
    assert evaluate(load_config(wrong), folder / "merged").left_out == {"first": "the adapter has no row for 'aple'"}


def test_running_again_when_finished_changes_nothing(runs):
    folder, report, config = runs("pm")
    before, stamp = contents(folder), (folder / "merged" / "adapter_model.safetensors").stat().st_mtime_ns
    again = learn(config)
    assert contents(folder) == before
    assert (folder / "merged" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert again.to_dict() == report.to_dict()


def test_same_seed_gives_the_same_run_and_another_seed_does_not(runs, tiny_base, data, tmp_path):
    folder, _, _ = runs("pm")
    short = {"groups": 1, "stream__train_per_class": 8}
    outputs = []
    for i, seed in enumerate((0, 0, 1)):
        learn(settings(tiny_base, data, tmp_path / str(i), seed=seed, **short))
        outputs.append((tmp_path / str(i) / "merged" / "adapter_model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_keyword_overrides_reach_the_run(tiny_base, data, tmp_path):
    config = settings(tiny_base, data, tmp_path / "a", groups=1, stream__train_per_class=4)
    report = learn(config, output_dir=str(tmp_path / "b"), method="sequential", max_forgetting=None)
    assert report.method == "sequential"
    assert report.folder == tmp_path / "b"
    assert not (tmp_path / "a").exists()


def test_mapping_keeps_the_order_of_its_tasks(tiny_base, data, tmp_path):
    groups = {"z": ["fog", "egg"], "a": ["apple", "bird"]}
    config = settings(tiny_base, data, tmp_path / "run", method="frozen")
    config["stream"]["class_groups"] = groups
    assert learn(config).tasks == ["z", "a"]
    assert len(CLASSES) == 6


def test_analytic_head_survives_bfloat16(runs, tiny_base, data, tmp_path):
    half = learn(settings(tiny_base, data, tmp_path / "run", method="frozen", training__bf16=True))
    assert half.metrics["ACC"] > runs("frozen")[1].metrics["ACC"] - 0.1


def test_temperature_never_makes_the_analytic_head_more_confident(runs):
    folder, _, _ = runs("pm_gram_lda")
    for task in sorted(folder.glob("task-*")):
        statistics = HeadStatistics.load(task / "head_statistics.safetensors")
        plain = HeadStatistics(statistics.labels, statistics.counts, statistics.means, statistics.scatter).solve()[0]
        spread = (plain - plain.mean(0)).norm()
        written = tensors(task / "merged")[f"{HEAD}.weight"].double()
        assert (written - written.mean(0)).norm() <= spread * (1 + 1e-4)
