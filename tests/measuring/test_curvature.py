"""estimate_curvature against a slow reference: one example at a time, unpadded, with autograd."""

import helpers.per_example as slow
import pytest
import torch
from helpers.per_example import batches, distance, examples, lora_layers

import pm_hf.measuring.curvature
from pm_hf import estimate_curvature, optimal_coefficient
from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank
from pm_hf.models.lora import adapted_layers, find_head, head_matrix, layer_product

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ROWS = examples(11)
KEYS = [f"bert.encoder.layer.{i}.attention.self.key" for i in (0, 1)]


@pytest.fixture(scope="module")
def _model(tiny_base):
    return slow.task_model(tiny_base)


@pytest.fixture
def model(_model):
    """Task adapter over a frozen one, both active; the base weights frozen, in training mode."""
    yield _model.train()
    for layer in lora_layers(_model).values():
        layer.base_layer.weight.requires_grad_(False)


@pytest.fixture
def reference(model):
    found = slow.fisher(model, ROWS, slow.dense_weights(model))
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_(False)
    model.train()
    return found


def measure(model, data, **settings):
    return estimate_curvature(model, data, **{"adapter": "task"} | settings)


def by_hand(layer, *adapters):
    return sum(layer.scaling[a] * layer.lora_B[a].weight @ layer.lora_A[a].weight for a in adapters).detach()


# ---- Fisher


@pytest.mark.parametrize("size", [1, 3, 8, 11])
def test_fisher_is_the_mean_of_squared_per_example_gradients_at_any_batch_size(model, reference, size):
    curvature = measure(model, batches(ROWS, size))
    assert distance(curvature.S, reference) < 1e-5
    assert curvature.examples == [11]
    assert len(reference) == 4
    assert curvature.settings.kind == "fisher"


def test_trace_normalisation_divides_by_the_mean_entry_of_all_modules(model, reference):
    found = measure(model, batches(ROWS, 4), normalisation="trace")
    mean = torch.cat([H.flatten() for H in reference.values()]).mean()
    assert distance(found.S, {name: H / mean for name, H in reference.items()}) < 1e-5
    for wrong in ({"normalisation": "sum"}, {"normalisation": "trace", "kind": "gram"}):
        with pytest.raises(InputError, match="normalisation must be examples, or trace with kind='fisher'"):
            measure(model, batches(ROWS, 4), **wrong)


def unscaled(model):
    """The same model at θ̂_{t−1}: B of the task's adapter is zero, what it was is returned."""
    before = {name: layer.lora_B["task"].weight.detach().clone() for name, layer in lora_layers(model).items()}
    for layer in lora_layers(model).values():
        layer.lora_B["task"].weight.data.zero_()
    return before


@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_both_ends_are_the_mean_of_a_measurement_at_each(model, kind):
    found = measure(model, batches(ROWS, 4), kind=kind, at="both")
    optimum = measure(model, batches(ROWS, 4), kind=kind)
    deltas = {name: by_hand(layer, "task") for name, layer in lora_layers(model).items()}
    before = unscaled(model)
    start = measure(model, batches(ROWS, 4), kind=kind)
    for name, layer in lora_layers(model).items():
        layer.lora_B["task"].weight.data.copy_(before[name])
    mean = {name: (optimum.S[name] + start.S[name]) / 2 for name in start.S}
    assert distance(found.S, mean) < 1e-5
    assert distance(optimum.S, mean) > 1e-3
    assert found.examples == [11]
    assert found.settings.at == "both"
    if kind == "fisher":  # Δ and θ* are still those of the optimum
        for name, layer in lora_layers(model).items():
            torch.testing.assert_close(found.M[name], mean[name] * by_hand(layer, "merged", "task"))
            assert found.current[name] == pytest.approx(float((mean[name] * deltas[name] ** 2).sum()), rel=1e-4)


def test_both_ends_are_never_mixed_with_one_and_need_a_delta_between_them(model):
    past = measure(model, batches(ROWS, 4))
    with pytest.raises(InputError, match="sums are never mixed"):
        measure(model, batches(ROWS, 4), at="both", previous=past)
    with pytest.raises(InputError, match="at must be one of optimum, both"):
        measure(model, batches(ROWS, 4), at="start")
    with pytest.raises(InputError, match="needs a task that was trained from the running merge"):
        measure(model, batches(ROWS, 4), at="both", merged={})


def test_forming_the_gradients_in_small_chunks_changes_nothing(model, reference, monkeypatch):
    monkeypatch.setattr(pm_hf.measuring.curvature, "CHUNK_BYTES", 4 * 32 * 32 * 2)  # two examples at a time
    assert distance(measure(model, batches(ROWS, 5)).S, reference) < 1e-5


