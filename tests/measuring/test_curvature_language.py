"""estimate_curvature of language models against autograd on the dense weights, one unpadded example at a time."""

import itertools

import helpers.slow_language as slow
import pytest
import torch
from helpers.per_example import distance, lora_layers
from helpers.slow_language import CAUSAL, KINDS, MODULES, SIZES, batches, rows, task_model

import pm_hf.measuring.curvature
from pm_hf import InputError, estimate_curvature
from pm_hf.models.lora import curvature_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
MODELS: dict = {}


@pytest.fixture
def case(request):
    """(model in training mode, its examples, their Fisher) of a kind of model."""
    kind = request.param
    if kind not in MODELS:
        model, examples = task_model(kind), rows(kind, SIZES)
        MODELS[kind] = model, examples, slow.fisher(model, examples)
    MODELS[kind][0].train()
    return MODELS[kind]


every = pytest.mark.parametrize("case", KINDS, indirect=True)


def measure(model, data, **settings):
    return estimate_curvature(model, data, **{"adapter": "task"} | settings)


# ---- Fisher


@every
@pytest.mark.parametrize(("size", "extra"), [(1, 0), (3, 0), (7, 4)])
def test_fisher_is_the_mean_of_squared_per_example_gradients_whatever_the_padding(case, size, extra):
    model, examples, reference = case
    found = measure(model, batches(examples, size, extra))
    assert distance(found.S, reference) < 1e-4
    assert len(reference) == MODULES[model.config.model_type]
    assert found.examples == [7]
    assert found.settings.loss_reduction == "mean"


@every
def test_an_examples_loss_may_be_the_sum_over_its_target_tokens(case):
    model, examples, reference = case
    expected = slow.fisher(model, examples, "sum")
    found = measure(model, batches(examples, 4), loss_reduction="sum")
    assert distance(found.S, expected) < 1e-4
    assert distance(reference, expected) > 0.1
    assert found.settings.loss_reduction == "sum"


@pytest.mark.parametrize("case", CAUSAL, indirect=True)
def test_a_masked_prompt_counts_through_attention_where_no_mask_is_given(case):
    model, examples, reference = case
    alone = [{name: row[name][None] for name in ("input_ids", "labels")} for row in examples]
    assert distance(measure(model, alone).S, reference) < 1e-4
    expected = slow.gram(model, examples)
    found = measure(model, alone, kind="gram", shrinkage=0.0)
    assert distance({name: found.sum_of(name) for name in expected}, expected) < 1e-4


@pytest.mark.parametrize("case", ["t5"], indirect=True)
def test_a_decoder_position_without_a_target_counts_while_targets_follow(case):
    model, examples, _ = case
    holes = [{"input_ids": row["input_ids"], "labels": row["labels"].clone()} for row in examples]
    for row in holes:
        row["labels"][: len(row["labels"]) // 2] = -100
    assert distance(measure(model, batches(holes, 3)).S, slow.fisher(model, holes)) < 1e-4
    found, expected = measure(model, batches(holes, 3), kind="gram", shrinkage=0.0), slow.gram(model, holes)
    assert distance({name: found.sum_of(name) for name in expected}, expected) < 1e-4


@pytest.mark.parametrize("case", ["t5"], indirect=True)
@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_encoder_and_decoder_of_one_length_are_told_apart(case, kind):
    """Three tokens on either side at most, so that only the lengths of the rows differ."""
    model, *_ = case
    examples = rows("t5", [(3, 1), (1, 3), (2, 2)], seed=1)
    together, mask_free = batches(examples, 3), [{n: row[n][None] for n in row} for row in rows("t5", [(2, 2), (3, 3)])]
    assert together[0]["input_ids"].shape == together[0]["labels"].shape
    apart = measure(model, batches(examples, 1), kind=kind)
    assert distance(measure(model, together, kind=kind).S, apart.S) < 1e-4
    if kind == "fisher":
        assert distance(apart.S, slow.fisher(model, examples)) < 1e-4
        assert distance(measure(model, mask_free).S, slow.fisher(model, rows("t5", [(2, 2), (3, 3)]))) < 1e-4
    assert together[0]["input_ids"].shape == (3, 3), "the caller's batch is not changed"


@every
@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_the_cap_counts_examples_exactly(case, kind):
    model, examples, _ = case
    capped = measure(model, batches(examples, 3), kind=kind, samples=4)
    assert capped.examples == [4]
    assert distance(capped.S, measure(model, batches(examples[:4], 2), kind=kind).S) < 1e-4


# ---- factored


@every
@pytest.mark.parametrize("chunk", [None, 4 * 8 * 8])
def test_factored_is_the_row_and_column_means_of_the_fisher(case, chunk, monkeypatch):
    model, examples, reference = case
    if chunk is not None:
        monkeypatch.setattr(pm_hf.measuring.curvature, "CHUNK_BYTES", chunk)  # an example at a time
    found = measure(model, batches(examples, 4), kind="factored")
    expected = slow.means(reference)
    assert distance(found.S, expected) < 1e-4
    for name, layer in lora_layers(model).items():
        delta = (layer.scaling["task"] * layer.lora_B["task"].weight @ layer.lora_A["task"].weight).detach()
        r, c = expected[name].split(list(delta.shape))
        form = float((torch.outer(r, c) / r.mean() * delta**2).sum())
        assert found.current[name] == pytest.approx(form, rel=1e-3)
    assert found.M == {}


@every
def test_factored_sums_of_two_tasks_add_up(case):
    model, examples, reference = case
    before = measure(model, batches(examples[:3], 3), kind="factored")
    both = measure(model, batches(examples, 4), kind="factored", previous=before)
    first, second = slow.means(slow.fisher(model, examples[:3])), slow.means(reference)
    assert distance(both.S, {name: first[name] + second[name] for name in first}) < 1e-4
    assert both.past == pytest.approx(before.current, rel=1e-5), "the same Δ"
    assert both.examples == [3, 7]
    assert both.nbytes == before.nbytes


# ---- labels drawn from the model


@every
@pytest.mark.parametrize("kind", ["fisher", "factored"])
def test_drawn_tokens_repeat_with_the_seed_and_ignore_the_data(case, kind):
    model, examples, _ = case
    relabelled = [{name: value.clone() for name, value in row.items()} for row in examples]
    for row in relabelled:  # the last token is in no other's prefix
        row["labels"][-1] = (row["labels"][-1] + 1) % slow.WORDS
    data, altered = batches(examples, 4), batches(relabelled, 4)
    first, again, other = (measure(model, data, kind=kind, labels="mc", seed=seed).S for seed in (1, 1, 2))
    blind = measure(model, altered, kind=kind, labels="mc", seed=1).S
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, blind[name])
        assert not torch.equal(value, other[name])


