"""Training that goes on from the last optimum, and is folded as a step from the running merge."""

import pytest
import torch
from helpers import refusal
from helpers.models import OLD_NAME
from helpers.streams import FEW, HEAD, Seen, assert_near, dense, domains, settings, steps, tasks, tensors

import pm_hf.runs.learner
from pm_hf.config.loading import load_config
from pm_hf.merging.curvature import Curvature
from pm_hf.models.lora import find_head
from pm_hf.runs.learner import learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.mark.parametrize("method", ["merge_only", "average", "pm_gram"])
def test_a_step_from_the_merge_to_the_optimum_that_training_found_from_the_last_one(
    tiny_base, data, tmp_path, monkeypatch, method
):
    seen, folder = Seen(monkeypatch), tmp_path / "run"
    exact = {"merge__max_rank": None, "curvature__shrinkage": 0.0, "max_forgetting": 1.0}
    learn(settings(tiny_base, data, folder, method, groups=3, merge__train_from="last", **exact, **FEW))
    merged = optimum = None
    for index, task in enumerate(tasks(folder)):
        if index:
            assert_near(seen.before[index], optimum, tolerance=1e-5)
        optimum = seen.after[index]
        new, coefficient = dense(task / "merged"), steps(folder)[index]["coefficient"]
        if index and (task / "curvature.safetensors").is_file():
            sums = Curvature.load(task / "curvature.safetensors")
            found = {n: (sums.M[n].double(), sums.sum_of(n).double()) for n in optimum}
            delta = {n: (optimum[n] - merged[n]).double() for n in optimum}
            if method == "pm_gram":
                free = {n: M @ torch.linalg.pinv(S, hermitian=True, rtol=1e-5) for n, (M, S) in found.items()}
                assert_near(new, free, tolerance=1e-2)
            else:
                top = sum((delta[n] * (M - S * merged[n])).sum() for n, (M, S) in found.items())
                alpha = float(top / sum((delta[n] * S * delta[n]).sum() for n, (_, S) in found.items()))
                assert coefficient["raw"] == pytest.approx(alpha, rel=1e-3)
        if index and method != "pm_gram":
            alpha = coefficient["used"]
            assert method != "average" or alpha == 1 / (index + 1)
            assert_near(new, {n: merged[n] + alpha * (optimum[n] - merged[n]) for n in new}, tolerance=1e-5)
        merged = new
    assert [step["train_from"] for step in steps(folder)] == ["last"] * 3


def test_ranks_do_not_double_when_training_goes_on_from_the_last_optimum(tiny_base, data, tmp_path):
    folder, exact = tmp_path / "run", {"merge__max_rank": None, "merge__train_from": "last"}
    learn(settings(tiny_base, data, folder, "average", groups=3, **exact, **FEW))
    ranks = [max(len(v) for n, v in tensors(task / "change").items() if "lora_A" in n) for task in tasks(folder)[2:]]
    assert ranks == [4]  # Δ₃ + ½Δ₂: not the factors of all three side by side
    config = settings(tiny_base, data, folder, "sequential", merge__train_from="last")
    assert "train_from" in refusal(load_config, config)


@pytest.mark.parametrize("method", ["merge_only", "average"])
def test_a_shared_head_goes_on_from_where_the_backbone_does(tiny_base, tmp_path, monkeypatch, method):
    starts = []
    train = pm_hf.runs.learner.train

    def watched(built, *args, **kwargs):
        starts.append(find_head(built.model, HEAD).weight.detach().clone())
        return train(built, *args, **kwargs)

    monkeypatch.setattr(pm_hf.runs.learner, "train", watched)
    learn(domains(tiny_base, tmp_path, tmp_path / "run", method, merge__train_from="last", **FEW))
    first, second = tasks(tmp_path / "run")
    assert torch.equal(starts[1], tensors(first / "adapter")[f"{HEAD}.weight"])
    step, alpha = tensors(second / "adapter")[f"{HEAD}.weight"], steps(tmp_path / "run")[1]["coefficient"]["used"]
    old, new = (tensors(folder / "merged")[f"{HEAD}.weight"] for folder in (first, second))
    assert torch.allclose(new, old + alpha * (step - old), atol=1e-5)