@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
@pytest.mark.parametrize("cap", [1, 6, 7, 11, 40])
def test_the_cap_counts_examples_exactly(model, kind, cap):
    data = batches(ROWS, 3)
    capped = measure(model, data, kind=kind, samples=cap)
    first = measure(model, batches(ROWS[:cap], 3), kind=kind)
    assert capped.examples == [min(cap, 11)]
    assert distance(capped.S, first.S) < 1e-6
    assert len(data[0]["labels"]) == 3  # the caller's batches are not cut


def test_padding_does_not_count(model, reference):
    wide = measure(model, batches(ROWS, 4, length=20))
    assert distance(wide.S, reference) < 1e-5
    no_mask = [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in batches(ROWS, 4, length=20)]
    assert distance(measure(model, no_mask).S, reference) > 0.1  # the mask is what excludes it


def test_data_without_padding_needs_no_mask(model, reference):
    alone = [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]} for row in ROWS]
    assert distance(measure(model, alone).S, reference) < 1e-5


def test_the_squared_gradient_of_a_batch_mean_is_not_the_fisher(model, reference):
    weights = slow.dense_weights(model)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in ROWS:
        for name, g in zip(weights, slow.gradients(model, list(weights.values()), row, row["labels"]), strict=True):
            total[name] += g / len(ROWS)
    wrong = {name: g.square() for name, g in total.items()}
    for name, value in reference.items():
        assert wrong[name].sum() < 0.6 * value.sum()
    assert distance(measure(model, batches(ROWS, 11)).S, wrong) > 0.5


def test_the_sums_hold_the_optimum_of_both_adapters_and_the_tasks_part(model, reference):
    curvature = measure(model, batches(ROWS, 4))
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(
            curvature.M[name], reference[name] * by_hand(layer, "merged", "task"), rtol=1e-4, atol=1e-9
        )
        delta = by_hand(layer, "task")
        assert curvature.current[name] == pytest.approx(float((reference[name] * delta**2).sum()), rel=1e-4)
        assert curvature.delta_norm[name] == pytest.approx(float(delta.norm()), rel=1e-5)


@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_earlier_sums_are_added_and_left_alone(model, kind):
    before = measure(model, batches(examples(5, seed=9), 2), kind=kind)
    kept = {name: value.clone() for name, value in before.S.items()}
    now = measure(model, batches(ROWS, 4), kind=kind)
    both = measure(model, batches(ROWS, 4), kind=kind, previous=before)
    assert both.examples == [5, 11]
    assert both.tasks == 2
    for name in before.S:
        torch.testing.assert_close(both.S[name], before.S[name] + now.S[name])
        assert torch.equal(before.S[name], kept[name])
    for name in before.M:
        torch.testing.assert_close(both.M[name], before.M[name] + now.M[name])
    assert both.current == now.current
    assert both.nbytes == before.nbytes


# ---- labels drawn from the model


def test_drawn_labels_repeat_with_the_seed_and_ignore_the_data(model):
    data = batches(ROWS, 4)
    other = [batch | {"labels": (batch["labels"] + 1) % 3} for batch in data]
    state = torch.get_rng_state()
    first, again = (measure(model, data, labels="mc", seed=1).S for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    relabelled, reseeded = measure(model, other, labels="mc", seed=1).S, measure(model, data, labels="mc", seed=2).S
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, relabelled[name])
        assert not torch.equal(value, reseeded[name])


def test_drawn_labels_give_the_exact_fisher_in_expectation(model, reference):
    few = ROWS[:4]
    found = measure(model, batches(few * 300, 120), labels="mc", seed=0)
    exact = slow.exact_fisher(model, few, slow.dense_weights(model))
    assert distance(found.S, exact) < 0.1
    assert distance(slow.fisher(model, few, slow.dense_weights(model)), exact) > 0.2  # the empirical one differs
    assert found.settings.labels == "mc"


# ---- Gram


@pytest.mark.parametrize(("size", "length"), [(1, None), (3, None), (8, 20)])
def test_gram_is_the_mean_over_examples_of_the_unpadded_tokens_outer_products(model, size, length):
    expected = slow.gram(model, ROWS)
    curvature = measure(model, batches(ROWS, size, length), kind="gram", shrinkage=0.0)
    assert distance(curvature.S, {key: expected[key] for key in KEYS}) < 1e-5
    for name in expected:
        torch.testing.assert_close(curvature.sum_of(name), expected[name], rtol=1e-4, atol=1e-4)
    assert curvature.settings.labels == "none"


