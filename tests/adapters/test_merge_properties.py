"""Properties of merging over ranks, shapes, scalings, patterns, layouts and dtypes, against dense float64 products."""

import pytest
import torch
from helpers.random_adapters import CONFIG, DTYPES, WEIGHTS, adapters, dense, sites, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pm_hf import merge_adapters

quick = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
WEIGHT = st.floats(-2, 2, allow_nan=False).filter(lambda w: abs(w) > 1e-3)


def folders(tmp_path_factory, data, count):
    """(sites, folders of `count` adapters, an empty folder for the output)."""
    places = data.draw(sites())
    root = tmp_path_factory.mktemp("drawn")
    drawn = data.draw(adapters(places, count))
    return places, [write(root / f"adapter-{i}", places, one) for i, one in enumerate(drawn)], root


def assert_close(found, expected, tolerance=1e-6, scale=None):
    """Relative to the norm of what goes in: a sum may cancel."""
    assert set(found) == set(expected)
    for name, matrix in expected.items():
        size = float(torch.linalg.norm(matrix)) if scale is None else scale[name]
        assert float(torch.linalg.norm(found[name] - matrix)) <= tolerance * max(size, 1e-12), name


@quick
@given(st.data())
def test_one_adapter_with_coefficient_one_is_the_same_function(tmp_path_factory, data):
    places, (one,), root = folders(tmp_path_factory, data, 1)
    report = merge_adapters(one, root / "out", coefficient=1)
    assert_close(dense(root / "out", places), dense(one, places))
    assert report.error <= 1e-6  # the only loss is a rank above the dimensions, which is reduced without one


@quick
@given(st.data())
def test_a_merge_is_the_weighted_sum_in_any_order(tmp_path_factory, data):
    places, paths, root = folders(tmp_path_factory, data, 3)
    weights = data.draw(st.lists(WEIGHT, min_size=3, max_size=3))
    updates = [dense(path, places) for path in paths]
    expected = {n: sum(w * u[n] for w, u in zip(weights, updates, strict=True)) for n in updates[0]}
    scale = {
        n: sum(abs(w) * float(torch.linalg.norm(u[n])) for w, u in zip(weights, updates, strict=True)) for n in expected
    }
    merge_adapters(paths, root / "out", method="average", weights=weights)
    merge_adapters(paths[::-1], root / "back", method="average", weights=weights[::-1])
    assert_close(dense(root / "out", places), expected, scale=scale)
    assert_close(dense(root / "back", places), expected, scale=scale)


@quick
@given(st.data())
def test_folding_one_by_one_is_averaging_at_once(tmp_path_factory, data):
    places, paths, root = folders(tmp_path_factory, data, 3)
    updates = [dense(path, places) for path in paths]
    merge_adapters(paths[0], root / "1", method="average")
    merge_adapters(paths[1], root / "2", into=root / "1", coefficient=0.5)
    merge_adapters(paths[2], root / "3", into=root / "2", coefficient=0.25)
    expected = {n: updates[0][n] + updates[1][n] / 2 + updates[2][n] / 4 for n in updates[0]}
    scale = {n: sum(float(torch.linalg.norm(u[n])) for u in updates) for n in expected}
    assert_close(dense(root / "3", places), expected, scale=scale)


@quick
@given(st.data())
def test_merging_a_merge_again_changes_no_bit(tmp_path_factory, data):
    places, paths, root = folders(tmp_path_factory, data, 2)
    merge_adapters(paths, root / "out", method="average")
    merge_adapters(root / "out", root / "again", coefficient=1)
    if any(place.kind == "fused" for place in places):  # padded to one rank, which may be above the dimensions
        assert_close(dense(root / "again", places), dense(root / "out", places))
        return
    first, second = load_file(root / "out" / WEIGHTS), load_file(root / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert (root / "out" / CONFIG).read_text() == (root / "again" / CONFIG).read_text()


@quick
@given(st.data(), st.integers(1, 5))
def test_a_truncation_is_the_best_of_its_rank_and_its_error_is_told(tmp_path_factory, data, rank):
    places, paths, root = folders(tmp_path_factory, data, 2)
    merge_adapters(paths, root / "exact", method="average")
    report = merge_adapters(paths, root / "out", method="average", max_rank=rank)
    exact, found = dense(root / "exact", places), dense(root / "out", places)
    for place in places:
        if place.name not in report.modules:
            continue
        slices = _matrices(place, exact[place.name])
        tails = sum(float(torch.linalg.svdvals(matrix)[rank:].square().sum()) for matrix in slices)
        gap, total = (found[place.name] - exact[place.name]).norm(), exact[place.name].norm()
        assert float(gap) == pytest.approx(tails**0.5, abs=1e-5 * float(total))
        assert report.modules[place.name]["error"] * float(total) == pytest.approx(float(gap), abs=1e-5 * float(total))
        assert report.modules[place.name]["rank_out"] <= rank


@quick
@given(st.data(), st.sampled_from(DTYPES))
def test_the_error_of_the_storage_dtype_is_told(tmp_path_factory, data, dtype):
    places, paths, root = folders(tmp_path_factory, data, 2)
    merge_adapters(paths, root / "exact", method="average")
    report = merge_adapters(paths, root / "out", method="average", dtype=dtype)
    assert {value.dtype for value in load_file(root / "out" / WEIGHTS).values()} == {dtype}
    exact, found = dense(root / "exact", places), dense(root / "out", places)
    worst = max(
        float((a - b).norm() / b.norm())
        for place in places
        for a, b in zip(_matrices(place, found[place.name]), _matrices(place, exact[place.name]), strict=True)
        if float(b.norm())
    )
    assert report.cast_error == pytest.approx(worst, rel=1e-3, abs=1e-6) or report.cast_error >= worst


def _matrices(place, update):
    """The matrices that are truncated each for itself."""
    if place.kind == "fused":
        return list(update)
    if place.kind == "grouped":
        return [part.flatten(1) for part in update.chunk(2)]
    return [update.flatten(1)]
