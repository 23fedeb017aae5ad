"""Every kind of adapter that PEFT writes, merged and read back by PEFT: against its own dense updates in float64."""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.peft_adapters import (
    KINDS,
    LABELS,
    NET,
    PLAIN,
    Kind,
    build,
    combine,
    distance,
    load,
    merged_difference,
    outputs,
    save,
    train,
    update,
    wrap,
)
from safetensors import safe_open
from torch import Tensor, nn

from pm_hf import InputError, merge_adapters

WEIGHTS = [0.3, 0.7]


@dataclass
class Row:
    """Two adapters of a kind and their dense updates."""

    kind: Kind
    folder: Path
    adapters: list[Path]
    updates: list[dict[str, Tensor]]

    def merge(self, *args, **settings):
        """(folder of the merged adapter, report)."""
        output = self.folder / "merged"
        return output, merge_adapters(*args, output, method="average", overwrite=True, **settings)


@pytest.fixture(scope="module", params=list(KINDS))
def row(request, tmp_path_factory) -> Row:
    torch.set_num_threads(1)
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("kind")
    adapters = build(kind, folder)
    return Row(kind, folder, adapters, [update(kind, adapter) for adapter in adapters])


def test_there_is_a_row_for_every_kind():
    assert len(KINDS) == 36


@pytest.mark.parametrize("given", [{"weights": [1.0]}, {"coefficient": 1.0}], ids=["weight", "coefficient"])
def test_one_adapter_with_weight_1_keeps_its_function(row, given):
    merged, _ = row.merge(row.adapters[0], **given)
    assert distance(update(row.kind, merged), row.updates[0]) <= 1e-6
    base, before = outputs(row.kind, None), outputs(row.kind, row.adapters[0])
    effect = torch.linalg.norm(before - base)
    assert effect > 0.01 * torch.linalg.norm(base)
    assert torch.linalg.norm(outputs(row.kind, merged) - before) <= 1e-6 * effect


def test_two_adapters_give_the_weighted_sum_of_their_updates(row):
    merged, report = row.merge(row.adapters, weights=WEIGHTS)
    assert distance(update(row.kind, merged), combine(row.updates, WEIGHTS)) <= 1e-6
    assert report.error <= 1e-12


def test_peft_finds_every_tensor_of_the_result_and_no_other(row):
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    merged, _ = row.merge(row.adapters, weights=WEIGHTS)
    about_the_base = row.kind.warning if row.kind.method == "LoraConfig" else None
    model = load(row.kind.model(), merged, about_the_base)  # a missing tensor is a warning, so an error
    assert set_peft_model_state_dict(model, load_peft_weights(merged)).unexpected_keys == []


def test_a_rank_cut_is_the_best_approximation_and_says_its_error(row):
    merged, report = row.merge(row.adapters, weights=WEIGHTS, max_rank=2)
    expected, errors = combine(row.updates, WEIGHTS), set()
    for name, change in expected.items():
        if change.ndim > 1 and name not in report.heads:  # biases and absolute values are kept
            expected[name], error = truncated(row.kind, name, change, 2)
            errors.add(error)
    assert distance(update(row.kind, merged), expected) <= 1e-5
    assert unique(module["error"] for module in report.modules.values()) == pytest.approx(unique(errors), abs=1e-5)
    assert {module["rank_out"] for module in report.modules.values()} <= {1, 2}


def unique(values: Iterable[float]) -> list[float]:
    """Sorted values above zero that differ by more than 1e-6."""
    kept = [0.0]
    for value in sorted(values):
        if value - kept[-1] > 1e-6:
            kept.append(value)
    return kept


def truncated(kind: Kind, name: str, change: Tensor, rank: int) -> tuple[Tensor, float]:
    """Eckart–Young for each matrix of a weight, and the relative error over all of them."""
    if change.ndim == 2:
        parts = [change]
    elif "experts" in name:
        parts = list(change.unbind())
    else:
        groups = getattr(kind.model().get_submodule(name.removesuffix(".weight")), "groups", 1)
        parts = [part.flatten(1) for part in change.chunk(groups)]
    cut = []
    for part in parts:
        U, s, Vh = torch.linalg.svd(part, full_matrices=False)
        cut.append(U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank])
    best = torch.cat(cut).reshape(change.shape)
    return best, float(torch.linalg.norm(best - change) / torch.linalg.norm(change))


