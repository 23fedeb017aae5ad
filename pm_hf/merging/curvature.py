"""Curvature of past tasks as two running sums per module: constant memory in the number of tasks.

Every method of the family minimises Σᵢ (θ − θ*ᵢ)ᵀ Hᵢ (θ − θ*ᵢ). With S = ΣHᵢ and M = ΣHᵢθ*ᵢ (θ relative to the
pretrained weights) the past enters only through S and M. The diagonal Fisher (Perturb-and-Merge,
arXiv 2505.22389) keeps S of the weight's own shape and acts elementwise; the input Gram (H = I ⊗ G, RegMean
and LOT merging, arXiv 2505.23859) keeps S of shape (in, in) and acts from the right. The factored Fisher, for
matrices too large for either, keeps row and column means of the squared gradient only: H ≈ rcᵀ/mean(r).

A file of sums is never read whole: S and M come from disk a chunk of rows at a time, and the quadratic forms are
computed from the factors of the task vector.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.files import WriteError, is_number, save_tensors
from pm_hf.merging.lowrank import LowRank, row_slices

CurvatureKind = Literal["fisher", "gram", "factored"]


NORMALISATIONS = {"examples": "mean over examples", "trace": "mean over examples, each task's entries over their mean"}


FULL_PRECISION = "full"  # frozen weights that are not quantized


CURVATURE_FORMAT = "pm_hf.curvature.v1"


CHUNK = 2**19  # entries of one matrix held in float64 at a time


QUOTED = 60  # characters of a value that a message quotes


ROUNDING = 1e-6  # how far below 0, as a share of the largest, a quadratic form may come out


PROBES = 4  # fixed projections of each module's task vector


STORED_DTYPES = {"F32": 4, "BF16": 2}  # dtypes a file may hold, with their bytes


@dataclass
class CurvatureSpec:
    """How the curvature was measured. Sums with different settings are never mixed."""

    kind: CurvatureKind = "fisher"
    labels: str = "empirical"  # labels of the Fisher: the data's own ("empirical") or drawn from the model ("mc")
    shrinkage: float = 0.0  # ρ of (1−ρ)G + ρ·diag(G), put into each task's Gram before it is summed
    normalisation: str = NORMALISATIONS["examples"]
    loss_reduction: str = "mean"  # language models: an example's loss is the mean or the sum over its target tokens
    at: str = "optimum"  # θ*_t, or the mean over both ends of Δ_t ("both"): θ̂_{t−1} and θ*_t
    base: str = FULL_PRECISION  # the frozen weights beneath: as they are stored, or quantized (nf4, int8)


@dataclass(frozen=True)
class FileTensors(Mapping[str, Tensor]):
    """Matrices of one safetensors file, {name: tensor}, read when they are asked for and kept nowhere.

    path: the file; prefix: what its tensor names have before ours; metadata: the file's own, as it was when the
    mapping was made; stored: {name: (shape, dtype as safetensors writes it)}. An item comes in float32, bfloat16
    upcast. Each read opens the file again, so its mapped pages go with the tensor. Raises InputError when the
    file is gone or its metadata are no longer the same: another task's sums took its name.
    """

    path: Path
    prefix: str
    metadata: Mapping[str, str]
    stored: Mapping[str, tuple[tuple[int, ...], str]]

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices as stored, from the header alone."""
        return sum(prod(shape) * STORED_DTYPES[dtype] for shape, dtype in self.stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a matrix, from the header alone."""
        return self.stored[name][0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 of a matrix, in the dtype they are stored in."""
        try:
            with safe_open(self.path, "pt") as handle:
                if (handle.metadata() or {}) == self.metadata:
                    return handle.get_slice(self.prefix + name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise InputError(f"curvature file {self.path} can no longer be read: {error}") from error
        raise InputError(f"curvature file {self.path} was replaced by another since it was loaded; load it again")


@dataclass
class Curvature:
    """Sums over the tasks 1 … t, the task being folded included.

    S: {module: ΣHᵢ}, float32; (out, in) for `fisher`, (in, in) for `gram`, (out + in,) for `factored`: Σr, then Σc.
       Modules that read the same input share one Gram: `owner` maps a module to the one whose entry it uses.
    M: {module: ΣHᵢθ*ᵢ}, float32, (out, in); empty for `factored`, whose past is anchored at the merged model.
       S and M are dicts, or `FileTensors` when they lie on disk.
    current: {module: ΔᵀH_tΔ}, the task's own part of the quadratic form, float64 as Python floats.
    past: of `factored` only, {module: Δᵀ(Σ_{i<t}Hᵢ)Δ}: a sum of factored curvatures cannot be taken apart again.
    delta_norm, probe: {module: ‖Δ‖} and {module: [uᵀΔv, …]} (see `delta_probe`) of the task vector it was measured
       with; they guard against a file of another adapter. `probe` is empty in files of before it existed.
    examples: number of examples of each task.
    """

    settings: CurvatureSpec
    S: Mapping[str, Tensor]
    M: Mapping[str, Tensor]
    current: dict[str, float]
    delta_norm: dict[str, float]
    examples: list[int]
    owner: dict[str, str] = field(default_factory=dict)
    probe: dict[str, list[float]] = field(default_factory=dict)
    past: dict[str, float] = field(default_factory=dict)

    @property
    def modules(self) -> set[str]:
        """Names of the modules that are measured."""
        return set(self.current)

    @property
    def tasks(self) -> int:
        """t, the number of tasks in the sums."""
        return len(self.examples)

    @property
    def nbytes(self) -> int:
        """Size of the sums in bytes as they are stored: the same for every t."""
        return _nbytes(self.S) + _nbytes(self.M)

    def sum_of(self, module: str) -> Tensor:
        """S of a module, float32."""
        return self.S[self._owner(module)]

    def quadratic(self, module: str, left: LowRank, rights: Sequence[LowRank]) -> list[float]:
        """⟨X, (ΣHᵢ)Y⟩ for X = `left` and each Y of `rights`, all (out, in): see `quadratic_forms`."""
        return quadratic_forms(self.settings.kind, self.S, self._owner(module), left, rights)

    def fits(self, module: str, shape: tuple[int, int]) -> bool:
        """Whether a module's sums belong to an (out, in) matrix."""
        if self.settings.kind == "factored":
            return shape_of(self.S, module) == (sum(shape),)
        return shape_of(self.M, module) == shape

    def moment(self, module: str, delta: LowRank) -> float:
        """⟨Δ, ΣHᵢθ*ᵢ⟩ = ⟨B, MAᵀ⟩ for an (out, in) matrix Δ = BA, in float64, a chunk of rows at a time."""
        B, A = delta.B.double(), delta.A.double()
        return sum(float(((M @ A.T) * B[rows]).sum()) for rows, M in row_chunks(self.M, module))

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically: the old file stays until the new one is synced.

        It may be the file that these sums are read from. Raises OSError when it cannot be written (no space left);
        nothing is left behind then, and the old file is as it was.
        """
        path = Path(path)
        tensors = {f"S.{name}": tensor for name, tensor in self.S.items()}
        tensors |= {f"M.{name}": tensor for name, tensor in self.M.items()}
        header = {"settings": asdict(self.settings), "owner": self.owner, "examples": self.examples}
        header |= {"current": self.current, "delta_norm": self.delta_norm, "probe": self.probe, "past": self.past}
        try:
            save_tensors(tensors, path, {"format": CURVATURE_FORMAT, "curvature": json.dumps(header)})
        except WriteError as error:
            needed = sum(tensor.nbytes for tensor in tensors.values())
            raise OSError(f"curvature file {path} ({needed / 1e6:.0f} MB) cannot be written: {error.reason}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Curvature":
        """Open a file that `save` wrote: the header is read and checked, S and M stay on disk until they are needed.

        Sums in bfloat16 are accepted too and upcast. InputError when the file is missing, truncated, something else,
        or when its names and shapes do not fit together.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"curvature file {path} does not exist; estimate it with pm_hf.estimate_curvature")
        metadata, stored = _read_header(path)
        if metadata.get("format") != CURVATURE_FORMAT:
            stated = metadata.get("format")
            raise InputError(f"{path} is not a curvature file: expected format {CURVATURE_FORMAT}, found {stated}")
        S, M = (
            FileTensors(path, p, metadata, {n[2:]: s for n, s in stored.items() if n.startswith(p)})
            for p in ("S.", "M.")
        )
        try:
            header: Any = json.loads(metadata["curvature"])
            odd = _header_fault(header)
        except (KeyError, ValueError, RecursionError) as error:
            odd = f"its header cannot be read ({type(error).__name__}: {error})"
        if odd is None:
            loaded = cls(CurvatureSpec(**header.pop("settings")), S, M, **header)
            odd = _inconsistency(loaded, stored)
        if odd:
            raise InputError(f"{path} is not a sound curvature file: {odd}; estimate the curvature again")
        return loaded

    def _owner(self, module: str) -> str:
        return self.owner.get(module, module)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Shape of one matrix; nothing is read from a file but its header."""
    return tensors.shape(name) if isinstance(tensors, FileTensors) else tuple(tensors[name].shape)


def row_chunks(tensors: Mapping[str, Tensor], name: str) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their values in float64) of one matrix from top to bottom, about `CHUNK` entries at a time."""
    for rows in row_slices(shape_of(tensors, name), CHUNK):
        lazy = isinstance(tensors, FileTensors)
        values = tensors.rows(name, rows.start, rows.stop) if lazy else tensors[name][rows]  # type: ignore[attr-defined]
        yield rows, values.double()


def quadratic_forms(
    kind: CurvatureKind, tensors: Mapping[str, Tensor], name: str, left: LowRank, rights: Sequence[LowRank]
) -> list[float]:
    """⟨X, H·Y⟩ for X = BA = `left` and each Y = CD of `rights`, all (out, in), with the curvature tensors[name].

    `fisher` (H·Y = S∘Y): Σ over chunks of rows of ⟨C, (S∘BA)Dᵀ⟩; `gram` (H·Y = YG): ⟨CᵀB, D·GAᵀ⟩, and `factored`
    (H·Y = diag(r)·Y·diag(c)/mean(r)): ⟨Bᵀdiag(r)C, A·diag(c)Dᵀ⟩/mean(r), where nothing is as large as (out, in).
    Sums in float64, one pass over the curvature. A factor may have rank 0: the form is 0.
    """
    left, others = left.to(torch.float64), [right.to(torch.float64) for right in rights]
    if kind == "factored":
        r, c = tensors[name].double().split(list(left.shape))
        mean = r.mean() if float(r.mean()) else r.new_ones(())  # all zero: the form is 0
        inner = [((left.B.T * r) @ right.B) * ((left.A * c) @ right.A.T) for right in others]
        return [float(products.sum() / mean) for products in inner]
    if kind == "gram":
        image = torch.cat([G @ left.A.T for _, G in row_chunks(tensors, name)])  # GAᵀ, (in, r)
        return [float(((right.A @ image) * (right.B.T @ left.B)).sum()) for right in others]
    totals = [0.0] * len(others)
    for rows, S in row_chunks(tensors, name):
        weighted = (left.B[rows] @ left.A).mul_(S)
        for index, right in enumerate(others):
            totals[index] += float(((weighted @ right.A.T) * right.B[rows]).sum())
    return totals


def delta_probe(module: str, delta: LowRank) -> list[float]:
    """uᵀΔv of a module's task vector (out, in) for `PROBES` pairs (u, v), float64: others for a flipped or rotated Δ.

    The entries of u and v are independent, with mean 0 and variance 1, from SHAKE-256 of the module's name: the same
    on every machine and with every version of torch. E(uᵀΔv)² = ‖Δ‖².
    """
    U, V = _noise(f"rows of {module}", delta.shape[0]), _noise(f"columns of {module}", delta.shape[1])
    probes: list[float] = ((U @ delta.B.double()) * (V @ delta.A.double().T)).sum(1).tolist()
    return probes


def shrink(gram: Tensor, rho: float) -> Tensor:
    """(1−ρ)G + ρ·diag(G): keeps the diagonal, damps what is off it."""
    return (1 - rho) * gram + rho * torch.diag(gram.diagonal())


def accumulate(
    measured: Mapping[str, Tensor],
    optimum: Mapping[str, LowRank],
    delta: Mapping[str, LowRank],
    settings: CurvatureSpec,
    examples: int,
    *,
    owner: Mapping[str, str] | None = None,
    previous: Curvature | None = None,
) -> Curvature:
    """Add one task to the sums: S = S_past + H_t, M = M_past + H_tθ*_t, both float32 in memory.

    measured: {module: H_t}; for `gram` the raw mean of xxᵀ, shrunk here, one entry per shared input; for `factored`
    (out + in,), the means over the columns and over the rows of each example's squared gradient, averaged.
    With the normalisation "trace" a task's `fisher` is divided by the mean of its entries over all modules, so that
    every task weighs alike, however large its gradients are; a Fisher that is zero stays zero.
    optimum: {module: θ*_t relative to the pretrained weights}; delta: {module: Δ_t}, both (out, in).
    previous: the sums of the past, read one module at a time where they lie on disk.
    Raises InputError when `previous` was measured otherwise or has other modules or shapes.
    """
    owner = dict(owner or {})
    if settings.kind == "gram":
        measured = {name: shrink(gram, settings.shrinkage) for name, gram in measured.items()}
    if settings.normalisation == NORMALISATIONS["trace"]:
        measured = _of_mean_one(measured)
    if previous is not None:
        _check_continues(previous, settings, measured, optimum, owner)
    S, M, current, before = {}, {}, {}, {}
    for name, H in measured.items():
        S[name] = H.float() if previous is None else previous.S[name] + H.float()
    for name, theta in optimum.items():
        source = owner.get(name, name)
        current[name] = quadratic_forms(settings.kind, measured, source, delta[name], [delta[name]])[0]
        if settings.kind == "factored":
            before[name] = 0.0 if previous is None else previous.quadratic(name, delta[name], [delta[name]])[0]
            continue
        M[name] = _anchored(settings.kind, measured, source, theta)
        if previous is not None:
            M[name] += previous.M[name]
    norms = {name: d.norm() for name, d in delta.items()}
    probes = {name: delta_probe(name, d) for name, d in delta.items()}
    past = [] if previous is None else previous.examples
    return Curvature(settings, S, M, current, norms, [*past, examples], owner, probes, before)


def _of_mean_one(measured: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All entries of all modules over their mean."""
    mean = sum(float(H.double().sum()) for H in measured.values()) / sum(H.numel() for H in measured.values())
    return {name: H / (mean or 1.0) for name, H in measured.items()}


def _anchored(kind: CurvatureKind, measured: Mapping[str, Tensor], name: str, theta: LowRank) -> Tensor:
    """H·θ*, (out, in) float32, its products in float64 and a chunk of rows at a time."""
    B, A, result = theta.B.double(), theta.A.double(), torch.empty(theta.shape)
    if kind == "fisher":
        for rows, H in row_chunks(measured, name):
            result[rows] = (B[rows] @ A).mul_(H)
        return result
    A = sum((A[:, rows] @ G for rows, G in row_chunks(measured, name)), torch.zeros_like(A))
    for rows in row_slices(theta.shape, CHUNK):
        result[rows] = B[rows] @ A
    return result


def _check_continues(
    previous: Curvature,
    settings: CurvatureSpec,
    measured: Mapping[str, Tensor],
    optimum: Mapping[str, LowRank],
    owner: Mapping[str, str],
) -> None:
    if previous.settings != settings:
        raise InputError(
            f"the curvature of the past was measured with {asdict(previous.settings)}, "
            f"this task with {asdict(settings)}; sums are never mixed: use the same settings or start a new run"
        )
    past: set[tuple] = {("S", name, shape_of(previous.S, name)) for name in previous.S}
    past |= {("M", name, shape_of(previous.M, name)) for name in previous.M}
    past |= {("input of", *pair) for pair in previous.owner.items()}
    now: set[tuple] = {("S", name, tuple(H.shape)) for name, H in measured.items()}
    now |= {("M", name, theta.shape) for name, theta in optimum.items() if settings.kind != "factored"}
    now |= {("input of", *pair) for pair in owner.items()}
    if past != now:
        odd = sorted(past ^ now, key=str)[:3]
        raise InputError(f"the curvature of the past does not fit this adapter: modules or shapes differ, first {odd}")


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[tuple[int, ...], str]]]:
    """(metadata, {tensor name: (shape, dtype)}) of a safetensors file whose length fits its header."""
    try:
        with safe_open(path, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            stored = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            return handle.metadata() or {}, stored
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); estimate the curvature again") from error


def _header_fault(header: Any) -> str | None:
    """What in a file's header has another type or value than `save` gives it, None when all is as it should be."""
    fields = HEADER | {"settings": (_are_settings, f"the fields of CurvatureSpec, {', '.join(SETTINGS)}")}
    if not isinstance(header, dict):
        return f"its header is a {type(header).__name__}, expected fields by name"
    if odd := (NEEDED - set(header)) or (set(header) - set(fields)):
        return f"its header {'lacks' if odd <= NEEDED else 'has a field'} {min(odd)}"
    for key, value in header.items():
        check, expected = fields[key]
        if not check(value):
            return f"{key} is not {expected}: {_beginning(value)}"
    return None


def _by_module(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(check, value.values()))


def _are_sizes(value: Any) -> bool:
    return _by_module(value, is_number) and min(value.values(), default=0) >= 0


def _are_forms(value: Any) -> bool:
    """Quadratic forms of sums that are positive semidefinite: not below zero by more than rounding."""
    if not _by_module(value, is_number):
        return False
    return all(form >= -ROUNDING * max(map(abs, value.values())) for form in value.values())


def _are_probes(value: Any) -> bool:
    def is_row(row: Any) -> bool:
        return isinstance(row, list) and len(row) == PROBES and all(map(is_number, row))

    return _by_module(value, is_row)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(count) is int and count > 0 for count in value)


def _are_settings(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= set(SETTINGS):
        return False
    texts = [text for key, text in value.items() if key != "shrinkage"]
    shrinkage = value.get("shrinkage", 0.0)
    return all(isinstance(text, str) for text in texts) and is_number(shrinkage) and 0 <= shrinkage <= 1


def _beginning(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # digits without end, or depth
        return f"a {type(value).__name__}"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"


SETTINGS = tuple(CurvatureSpec.__dataclass_fields__)


NEEDED = {"settings", "current", "delta_norm", "examples"}


# {field of a file's header: (its check, what is expected)}
HEADER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "owner": (lambda value: _by_module(value, lambda name: isinstance(name, str)), "{module: module}"),
    "examples": (_are_counts, "a list of positive whole numbers, one a task"),
    "current": (_are_forms, "{module: number}, none below 0"),
    "past": (_are_forms, "{module: number}, none below 0"),
    "delta_norm": (_are_sizes, "{module: number}, none below 0"),
    "probe": (_are_probes, f"{{module: list of {PROBES} numbers}}"),
}


def _inconsistency(loaded: Curvature, stored: Mapping[str, tuple[tuple[int, ...], str]]) -> str | None:
    """What in the names, shapes and dtypes of a file does not fit together, None when all does."""
    kind, modules = loaded.settings.kind, loaded.modules
    if kind not in get_args(CurvatureKind) or not loaded.examples:
        return f"kind {kind!r}, {loaded.tasks} tasks"
    factored = kind == "factored"
    ours = ("S.",) if factored else ("S.", "M.")
    foreign = [name for name, (_, dtype) in stored.items() if name[:2] not in ours or dtype not in STORED_DTYPES]
    if foreign:
        return f"tensor {foreign[0]} is none of its sums, or not in {' or '.join(STORED_DTYPES)}"
    named: dict[str, Any] = {"past": loaded.past} if factored else {"M": loaded.M}
    named |= {"delta_norm": loaded.delta_norm, "probe": loaded.probe or modules}
    for key, of_modules in named.items():
        if set(of_modules) != modules:
            return f"{key} and current name different modules, first {min(set(of_modules) ^ modules)}"
    owners = {name: loaded._owner(name) for name in modules}
    if set(owners.values()) != set(loaded.S) or not set(loaded.owner) <= modules:
        return "S and M do not belong to the same modules"
    if factored:
        odd = sorted(name for name in modules if len(shape_of(loaded.S, name)) != 1)
        return f"S of {odd[0]} has shape {shape_of(loaded.S, odd[0])}" if odd else None
    for name, source in owners.items():
        M, S = shape_of(loaded.M, name), shape_of(loaded.S, source)
        if len(M) != 2 or (M if kind == "fisher" else (M[1], M[1])) != S:
            return f"M of {name} has shape {M}, its S {S}"
    return None


def _noise(key: str, size: int) -> Tensor:
    raw = torch.frombuffer(bytearray(hashlib.shake_256(key.encode()).digest(PROBES * size)), dtype=torch.uint8)
    return (raw.double().view(PROBES, size) - 127.5) / ((256**2 - 1) / 12) ** 0.5  # uniform on 256 steps, standardised


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return tensors.nbytes if isinstance(tensors, FileTensors) else sum(t.nbytes for t in tensors.values())
