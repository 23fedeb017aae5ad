"""Every method of the table through merge_adapters: what is folded, what is kept, and what is refused."""

import json

import pytest
import torch
from helpers.adapter_folders import (
    HEAD,
    SHAPES,
    assert_same,
    curvature_sums,
    dense,
    head,
    refused,
    saved_tensors,
    tree,
    write_folder,
)

from pm_hf import InputError, merge_adapters
from pm_hf.merging import METHODS
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods.base import Matrix

REPORT = "merge_report.json"
BATCH = [name for name, method in METHODS.items() if method.batch]
FOLD = [name for name, method in METHODS.items() if method.fold and name != "pm"]


@pytest.fixture
def pair(tmp_path):
    """Two adapters, the second without one of the modules."""
    first = write_folder(tmp_path / "a", seed=1, rank={"layers.0.q": 3, "layers.1.v": 2})
    return first, write_folder(tmp_path / "b", {"layers.0.q": SHAPES["layers.0.q"]}, seed=2)


def needs(method, folders):
    """The curvature or the learned coefficients that a method wants, for plain folders."""
    if METHODS[method].curvature in ("fisher", "gram"):
        kind = METHODS[method].curvature
        return {"curvature": [curvature_sums(kind, [dense(f)], [{}], seed=i)[0] for i, f in enumerate(folders)]}
    if METHODS[method].learned:
        ranks = {
            name: [torch.linalg.matrix_rank(dense(f).get(name, torch.zeros(1, 1))) for f in folders] for name in SHAPES
        }
        return {
            "learned": {
                "matrices": {
                    name: {"coefficients": [0.3, 0.7], "masks": [[1] * int(r) for r in found]}
                    for name, found in ranks.items()
                }
            }
        }
    return {}


def products(folder):
    """{module: LowRank} of full rank, zero of rank 0 where the folder lacks the module."""
    updates = dense(folder)
    zero = {n: LowRank(torch.zeros(shape[0], 0), torch.zeros(0, shape[1])) for n, shape in SHAPES.items()}
    return zero | {n: LowRank(u.float(), torch.eye(u.shape[1])) for n, u in updates.items()}


def kernel_result(method, terms, weights, state, options, curvature):
    """{module: the kernel's result, dense float64}, called matrix by matrix."""
    found = {}
    for name in SHAPES:
        sums = tuple(c.sum_of(name) if name in c.M else torch.zeros_like(curvature[0].sum_of(name)) for c in curvature)
        matrix = Matrix(name, tuple(t[name] for t in terms), tuple(weights), sums)
        result = METHODS[method].kernel(matrix, state, **options)
        found[name] = (result.dense() if isinstance(result, LowRank) else result).double()
    return found


@pytest.mark.parametrize("method", BATCH)
def test_several_adapters_are_what_the_kernel_makes_of_them(pair, tmp_path, method):
    chosen, extra = METHODS[method], needs(method, pair)
    report = merge_adapters(pair, tmp_path / "out", method=method, max_rank="full", **extra)
    weights = [chosen.weight or 0.5] * 2
    terms = [products(folder) for folder in pair]
    options = {name: option.default for name, option in chosen.options.items()}
    if chosen.kernel is None:
        expected = {n: sum(w * t[n].dense().double() for w, t in zip(weights, terms, strict=True)) for n in SHAPES}
    else:
        stream = lambda: (Matrix(n, tuple(t[n] for t in terms), tuple(weights)) for n in SHAPES)  # noqa: E731
        state = extra.get("learned", {}).get("matrices")
        state = chosen.prepare(stream, None, **options) if chosen.prepare else state
        expected = kernel_result(method, terms, weights, state, options, extra.get("curvature", ()))
    # where a gradient of DOGE is zero, Adam makes a step of its rounding
    assert_same(dense(tmp_path / "out"), expected, 2e-2 if method == "doge" else 2e-5)
    assert report.options == options
    assert report.weights == weights


@pytest.mark.parametrize("method", [name for name in FOLD if METHODS[name].curvature is None and name != "slao"])
def test_a_fold_goes_on_from_the_folder_alone(tmp_path, method):
    """Folding the third task into a merge of two that was read from disk, against the kernel's own recursion."""
    tasks = [write_folder(tmp_path / str(i), seed=i) for i in range(3)]
    running, state, past = None, None, None
    for i, task in enumerate(tasks):
        out = tmp_path / f"merged-{i}"
        report = merge_adapters(task, out, into=running, method=method, max_rank="full")
        if i:
            expected = _fold(method, past, products(task), i + 1, state)
            assert_same(dense(out), expected, 2e-5)
        running, past, state = out, products(out), json.loads((out / REPORT).read_text())["state"]
        assert report.state == state
        assert report.tasks == i + 1
    if method == "opcm":
        assert state["tasks"] == 3


