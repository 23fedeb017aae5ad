"""Strategies in streams: every method runs, and each does to the weights what it says."""

import json
import math

import pytest
import torch
from helpers import refusal, with_changes
from helpers.models import OLD_NAME
from helpers.streams import (
    FEW,
    HEAD,
    Seen,
    assert_near,
    dense,
    domains,
    first,
    same_tensors,
    settings,
    steps,
    tasks,
    tensors,
    write_yaml,
)

import pm_hf.runs.learner
from pm_hf.adapters.merge import merge_adapters
from pm_hf.cli import main
from pm_hf.config.loading import load_config
from pm_hf.config.presets import PRESETS
from pm_hf.data.stream import load_stream
from pm_hf.errors import InputError
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.methods import METHODS as MERGES
from pm_hf.models.contexts import without_lora
from pm_hf.runs.learner import learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
LONG = {"training__num_train_epochs": 12}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture(scope="module")
def run(tiny_base, data, tmp_path_factory):
    """run(method, groups=2, **changes): folder of a finished run, the same one for the same settings."""
    finished = {}

    def get(method, groups=2, **changes):
        key = str((method, groups, sorted(changes.items())))
        if key not in finished:
            folder = tmp_path_factory.mktemp("run") / method
            learn(settings(tiny_base, data, folder, method=method, groups=groups, **FEW | changes))
            finished[key] = folder
        return finished[key]

    return get


# every method


def test_there_are_twenty_one_methods_and_every_sequential_merge_is_one():
    assert len(PRESETS) == 21
    folds = {name for name, method in MERGES.items() if method.fold}
    assert folds == {"pm", "average", "sequential", "coma", "cofima", "magmax", "opcm", "slao"}
    assert folds == {row["merge"]["method"] for row in PRESETS.values()}


@pytest.mark.parametrize("method", PRESETS)
def test_method_runs_to_the_end_of_its_second_task(run, method):
    folder = run(method)
    joint, individual = method == "joint", method == "individual"
    assert len(tasks(folder)) == (1 if joint else 2)
    assert (folder / "merged").is_dir() != individual
    trained = ["training_loss" in step for step in steps(folder)]
    assert trained == [method != "frozen"] * len(trained)
    last = steps(folder)[-1]["scores"]["class_incremental"]
    assert len(last) == 2
    assert all(score is None or 0 <= score <= 1 for score in last)


@pytest.mark.parametrize("method", ["average", "coma", "magmax", "opcm", "slao", "cofima", "pm", "sequential"])
def test_every_sequential_merge_of_the_engine_can_be_asked_for_by_name(data, tiny_base, tmp_path, method):
    rest = {"curvature__kind": "fisher", "merge__max_rank": None}
    config = load_config(settings(tiny_base, data, tmp_path, "sequential", merge__method=method, **rest))
    assert config.merge.method == method


# what is merged


@pytest.mark.parametrize("method", ["average", "coma", "opcm", "merge_only", "pm_gram", "cofima"])
def test_stream_merges_as_merge_adapters_does(run, tmp_path, method):
    kept = {"max_forgetting": 1.0} if method == "cofima" else {}  # with a gate the curvature before the last stays too
    found = tasks(run(method, groups=3 if method == "opcm" else 2, **kept))
    row, merged = PRESETS[method]["merge"], None
    for index, task in enumerate(found):
        files = [folder / "curvature.safetensors" for folder in found[index - 1 : index + 1]]
        measured = {"merge_only": files[-1:], "pm_gram": files[-1:], "cofima": files}.get(method)
        free = {"freedom": row["freedom"], "curvature": measured} if merged is not None else {}
        coefficient = 1.0 if merged is None and row["method"] == "pm" else None
        settings = {"method": row["method"], "coefficient": coefficient, "max_rank": row["max_rank"]}
        merge_adapters(task / "adapter", tmp_path / f"{index}", into=merged, **settings, **free)
        merged = tmp_path / f"{index}"
        assert_near(dense(merged), dense(task / "merged"), tolerance=1e-6)


