"""Curvature of past tasks as two running sums per module: constant memory in the number of tasks.

Every method of the family minimises Σᵢ (θ − θ*ᵢ)ᵀ Hᵢ (θ − θ*ᵢ). With S = ΣHᵢ and M = ΣHᵢθ*ᵢ (θ relative to the
pretrained weights) the past enters only through S and M. The diagonal Fisher (Perturb-and-Merge,
arXiv 2505.22389) keeps S of the weight's own shape and acts elementwise; the input Gram (H = I ⊗ G, RegMean
and LOT merging, arXiv 2505.23859) keeps S of shape (in, in) and acts from the right.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank

Kind = Literal["fisher", "gram"]
FORMAT = "pm_hf.curvature.v1"


@dataclass
class Settings:
    """How the curvature was measured. Sums with different settings are never mixed."""

    kind: Kind = "fisher"
    labels: str = "empirical"  # labels of the Fisher: the data's own ("empirical") or drawn from the model ("mc")
    shrinkage: float = 0.0  # ρ of (1−ρ)G + ρ·diag(G), put into each task's Gram before it is summed
    normalisation: str = "mean over examples"


@dataclass
class Curvature:
    """Sums over the tasks 1 … t, the task being folded included.

    S: {module: ΣHᵢ}, float32; (out, in) for `fisher`, (in, in) for `gram`. Modules that read the same input
       share one Gram: `owner` maps a module to the one whose entry it uses.
    M: {module: ΣHᵢθ*ᵢ}, float32, (out, in).
    current: {module: ΔᵀH_tΔ}, the task's own part of the quadratic form, float64 as Python floats.
    delta_norm: {module: ‖Δ‖} of the task vector it was measured with; guards against a file that does not fit.
    examples: number of examples of each task.
    """

    settings: Settings
    S: dict[str, Tensor]
    M: dict[str, Tensor]
    current: dict[str, float]
    delta_norm: dict[str, float]
    examples: list[int]
    owner: dict[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """t, the number of tasks in the sums."""
        return len(self.examples)

    @property
    def nbytes(self) -> int:
        """Size of the sums in bytes: the same for every t."""
        return sum(tensor.nbytes for tensor in (*self.S.values(), *self.M.values()))

    def sum_of(self, module: str) -> Tensor:
        """S of a module."""
        return self.S[self.owner.get(module, module)]

    def apply(self, module: str, matrix: Tensor) -> Tensor:
        """(ΣHᵢ) · matrix for an (out, in) matrix: S∘X for the diagonal, X S for the Gram."""
        return curvature_product(self.settings.kind, self.sum_of(module), matrix)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically: the old file stays until the new one is synced."""
        path = Path(path)
        tensors = {f"S.{name}": tensor for name, tensor in self.S.items()}
        tensors |= {f"M.{name}": tensor for name, tensor in self.M.items()}
        header = {"settings": asdict(self.settings), "owner": self.owner, "examples": self.examples}
        header |= {"current": self.current, "delta_norm": self.delta_norm}
        temporary = path.with_name(path.name + ".tmp")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": FORMAT, "curvature": json.dumps(header)})
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Curvature":
        """Read a file that `save` wrote; InputError when it is missing, truncated or something else."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"curvature file {path} does not exist; estimate it with pm_hf.estimate_curvature")
        try:
            with safe_open(path, "pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is not a whole safetensors file ({error}); estimate the curvature again"
            ) from error
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise InputError(f"{path} is not a curvature file: expected format {FORMAT}, found {found}")
        header = json.loads(metadata["curvature"])
        sums = {key: {n[2:]: t for n, t in tensors.items() if n.startswith(key + ".")} for key in "SM"}
        return cls(Settings(**header.pop("settings")), sums["S"], sums["M"], **header)


def curvature_product(kind: Kind, sums: Tensor, matrix: Tensor) -> Tensor:
    """H · X with the module's stored curvature: elementwise for `fisher`, from the right for `gram`."""
    sums = sums.to(matrix.dtype)
    return sums * matrix if kind == "fisher" else matrix @ sums


def shrink(gram: Tensor, rho: float) -> Tensor:
    """(1−ρ)G + ρ·diag(G): keeps the diagonal, damps what is off it."""
    return (1 - rho) * gram + rho * torch.diag(gram.diagonal())


def accumulate(
    measured: dict[str, Tensor],
    optimum: dict[str, LowRank],
    delta: dict[str, LowRank],
    settings: Settings,
    examples: int,
    *,
    owner: dict[str, str] | None = None,
    previous: Curvature | None = None,
) -> Curvature:
    """Add one task to the sums.

    measured: {module: H_t}; for `gram` the raw mean of xxᵀ, shrunk here, one entry per shared input.
    optimum: {module: θ*_t relative to the pretrained weights}; delta: {module: Δ_t}, both (out, in).
    Raises InputError when `previous` was measured otherwise or has other modules or shapes.
    """
    owner = owner or {}
    if settings.kind == "gram":
        measured = {name: shrink(gram, settings.shrinkage) for name, gram in measured.items()}
    if previous is not None:
        _check_continues(previous, settings, measured, optimum, owner)
    S, M, current = {}, {}, {}
    for name, H in measured.items():
        S[name] = H.float() if previous is None else previous.S[name] + H.float()
    for name, theta in optimum.items():
        H = measured[owner.get(name, name)].double()
        dense = delta[name].to(torch.float64).dense()
        current[name] = float((dense * curvature_product(settings.kind, H, dense)).sum())
        anchored = curvature_product(settings.kind, H, theta.to(torch.float64).dense()).float()
        M[name] = anchored if previous is None else previous.M[name] + anchored
    norms = {name: d.norm() for name, d in delta.items()}
    past = [] if previous is None else previous.examples
    return Curvature(settings, S, M, current, norms, [*past, examples], dict(owner))


def _check_continues(
    previous: Curvature,
    settings: Settings,
    measured: dict[str, Tensor],
    optimum: dict[str, LowRank],
    owner: dict[str, str],
) -> None:
    if previous.settings != settings:
        raise InputError(
            f"the curvature of the past was measured with {asdict(previous.settings)}, "
            f"this task with {asdict(settings)}; sums are never mixed: use the same settings or start a new run"
        )
    past = {("S", n, tuple(t.shape)) for n, t in previous.S.items()} | {
        ("input of", *p) for p in previous.owner.items()
    }
    past |= {("M", n, tuple(t.shape)) for n, t in previous.M.items()}
    now = {("S", n, tuple(t.shape)) for n, t in measured.items()} | {("input of", *p) for p in owner.items()}
    now |= {("M", n, d.shape) for n, d in optimum.items()}
    if past != now:
        odd = sorted(past ^ now, key=str)[:3]
        raise InputError(f"the curvature of the past does not fit this adapter: modules or shapes differ, first {odd}")
