"""The table of methods: every row keeps what it says, and options are read or refused."""

import inspect
import math

import pytest
import torch
from helpers import refusal
from helpers.small_matrices import close, fishers, grams, matrix

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank, weighted_sum
from pm_hf.merging.methods import METHODS, get_method, read_options
from pm_hf.merging.methods.base import Matrix, Method

KERNELS = {name: method for name, method in METHODS.items() if method.kernel is not None}
FOLD_ONLY = {"opcm": (4, 2), "slao": (3, 3)}  # ranks of (running merge, task)


def merge(name: str, m: Matrix, **options):
    """The method's result for a model of this one matrix."""
    method = METHODS[name]
    if method.kernel is None:
        return weighted_sum(m.terms, m.weights)
    chosen = read_options(name, options)
    state = method.prepare(lambda: iter([m]), None, **chosen) if method.prepare else learned(m)
    return method.kernel(m, state, **chosen)


def learned(m: Matrix):
    values = [0.3] * len(m.terms)
    ranks = [min(t.rank, int(torch.linalg.matrix_rank(t.dense()))) if t.rank else 0 for t in m.terms]
    return {"tasks": 2, m.name: {"coefficients": values, "masks": [[1] * r for r in ranks]}}


def example(name: str, ranks=None, dtype=torch.float32) -> Matrix:
    ranks = ranks or FOLD_ONLY.get(name, (2, 3, 1))
    curvature = {"fisher": fishers(len(ranks)), "gram": grams(len(ranks))}.get(METHODS[name].curvature, [])
    weight = METHODS[name].weight or 1 / len(ranks)
    return matrix(ranks, [weight] * len(ranks), dtype=dtype, curvature=[c.to(dtype) for c in curvature])


def test_the_table_has_every_method():
    assert list(METHODS) == [
        "pm", "average", "sequential", "coma", "cofima", "task_arithmetic", "ties", "dare", "dare_ties", "magmax",
        "opcm", "lot", "lore", "doge", "slao", "adamerging", "adamerging++", "adarank",
    ]  # fmt: skip
    assert len(KERNELS) == 13
    assert all(m.fold or m.batch for m in METHODS.values())
    assert {n for n, m in METHODS.items() if m.learned} == {"adamerging", "adamerging++", "adarank"}


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_complete(name):
    method = METHODS[name]
    assert all([method.about, method.paper, method.needs, method.cost])
    assert method.weight is None or method.batch, "only N adapters have weights"
    assert method.dense <= (method.kernel is not None)
    for option in method.options.values():
        assert option.read(option.default) == option.default, "the default is in range"
        assert isinstance(option.default, str) == bool(option.choices)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_take_the_options_of_their_row(name):
    method = METHODS[name]
    for function in filter(None, (method.kernel, method.prepare)):
        parameters = inspect.signature(function).parameters.values()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(method.options)
        assert sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 2
        assert function.__doc__


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_return_what_their_row_says_and_leave_their_input_alone(name):
    m = example(name)
    before = [(t.B.clone(), t.A.clone()) for t in m.terms] + [(c.clone(), c.clone()) for c in m.curvature]
    found = merge(name, m)
    assert isinstance(found, torch.Tensor if METHODS[name].dense else LowRank)
    assert (found if METHODS[name].dense else found.B).dtype == torch.float32
    assert tuple(found.shape) == m.shape
    after = [(t.B, t.A) for t in m.terms] + [(c, c) for c in m.curvature]
    assert all(torch.equal(x, y) for pair in zip(before, after, strict=True) for x, y in zip(*pair, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_float32_agrees_with_float64(name):
    found = merge(name, example(name))
    dense = found if isinstance(found, torch.Tensor) else found.dense()
    expected = merge(name, example(name, dtype=torch.float64))
    close(dense.double(), expected if isinstance(expected, torch.Tensor) else expected.dense(), 2e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_module_is_a_zero_task_vector(name, missing):
    m = example(name, dtype=torch.float64)
    lacks, zero = (
        Matrix(m.name, tuple(replaced if i == missing else t for i, t in enumerate(m.terms)), m.weights, m.curvature)
        for replaced in (LowRank(torch.zeros(6, 0).double(), torch.zeros(0, 9).double()), m.terms[missing].scale(0.0))
    )
    found, expected = merge(name, lacks), merge(name, zero)
    if name == "slao" and missing == 1:  # A belongs to the side that has one
        expected = m.terms[0].scale(1 - math.sqrt(1 / 2))
    close(found, expected if isinstance(expected, torch.Tensor) else expected.dense())


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.batch and not m.learned and n != "doge"])
def test_one_adapter_with_weight_one_is_the_identity(name):
    options = {"density": 1.0} if "density" in METHODS[name].options else {}
    m = example(name, ranks=(3,), dtype=torch.float64)
    close(merge(name, Matrix(m.name, m.terms, (1.0,), m.curvature), **options), m.terms[0].dense(), 1e-9)


@pytest.mark.parametrize("name", KERNELS)
def test_a_model_of_zeros_merges_to_zero_or_is_refused(name):
    m = example(name, ranks=(0, 0))
    if name == "opcm":
        with pytest.raises(InputError, match="cannot scale"):
            merge(name, m)
        return
    found = merge(name, m)
    assert tuple(found.shape) == m.shape
    assert not (found if isinstance(found, torch.Tensor) else found.dense()).any()


def test_an_unknown_method_lists_the_valid_ones():
    assert isinstance(get_method("ties"), Method)
    with pytest.raises(InputError, match="unknown merging method 'tie'; valid: pm, average, .*adarank"):
        get_method("tie")


def test_options_are_filled_in_and_converted():
    assert read_options("ties", None) == {"density": 0.2, "majority": "total"}
    found = read_options("dare", {"density": "0.25", "seed": "7"})
    assert found == {"density": 0.25, "seed": 7}
    assert type(found["seed"]) is int
    assert type(read_options("dare", {"density": 1})["density"]) is float
    assert read_options("average", {}) == {"prior": 0.0}
    assert read_options("sequential", {}) == {}
    assert read_options("pm", {"on_zero_curvature": "average"})["unmeasured_past"] == "error"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("density", 0, "expected a value in .1e-12, 1., found 0"),
        ("density", "1.5", "expected a value in .1e-12, 1., found '1.5'"),
        ("density", math.nan, "expected a number, found nan"),
        ("density", "much", "expected a number, found 'much'"),
        ("density", True, "expected a number, found True"),
        ("density", None, "expected a number, found None"),
        ("seed", 1.5, "expected an integer, found 1.5"),
        ("seed", "inf", "expected an integer, found 'inf'"),
        ("seed", -1, "expected a value in .0, "),
        ("majority", "most", "expected one of total, frequency, found 'most'"),
    ],
)
def test_values_that_do_not_fit_are_refused(key, value, expected):
    with pytest.raises(InputError, match=f"method dare_ties: option {key} .*{expected}"):
        read_options("dare_ties", {key: value})


def test_an_infinite_value_is_refused_where_nothing_bounds_it():
    with pytest.raises(InputError, match="option threshold"):
        read_options("lore", {"threshold": "inf"})


def test_one_error_lists_every_problem():
    message = refusal(read_options, "ties", {"density": 2, "majority": "x", "densty": 0.2})
    assert "3 problems" in message
    assert "unknown option 'densty'; valid: density, majority" in message
    with pytest.raises(InputError, match="unknown option 'a'; valid: none"):
        read_options("sequential", {"a": 1})