def test_magmax_merges_what_every_task_has_become_since_the_base(run, tmp_path):
    folder = run("magmax", groups=3)
    optimum, merged = {}, {}
    for index, task in enumerate(tasks(folder)):
        delta = dense(task / "adapter")
        optimum = {name: optimum.get(name, 0) + value for name, value in delta.items()}  # trained from the last one
        if index == 0:
            merged = optimum
        else:
            pairs = {name: (merged[name], optimum[name]) for name in optimum}
            merged = {name: torch.where(old.abs() >= new.abs(), old, new) for name, (old, new) in pairs.items()}
        assert_near(dense(task / "merged"), merged, tolerance=1e-5)
        merged = dense(task / "merged")


def test_slao_merges_a_of_the_last_task_and_b_by_the_recursion(run):
    folder = run("slao", groups=3)
    B = {}
    for t, task in enumerate(tasks(folder), start=1):
        adapter, merged = tensors(task / "adapter"), tensors(task / "merged")
        scale = 2.0  # alpha 4, r 2
        for name in (name for name in adapter if "lora_A" in name):
            new = scale * adapter[name.replace("lora_A", "lora_B")]
            B[name] = new if t == 1 else B[name] + (new - B[name]) / math.sqrt(t)
            assert torch.equal(merged[name], adapter[name])
            assert torch.allclose(merged[name.replace("lora_A", "lora_B")], B[name], atol=1e-6)


# where training starts


