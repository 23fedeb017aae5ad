"""The optimum over whole matrices against dense float64 sums over every past task."""

import math

import pytest
import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging import curvature as kernel
from pm_hf.merging.coefficient import free_solution
from pm_hf.merging.curvature import Curvature, CurvatureSpec, accumulate
from pm_hf.merging.lowrank import LowRank, add

OUT, IN, RANK = 9, 12, 2
FISHER = CurvatureSpec("fisher")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Two rows at a time."""
    monkeypatch.setattr(kernel, "CHUNK", 25)


def factors(seed: int, out: int = OUT) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, RANK, generator=g), torch.randn(RANK, IN, generator=g))


def gram_of(seed: int, rows: int = 30) -> Tensor:
    """Mean of xxᵀ of inputs whose features have scales from 0.1 to 10."""
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    x = x * torch.logspace(-1, 1, IN, dtype=torch.float64)
    return (x.T @ x / rows).float()


def shrunk(gram: Tensor, rho: float) -> Tensor:
    G = gram.double()
    return (1 - rho) * G + rho * torch.diag(G.diagonal())


def gram_task(previous, merged, delta: LowRank, gram: Tensor, rho: float) -> Curvature:
    optimum = {"m": delta if merged is None else add(merged, delta)}
    return accumulate({"m": gram}, optimum, {"m": delta}, CurvatureSpec("gram", shrinkage=rho), 8, previous=previous)


def close(found: LowRank, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return float(torch.linalg.norm(found.dense().double() - expected) / torch.linalg.norm(expected)) < tolerance


class GramStream:
    """Tasks trained from the merged model, with every Θᵢ and Gᵢ kept in full beside the running sums."""

    def __init__(self, rho: float, rows: int = 30) -> None:
        self.rho, self.rows, self.merged, self.curvature = rho, rows, None, None
        self.weighted, self.grams = torch.zeros(OUT, IN).double(), torch.zeros(IN, IN).double()

    def step(self, seed: int, max_rank: int | None = None) -> tuple[LowRank, float]:
        delta, gram = factors(seed), gram_of(seed, self.rows)
        start = torch.zeros(OUT, IN).double() if self.merged is None else self.merged.dense().double()
        self.weighted += (start + delta.B.double() @ delta.A.double()) @ shrunk(gram, self.rho)
        self.grams += shrunk(gram, self.rho)
        self.curvature = gram_task(self.curvature, self.merged, delta, gram, self.rho)
        self.merged, error = free_solution("m", delta, self.merged, self.curvature, max_rank)
        return self.merged, error

    def optimum(self) -> Tensor:
        """(ΣΘᵢGᵢ)(ΣGᵢ)⁺."""
        return self.weighted @ torch.linalg.pinv(self.grams, hermitian=True, rtol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_an_exact_optimum_of_more_factors_than_dimensions_is_reduced_without_loss(rho):
    stream = GramStream(rho)
    for t in range(1, 8):
        found, error = stream.step(t)
        assert found.rank == min(RANK * t, OUT)
        assert error < 1e-12
        assert close(found, stream.optimum())


def test_what_was_cut_from_inputs_of_small_scale_is_not_forgotten():
    # beside the pull of the large inputs the cut part is 1e-6, below the tolerance; in the outputs it is 1e-3
    scale = torch.cat([torch.ones(IN // 2), torch.full((IN - IN // 2,), 1e-3)])
    first, second, third = factors(1), factors(2), factors(3)
    large, small = scale == 1, scale < 1
    first, second = LowRank(first.B, first.A * large), LowRank(second.B, second.A * small)
    gram = torch.diag(scale**2)
    curvature = gram_task(None, None, first, gram, 0.1)
    curvature = gram_task(curvature, first, second, gram, 0.1)
    kept = first  # of the two, only the part on the large inputs
    curvature = gram_task(curvature, kept, third, gram, 0.1)
    found, _ = free_solution("m", third, kept, curvature, OUT)
    optimum = curvature.M["m"].double() @ torch.linalg.inv(curvature.S["m"].double())
    gap = (found.dense().double() - optimum) * scale
    assert float(gap.norm() / (optimum * scale).norm()) < 1e-5


@pytest.mark.parametrize("settings", [FISHER, CurvatureSpec("gram", shrinkage=0.1)], ids=["fisher", "gram"])
def test_a_file_gives_the_optimum_of_the_sums_in_memory(tmp_path, settings):
    delta, start = factors(1), factors(2)
    H = gram_of(1) if settings.kind == "gram" else torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1))
    sums = accumulate({"m": H}, {"m": add(start, delta)}, {"m": delta}, settings, 8)
    sums.save(tmp_path / "c.safetensors")
    for past in (start, None):
        kept, error = free_solution("m", delta, past, sums, None)
        read, same = free_solution("m", delta, past, Curvature.load(tmp_path / "c.safetensors"), None)
        assert torch.equal(read.B, kept.B)
        assert torch.equal(read.A, kept.A)
        assert error == same


@pytest.mark.parametrize("settings", [FISHER, CurvatureSpec("gram", shrinkage=0.1)], ids=["fisher", "gram"])
def test_a_task_that_leaves_the_module_alone_leaves_the_optimum_to_the_past(settings):
    H = gram_of(1) if settings.kind == "gram" else torch.ones(OUT, IN)
    first, none = factors(1), LowRank(torch.zeros(OUT, 0), torch.zeros(0, IN))
    sums = accumulate({"m": H}, {"m": first}, {"m": first}, settings, 8)
    sums = accumulate({"m": H}, {"m": first}, {"m": none}, settings, 8, previous=sums)
    found, error = free_solution("m", none, first, sums, None)
    assert error < 1e-6
    assert close(found, first.dense().double())


@pytest.mark.parametrize("rho", [0.0, 0.01, 0.5])
def test_gram_recursion_equals_the_dense_optimum_and_costs_one_task_rank_a_task(rho):
    stream = GramStream(rho)
    for t in range(1, 5):
        found, error = stream.step(t)
        assert (found.rank, error) == (RANK * t, 0.0)
        assert close(found, stream.optimum())


def test_gram_optimum_keeps_the_outputs_of_tasks_with_unrelated_inputs():
    # two tasks that see different features: both survive in full, where an average would halve each
    deltas, merged, curvature = [factors(1), factors(2)], None, None
    masks = [torch.arange(IN) < 5, torch.arange(IN) >= 5]
    for delta, mask in zip(deltas, masks, strict=True):
        curvature = gram_task(curvature, merged, delta, gram_of(1) * mask * mask[:, None], 0.1)
        merged, _ = free_solution("m", delta, merged, curvature, None)
    kept = sum(delta.dense() * mask for delta, mask in zip(deltas, masks, strict=True))
    assert close(merged, kept.double())


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_with_shrinkage_in_both_products_the_first_task_is_kept_whole(rows):
    delta = factors(1)
    found, error = free_solution("m", delta, None, gram_task(None, None, delta, gram_of(1, rows), 0.01), None)
    assert error == 0.0
    assert close(found, delta.dense().double(), 1e-3)


@pytest.mark.parametrize("rows", [3, 8])
def test_without_shrinkage_a_rank_deficient_gram_is_answered_on_its_inputs(rows):
    stream = GramStream(0.0, rows)
    found, _ = stream.step(1)
    torch.testing.assert_close(found.dense().double() @ stream.grams, stream.weighted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_without_shrinkage_nothing_is_added_where_a_rank_deficient_gram_saw_no_input(rows):
    stream = GramStream(0.0, rows)
    found, _ = stream.step(1)
    assert found.norm() < 1.01 * float(stream.optimum().norm()), "noise of the float32 sums was inverted"
    assert close(found, stream.optimum(), 1e-2)


@pytest.mark.parametrize("keep", [1, 3])
def test_after_truncation_of_the_past_the_kept_sum_is_used(keep):
    stream = GramStream(0.1)
    stream.step(1)
    exact, _ = stream.step(2)
    stream.merged, lost = exact.compress(keep)
    assert lost > 0.05
    before = stream.merged
    # task 3 starts from the truncated model; the optimum over all three tasks does not
    found, error = stream.step(3, max_rank=OUT)
    assert close(found, stream.optimum())
    assert error < 1e-6
    recursion = add(before, LowRank(factors(3).B, (factors(3).A.double() @ shrunk(gram_of(3), 0.1)).float()))
    assert found.rank > recursion.rank, "the recursion alone cannot give back what was cut"


def test_after_truncation_the_rank_stays_the_sum_of_the_inputs_and_the_error_is_reported():
    stream = GramStream(0.1)
    stream.step(1)
    stream.step(2)
    stream.merged, _ = stream.merged.compress(1)
    found, error = stream.step(3)
    s = torch.linalg.svdvals(stream.optimum())
    assert found.rank == 1 + RANK
    assert error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-3)
    true = torch.linalg.norm(found.dense() - stream.optimum()) / torch.linalg.norm(stream.optimum())
    assert error == pytest.approx(float(true), rel=1e-3)


def test_task_vectors_that_all_start_at_the_base_use_the_kept_sum():
    deltas, grams = [factors(1), factors(2), factors(3)], [gram_of(1), gram_of(2), gram_of(3)]
    curvature = None
    for delta, gram in zip(deltas, grams, strict=True):
        curvature = gram_task(curvature, None, delta, gram, 0.1)
    weighted = sum(d.dense().double() @ shrunk(g, 0.1) for d, g in zip(deltas, grams, strict=True))
    expected = weighted @ torch.linalg.inv(sum(shrunk(g, 0.1) for g in grams))
    merged = add(deltas[0].scale(0.3), deltas[1].scale(0.2))  # whatever the running merge is
    assert close(free_solution("m", deltas[2], merged, curvature, OUT)[0], expected)


def test_a_rank_limit_gives_the_best_approximation_of_the_optimum():
    stream = GramStream(0.1)
    for t in range(1, 3):
        stream.step(t)
    found, error = stream.step(3, max_rank=2)
    U, s, Vh = torch.linalg.svd(stream.optimum(), full_matrices=False)
    assert close(found, U[:, :2] * s[:2] @ Vh[:2], 1e-3)
    assert error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-3)


def test_modules_that_share_a_gram_are_solved_with_it():
    deltas = {"q": factors(1), "v": factors(2, out=4)}
    sums = accumulate({"q": gram_of(1)}, deltas, deltas, CurvatureSpec("gram", shrinkage=0.1), 8, owner={"v": "q"})
    found, _ = free_solution("v", deltas["v"], None, sums, None)
    assert close(found, deltas["v"].dense().double())


def diagonal_stream(tasks: int) -> tuple[LowRank, LowRank | None, Curvature, Tensor, Tensor]:
    """(last Δ, its start, sums, ΣHᵢ, ΣHᵢ∘θ*ᵢ) of tasks that start from the average of the earlier ones."""
    merged = curvature = None
    S, M = torch.zeros(OUT, IN).double(), torch.zeros(OUT, IN).double()
    for t in range(1, tasks + 1):
        delta, start = factors(t), merged
        optimum = delta if start is None else add(start, delta)
        H = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(t)) ** 4 + 1e-6
        curvature = accumulate({"m": H}, {"m": optimum}, {"m": delta}, FISHER, 8, previous=curvature)
        S, M = S + H.double(), M + H.double() * (optimum.B.double() @ optimum.A.double())
        merged = delta if start is None else add(start, delta.scale(1 / t))
    return delta, start, curvature, S, M


@pytest.mark.parametrize("tasks", [1, 4])
def test_free_diagonal_is_the_weighted_mean_of_all_optima(tasks):
    delta, start, curvature, S, M = diagonal_stream(tasks)
    found, error = free_solution("m", delta, start, curvature, OUT)
    assert close(found, M / S)
    assert error < 1e-6


def test_free_diagonal_does_not_depend_on_the_running_merge():
    delta, start, curvature, S, M = diagonal_stream(3)
    assert close(free_solution("m", delta, start.scale(-0.7), curvature, OUT)[0], M / S)
    assert close(free_solution("m", delta, None, curvature, OUT)[0], M / S)


@pytest.mark.parametrize("max_rank", [None, 3])
def test_free_diagonal_is_truncated_to_the_ranks_that_go_in_and_reports_it(max_rank):
    delta, start, curvature, S, M = diagonal_stream(3)
    found, error = free_solution("m", delta, start, curvature, max_rank)
    rank = max_rank or delta.rank + start.rank
    U, s, Vh = torch.linalg.svd(M / S, full_matrices=False)
    assert found.rank == rank
    assert close(found, U[:, :rank] * s[:rank] @ Vh[:rank], 1e-3)
    assert error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-3)


def test_weights_without_any_curvature_take_the_average_step():
    start, first, second = factors(7), factors(8), factors(9)
    H = torch.ones(OUT, IN)
    H[:, 0] = 0.0
    sums = accumulate({"m": H}, {"m": start}, {"m": first}, FISHER, 8)
    sums = accumulate({"m": H}, {"m": add(start, second)}, {"m": second}, FISHER, 8, previous=sums)
    found = free_solution("m", second, start, sums, OUT)[0].dense().double()
    expected = (start.dense() + 0.5 * second.dense()).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_free_solution_of_a_curvature_that_is_not_finite_is_an_input_error(kind):
    delta, shape = factors(1), (OUT, IN) if kind == "fisher" else (IN, IN)
    sums = accumulate({"m": torch.full(shape, math.nan)}, {"m": delta}, {"m": delta}, CurvatureSpec(kind), 8)
    with pytest.raises(InputError, match=r"not finite.*\bm\b"):
        free_solution("m", delta, None, sums, None)


def test_a_gram_without_any_input_does_not_drop_the_task_in_silence():
    delta = factors(1)
    with pytest.raises(InputError, match=r"zero.*\bm\b"):
        free_solution("m", delta, None, gram_task(None, None, delta, torch.zeros(IN, IN), 0.1), None)
