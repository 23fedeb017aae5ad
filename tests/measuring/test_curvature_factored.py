"""The factored curvature of a tiny language model from training to the merged folder, its memory, and its precision."""

import helpers.slow_language as slow
import pytest
import torch
from helpers.adapter_folders import assert_same, dense, peft_quiet
from helpers.per_example import distance, lora_layers
from helpers.slow_language import base_model, batches, rows, task_model
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import pm_hf.measuring.curvature
from pm_hf import InputError, estimate_curvature, merge_adapters, optimal_coefficient
from pm_hf.merging.curvature import Curvature
from pm_hf.models.lora import adapted_layers, layer_product

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SIZES = [(3, 2), (5, 1), (2, 4), (4, 3)] * 3
KINDS = ("fisher", "factored")


def measure(model, data, **settings):
    return estimate_curvature(model, data, **{"adapter": "task"} | settings)


def deltas(model, adapter="task"):
    return {name: layer_product(layer, [adapter]) for name, layer in adapted_layers(model, "task").items()}


# ---- a stream of two trained tasks


def started(merged=None):
    """A model with a new task adapter, over a merged one from its folder."""
    torch.manual_seed(5)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base_model("llama"), lora, adapter_name="task")
    if merged is not None:
        model.load_adapter(merged, "merged")
    for layer in lora_layers(model).values():
        layer.set_adapter([*(["merged"] if merged else []), "task"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".task." in name)
    return model


def train(model, data, steps=25):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.eval()  # without dropout
    for _ in range(steps):
        losses.append(model(**data).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """Both tasks' α by kind and freedom, the files, and what two folds with the factored file wrote."""
    folder, found, sums, merged = tmp_path_factory.mktemp("stream"), {}, dict.fromkeys(KINDS), None
    with peft_quiet():
        for t in range(2):
            model, data = started(merged), batches(rows("llama", SIZES, seed=t), len(SIZES))[0]
            train(model, data)
            model.save_pretrained(folder / f"{t}", selected_adapters=["task"])
            task, file = folder / f"{t}" / "task", folder / f"{t}.safetensors"
            for kind in KINDS:
                sums[kind] = measure(model, [data], kind=kind, previous=sums[kind])
                past = deltas(model, "merged") if t else None
                for freedom in ("global", "module"):
                    found[t, kind, freedom] = optimal_coefficient(deltas(model), past, sums[kind], freedom=freedom)
            sums["factored"].save(file)
            output = folder / f"merged-{t}"
            found[t] = merge_adapters(task, output, into=merged, curvature=file)
            merged = output
    return folder, found


def test_the_first_task_is_taken_as_it_is(folded):
    folder, found = folded
    for kind in KINDS:
        assert found[0, kind, "global"].raw == pytest.approx(1, abs=1e-6)
    assert found[0].coefficient.raw == pytest.approx(1, abs=1e-6)
    assert_same(dense(folder / "merged-0"), dense(folder / "0" / "task"))


def test_the_factored_alpha_stands_beside_the_exact_one_between_zero_and_one(folded):
    _, found = folded
    exact, factored = (found[1, kind, "global"].raw for kind in KINDS)
    assert 0 < exact < 1
    assert 0 < factored < 1
    assert abs(factored - exact) < 0.15
    modules = [found[1, kind, "module"].modules for kind in KINDS]
    assert set(modules[0]) == set(modules[1])
    assert all(0 < alpha.raw < 1 for kind in modules for alpha in kind.values())


def test_a_folder_is_folded_with_a_factored_file(folded):
    folder, found = folded
    report, alpha = found[1], found[1, "factored", "global"]
    assert report.coefficient.raw == pytest.approx(alpha.raw, rel=1e-9)
    assert report.tasks == 2
    past, task = dense(folder / "merged-0"), dense(folder / "1" / "task")
    assert_same(dense(folder / "merged-1"), {name: past[name] + alpha.raw * task[name] for name in task})


def test_each_module_may_have_its_own_coefficient(folded, tmp_path):
    folder, found = folded
    alpha = found[1, "factored", "module"]
    merge_adapters(
        folder / "1" / "task",
        tmp_path / "out",
        into=folder / "merged-0",
        curvature=folder / "1.safetensors",
        freedom="module",
    )
    past, task = dense(folder / "merged-0"), dense(folder / "1" / "task")
    assert len({round(alpha.for_module(name), 3) for name in task}) > 1
    assert_same(dense(tmp_path / "out"), {n: past[n] + alpha.for_module(n) * task[n] for n in task})


def test_the_whole_matrix_is_refused_and_nothing_is_written(folded, tmp_path):
    folder, _ = folded
    files = {"into": folder / "merged-0", "curvature": folder / "1.safetensors"}
    with pytest.raises(InputError, match="the factored curvature has no free solution"):
        merge_adapters(folder / "1" / "task", tmp_path / "out", freedom="free", **files)
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_another_task_is_refused(folded, tmp_path):
    folder, _ = folded
    with pytest.raises(InputError, match="measured with another task adapter"):
        merge_adapters(folder / "1" / "task", tmp_path / "out", curvature=folder / "0.safetensors")
    with pytest.raises(InputError, match=r"covers 1 task\(s\)"):
        merge_adapters(
            folder / "1" / "task", tmp_path / "out", into=folder / "merged-0", curvature=folder / "0.safetensors"
        )


def test_the_file_has_no_matrix(folded):
    folder, _ = folded
    sums = Curvature.load(folder / "1.safetensors")
    assert (sums.tasks, sums.nbytes) == (2, 4 * 2 * (24 + 18 + 32))
    assert (folder / "1.safetensors").stat().st_size < sums.nbytes + 8192


def two_tasks(model, kind, past, current, **settings):
    """(α, sums) of the second task, where the first one's optimum is the merged model."""
    factors = [layer.lora_B["task"].weight.data for layer in lora_layers(model).values()]
    trained = [factor.clone() for factor in factors]
    for factor in factors:
        factor.zero_()
    first = measure(model, past, kind=kind, **settings)
    for factor, value in zip(factors, trained, strict=True):
        factor.copy_(value)
    sums = measure(model, current, kind=kind, previous=first, **settings)
    return optimal_coefficient(deltas(model), deltas(model, "merged"), sums).raw, sums.S


def test_alpha_is_exact_where_one_token_predicts_one_so_that_the_fisher_has_rank_one():
    model = task_model("llama")
    data = [batches(rows("llama", [(1, 1)], seed=seed), 1) for seed in (1, 2)]
    exact, factored = (two_tasks(model, kind, *data)[0] for kind in KINDS)
    assert factored == pytest.approx(exact, abs=1e-5)
    assert 1e-2 < abs(factored - 0.5) < 0.49


# ---- memory


class Largest(TorchDispatchMode):
    """Remembers the most entries of one tensor that an operation made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        parts = made if isinstance(made, tuple | list) else [made]
        sizes = [part.numel() for part in parts if isinstance(part, torch.Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_factored_pass_never_holds_as_many_entries_as_a_weight(kind, monkeypatch):
    monkeypatch.setattr(pm_hf.measuring.curvature, "CHUNK_BYTES", 1)  # an example at a time
    model, name = task_model("llama"), f"_add_{kind}"
    plain, largest = getattr(pm_hf.measuring.curvature, name), Largest()

    def watched(*args):
        with largest:
            plain(*args)

    monkeypatch.setattr(pm_hf.measuring.curvature, name, watched)
    measure(model, batches(rows("llama", [(3, 2)]), 1), kind=kind)
    weights = {layer.in_features * layer.out_features for layer in lora_layers(model).values()}
    assert weights == {12 * 6, 12 * 12, 12 * 20}
    assert largest.entries == (12 * 20 if kind == "fisher" else 5 * 20)  # tokens by features


# ---- precision


def caught(model, run):
    """({module: [[x, δ] of every example]}, result) of a run over single examples, in the dtypes of the layers."""
    found = {name: [] for name in lora_layers(model)}

    def hook(at):
        def keep(_, args, output):
            at.append([args[0].detach()])
            output.register_hook(lambda gradient: at[-1].append(gradient.detach()))

        return keep

    handles = [layer.register_forward_hook(hook(found[name])) for name, layer in lora_layers(model).items()]
    result = run()
    for handle in handles:
        handle.remove()
    return found, result


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_ends_where_the_products_begin(kind):
    """x and δ as the bfloat16 pass has them, their products and sums in float64: only float32 rounding is left."""
    model, data = task_model("llama"), batches(rows("llama", SIZES), 1)
    seen, found = caught(model, lambda: measure(model, data, kind=kind, autocast=torch.bfloat16))
    expected = {}
    for name, pairs in seen.items():
        assert len(pairs) == len(SIZES)
        products = [d[0].double().T @ x[0].double() for x, d in pairs]
        expected[name] = sum(G.square() for G in products) / len(products)
    assert {x.dtype for pairs in seen.values() for x, _ in pairs} >= {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in found.S.values())
    expected = expected if kind == "fisher" else slow.means(expected)
    assert distance({name: value.double() for name, value in found.S.items()}, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", slow.KINDS)
def test_bfloat16_autocast_moves_alpha_little(language, kind):
    """Random weights and few examples: single curvatures move by up to a seventh, the ratio of their sums does not."""
    model = task_model(language)
    data = [batches(rows(language, 4 * SIZES, seed=seed), 16) for seed in (5, 6)]
    (alpha, sums), (moved, half) = (two_tasks(model, kind, *data, autocast=d) for d in (None, torch.bfloat16))
    assert 0.2 < alpha < 0.8
    assert 0 < abs(moved - alpha) < 0.02
    assert 0 < distance(half, sums) < 0.2
    assert all(value.dtype == torch.float32 for value in half.values())