def test_slao_starts_at_orthonormal_rows_and_the_last_b(tiny_base, data, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    learn(settings(tiny_base, data, tmp_path / "run", "slao", groups=2, **FEW))
    last = tensors(tasks(tmp_path / "run")[0] / "adapter")
    for name, start in seen.before[1].items():
        A, B = (last[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        Q, R = torch.linalg.qr(A.T)
        assert torch.allclose(start, 2.0 * B @ (Q * R.diagonal().sign()).T, atol=1e-6)


@pytest.mark.parametrize(("method", "start"), [("pm", "merged"), ("magmax", "last"), ("opcm", "base")])
def test_training_starts_where_the_method_says(tiny_base, data, tmp_path, monkeypatch, method, start):
    seen, folder = Seen(monkeypatch), tmp_path / "run"
    count = 3 if start == "last" else 2
    learn(settings(tiny_base, data, folder, method, groups=count, **FEW))
    assert all(value.abs().max() == 0 for value in seen.before[0].values())
    zero = seen.before[0]
    for index in range(1, count):
        merged = dense(tasks(folder)[index - 1] / "merged")
        assert_near(seen.before[index], {"merged": merged, "last": seen.after[index - 1], "base": zero}[start])
    assert [step["train_from"] for step in steps(folder)] == [start] * count
    gap = {
        name: (seen.after[1][name] - value).abs().max() for name, value in dense(tasks(folder)[1] / "merged").items()
    }
    assert max(gap.values()) > 1e-3  # after the second task the last optimum is not the merge


def test_magmax_can_be_made_to_train_from_the_base(tiny_base, data, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    learn(settings(tiny_base, data, tmp_path / "run", "magmax", groups=2, merge__train_from="base", **FEW))
    assert all(value.abs().max() == 0 for value in seen.before[1].values())


# bounds and controls


def test_individual_tasks_know_nothing_of_each_other(run):
    folder = run("individual")
    other = run("individual", stream__class_groups={"third": ["egg", "fog"], "second": ["car", "dog"]})
    assert same_tensors(tasks(folder)[1] / "adapter", tasks(other)[1] / "adapter")
    assert not same_tensors(tasks(folder)[0] / "adapter", tasks(other)[0] / "adapter")
    alone = run("sequential", groups=1)
    assert same_tensors(tasks(folder)[0] / "merged", tasks(alone)[0] / "merged")
    for task in tasks(folder):
        assert_near(dense(task / "merged"), dense(task / "adapter"), tolerance=1e-7)


def test_individual_scores_stay_those_of_each_task_s_own_adapter(run):
    folder = run("individual")
    first_step, second = steps(folder)
    for name, scores in second["scores"].items():
        assert scores[:1] == first_step["scores"][name]


def test_joint_is_one_training_on_the_rows_of_all_tasks(run):
    folder = run("joint")
    one = run("sequential", groups=1, stream__class_groups={"all": [c for group in first(2).values() for c in group]})
    assert same_tensors(folder / "merged", one / "merged")
    report = json.loads((folder / "report.json").read_text())
    assert report["tasks"] == ["first", "second"]
    assert [len(row) for row in report["scores"]] == [2]
    together = steps(one)[0]["scores"]["class_incremental"][0]
    assert sum(report["scores"][0]) / 2 == pytest.approx(together)  # as many test rows in each task


def test_frozen_leaves_the_backbone_as_it_is(run):
    folder = run("frozen")
    for task in tasks(folder):
        assert all(value.abs().max() == 0 for value in dense(task / "merged").values())
    assert steps(folder)[1]["scores"]["class_incremental"][0] is not None


# replay


def test_replay_keeps_some_rows_of_every_earlier_class(tiny_base, data, tmp_path):
    config = load_config(settings(tiny_base, data, tmp_path, "replay", strategy__replay_per_class=3))
    stream = load_stream(config)
    assert [len(task.replayed) for task in stream.tasks] == [0, 6, 12]
    last = stream.tasks[2]
    assert {label: last.replayed.labels.count(label) for label in last.replayed.labels} == dict.fromkeys(
        ["apple", "bird", "car", "dog"], 3
    )
    assert last.labels == ("apple", "bird", "car", "dog", "egg", "fog")
    assert last.own == ("egg", "fog")
    for task in stream.tasks[:2]:
        stored = list(zip(last.replayed.inputs, last.replayed.labels, strict=True))
        own = set(zip(task.train.inputs, task.train.labels, strict=True))
        assert sum(row in own for row in stored) == 6
    assert set(zip(stream.tasks[1].replayed.inputs, stream.tasks[1].replayed.labels, strict=True)) <= set(stored)


def forgetting(folder):
    """Mean fall of the earlier tasks' class-incremental accuracy since they were learned."""
    scores = [step["scores"]["class_incremental"] for step in steps(folder)]
    return sum(scores[i][i] - scores[-1][i] for i in range(len(scores) - 1)) / (len(scores) - 1)


@pytest.mark.parametrize("strategy", [{"method": "replay"}, {"method": "pm", "strategy__replay_per_class": 5}])
def test_replay_forgets_less(run, strategy):
    plain = run("sequential" if strategy["method"] == "replay" else "pm", **LONG)
    assert forgetting(run(**LONG, **strategy)) < forgetting(plain) - 0.3


# penalties


def changes(folder):
    """‖Δ‖ of the second task over the first one's, for all modules together."""
    sizes = [math.sqrt(sum(float(v.square().sum()) for v in dense(t / "adapter").values())) for t in tasks(folder)]
    return sizes[1] / sizes[0]


def test_elastic_weights_of_a_huge_weight_hold_the_model(run):
    assert changes(run("sequential", **LONG)) > 1
    assert changes(run("ewc", strategy__ewc_weight=1e9, **LONG)) < 0.02


def test_elastic_weights_hold_a_shared_head_too(tiny_base, tmp_path):
    moved = {}
    for weight in (0.0, 1e9):
        folder = tmp_path / f"run-{weight}"
        changes = {"strategy__ewc_weight": weight, "curvature__kind": "fisher", "stream": {}, **FEW}
        learn(domains(tiny_base, tmp_path / "data", folder, "ewc", **changes))
        old, new = (tensors(task / "merged")[f"{HEAD}.weight"] for task in tasks(folder))
        moved[weight] = float((old - new).norm())
    assert moved[1e9] < 0.1 * moved[0.0]


def test_a_drift_penalty_of_a_huge_weight_holds_the_model_and_its_sums_are_kept_for_it_alone(run, tiny_base, data):
    gram = {"merge__coefficient": 1.0, "curvature__kind": "gram", "curvature__at": "both", **LONG}
    held = run("best", strategy__drift_weight=1e6, **gram)
    assert changes(run("best", **gram)) > 0.3
    assert changes(held) < 0.02
    sums = Curvature.load(tasks(held)[-1] / "curvature.safetensors")
    assert (sums.settings.kind, sums.settings.at, sums.tasks) == ("gram", "both", 2)
    assert [step["coefficient"]["used"] for step in steps(held)] == [1.0, 1.0]
    asked = {"start_from": str(held / "merged"), "strategy__drift_weight": 1.0}
    other = settings(
        tiny_base, data, held.parent / "other", method="best", **asked, **gram | {"curvature__at": "optimum"}
    )
    assert "sums are never mixed" in refusal(learn, other)
    last = {"merge__method": "average", "merge__train_from": "last", "head__training": "task"}
    changed = settings(tiny_base, data, held.parent / "last", "best", **gram | {"curvature__at": "optimum"} | last)
    learn(with_changes(changed, {"strategy__drift_weight": 1.0, "merge__coefficient": "average", **FEW}))


def test_elastic_weights_from_a_released_adapter_need_its_curvature(run, tiny_base, data, tmp_path):
    released = str(run("sequential") / "merged")
    with pytest.raises(InputError, match="strategy.ewc_weight needs curvature.safetensors beside it"):
        learn(settings(tiny_base, data, tmp_path / "run", method="ewc", start_from=released))


def test_merged_adapter_keeps_the_a_of_every_task_and_olora_makes_them_orthogonal(run):
    overlap = {}
    for method, changes in (("sequential", {}), ("olora", {"groups": 3, "strategy__olora_weight": 1e4})):
        found = tasks(run(method, **changes, **LONG))
        adapters = [tensors(task / "adapter") for task in found]
        names = [name for name in adapters[0] if "lora_A" in name]
        for name in names:
            for t in range(len(found)):
                stacked = torch.cat([adapter[name] for adapter in adapters[: t + 1]])
                assert torch.equal(tensors(found[t] / "merged")[name], stacked)
        products = [
            adapters[old][name] @ adapters[new][name].T
            for name in names
            for new in range(len(found))
            for old in range(new)
        ]
        overlap[method] = max(float(product.abs().max()) for product in products)
    assert overlap["olora"] < 0.1 * overlap["sequential"]


def test_olora_is_refused_where_the_merge_could_not_keep_every_a(tiny_base, data, tmp_path):
    config = settings(tiny_base, data, tmp_path / "run", method="olora", groups=2, lora__r=33)
    with pytest.raises(InputError, match=r"rank 33 before the last one, but .* has room for 32; use a smaller lora.r"):
        learn(config)
    assert not list((tmp_path / "run").glob("task-*/checkpoints"))


def test_divergence_of_a_huge_weight_keeps_the_base_s_predictions(tiny_base, data, tmp_path, monkeypatch):
    seen, apart = Seen(monkeypatch), {}
    config = settings(tiny_base, data, tmp_path / "run", "base_kl", groups=1, **FEW | LONG)
    for weight in (0.0, 1e3):
        learn(config | {"output_dir": str(tmp_path / f"run-{weight}"), "strategy": {"base_kl_weight": weight}})
        model = seen.models[-1].eval()
        with torch.no_grad():
            tuned = model(**seen.inputs).logits.softmax(-1)
            with without_lora(model):
                base = model(**seen.inputs).logits.softmax(-1)
        apart[weight] = float((tuned - base).abs().max())
    assert apart[0.0] > 0.05
    assert apart[1e3] < 0.1 * apart[0.0]


def test_averaging_stays_closer_to_the_model_before_the_task(run):
    assert changes(run("sfa", **LONG)) < 0.5 * changes(run("sequential", **LONG))
    assert changes(run("sfa", strategy__averaging_weight=1.0)) == changes(run("sequential"))


# a run that fails


def test_diverged_stream_fails_with_one_line_and_keeps_what_was_finished(
    tiny_base, data, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    config = settings(tiny_base, data, folder, "sequential", groups=2, training__num_train_epochs=3)
    losses = []

    class Broken:
        per_target = False

        def __call__(self, model, batch, logits):
            losses.append(1)
            return logits.sum() * (math.nan if len(losses) == 4 else 0)

    def poisoned(config, built, start):
        return [Broken()] if start.running is not None else []

    with monkeypatch.context() as patch:
        patch.setattr(pm_hf.runs.learner, "make_penalties", poisoned)
        assert main(["train", "--config", str(write_yaml(tmp_path / "c.yaml", config))]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("task ")]
    assert len(lines) == 1
    assert "pm-hf: the training loss is nan at step 4 of the task; lower the learning rate" in lines[0]
    assert "Traceback" not in err
    assert "merged adapter" not in out
    assert len(steps(folder)) == 1
    assert list(folder.glob("task-01-*/checkpoints/checkpoint-*"))
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    learn(config | {"output_dir": str(tmp_path / "whole")})
    assert same_tensors(folder / "merged", tmp_path / "whole" / "merged")