def test_key_and_value_share_one_gram_but_not_their_products(model):
    curvature = measure(model, batches(ROWS, 4), kind="gram")
    assert curvature.owner == {name: name.replace("value", "key") for name in lora_layers(model)}
    assert sorted(curvature.S) == KEYS
    assert sorted(curvature.M) == sorted(lora_layers(model))
    for name, layer in lora_layers(model).items():
        expected = by_hand(layer, "merged", "task") @ curvature.sum_of(name)
        torch.testing.assert_close(curvature.M[name], expected, rtol=1e-4, atol=1e-4)


def test_shrinkage_damps_what_is_off_the_diagonal(model):
    plain, shrunk = (measure(model, batches(ROWS, 4), kind="gram", shrinkage=rho) for rho in (0.0, 0.3))
    for name, gram in plain.S.items():
        expected = 0.7 * gram
        expected.fill_diagonal_(0).diagonal().add_(gram.diagonal())
        torch.testing.assert_close(shrunk.S[name], expected)
        assert not torch.allclose(shrunk.S[name], gram)


def test_gram_needs_no_backward_pass(model):
    logits = []
    handle = model.register_forward_hook(lambda *args: logits.append(args[2].logits))
    measure(model, batches(ROWS, 4), kind="gram")
    handle.remove()
    assert len(logits) == 3
    assert not any(value.requires_grad for value in logits)


# ---- heads inside the curvature


def test_a_shared_head_is_measured_as_weight_and_bias_side_by_side(model, reference):
    head = find_head(model, "classifier")
    start = LowRank(torch.randn(3, 33, generator=torch.Generator().manual_seed(1)), torch.eye(33))
    curvature = measure(model, batches(ROWS, 4), heads={"classifier": start})
    model.eval()
    weight, bias = torch.zeros(3, 32), torch.zeros(3)
    for row in ROWS:
        g_weight, g_bias = slow.gradients(model, [head.weight, head.bias], row, row["labels"])
        weight += g_weight.square() / 11
        bias += g_bias.square() / 11
    expected = torch.cat([weight, bias[:, None]], dim=1)
    assert distance(curvature.S, reference | {"classifier": expected}) < 1e-5
    now = torch.cat([head.weight, head.bias[:, None]], dim=1).detach()
    torch.testing.assert_close(curvature.M["classifier"], expected * now, rtol=1e-4, atol=1e-8)
    part = float((expected * (now - start.dense()) ** 2).sum())
    assert curvature.current["classifier"] == pytest.approx(part, rel=1e-4)


def test_a_shared_head_is_in_the_factored_curvature_with_its_bias(model):
    start = LowRank(torch.randn(3, 33, generator=torch.Generator().manual_seed(1)), torch.eye(33))
    full, found = (
        measure(model, batches(ROWS, 4), kind=kind, heads={"classifier": start}) for kind in ("fisher", "factored")
    )
    means = {name: torch.cat([F.mean(1), F.mean(0)]) for name, F in full.S.items()}
    assert found.S["classifier"].shape == (3 + 33,)
    assert distance(found.S, means) < 1e-5
    assert found.fits("classifier", (3, 33))


def test_a_shared_heads_gram_includes_the_constant_input_of_its_bias(model):
    before = head_matrix(find_head(model, "classifier"))
    curvature = measure(model, batches(ROWS, 4), kind="gram", heads={"classifier": before})
    assert curvature.S["classifier"].shape == (33, 33)
    assert curvature.S["classifier"][-1, -1] == pytest.approx(1.0)  # one pooled position for each example
    assert curvature.current["classifier"] == 0.0  # the head did not move


# ---- precision


def test_bfloat16_autocast_moves_alpha_little(model):
    layers = adapted_layers(model, "task")
    weights = [layer.lora_B["task"].weight for layer in layers.values()]
    trained = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data.zero_()  # the past had its optimum at the merged model
    past = measure(model, batches(examples(16, seed=5), 8))
    for weight, value in zip(weights, trained, strict=True):
        weight.data.copy_(value)
    delta = {name: layer_product(layer, ["task"]) for name, layer in layers.items()}
    merged = {name: layer_product(layer, ["merged"]) for name, layer in layers.items()}
    alphas, sums = [], []
    for dtype in (None, torch.bfloat16):
        curvature = measure(model, batches(examples(32, seed=6), 8), previous=past, autocast=dtype)
        assert all(value.dtype == torch.float32 for value in (*curvature.S.values(), *curvature.M.values()))
        alphas.append(optimal_coefficient(delta, merged, curvature).raw)
        sums.append(curvature.S)
    assert 0 < distance(sums[1], sums[0]) < 0.05
    assert 0.2 < alphas[0] < 0.8
    assert 0 < abs(alphas[1] - alphas[0]) < 5e-3
    print("alpha float32, bfloat16, Fisher distance:", *alphas, distance(sums[1], sums[0]))
