"""Penalties against slow, obvious references: every task's own Fisher, double loops, the definitions of divergences."""

import copy
import itertools

import pytest
import torch
from helpers.models import OLD_NAME, SIZE, activate_all, batch, lora_bert, rows, tiny_bert, tiny_model
from peft.tuners.lora import LoraLayer
from scipy.spatial.distance import jensenshannon
from torch.distributions import Categorical, kl_divergence

from pm_hf.errors import InputError
from pm_hf.merging.curvature import Curvature, CurvatureSpec
from pm_hf.models.contexts import scaled_adapter, without_lora
from pm_hf.models.language_model import target_count
from pm_hf.models.lora import adapted_layers, find_head, head_matrix, layer_product
from pm_hf.training.penalties import BaseDivergence, ElasticWeights, OrthogonalSubspaces, OutputDrift, divergence

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
HEAD, KINDS = "classifier", ("kl", "reverse_kl", "js", "tv")


@pytest.fixture
def model():
    """BERT with a frozen running merge and a task adapter, both active, and a trainable head."""
    made = activate_all(lora_bert("merged", "task"), "task")
    find_head(made, HEAD).requires_grad_(True)
    return made


@pytest.fixture
def tokens():
    return batch(rows(6))


def two_past_tasks(model, heads=()):
    """({module: [(Fᵢ, θ*ᵢ), …]} of two random tasks, the curvature that holds their sums alone)."""
    generator = torch.Generator().manual_seed(5)
    shapes = {name: layer_product(layer, ["task"]).shape for name, layer in adapted_layers(model, "task").items()}
    shapes |= {name: head_matrix(find_head(model, name)).shape for name in heads}
    draw = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    past = {name: [(draw(shape).square(), draw(shape)) for _ in range(2)] for name, shape in shapes.items()}
    S = {name: sum(F for F, _ in tasks) for name, tasks in past.items()}
    M = {name: sum(F * optimum for F, optimum in tasks) for name, tasks in past.items()}
    flat = dict.fromkeys(past, 1.0)
    return past, Curvature(CurvatureSpec(), S, M, flat, flat, [4, 4])


def dense(layer, name):
    """s·BA by the definition, with its graph."""
    return layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight


def set_zero(model):
    for layer in adapted_layers(model, "task").values():
        torch.nn.init.zeros_(layer.lora_B["task"].weight)


# elastic weights


def test_elastic_penalty_and_its_gradient_are_those_of_every_task_s_own_fisher(model, tokens):
    past, curvature = two_past_tasks(model)
    layers = adapted_layers(model, "task")
    value = ElasticWeights(model, "task", curvature, 0.7)(model, tokens, None)
    value.backward()
    expected = 0.0
    for name, layer in layers.items():
        merged, delta = dense(layer, "merged").detach(), dense(layer, "task").detach()
        for F, optimum in past[name]:
            squared = (merged + delta - optimum).square() - (merged - optimum).square()
            expected += 0.7 * 0.5 * float((F * squared).sum())
        G = 0.7 * sum(F * (merged + delta - optimum) for F, optimum in past[name])
        A, B, s = layer.lora_A["task"].weight, layer.lora_B["task"].weight, layer.scaling["task"]
        assert torch.allclose(A.grad, s * B.detach().T @ G, rtol=1e-4, atol=1e-4)
        assert torch.allclose(B.grad, s * G @ A.detach().T, rtol=1e-4, atol=1e-4)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-4)


def test_elastic_penalty_is_zero_without_a_change_and_still_pulls_towards_the_optima(model, tokens):
    set_zero(model)
    value = ElasticWeights(model, "task", two_past_tasks(model)[1], 3.0)(model, tokens, None)
    value.backward()
    assert float(value.detach()) == 0
    assert all(layer.lora_B["task"].weight.grad.norm() > 1 for layer in adapted_layers(model, "task").values())


