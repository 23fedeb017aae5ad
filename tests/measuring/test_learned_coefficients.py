"""Learned coefficients against a slow dense reference, through the merge and PEFT, and what is left of the model."""

import copy
import json

import pytest
import torch
from helpers.adapter_folders import assert_same, dense, head, saved_tensors, write_folder
from helpers.models import batch, rows, tiny_bert
from helpers.peft_adapters import KINDS, build, gpt2, load, seeded, wrap
from peft import LoraConfig
from torch.func import functional_call

from pm_hf import InputError, learn_coefficients, merge_adapters
from pm_hf.measuring.learned_coefficients import Coefficients, LearnedCoefficients, Terms

LAYER = "bert.encoder.layer"
SHAPES = {f"{LAYER}.0.attention.self.key": (16, 16), f"{LAYER}.1.intermediate.dense": (24, 16)}
OTHER = {f"{LAYER}.0.attention.self.key": (16, 16), f"{LAYER}.1.output.dense": (16, 24)}
METHODS = ("adamerging", "adamerging++", "adarank")
FAST = {"steps": 6, "learning_rate": 0.03}  # AdaRank's m begins at 0.1: some singular values go within six steps
LINEAR = (
    *("plain", "rslora", "fan_in_fan_out", "lora_bias", "lora_bias of one", "unequal target modules"),
    *("rank above the width", "modules_to_save", "tied embeddings, head", "adalora, pruned"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of tiny_bert with one module in common, ranks 2 and 4: scalings that float32 holds exactly."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = {"alpha": 1, "config": {"task_type": "SEQ_CLS"}}
    return [
        write_folder(folder / "a", SHAPES, rank=2, seed=1, **settings),
        write_folder(folder / "b", OTHER, rank=4, seed=2, **settings),
    ]


def loaders(count=1, size=4):
    """`count` lists of two batches."""
    examples = rows(2 * size * count)
    both = [batch(examples[start : start + size]) for start in range(0, len(examples), size)]
    return [both[2 * i : 2 * i + 2] for i in range(count)]


def logits(model, inputs):
    with torch.no_grad():
        return model(**{key: value for key, value in inputs.items() if key != "labels"}).logits


def trim(tau, density):
    """The int(density·size) largest entries of a dense matrix."""
    kept = tau.abs().flatten().topk(int(density * tau.numel())).indices
    return torch.zeros_like(tau).flatten().index_copy(0, kept, tau.flatten()[kept]).reshape(tau.shape)


def singular_values(tau, m):
    """U diag(h∘s) Vᵀ with h = [sigmoid(m/10) > 1/2] and the gradient of the sigmoid."""
    U, s, Vh = torch.linalg.svd(tau, full_matrices=False)
    soft = torch.sigmoid(m / 10)
    hard = torch.where(m > 0, 1.0, 0.0).double()
    return (U[:, : len(m)] * (s[: len(m)] * (hard.detach() - soft.detach() + soft))) @ Vh[: len(m)]


def reference(model, loaders, folders, method, per, steps, learning_rate):
    """({module: λ}, {module: masks}, history) by W + Σ λτ dense, in float64."""
    updates = [dense(folder) for folder in folders]
    names = list(dict.fromkeys(name for update in updates for name in update))
    scales = {name: torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) for name in names}
    if per == "task":
        scales = dict.fromkeys(names, scales[names[0]])
    ranks = [2, 4]
    masks = {
        (name, i): torch.full((ranks[i],), 0.1, dtype=torch.float64, requires_grad=True)
        for i, update in enumerate(updates)
        for name in update
    }
    optimizer = torch.optim.Adam([*dict.fromkeys(scales.values()), *masks.values()], lr=learning_rate)
    weights, history = {name: value.detach() for name, value in model.state_dict().items()}, []
    for step in range(steps):
        merged = {f"{name}.weight": weights[f"{name}.weight"] for name in names}
        for i, update in enumerate(updates):
            for name, tau in update.items():
                if method == "adamerging++":
                    tau = trim(tau, 0.4)
                if method == "adarank":
                    tau = singular_values(tau, masks[name, i])
                merged[f"{name}.weight"] = merged[f"{name}.weight"] + scales[name][i] * tau
        loss = torch.zeros((), dtype=torch.float64)
        for own in loaders:
            inputs = {key: value for key, value in own[step % len(own)].items() if key != "labels"}
            p = functional_call(model.eval(), weights | merged, kwargs=inputs).logits.softmax(-1)
            loss = loss - (p * p.log()).sum() / len(p)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    found = {
        name: [(masks[name, i] > 0).int().tolist() if (name, i) in masks else [] for i in range(2)] for name in names
    }
    return scales, found, history


@pytest.mark.parametrize(
    ("method", "per", "count"),
    [
        ("adamerging", "module", 1),
        ("adamerging", "task", 2),
        ("adamerging++", "module", 2),
        ("adamerging++", "task", 1),
        ("adarank", "module", 2),
        ("adarank", "task", 1),
    ],
)
def test_adam_walks_as_on_dense_weights(folders, method, per, count):
    data, model = loaders(count), tiny_bert().double()
    given = data if count > 1 else data[0]
    options = {"density": 0.4} if method == "adamerging++" else None
    found = learn_coefficients(model, given, folders, method=method, per=per, options=options, **FAST)
    scales, masks, history = reference(model, data, folders, method, per, **FAST)
    assert list(found.matrices) == list(scales)
    for name, expected in scales.items():
        learned = torch.tensor(found.matrices[name]["coefficients"], dtype=torch.float64)
        exact = 1e-6 if method == "adamerging++" else 1e-9  # it trims the float32 product, as the merge does
        torch.testing.assert_close(learned, expected.detach(), rtol=0, atol=exact)
        assert found.matrices[name].get("masks", masks[name]) == masks[name]
    assert found.history == pytest.approx(history, abs=1e-7)
    moved = {value for own in found.matrices.values() for value in own["coefficients"]}
    assert len(moved) == (2 if per == "task" else 5)  # two adapters of two modules, one shared; 0.3 where there is none
    if method == "adarank":
        flat = [bit for own in masks.values() for adapter in own for bit in adapter]
        assert 0 < sum(flat) < len(flat) == 12


@pytest.mark.parametrize("method", METHODS)
def test_entropy_falls(folders, method):
    data, settings = loaders(size=8)[0][:1], {"steps": 30, "learning_rate": 0.1, "predict": sharp}
    found = learn_coefficients(tiny_bert(), data, folders, method=method, **settings)
    assert len(found.history) == 30
    assert found.history[-1] < 0.8 * found.history[0]


def sharp(model, inputs):
    """Logits that a random head would give after training: further apart."""
    return 8 * model(**inputs).logits


@pytest.fixture(scope="module", params=LINEAR)
def row(request, tmp_path_factory):
    kind = KINDS[request.param]
    return kind, build(kind, tmp_path_factory.mktemp("kind"))


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_is_the_model_at_the_end_of_learning(row, tmp_path, method):
    kind, adapters = row
    seen = []

    def predict(model, inputs):
        output = model(inputs["ids"])
        seen.append(getattr(output, "logits", output).detach())
        return getattr(output, "logits", output)

    arguments = (kind.model(), [{"ids": kind.inputs()}], adapters)
    settings = {"method": method, "learning_rate": 0.03, "predict": predict}
    learned = learn_coefficients(*arguments, steps=5, **settings)
    learn_coefficients(*arguments, steps=6, **settings)  # its last forward pass has what five steps learned
    assert len({value for own in learned.matrices.values() for value in own["coefficients"]}) > 2
    merge_adapters(adapters, tmp_path / "out", method=method, learned=learned, max_rank="full")
    with torch.no_grad():
        found = load(kind.model(), tmp_path / "out", kind.warning)(kind.inputs())
        base = kind.model()(kind.inputs())
    found, base = getattr(found, "logits", found), getattr(base, "logits", base)
    assert (found - seen[-1]).norm() <= 5e-6 * (found - base).norm()


def with_heads(tmp_path, sizes=(2, 3)):
    """Two adapters whose heads have a label in common, when there are three rows in the second."""
    labels = [["a", "b"], ["c", "d", "a"][: sizes[1]]]
    return [
        write_folder(
            tmp_path / f"head{i}",
            SHAPES,
            seed=i,
            alpha=1,
            config={"task_type": "SEQ_CLS"},
            saved=head(len(names), i),
            labels={"classifier": names},
        )
        for i, names in enumerate(labels)
    ]


def test_heads_are_those_of_the_merge_for_the_duration(tmp_path):
    adapters, model, seen = with_heads(tmp_path), tiny_bert(labels=4), []
    before = copy.deepcopy(model.classifier.state_dict())

    def predict(model, inputs):
        seen.append({f"classifier.{name}": value.clone() for name, value in model.classifier.state_dict().items()})
        return model(**inputs).logits

    learned = learn_coefficients(model, loaders()[0], adapters, steps=2, predict=predict)
    merge_adapters(adapters, tmp_path / "out", method="adamerging", learned=learned)
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"classifier": ["a", "b", "c", "d"]}
    assert_same(seen[-1], {name: value.double() for name, value in saved_tensors(tmp_path / "out").items()}, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.classifier.state_dict().items())
    with pytest.raises(InputError, match=r"classifier.bias is \(3,\) in the model, \(4,\) in .* num_labels=4"):
        learn_coefficients(tiny_bert(labels=3), loaders()[0], adapters, steps=1)