def _fold(method, past, task, tasks, saved):
    alpha = {"average": 1 / tasks, "sequential": 1.0, "coma": 0.4}.get(method)
    if alpha is not None:
        return {n: past[n].dense().double() + alpha * task[n].dense().double() for n in SHAPES}
    chosen, options = METHODS[method], {name: o.default for name, o in METHODS[method].options.items()}
    state = {"tasks": tasks}
    if chosen.prepare:
        state = chosen.prepare(lambda: (Matrix(n, (past[n], task[n]), (1.0, 1.0)) for n in SHAPES), saved, **options)
    return kernel_result(method, [past, task], [1.0, 1.0], state, options, ())


def test_slao_needs_factors_of_one_rank_and_keeps_the_last_a(tmp_path):
    first, second = write_folder(tmp_path / "a", seed=1), write_folder(tmp_path / "b", seed=2)
    merge_adapters(second, tmp_path / "out", into=first, method="slao")
    out = {n: (B, A) for n, (B, A) in _factors(tmp_path / "out").items()}
    one, two = _factors(first), _factors(second)
    for name, (B, A) in out.items():
        assert torch.equal(A, two[name][1])
        assert torch.allclose(B, one[name][0] + (two[name][0] - one[name][0]) / 2**0.5, atol=1e-6)
    third = write_folder(tmp_path / "c", rank=3, seed=3)
    with pytest.raises(InputError, match="rank"):
        merge_adapters(third, tmp_path / "no", into=tmp_path / "out", method="slao")


def _factors(folder):
    """{module: (s·B, A)} from the file; write_folder's scaling is 2, a merge's 1."""
    from pm_hf.adapters.folder import open_adapter

    adapter = open_adapter(folder)
    return {name: (adapter.product(name).B, adapter.product(name).A) for name in adapter.layouts}


def test_cofima_fold_weighs_both_sides_by_their_own_fisher(tmp_path):
    merged, task = write_folder(tmp_path / "m", seed=1), write_folder(tmp_path / "t", seed=2)
    (old, (F,)), (new, (H,)) = (curvature_sums("fisher", [dense(f)], [{}], seed=s) for f, s in ((merged, 5), (task, 6)))
    merge_adapters(
        task, tmp_path / "out", into=merged, method="cofima", curvature=[old, new], coefficient=0.3, max_rank="full"
    )
    past, delta = dense(merged), dense(task)
    expected = {n: past[n] + 0.3 * H[n] * delta[n] / (0.7 * F[n] + 0.3 * H[n]) for n in SHAPES}
    assert_same(dense(tmp_path / "out"), expected, 1e-5)


def test_dense_results_keep_the_sum_of_the_ranks_unless_told_otherwise(tmp_path):
    pair = [write_folder(tmp_path / name, seed=i, rank=2) for i, name in enumerate("ab")]
    ranks = {}
    for limit in (None, 1, 7, "full"):
        report = merge_adapters(pair, tmp_path / f"out-{limit}", method="ties", max_rank=limit)
        ranks[limit] = {module["rank_out"] for module in report.modules.values()}
        exact = dense(tmp_path / f"out-{limit}")
    assert ranks == {None: {4}, 1: {1}, 7: {7}, "full": {10, 12}}
    for limit in (None, 1, 7):
        folder = tmp_path / f"out-{limit}"
        lines, found = json.loads((folder / REPORT).read_text())["modules"], dense(folder)
        for name, matrix in exact.items():
            gap = float(torch.linalg.norm(found[name] - matrix) / torch.linalg.norm(matrix))
            assert lines[name]["error"] == pytest.approx(gap, rel=1e-4)


@pytest.mark.parametrize("method", ["ties", "average"])
def test_energy_keeps_the_share_that_is_asked_for(tmp_path, method):
    pair = [write_folder(tmp_path / name, seed=i, rank=4) for i, name in enumerate("ab")]
    merge_adapters(pair, tmp_path / "all", method=method, max_rank="full")
    report = merge_adapters(pair, tmp_path / "some", method=method, energy=0.8)
    for name, matrix in dense(tmp_path / "all").items():
        share = torch.linalg.svdvals(matrix).square().cumsum(0) / matrix.square().sum()
        assert report.modules[name]["rank_out"] == int((share < 0.8).sum()) + 1


def test_heads_with_labels_of_their_own_merge_under_any_weights(tmp_path):
    """TIES weighs every adapter by 1; rows that only one adapter has are taken as they are."""
    pair = [
        write_folder(tmp_path / name, seed=i, saved=head(2, i), labels={HEAD: [f"{name}0", f"{name}1"]})
        for i, name in enumerate("ab")
    ]
    merge_adapters(pair, tmp_path / "out", method="ties")
    weight = saved_tensors(tmp_path / "out")[f"{HEAD}.weight"]
    assert torch.equal(weight, torch.cat([saved_tensors(f)[f"{HEAD}.weight"] for f in pair]))
    shared = [
        write_folder(tmp_path / f"s{name}", seed=i, saved=head(2, i), labels={HEAD: ["x", "y"]})
        for i, name in enumerate("ab")
    ]
    with pytest.raises(InputError, match=r"classifier\.\w+ row x is an absolute value, so its weights must sum to 1"):
        merge_adapters(shared, tmp_path / "no", method="ties")
    merge_adapters(shared, tmp_path / "yes", method="ties", weights=[0.25, 0.75])
    first, second = (saved_tensors(f)[f"{HEAD}.weight"] for f in shared)
    assert torch.allclose(saved_tensors(tmp_path / "yes")[f"{HEAD}.weight"], 0.25 * first + 0.75 * second, atol=1e-6)