def enumerated(model, row, words: int, count: int) -> dict:
    """Σ over all completions of Π p(token|the given prefix) · G∘G of the mean loss for these tokens."""
    with torch.no_grad():
        chances = slow.logits_of(model, row)[0].softmax(-1)
    total: dict = {}
    for tokens in itertools.product(range(words), repeat=count):
        p = torch.prod(torch.stack([chances[t, token] for t, token in enumerate(tokens)]))
        for name, g in slow.gradients(model, row, list(tokens)).items():
            total[name] = total.get(name, 0.0) + p * g.square()
    return total


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_drawn_tokens_give_the_enumerated_fisher_in_expectation(kind):
    words, targets = 4, ["v_proj"] if kind == "llama" else ["v"]
    model = task_model(kind, targets, words)
    few = rows(kind, [(2, 2), (3, 2)], seed=4, words=words)
    parts = [enumerated(model, row, words, 2) for row in few]
    expected = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    found = measure(model, batches(few * 600, 400), labels="mc")
    assert distance(found.S, expected) < 0.1
    assert distance(slow.fisher(model, few), expected) > 0.2, "the empirical one differs"
    factored = measure(model, batches(few * 600, 400), labels="mc", kind="factored")
    assert distance(factored.S, slow.means(expected)) < 0.1
    assert found.settings.labels == factored.settings.labels == "mc"


# ---- Gram


@every
@pytest.mark.parametrize(("size", "extra"), [(1, 0), (3, 0), (7, 4)])
def test_gram_is_the_mean_over_examples_of_the_unpadded_tokens_outer_products(case, size, extra):
    model, examples, _ = case
    expected = slow.gram(model, examples)
    found = measure(model, batches(examples, size, extra), kind="gram", shrinkage=0.0)
    assert distance({name: found.sum_of(name) for name in expected}, expected) < 1e-4
    assert len(found.S) < len(expected) or model.config.model_type == "gpt2", "modules with one input share a Gram"


# ---- settings and size


@pytest.mark.parametrize("case", ["llama"], indirect=True)
@pytest.mark.parametrize("change", [{"loss_reduction": "sum"}, {"kind": "factored"}, {"kind": "gram"}], ids=str)
def test_sums_of_another_loss_or_kind_are_never_mixed(case, change):
    model, examples, _ = case
    past, other = measure(model, batches(examples, 7)), measure(model, batches(examples, 7), **change)
    with pytest.raises(InputError, match="sums are never mixed"):
        measure(model, batches(examples, 7), previous=past, **change)
    with pytest.raises(InputError, match="sums are never mixed"):
        measure(model, batches(examples, 7), previous=other)


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_an_unknown_loss_reduction_or_kind_is_an_error(case):
    model, examples, _ = case
    with pytest.raises(InputError, match="loss_reduction must be one of mean, sum, found 'median'"):
        measure(model, batches(examples, 7), loss_reduction="median")
    with pytest.raises(InputError, match="kind must be one of fisher, gram, factored, found 'kfac'"):
        measure(model, batches(examples, 7), kind="kfac")


@every
@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_the_size_that_is_announced_is_the_size_of_the_sums(case, kind):
    model, examples, _ = case
    announced, found = curvature_bytes(model, "task", kind), measure(model, batches(examples, 7), kind=kind)
    sizes = {found.nbytes, measure(model, batches(examples[:2], 2), kind=kind, previous=found).nbytes}
    assert len(sizes) == 1
    if kind != "gram":
        assert sizes == {announced}
    else:
        shared = sum(4 * layer.in_features**2 for name, layer in lora_layers(model).items() if name not in found.S)
        assert sizes == {announced - shared}
