"""Streams beyond the plain one: domains, strict heads, freedoms, the forgetting gate, extending, releasing."""

import json
import shutil

import pytest
import torch
from helpers import refusal
from helpers.streams import (
    GROUPS,
    contents,
    dense,
    domains,
    first,
    same_tensors,
    settings,
    steps,
    tensors,
    write_data,
    write_rows,
    write_yaml,
)

from pm_hf.adapters.folder import open_adapter
from pm_hf.cli import main
from pm_hf.config.loading import load_config
from pm_hf.config.schema import RunConfig
from pm_hf.errors import InputError
from pm_hf.measuring.analytic_head import HeadStatistics
from pm_hf.merging.coefficient import optimal_coefficient
from pm_hf.merging.curvature import Curvature
from pm_hf.runs.learner import learn

HEAD = "classifier"


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(24)


@pytest.fixture(scope="module")
def two(tiny_base, data, tmp_path_factory):
    """A finished pm run of the first two tasks."""
    folder = tmp_path_factory.mktemp("two") / "run"
    learn(settings(tiny_base, data, folder, groups=2))
    return folder


@pytest.fixture(scope="module")
def two_best(tiny_base, data, tmp_path_factory):
    """The same with the analytic head and the Gram."""
    folder = tmp_path_factory.mktemp("two") / "pm_gram_lda"
    learn(settings(tiny_base, data, folder, method="pm_gram_lda", groups=2))
    return folder


# domains