def test_shared_heads_of_a_fold_without_coefficient_are_averaged(tmp_path):
    folders = [write_folder(tmp_path / str(i), seed=i, saved=head(2, i), labels={HEAD: ["x", "y"]}) for i in range(3)]
    merge_adapters(folders[0], tmp_path / "m0", method="magmax")
    merge_adapters(folders[1], tmp_path / "m1", into=tmp_path / "m0", method="magmax")
    merge_adapters(folders[2], tmp_path / "m2", into=tmp_path / "m1", method="magmax")
    mean = torch.stack([saved_tensors(f)[f"{HEAD}.weight"] for f in folders]).mean(0)
    assert torch.allclose(saved_tensors(tmp_path / "m2")[f"{HEAD}.weight"], mean, atol=1e-6)


REFUSED = {
    "batch method": ({"method": "ties", "into": "a"}, "merges several adapters at once; leave into= out"),
    "no curvature": ({"method": "lot"}, "needs a gram curvature file for each of 2 adapters, .* found 0"),
    "no learned": ({"method": "adamerging"}, r"needs learned= \(--learned FILE\)"),
    "learned for nothing": ({"method": "ties", "learned": {}}, "learned= belongs to methods that learn"),
    "learned misfits": ({"method": "adarank", "learned": {"matrices": {}}}, "do not fit the adapters: 2 modules"),
    "learned is no file": ({"method": "adarank", "learned": {"x": 1}}, "expected .*matrices.*found"),
    "learned and weights": (
        {"method": "adamerging", "learned": {}, "weights": [0.5, 0.5]},
        "weights= would contradict the coefficients",
    ),
    "learned otherwise": (
        {"method": "adarank", "learned": {"method": "adamerging", "matrices": {}}},
        "learned with method 'adamerging', the merge has 'adarank'",
    ),
    "learned with other options": (
        {"method": "adamerging++", "learned": {"options": {"density": 0.4}, "matrices": {}}},
        r"learned with options \{'density': 0.4\}",
    ),
    "freedom": ({"method": "ties", "freedom": "module"}, "freedom= belongs to folding one adapter"),
    "option": ({"method": "ties", "options": {"density": 2}}, "density .*found|density .*expected"),
    "rank and energy": ({"method": "ties", "max_rank": "full", "energy": 0.5}, "give one of them"),
    "slao": ({"method": "slao", "into": "a", "max_rank": 2}, "slao merges the factors, which max_rank= and energy="),
    "rank": ({"method": "ties", "max_rank": "all"}, "max_rank must be at least 1, or 'full', found 'all'"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_a_method_cannot_use(tmp_path, arguments, message):
    pair = [write_folder(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    if "into" in arguments:
        pair, arguments = pair[1], arguments | {"into": tmp_path / "a"}
    refused(tmp_path, message, pair, tmp_path / "out", **arguments)


def test_curvatures_that_do_not_belong_to_the_adapters(tmp_path):
    pair = [write_folder(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    grams = [curvature_sums("gram", [dense(f)], [{}])[0] for f in pair]
    fisher, _ = curvature_sums("fisher", [dense(pair[1])], [{}])
    cases = {
        "found 1": grams[:1],
        "of kind fisher, expected gram": [grams[0], fisher],
        "was measured with another task adapter": grams[::-1],
    }
    for message, curvature in cases.items():
        with pytest.raises(InputError, match=message):
            merge_adapters(pair, tmp_path / "out", method="lot", curvature=curvature)
    with pytest.raises(InputError, match="this method takes one curvature file, found 2"):
        merge_adapters(pair[1], tmp_path / "out", into=pair[0], curvature=grams)


def test_a_curvature_that_lacks_a_module_names_it(tmp_path):
    pair = [write_folder(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    short = [curvature_sums("gram", [{"layers.0.q": dense(f)["layers.0.q"]}], [{}])[0] for f in pair]
    with pytest.raises(InputError, match="lacks layers.1.v"):
        merge_adapters(pair, tmp_path / "out", method="lot", curvature=short)


def test_dry_run_of_every_batch_method_writes_nothing(pair, tmp_path):
    before = tree(tmp_path)
    for method in BATCH:
        report = merge_adapters(pair, tmp_path / "out", method=method, dry_run=True, **needs(method, pair))
        assert set(report.modules) == set(SHAPES)
    assert tree(tmp_path) == before
