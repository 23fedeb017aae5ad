"""Running sums of curvature against sums over every past task, kept in full, in float64."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pm_hf.errors import InputError
from pm_hf.merging.curvature import FORMAT, Curvature, Settings, accumulate, shrink
from pm_hf.merging.lowrank import LowRank, add

SHAPES = {"q": (6, 5), "v": (3, 5), "up": (4, 7)}
OWNER = {"v": "q"}  # q and v read the same input, so they share a Gram
FISHER, GRAM = Settings("fisher"), Settings("gram", shrinkage=0.1)


def task(seed: int, kind: str) -> tuple[dict, dict]:
    """(measured, delta) of one task."""
    g = torch.Generator().manual_seed(seed)
    delta = {
        name: LowRank(torch.randn(out, 2, generator=g), torch.randn(2, width, generator=g))
        for name, (out, width) in SHAPES.items()
    }
    if kind == "fisher":
        return {name: torch.rand(shape, generator=g) for name, shape in SHAPES.items()}, delta
    inputs = {name: torch.randn(9, SHAPES[name][1], generator=g) for name in ("q", "up")}
    return {name: x.T @ x / 9 for name, x in inputs.items()}, delta


def stream(settings: Settings, tasks: int) -> list[Curvature]:
    """Sums after each task, where every task starts from the sum of the earlier ones."""
    owner = OWNER if settings.kind == "gram" else None
    merged, steps = {}, []
    for seed in range(tasks):
        measured, delta = task(seed, settings.kind)
        optimum = {name: add(merged[name], d) if merged else d for name, d in delta.items()}
        previous = steps[-1] if steps else None
        steps.append(accumulate(measured, optimum, delta, settings, 10 + seed, owner=owner, previous=previous))
        merged = optimum
    return steps


def dense_tasks(settings: Settings, tasks: int) -> list[dict]:
    """For each task {module: (H, θ*, Δ)} in float64, H as the Gram after shrinkage written out by hand."""
    past, merged = [], dict.fromkeys(SHAPES, 0.0)
    for seed in range(tasks):
        measured, delta = task(seed, settings.kind)
        entry = {}
        for name, d in delta.items():
            H = measured[OWNER.get(name, name) if settings.kind == "gram" else name].double()
            if settings.kind == "gram":
                diagonal = torch.eye(len(H), dtype=torch.float64) * H
                H = (1 - settings.shrinkage) * H + settings.shrinkage * diagonal
            merged[name] = merged[name] + d.B.double() @ d.A.double()
            entry[name] = (H, merged[name], d.B.double() @ d.A.double())
        past.append(entry)
    return past


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_sums_equal_those_over_all_past_tasks(settings):
    found, past = stream(settings, 4)[-1], dense_tasks(settings, 4)
    assert (found.tasks, found.examples) == (4, [10, 11, 12, 13])
    for name in SHAPES:
        S = sum(entry[name][0] for entry in past)
        if settings.kind == "fisher":
            M = sum(H * theta for H, theta, _ in (entry[name] for entry in past))
        else:
            M = sum(theta @ H for H, theta, _ in (entry[name] for entry in past))
        torch.testing.assert_close(found.sum_of(name).double(), S, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.M[name].double(), M, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_current_is_the_quadratic_form_of_the_newest_task_alone(settings):
    found, newest = stream(settings, 3)[-1], dense_tasks(settings, 3)[-1]
    for name, (H, _, d) in newest.items():
        full = torch.diag(H.flatten()) if settings.kind == "fisher" else torch.kron(torch.eye(len(d)).double(), H)
        expected = d.flatten() @ full @ d.flatten()
        assert found.current[name] == pytest.approx(float(expected), rel=1e-6)
        assert found.delta_norm[name] == pytest.approx(float(d.norm()), rel=1e-10)


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_apply_is_the_product_with_the_full_curvature_matrix(settings):
    found = stream(settings, 2)[-1]
    for name, shape in SHAPES.items():
        X = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        S = found.sum_of(name).double()
        full = (
            torch.diag(S.flatten())
            if settings.kind == "fisher"
            else torch.kron(torch.eye(shape[0]).double(), S.T.contiguous())
        )
        torch.testing.assert_close(found.apply(name, X).flatten(), full @ X.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_state_size_is_the_same_to_the_byte_after_every_task(settings):
    sizes = {step.nbytes for step in stream(settings, 6)}
    weights = sum(out * width for out, width in SHAPES.values())
    sums = weights if settings.kind == "fisher" else 5 * 5 + 7 * 7
    assert sizes == {4 * (sums + weights)}


def test_modules_with_one_input_share_one_gram():
    found = stream(GRAM, 2)[-1]
    assert set(found.S) == {"q", "up"}
    assert found.sum_of("v") is found.sum_of("q")
    assert set(found.M) == set(SHAPES)


def test_shrinkage_keeps_the_diagonal_and_makes_a_rank_one_gram_invertible():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = torch.outer(x, x)
    found = shrink(gram, 0.2)
    assert torch.equal(found.diagonal(), (0.8 * gram + 0.2 * gram).diagonal())
    torch.testing.assert_close(found - torch.diag(found.diagonal()), 0.8 * (gram - torch.diag(gram.diagonal())))
    assert int(torch.linalg.matrix_rank(gram)) == 1
    assert int(torch.linalg.matrix_rank(found)) == 6
    assert torch.equal(shrink(gram, 0.0), gram)


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_the_previous_sums_are_left_as_they_were(settings):
    first = stream(settings, 1)[0]
    sums = [*first.S.values(), *first.M.values()]
    before = [tensor.clone() for tensor in sums]
    measured, delta = task(1, settings.kind)
    raw = {name: tensor.clone() for name, tensor in measured.items()}
    owner = OWNER if settings.kind == "gram" else None
    accumulate(measured, delta, delta, settings, 3, owner=owner, previous=first)
    assert all(torch.equal(now, then) for now, then in zip(sums, before, strict=True))
    assert all(torch.equal(measured[name], raw[name]) for name in raw)
    assert (first.tasks, first.examples) == (1, [10])


@pytest.mark.parametrize(
    "change",
    [{"kind": "gram"}, {"labels": "mc"}, {"shrinkage": 0.3}, {"normalisation": "sum over tokens"}],
    ids=lambda change: next(iter(change)),
)
def test_sums_measured_otherwise_are_never_mixed(change):
    first = stream(FISHER, 1)[0]
    settings = replace(FISHER, **change)
    measured, delta = task(1, settings.kind)
    with pytest.raises(InputError, match="sums are never mixed"):
        accumulate(measured, delta, delta, settings, 3, previous=first)


def test_sums_with_other_modules_or_shapes_are_refused():
    first = stream(FISHER, 1)[0]
    measured, delta = task(1, "fisher")
    fewer = {name: measured[name] for name in ("q", "v")}
    with pytest.raises(InputError, match=r"does not fit this adapter.*up"):
        accumulate(fewer, {n: delta[n] for n in fewer}, {n: delta[n] for n in fewer}, FISHER, 3, previous=first)
    wide = LowRank(torch.ones(6, 1), torch.ones(1, 8))
    with pytest.raises(InputError, match=r"does not fit this adapter.*q"):
        accumulate(
            measured | {"q": torch.ones(6, 8)}, delta | {"q": wide}, delta | {"q": wide}, FISHER, 3, previous=first
        )


@pytest.mark.parametrize("out", [1, 8])  # it was 4; 1 would broadcast
def test_a_gram_of_a_module_with_another_output_size_is_refused(out):
    first = stream(GRAM, 1)[0]
    measured, delta = task(1, "gram")
    delta["up"] = LowRank(torch.ones(out, 1), torch.ones(1, 7))
    with pytest.raises(InputError, match=r"does not fit this adapter.*up"):
        accumulate(measured, delta, delta, GRAM, 3, owner=OWNER, previous=first)


def test_another_sharing_of_inputs_is_refused_and_named():
    first = stream(GRAM, 1)[0]
    measured, delta = task(1, "gram")
    with pytest.raises(InputError, match=r"does not fit this adapter.*\bv\b"):
        accumulate(measured, delta, delta, GRAM, 3, owner={"v": "up"}, previous=first)


def test_a_saved_file_comes_back_bit_for_bit(tmp_path):
    saved = stream(GRAM, 3)[-1]
    saved.save(tmp_path / "c.safetensors")
    loaded = Curvature.load(tmp_path / "c.safetensors")
    for key in ("S", "M"):
        ours, theirs = getattr(saved, key), getattr(loaded, key)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) and theirs[name].dtype == torch.float32 for name in ours)
    for key in ("settings", "current", "delta_norm", "examples", "owner"):
        assert getattr(loaded, key) == getattr(saved, key)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_going_through_the_file_changes_no_bit_of_the_next_sums(tmp_path, settings):
    straight = stream(settings, 2)
    straight[0].save(tmp_path / "c.safetensors")
    owner = OWNER if settings.kind == "gram" else None
    (_, first), (measured, delta) = task(0, settings.kind), task(1, settings.kind)
    optimum = {name: add(first[name], d) for name, d in delta.items()}
    resumed = accumulate(
        measured, optimum, delta, settings, 11, owner=owner, previous=Curvature.load(tmp_path / "c.safetensors")
    )
    assert all(torch.equal(resumed.S[name], tensor) for name, tensor in straight[1].S.items())
    assert all(torch.equal(resumed.M[name], tensor) for name, tensor in straight[1].M.items())
    assert resumed.examples == straight[1].examples


def test_saving_replaces_an_older_file(tmp_path):
    first, second = stream(FISHER, 2)
    first.save(tmp_path / "c.safetensors")
    second.save(tmp_path / "c.safetensors")
    assert Curvature.load(tmp_path / "c.safetensors").tasks == 2


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"curvature file .*none.safetensors does not exist"):
        Curvature.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_an_input_error(tmp_path, share):
    path = tmp_path / "c.safetensors"
    stream(FISHER, 1)[0].save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        Curvature.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": FORMAT + "0", "curvature": json.dumps({})}])
def test_a_foreign_safetensors_file_is_an_input_error(tmp_path, metadata):
    path = tmp_path / "adapter_model.safetensors"
    save_file({"S.q": torch.ones(2, 2)}, path, metadata=metadata)
    with pytest.raises(InputError, match="is not a curvature file: expected format"):
        Curvature.load(path)