@pytest.fixture(scope="module")
def domain_run(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    return folder / "run", learn(domains(tiny_base, folder, folder / "run"))


def test_shared_head_is_inside_the_curvature_and_merged_by_the_coefficient(domain_run):
    folder, report = domain_run
    before, new, after = (
        tensors(folder / name) for name in ("task-00-plain/merged", "task-01-odd/adapter", "task-01-odd/merged")
    )
    coefficient = steps(folder)[1]["coefficient"]
    a = coefficient["used"]
    assert 0 < a < 1
    for name in (f"{HEAD}.weight", f"{HEAD}.bias"):
        assert torch.allclose(after[name], (1 - a) * before[name] + a * new[name], atol=1e-6)
        assert not torch.equal(before[name], new[name])
    curvature = Curvature.load(folder / "task-01-odd" / "curvature.safetensors")
    assert curvature.M[HEAD].shape == (3, 33)  # weight and bias
    assert len(curvature.M) == 5
    assert coefficient["past"] > 0
    assert report.scenario == "domain_incremental"


def test_first_domain_has_coefficient_one_with_the_head_in_the_curvature(domain_run):
    step = steps(domain_run[0])[0]
    assert step["coefficient"]["raw"] == pytest.approx(1, abs=1e-6)


def test_domains_have_one_head_of_all_labels_and_are_learned(domain_run):
    folder, report = domain_run
    for task in sorted(folder.glob("task-*")):
        assert open_adapter(task / "merged").labels == {HEAD: ["apple", "bird", "car"]}
    assert report.scores == report.task_incremental  # every task has all classes
    assert report.metrics["ACC"] > 0.5  # 1/3 by chance


def test_coefficient_in_the_step_file_is_the_solver_s(domain_run):
    folder, _ = domain_run
    from pm_hf.adapters.plan import task_vector

    curvature = Curvature.load(folder / "task-01-odd" / "curvature.safetensors")
    task, running = open_adapter(folder / "task-01-odd" / "adapter"), open_adapter(folder / "task-00-plain" / "merged")
    found = optimal_coefficient(*task_vector(task, running, curvature), curvature)
    assert found.raw == pytest.approx(steps(folder)[1]["coefficient"]["raw"], rel=1e-6)


@pytest.mark.usefixtures("no_training")
def test_analytic_head_without_rows_of_a_class_in_the_first_domain_is_refused_before_training(tiny_base, tmp_path):
    config = domains(tiny_base, tmp_path, tmp_path / "run", method="best")
    write_rows(tmp_path / "plain-train.csv", ["apple", "bird"], 8, seed=1)
    assert "car" in refusal(learn, config)


# one head at a time


def test_strict_head_leaves_old_rows_and_the_backbone_bit_identical(tiny_base, data, tmp_path):
    learn(settings(tiny_base, data, tmp_path / "run", method="pm_gram_lda", head__strict=True))
    merged = [tensors(task / "merged") for task in sorted((tmp_path / "run").glob("task-*"))]
    for earlier, later in zip(merged, merged[1:], strict=False):
        for name, value in earlier.items():
            assert torch.equal(later[name][: len(value)], value)
        assert len(later[f"{HEAD}.weight"]) == len(earlier[f"{HEAD}.weight"]) + 2
    assert any(value.any() for value in dense(tmp_path / "run" / "merged").values())
    assert ["training_loss" in step for step in steps(tmp_path / "run")] == [True, False, False]


def test_rank_limit_is_kept_and_the_error_recorded(tiny_base, data, tmp_path):
    learn(settings(tiny_base, data, tmp_path / "run", method="average", groups=2, merge__max_rank=3))
    ranks = [
        {len(v) for name, v in tensors(task / "merged").items() if "lora_A" in name}
        for task in sorted((tmp_path / "run").glob("task-*"))
    ]
    assert ranks == [{2}, {3}]
    assert [step["merge_error"] > 0 for step in steps(tmp_path / "run")] == [False, True]
    worst = steps(tmp_path / "run")[1]["merge_error"]
    folder = tmp_path / "run"
    old, new, merged = (dense(folder / n) for n in ("task-00-first/merged", "task-01-second/adapter", "merged"))
    exact = {name: old[name] + new[name] / 2 for name in merged}
    measured = max(float((exact[n] - merged[n]).norm() / exact[n].norm()) for n in merged)
    assert measured == pytest.approx(worst, rel=1e-3)


def test_freedom_module_gives_every_module_its_coefficient(tiny_base, data, tmp_path):
    learn(settings(tiny_base, data, tmp_path / "run", groups=2, merge__freedom="module"))
    modules = steps(tmp_path / "run")[1]["coefficient"]["modules"]
    names = {"old": "task-00-first/merged", "new": "task-01-second/adapter", "all": "merged"}
    found = {key: dense(tmp_path / "run" / name) for key, name in names.items()}
    assert set(modules) == set(found["new"])
    assert len({c["used"] for c in modules.values()}) > 1
    for name, coefficient in modules.items():
        expected = found["old"][name] + coefficient["used"] * found["new"][name]
        assert torch.allclose(found["all"][name], expected, atol=1e-6)


def test_coefficient_of_one_s_own_is_used_for_every_later_task(tiny_base, data, tmp_path):
    learn(settings(tiny_base, data, tmp_path / "run", groups=2, merge__coefficient=0.25))
    assert [step["coefficient"]["used"] for step in steps(tmp_path / "run")] == [1, 0.25]


# the gate


@pytest.fixture(scope="module")
def gated(tiny_base, data, tmp_path_factory):
    """A sequential run that forgot too much: (folder, YAML file)."""
    folder = tmp_path_factory.mktemp("gate")
    config = settings(tiny_base, data, folder / "run", method="sequential", max_forgetting=0.02)
    path = write_yaml(folder / "c.yaml", config)
    assert main(["train", "--config", str(path)]) == 1
    return folder / "run", path


def test_forgetting_too_much_exits_with_one_and_keeps_the_published_adapter(gated, capsys):
    folder, path = gated
    kept = contents(folder / "task-00-first" / "merged")
    assert contents(folder / "merged") == kept
    before = contents(folder)
    assert main(["train", "--config", str(path)]) == 1  # and the same again
    out, err = capsys.readouterr()
    assert "accuracy on each task" in out
    assert "first" in out
    assert "forgetting" in out
    assert "forgot more than max_forgetting 0.02 after task second: first by" in err
    assert f"{folder / 'merged'} is still the previous adapter" in err
    assert len(err.strip().splitlines()) == 1
    assert contents(folder) == before
    assert not list(folder.glob("task-02-*"))


def test_raising_the_limit_publishes_and_continues(gated, tmp_path, capsys):
    folder = shutil.copytree(gated[0], tmp_path / "run")
    assert main(["train", "--config", str(gated[1]), f"output_dir={folder}", "max_forgetting=1"]) == 0
    assert len(steps(folder)) == 3
    assert contents(folder / "merged") == contents(folder / "task-02-third" / "merged")
    assert "merged adapter:" in capsys.readouterr().out


def test_starting_from_a_gated_release_does_not_take_the_later_task_s_sums(tiny_base, data, tmp_path):
    """`merged/` holds task 1 only, the curvature beside it covers task 2 as well."""
    config = settings(tiny_base, data, tmp_path / "gate", groups=2, max_forgetting=-1.0)
    assert main(["train", "--config", str(write_yaml(tmp_path / "c.yaml", config))]) == 1
    assert open_adapter(tmp_path / "gate" / "merged").labels == {HEAD: GROUPS["first"]}
    config = settings(tiny_base, data, tmp_path / "next", start_from=str(tmp_path / "gate" / "merged"))
    config["stream"]["class_groups"] = {"third": GROUPS["third"]}
    try:
        learn(config)
    except InputError:
        assert not list((tmp_path / "next").glob("task-*/adapter"))  # refusing is fine too, but before training
        return
    curvature = Curvature.load(tmp_path / "next" / "task-00-third" / "curvature.safetensors")
    assert curvature.tasks <= 2


# extending


def test_extended_run_equals_one_that_had_all_tasks_at_once(tiny_base, data, two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "extended")
    before = {name: value for name, value in contents(folder).items() if name.startswith("task-")}
    learn(settings(tiny_base, data, folder, groups=3))
    learn(settings(tiny_base, data, tmp_path / "whole", groups=3))
    assert same_tensors(folder / "merged", tmp_path / "whole" / "merged")
    after = contents(folder)
    del before["task-00-first/curvature.safetensors"]  # the newest is kept, and the one before it
    assert {name: after[name] for name in before} == before
    assert "task-00-first/curvature.safetensors" not in after
    assert len(steps(folder)) == 3


@pytest.mark.usefixtures("no_training")
def test_config_that_contradicts_the_finished_part_is_refused_with_the_keys(tiny_base, data, two):
    before = contents(two)
    message = refusal(
        learn, settings(tiny_base, data, two, groups=3, method="average", lora__r=4, training__num_train_epochs=9)
    )
    for part in (
        "holds another run; use its config or another output_dir",
        "method: 'pm' in the finished run, 'average' now",
        "merge.method: 'pm' in the finished run, 'average' now",
        "lora.r: 2 in the finished run, 4 now",
        "training.num_train_epochs: 6 in the finished run, 9 now",
    ):
        assert part in message
    assert contents(two) == before


@pytest.mark.usefixtures("no_training")
def test_other_or_fewer_tasks_than_finished_are_refused(tiny_base, data, two):
    fewer = refusal(learn, settings(tiny_base, data, two, groups=1))
    assert "the folder has 2 finished tasks, the config fits the first 1" in fewer
    config = settings(tiny_base, data, two)
    config["stream"]["class_groups"] = first(1) | {"second": GROUPS["third"]}
    assert "task 1 (second): its labels or rows differ" in refusal(learn, config)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_changed_data_of_a_finished_task_is_refused(tiny_base, two, tmp_path, name):
    changed = write_data(tmp_path)
    lines = (changed / name).read_text().splitlines()
    lines[1] = "the0 of0," + lines[1].rsplit(",", 1)[1]
    (changed / name).write_text("\n".join(lines) + "\n")
    assert "task 0 (first): its labels or rows differ" in refusal(learn, settings(tiny_base, changed, two))


def test_number_written_otherwise_is_no_contradiction(tiny_base, data, two):
    before = contents(two / "merged")
    learn(settings(tiny_base, data, two, groups=2, training__learning_rate="2e-2"))  # as YAML reads it
    assert contents(two / "merged") == before


# releases


def release(base, data, output, source, method="pm", **changes):
    config = settings(base, data, output, method, start_from=str(source), **changes)
    config["stream"]["class_groups"] = {"third": GROUPS["third"]}
    return config


def test_released_adapter_continues_with_new_classes(tiny_base, data, two, tmp_path):
    before = contents(two)
    learn(release(tiny_base, data, tmp_path / "run", two / "merged"))
    (step,) = steps(tmp_path / "run")
    assert step["coefficient"]["one_over_t"] == pytest.approx(1 / 3)  # the curvature beside it was found
    assert step["coefficient"]["past"] > 0
    old, new = tensors(two / "merged"), tensors(tmp_path / "run" / "merged")
    assert torch.equal(new[f"{HEAD}.weight"][:4], old[f"{HEAD}.weight"])
    assert open_adapter(tmp_path / "run" / "merged").labels == {HEAD: sum(GROUPS.values(), [])}
    delta = dense(tmp_path / "run" / "task-00-third" / "adapter")
    for module, value in dense(two / "merged").items():
        expected = value + step["coefficient"]["used"] * delta[module]
        assert torch.allclose(dense(tmp_path / "run" / "merged")[module], expected, atol=1e-6)
    assert contents(two) == before


def test_released_analytic_head_continues_from_its_statistics(tiny_base, data, two_best, tmp_path):
    learn(release(tiny_base, data, tmp_path / "run", two_best / "merged", method="pm_gram_lda"))
    statistics = HeadStatistics.load(tmp_path / "run" / "task-00-third" / "head_statistics.safetensors")
    assert statistics.labels == sum(GROUPS.values(), [])
    assert statistics.counts.tolist() == [24] * 6
    curvature = Curvature.load(tmp_path / "run" / "task-00-third" / "curvature.safetensors")
    assert curvature.examples == [32] * 3


@pytest.mark.parametrize("method", ["pm", "pm_gram_lda"])
def test_the_tokenizer_beside_a_released_adapter_stays_with_what_is_merged(
    tiny_base, data, two, two_best, tmp_path, method
):
    run = two if method == "pm" else two_best
    source = shutil.copytree(run / "task-01-second", tmp_path / "start") / "merged"
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: json.dumps(json.loads((tiny_base / name).read_text()), indent=1) for name in names}
    for name, content in files.items():
        (source / name).write_text(content)
    learn(release(tiny_base, data, tmp_path / "run", source, method=method))
    for folder in ("merged", "task-00-third/merged"):
        assert {name: (tmp_path / "run" / folder / name).read_text() for name in files} == files