def snapshot(model):
    """Everything that learning touches for a while."""
    return (
        {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
    )


def trainable(model):
    return any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tmp_path, fails):
    model, calls, state = tiny_bert(dropout=0.1, labels=4).train(), [], torch.get_rng_state()
    model.bert.eval()
    model.bert.embeddings.requires_grad_(False)

    def predict(model, inputs):
        calls.append("labels" in inputs or any(m.training for m in model.modules()) or trainable(model))
        if fails and len(calls) == 3:
            raise RuntimeError("out of memory")
        return model(**inputs).logits

    before = snapshot(model)
    try:
        learn_coefficients(model, loaders()[0], with_heads(tmp_path), steps=4, predict=predict)
    except RuntimeError as error:
        assert fails and str(error) == "out of memory"  # noqa: PT018, PT017
    assert calls == [False] * (3 if fails else 4)
    tensors, *rest = snapshot(model)
    assert rest == list(before[1:])
    assert all(p == before[0][n][0] and torch.equal(v, before[0][n][1]) for n, (p, v) in tensors.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_has_no_entropy(tmp_path):
    adapters = build(KINDS["fan_in_fan_out"], tmp_path)
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    garbage = torch.where(mask == 1, ids, 7)
    model = seeded(gpt2)
    found = [
        learn_coefficients(model, [{"input_ids": tokens, "attention_mask": mask}], adapters, steps=1)
        for tokens in (ids, garbage)
    ]
    assert found[0].history == found[1].history
    parts = [
        learn_coefficients(model, [{"input_ids": row[:n][None]}], adapters, steps=1).history[0] * n
        for row, n in zip(ids, (3, 5), strict=True)
    ]
    assert found[0].history[0] == pytest.approx(sum(parts) / 8, rel=1e-5)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(InputError, match=r"positions \(2, 3\), the attention_mask \(2, 6\)"):
        learn_coefficients(model, [inputs], adapters, predict=lambda m, b: m(**b).logits[:, :3])


def test_the_seed_is_that_of_a_shuffling_loader(folders):
    loader = torch.utils.data.DataLoader(rows(12), batch_size=4, shuffle=True)
    with torch.no_grad():
        runs = [learn_coefficients(tiny_bert(), loader, folders, steps=4, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].matrices == runs[1].matrices != runs[2].matrices


def test_a_base_in_half_precision(folders):
    found = [
        learn_coefficients(model, loaders()[0], folders, steps=3, predict=sharp).history
        for model in (tiny_bert(), tiny_bert().bfloat16())
    ]
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.03)


def test_the_gradient_of_a_mask_is_that_of_its_sigmoid():
    term = Terms("layer", (torch.zeros(3, 4), torch.zeros(5, 3)), torch.tensor([0, 0, 1]))
    coefficients = Coefficients([term], 2, 0.5, shared=False, masks=True)
    with torch.no_grad():
        coefficients.logits["layer"].copy_(torch.tensor([2.0, -1.0, 0.1]))
    weights = coefficients.weights(term)
    torch.testing.assert_close(weights.detach(), torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))
    weights.sum().backward()
    soft = torch.tensor([0.2, -0.1, 0.01], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(coefficients.logits["layer"].grad, 0.5 * soft * (1 - soft) / 10)
    assert coefficients.scales.grad.tolist() == [[1.0, 1.0]]
    assert coefficients.values() == {"layer": {"coefficients": [0.5, 0.5], "masks": [[1, 0], [1]]}}


def learn(folders, model=None, data=None, **settings):
    data = loaders()[0] if data is None else data
    return learn_coefficients(model or tiny_bert(), data, folders, **{"steps": 2} | settings)


def cusp(logits):
    return logits + (logits - logits.detach()).abs().sqrt()


def unrelated(model, inputs):
    return torch.zeros(4, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ties"}, "method must be one of adamerging, adamerging\\+\\+, adarank, found 'ties'"),
        ({"per": "layer", "steps": 1.5}, "2 problems: per must be module or task, found 'layer'; steps must be an int"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, found 0.0"),
        ({"start": float("inf")}, "start must be finite, found inf"),
        ({"options": {"density": 0.2}}, "method adamerging: unknown option 'density'; valid: none"),
        ({"method": "adamerging++", "options": {"density": 2}}, "option density must fit"),
        ({"data": []}, "no batches"),
        ({"data": [[], []]}, "no batches"),
        ({"data": (item for item in loaders()[0][:1])}, "no batches; expected at least one whenever it is iterated"),
        ({"data": [[("x", "y")]]}, "expected batches as dicts of tensors, found a tuple"),
        ({"predict": logits}, "predict= must not run under torch.no_grad"),
        ({"predict": lambda m, b: torch.cat([m(**b).logits, torch.full((1, 3), torch.nan)])}, "found entropy nan"),
        ({"predict": lambda m, b: cusp(m(**b).logits)}, r"step 0: expected an entropy and a .* found entropy [01]\.\d"),
        ({"predict": lambda m, b: m(**b).logits[:, :1]}, r"of 2 classes or more, found \(4, 1\)"),
        ({"predict": unrelated}, "does not reach 3 adapted layers, first bert.encoder.layer.0.attention.self.key"),
    ],
)
def test_bad_input_is_refused(folders, settings, message):
    with pytest.raises(InputError, match=message):
        learn(folders, **settings)


def test_a_model_without_logits_needs_predict(folders):
    model = tiny_bert()
    model.forward = model.bert.forward
    with pytest.raises(InputError, match="BertForSequenceClassification returns no logits; give predict="):
        learn(folders, model)


def test_models_that_do_not_fit_are_refused(folders, tmp_path):
    with pytest.raises(InputError, match="no adapter given"):
        learn([])
    with pytest.raises(
        InputError, match=r"3 of 3 adapted modules do not fit the model \(BertModel\), first: it lacks "
    ):
        learn(folders, tiny_bert().bert)
    wide = write_folder(tmp_path / "wide", {f"{LAYER}.0.intermediate.dense": (20, 16)})
    with pytest.raises(InputError, match=r"dense is \(24, 16\) in the model, \(20, 16\) in the adapters"):
        learn(wide)
    words = write_folder(tmp_path / "words", {"bert.embeddings.word_embeddings": (40, 16)})
    with pytest.raises(InputError, match="word_embeddings is a Embedding, expected Linear or Conv1D; merge with"):
        learn(words)
    saved, config = {"score.weight": torch.zeros(3, 16)}, {"modules_to_save": ["score"]}
    score = write_folder(tmp_path / "score", SHAPES, saved=saved, config=config)
    with pytest.raises(InputError, match="lacks score.weight, which the adapters save"):
        learn(score)


@pytest.mark.parametrize(("name", "kind"), [("embedding", "embedding"), ("target_parameters", "fused")])
def test_kinds_that_are_not_linear_are_refused(tmp_path, name, kind):
    row = KINDS[name]
    adapters = build(row, tmp_path)
    with pytest.raises(InputError, match=f"has LoRA of kind '{kind}', expected .* such as method='task_arithmetic'"):
        learn(adapters, row.model())


def test_a_wrapped_model_is_refused(folders):
    wrapped = wrap(tiny_bert(), LoraConfig(target_modules=["key"]))
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(InputError, match="the model is wrapped in PEFT, expected the base alone"):
            learn(folders, model)


def test_the_file_is_what_was_learned_and_fits_these_adapters_only(folders, tmp_path):
    learned, file = learn(folders, method="adarank", learning_rate=0.02, per="task", seed=5), tmp_path / "learned.json"
    learned.save(file)
    content = json.loads(file.read_text())
    assert content == dict(learned)
    assert LearnedCoefficients(**content) == learned
    assert content["settings"] == {"per": "task", "steps": 2, "learning_rate": 0.02, "start": 0.3, "seed": 5}
    assert (content["method"], content["inputs"]) == ("adarank", [str(folder) for folder in folders])
    for name, given in (("object", learned), ("file", file)):
        merge_adapters(folders, tmp_path / name, method="adarank", learned=given)
    assert_same(dense(tmp_path / "object"), dense(tmp_path / "file"), 0.0)
    for adapters in (folders[:1], [*folders, folders[0]], folders[::-1]):
        with pytest.raises(InputError, match="learned with other adapters, or in another order"):
            merge_adapters(adapters, tmp_path / "no", method="adarank", learned=file)
    assert not (tmp_path / "no").exists()