def test_half_precision_results_say_what_the_cast_costs(tmp_path):
    kind = KINDS["plain"]
    adapters = build(kind, tmp_path)
    report = merge_adapters(adapters, tmp_path / "merged", method="average", weights=WEIGHTS, dtype="bfloat16")
    with safe_open(tmp_path / "merged" / "adapter_model.safetensors", "pt") as handle:
        assert {handle.get_tensor(name).dtype for name in handle.keys()} == {torch.bfloat16}  # noqa: SIM118
    expected = combine([update(kind, adapter) for adapter in adapters], WEIGHTS)
    found = update(kind, tmp_path / "merged")
    worst = max(distance({name: found[name]}, {name: change}) for name, change in expected.items())
    assert 1e-4 < worst < 1e-2
    assert report.cast_error == pytest.approx(worst, rel=1e-3)


def with_head(rows: int) -> nn.Module:
    """A network whose head has so many rows; everything else is the same at every call."""
    net = NET()
    torch.manual_seed(5)
    net.head = nn.Linear(16, rows)
    return net


def saved_head(folder: Path, rows: list[str], seed: int) -> Path:
    from peft import LoraConfig

    model = train(wrap(with_head(len(rows)), LoraConfig(**PLAIN, modules_to_save=["head"])), seed)
    path = save(model, folder / str(seed))
    (path / "labels.json").write_text(json.dumps({"head": rows}))
    return path


def test_heads_of_other_labels_merge_row_by_row(tmp_path):
    kind = Kind(NET, PLAIN)
    adapters = [saved_head(tmp_path, ["red", "green"], 0), saved_head(tmp_path, ["green", "blue"], 1)]
    rows = [load(with_head(2), path).base_model.model.head.weight.double() for path in adapters]
    merge_adapters(adapters, tmp_path / "merged", method="average", weights=WEIGHTS)
    model = load(with_head(3), tmp_path / "merged").double()
    assert json.loads((tmp_path / "merged" / "labels.json").read_text()) == {"head": list(LABELS)}
    expected = torch.stack([rows[0][0], 0.3 * rows[0][1] + 0.7 * rows[1][0], rows[1][1]])
    assert torch.allclose(model.base_model.model.head.weight, expected, atol=1e-6)
    parts = [merged_difference(kind, without_head(load(with_head(2), path))) for path in adapters]
    found = merged_difference(kind, without_head(model))
    assert distance(found, combine(parts, WEIGHTS)) <= 1e-6


def without_head(model: nn.Module) -> nn.Module:
    """The base's own head in place of the saved one, in float64."""
    model.base_model.model.head = NET().head
    return model.double()


def test_a_module_saved_by_one_adapter_is_taken_over_as_it_is(tmp_path):
    kind = Kind(NET, PLAIN | {"modules_to_save": ["norm"]}, {"modules_to_save": None})
    adapters = build(kind, tmp_path)
    report = merge_adapters(adapters, tmp_path / "merged", method="average", weights=WEIGHTS)
    updates = [update(kind, adapter) for adapter in adapters]
    whole = {name: change for name, change in updates[0].items() if name.startswith("norm")}
    assert set(whole) == {"norm.weight", "norm.bias"} == set(report.heads)
    rest = [{n: x for n, x in found.items() if n not in whole} for found in updates]
    assert distance(update(kind, tmp_path / "merged"), combine(rest, WEIGHTS) | whole) <= 1e-6


def test_weights_that_do_not_sum_to_1_are_refused_for_absolute_values(tmp_path):
    adapters = build(KINDS["modules_to_save"], tmp_path)
    with pytest.raises(InputError, match=r"\.(weight|bias) is an absolute value, so its weights must sum to 1"):
        merge_adapters(adapters, tmp_path / "merged", method="average", weights=[1.0, 1.0])
    assert not (tmp_path / "merged").exists()


def test_different_target_parameters_of_one_module_are_refused(tmp_path):
    first = KINDS["target_parameters"].first
    kind = Kind(KINDS["target_parameters"].model, first, {"target_parameters": first["target_parameters"][1:]})
    adapters = build(kind, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="experts"):
            merge_adapters(adapters, tmp_path / "merged", method="average", weights=WEIGHTS)
    assert not (tmp_path / "merged").exists()