def test_release_without_curvature_says_that_the_past_has_no_weight(tiny_base, data, two, tmp_path):
    alone = shutil.copytree(two / "merged", tmp_path / "alone" / "merged")
    report = learn(release(tiny_base, data, tmp_path / "run", alone))
    assert any("past" in note for note in report.notes)
    merged = json.loads((tmp_path / "run" / "merged" / "merge_report.json").read_text())
    assert merged["tasks"] == 3


def test_release_without_curvature_is_refused_when_the_past_must_be_measured(tiny_base, data, two, tmp_path):
    alone = shutil.copytree(two / "merged", tmp_path / "alone" / "merged")
    config = release(tiny_base, data, tmp_path / "run", alone, merge__options={"unmeasured_past": "error"})
    message = refusal(learn, config)
    assert "merge.options.unmeasured_past is error, and it has no curvature.safetensors beside it" in message
    learn(config | {"merge": config["merge"] | {"coefficient": 0.25}})  # a given coefficient measures nothing
    (step,) = steps(tmp_path / "run")
    assert step["coefficient"]["used"] == 0.25


@pytest.mark.usefixtures("no_training")
def test_release_that_does_not_fit_is_refused_in_one_error(tiny_base, data, two, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other-base")
    nameless = shutil.copytree(two / "merged", tmp_path / "nameless")
    (nameless / "labels.json").unlink()
    message = refusal(learn, release(other, data, tmp_path / "run", nameless, merge__max_rank=1))
    assert "3 problems" in message
    assert f"its base model is {tiny_base}, the config's is {other}" in message
    assert "its rank 4 is above merge.max_rank 1" in message
    assert "it has no labels.json with one head, so its rows have no names" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_training")
def test_release_whose_labels_are_not_the_domains_is_refused(tiny_base, two, tmp_path):
    config = domains(tiny_base, tmp_path, tmp_path / "run", start_from=str(two / "merged"))
    assert "its labels are not those of the domain-incremental stream, in this order" in refusal(learn, config)


@pytest.mark.usefixtures("no_training")
def test_release_without_statistics_is_refused_for_the_analytic_head(tiny_base, data, two, tmp_path):
    message = refusal(learn, release(tiny_base, data, tmp_path / "run", two / "merged", method="best"))
    assert "head.kind lda needs head_statistics.safetensors beside it; use head.kind: linear" in message


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "changes", [{"curvature__kind": "gram"}, {"curvature__labels": "mc"}, {"lora__target_modules": ["query"]}], ids=str
)
def test_release_whose_curvature_cannot_be_continued_is_refused_before_training(
    tiny_base, data, two, tmp_path, changes
):
    message = refusal(learn, release(tiny_base, data, tmp_path / "run", two / "merged", **changes))
    assert "curvature" in message or "lora.target_modules differ from the running merge's" in message


def test_run_config_object_is_accepted_and_not_changed(tiny_base, data, two):
    config = load_config(settings(tiny_base, data, two, groups=2))
    before = config.to_dict()
    assert isinstance(config, RunConfig)
    assert learn(config).tasks == ["first", "second"]
    assert config.to_dict() == before