def test_elastic_penalty_does_not_see_the_perturbation(model, tokens):
    penalty = ElasticWeights(model, "task", two_past_tasks(model)[1], 1.0)
    found = []
    for factor in (1.0, 1.5):
        model.zero_grad()
        with scaled_adapter(list(adapted_layers(model, "task").values()), "task", factor):
            value = penalty(model, tokens, None)
            value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 4
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_elastic_penalty_covers_a_shared_head_where_the_curvature_does(model, tokens):
    past, curvature = two_past_tasks(model, heads=[HEAD])
    set_zero(model)
    head = find_head(model, HEAD)
    penalty = ElasticWeights(model, "task", curvature, 2.0)
    before = head_matrix(head).dense()
    assert float(penalty(model, tokens, None).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        head.weight.add_(0.3)
        head.bias.sub_(0.2)
    value, now = penalty(model, tokens, None), head_matrix(head).dense()
    value.backward()
    expected = sum((F * ((now - best).square() - (before - best).square())).sum() for F, best in past[HEAD])
    assert torch.allclose(value, expected, rtol=1e-4)  # ½·2
    G = 2.0 * sum(F * (now - best) for F, best in past[HEAD])
    assert torch.allclose(torch.cat([head.weight.grad, head.bias.grad[:, None]], dim=1), G, rtol=1e-4, atol=1e-4)


def test_elastic_penalty_refuses_a_curvature_that_does_not_fit(model):
    _, curvature = two_past_tasks(model)
    names = sorted(curvature.modules)
    gram = Curvature(CurvatureSpec("gram"), curvature.S, curvature.M, curvature.current, curvature.delta_norm, [4])
    with pytest.raises(InputError, match="diagonal Fisher, found kind 'gram'"):
        ElasticWeights(model, "task", gram, 1.0)
    fewer = copy.deepcopy(curvature)
    del fewer.current[names[0]]
    with pytest.raises(InputError, match=f"every adapted module, it lacks {names[0]}"):
        ElasticWeights(model, "task", fewer, 1.0)
    other = copy.deepcopy(curvature)
    other.S[names[0]] = other.M[names[0]] = torch.ones(2, 3)
    with pytest.raises(InputError, match="another"):
        ElasticWeights(model, "task", other, 1.0)


# drift of outputs


def two_past_grams(model):
    """({module: [inputs (examples, tokens, in) of two past tasks]}, the sums of their Grams; key and value share one).

    The last of the two changed every output by half its input.
    """
    generator, layers = torch.Generator().manual_seed(6), adapted_layers(model, "task")
    owners = {name: name.replace("value", "key") for name in layers}
    inputs = {
        owner: [torch.randn(count, 5, 16, generator=generator) for count in (3, 4)] for owner in set(owners.values())
    }
    gram = lambda x: sum(example.T @ example for example in x) / len(x)  # noqa: E731
    S = {owner: gram(first) + gram(last) for owner, (first, last) in inputs.items()}
    M = {name: torch.zeros(16, 16) for name in layers}
    current = {name: 0.25 * float(gram(inputs[owners[name]][1]).trace()) for name in layers}
    sums = Curvature(CurvatureSpec("gram"), S, M, current, dict.fromkeys(layers, 1.0), [3, 4], owners)
    return {name: inputs[owners[name]] for name in layers}, sums


def mean_change(x, D):
    """Mean over examples of Σ_tokens ‖Dx‖²."""
    return sum((D @ token).square().sum() for example in x for token in example) / len(x)


@pytest.mark.parametrize("started_elsewhere", [False, True])
def test_drift_penalty_is_the_change_of_outputs_token_by_token(model, tokens, started_elsewhere):
    inputs, sums = two_past_grams(model)
    layers, offset = adapted_layers(model, "task"), None
    if started_elsewhere:
        offset = {name: layer_product(layer, ["merged"]).scale(-0.5) for name, layer in layers.items()}
    penalty = OutputDrift(model, "task", sums, 2.0, offset)
    value = penalty(model, tokens, None)
    value.backward()
    found = {name: layer.lora_B["task"].weight.grad.clone() for name, layer in layers.items()}
    model.zero_grad()
    paid = sum(mean_change(inputs[name][1], 0.5 * torch.eye(16)) for name in layers)  # by the last task on its own
    D = {name: dense(layer, "task") + (offset[name].dense() if offset else 0) for name, layer in layers.items()}
    expected = 2.0 * 0.1 / paid * sum(mean_change(x, D[name]) / 2 for name in layers for x in inputs[name])
    expected.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, layer in layers.items():
        assert torch.allclose(found[name], layer.lora_B["task"].weight.grad, rtol=1e-3, atol=1e-6)


def test_drift_penalty_of_weight_1_costs_a_tenth_of_a_nat_for_what_the_last_task_changed(model, tokens):
    layers = adapted_layers(model, "task")
    inputs, sums = two_past_grams(model)
    only_last = {name: [inputs[name][1]] for name in layers}
    sums.S = {owner: sum(x.T @ x for x in only_last[owner][0]) / 4 for owner in set(sums.owner.values())}
    sums.examples = [4]
    change = {name: mean_change(only_last[name][0], dense(layer, "task")) for name, layer in layers.items()}
    sums.current = {name: float(value.detach()) for name, value in change.items()}
    value = OutputDrift(model, "task", sums, 1.0)(model, tokens, None)
    assert float(value.detach()) == pytest.approx(0.1, rel=1e-4)


def test_drift_penalty_does_not_see_the_perturbation_and_is_flat_without_a_change(model, tokens):
    penalty = OutputDrift(model, "task", two_past_grams(model)[1], 1.0)
    plain = penalty(model, tokens, None)
    with scaled_adapter(list(adapted_layers(model, "task").values()), "task", 1.5):
        assert torch.equal(penalty(model, tokens, None), plain)
    set_zero(model)
    value = penalty(model, tokens, None)
    value.backward()
    assert float(value.detach()) == 0
    assert all(not layer.lora_B["task"].weight.grad.any() for layer in adapted_layers(model, "task").values())


def test_drift_penalty_refuses_a_curvature_that_does_not_fit(model):
    _, sums = two_past_grams(model)
    with pytest.raises(InputError, match="needs the Gram of the inputs, found kind 'fisher'"):
        OutputDrift(model, "task", two_past_tasks(model)[1], 1.0)
    still = copy.deepcopy(sums)
    still.current = dict.fromkeys(sums.current, 0.0)
    with pytest.raises(InputError, match="the last task changed no output"):
        OutputDrift(model, "task", still, 1.0)
    name = min(sums.current)
    fewer, other = copy.deepcopy(sums), copy.deepcopy(sums)
    del fewer.current[name]
    with pytest.raises(InputError, match=f"every adapted module, it lacks {name}"):
        OutputDrift(model, "task", fewer, 1.0)
    other.S = dict.fromkeys(sums.S, torch.eye(3))
    with pytest.raises(InputError, match="has shape"):
        OutputDrift(model, "task", other, 1.0)


# orthogonal subspaces


def test_orthogonal_penalty_is_the_sum_of_absolute_inner_products_of_the_rows(model, tokens):
    value = OrthogonalSubspaces(model, "task", "merged", 0.5)(model, tokens, None)
    expected = 0.0
    for layer in adapted_layers(model, "task").values():
        for old in layer.lora_A["merged"].weight:
            for new in layer.lora_A["task"].weight:
                expected += 0.5 * abs(float((old @ new).detach()))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    value.backward()
    for layer in adapted_layers(model, "task").values():
        old, new = layer.lora_A["merged"].weight, layer.lora_A["task"].weight
        assert torch.allclose(new.grad, 0.5 * (old @ new.T).sign().T @ old, atol=1e-6)
        assert old.grad is None
        assert layer.lora_B["task"].weight.grad is None


def test_orthogonal_penalty_needs_earlier_factors():
    with pytest.raises(InputError, match="has no adapter merged"):
        OrthogonalSubspaces(lora_bert("task"), "task", "merged", 0.5)


# divergences


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return [2 * torch.randn(40, 5, generator=generator) for _ in range(2)]


def test_divergences_are_their_definitions(logits):
    p, q = (Categorical(logits=values) for values in logits)
    found = {kind: divergence(*logits, kind) for kind in KINDS}
    assert torch.allclose(found["kl"], kl_divergence(p, q), atol=1e-6)
    assert torch.allclose(found["reverse_kl"], kl_divergence(q, p), atol=1e-6)
    distance = jensenshannon(p.probs.double().numpy(), q.probs.double().numpy(), axis=1)
    assert torch.allclose(found["js"].double(), torch.tensor(distance) ** 2, atol=1e-6)
    events = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))  # every event of the five outcomes
    largest = ((p.probs - q.probs) @ events.T).abs().amax(1)
    assert torch.allclose(found["tv"], largest, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_bounded_zero_for_equals_and_finite_at_the_extremes(logits, kind):
    assert torch.allclose(divergence(logits[0], logits[0], kind), torch.zeros(40), atol=1e-6)
    assert (divergence(*logits, kind) > 0).all()
    left = torch.tensor([[1e4, 0.0], [0.0, 1e4], [1e4, 0.0]])
    right = torch.tensor([[0.0, 1e4], [1e4, 0.0], [1e4, 0.0]], requires_grad=True)
    found = divergence(left, right, kind)
    found.sum().backward()
    most = {"js": torch.log(torch.tensor(2.0)), "tv": torch.tensor(1.0)}.get(kind, torch.tensor(1e4))
    assert torch.allclose(found, torch.stack([most, most, 0 * most]))
    assert right.grad.isfinite().all()


# the base's prediction


def test_base_prediction_is_the_model_without_lora_in_eval_mode_under_the_trained_head(tokens):
    model = activate_all(lora_bert("merged", "task", dropout=0.3), "task").train()
    model.get_submodule("base_model.model.bert.embeddings").eval()
    base = tiny_bert(dropout=0.3).eval()
    with torch.no_grad():
        for mine, theirs in zip(find_head(model, HEAD).parameters(), base.classifier.parameters(), strict=True):
            mine.add_(0.5)
            theirs.copy_(mine)
        expected = base(tokens["input_ids"], tokens["attention_mask"]).logits
    logits = model(**tokens).logits
    random, modes = torch.get_rng_state(), {module: module.training for module in model.modules()}
    for kind in KINDS:
        value = BaseDivergence(0.4, kind)(model, tokens, logits)
        assert torch.allclose(value, 0.4 * divergence(expected, logits, kind).mean(), atol=1e-6)
    assert torch.equal(torch.get_rng_state(), random)
    assert {module: module.training for module in model.modules()} == modes


def test_saved_head_of_the_adapter_stays_on_without_lora(tokens):
    model = lora_bert("task", modules_to_save=[HEAD]).eval()
    with torch.no_grad():
        find_head(model, HEAD).bias.add_(torch.tensor([1.0, -2.0, 3.0]))
        plain = tiny_bert().eval()(**tokens).logits
        with without_lora(model):
            found = model(**tokens).logits
    assert torch.allclose(found - plain, torch.tensor([1.0, -2.0, 3.0]).expand(6, 3), atol=1e-5)


def test_model_is_as_before_when_the_base_s_prediction_fails(model):
    model.train()
    with pytest.raises(RuntimeError, match="broken"), without_lora(model):
        raise RuntimeError("broken")
    assert all(module.training for module in model.modules())
    assert not any(module.disable_adapters for module in model.modules() if isinstance(module, LoraLayer))


def test_base_prediction_has_no_gradient_of_its_own(model, tokens):
    logits = model(**tokens).logits
    value = BaseDivergence(1.0)(model, tokens, logits)
    (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
    with torch.no_grad(), without_lora(model):
        p = model(**tokens).logits.softmax(-1)
    assert torch.allclose(gradient, (logits.softmax(-1) - p) / 6, atol=1e-6)  # of KL(p‖q) with respect to q's logits
    assert not BaseDivergence(1.0)(model, tokens, logits.detach()).requires_grad


def language_batch():
    """Three rows of unlike length; -100 where nothing is predicted."""
    ids = torch.randint(6, SIZE, (3, 7), generator=torch.Generator().manual_seed(1))
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row, (start, stop) in enumerate([(2, 7), (4, 5), (1, 6)]):
        labels[row, :start], labels[row, stop:], mask[row, stop:] = -100, -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_base_prediction_of_a_language_model_counts_target_tokens_only(name):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    targets = ["q", "v"] if name == "t5" else ["q_proj", "v_proj"]
    model = get_peft_model(tiny_model(name), LoraConfig(r=2, target_modules=targets), adapter_name="task").train()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.5)
    tokens = language_batch()
    logits = model(**tokens).logits
    with torch.no_grad(), model.disable_adapter():
        base = model(**tokens).logits
    values = []
    for row in range(3):
        for t in range(7):
            if tokens["labels"][row, t] != -100:
                at = t if name == "t5" else t - 1
                p, q = base[row, at].softmax(-1), logits[row, at].softmax(-1)
                values.append(float((p * (p.log() - q.log())).sum().detach()))
    assert len(values) == 11 == int(target_count(model, tokens))
    assert float(BaseDivergence(2.0)(model, tokens, logits).detach()) == pytest.approx(2 * sum(values) / 11, rel=1e-4)
