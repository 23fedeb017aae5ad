"""How PEFT stores the update of one adapted module: tensors and scaling to (out, in) matrices, and back."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pm_hf.merging.lowrank import LowRank

ADAPTER_CONFIG = "adapter_config.json"


ADAPTER_WEIGHTS, LABELS_FILE = "adapter_model.safetensors", "labels.json"


MERGE_REPORT = "merge_report.json"


CARD_FILE = "README.md"


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


# all that an adapter folder of ours may hold
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, LABELS_FILE, MERGE_REPORT, *TOKENIZER_FILES)


PEFT_PREFIX = "base_model.model."


FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<tensor>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|A|B|E)$")


Shape = tuple[int, ...]


LayoutKind = Literal["linear", "embedding", "conv", "fused", "adalora"]


RANK_NUMBER_OFFSET = 1e-5  # what PEFT adds to AdaLoRA's rank before it divides by it


@dataclass(frozen=True)
class Layout:
    """Storage of one module; its update is a list of matrices s·B@A, each (out, in), and perhaps a bias s·b.

    linear: lora_A (r, in), lora_B (out, r), for Linear and Conv1D, one matrix. embedding: lora_embedding_A (r, rows),
    lora_embedding_B (width, r), one matrix (width, rows), the transpose of the weight's update. conv: lora_A
    (r, in, *kernel), lora_B (out, r/groups, 1, …), one matrix (out/groups, in·kernel) for each group. fused
    (`target_parameters`, experts stacked in one parameter): lora_A (experts·r, in), lora_B (out, r·experts) with the
    expert as the fastest index of the columns, one matrix for each expert. adalora: lora_A (r, in), lora_E (r, 1),
    lora_B (out, r), one matrix B@(E∘A), written as linear.

    A, B: shapes as stored. count: number of matrices. bias: whether lora_B has a bias (`lora_bias`).
    """

    kind: LayoutKind
    scaling: float
    A: Shape
    B: Shape
    count: int = 1
    bias: bool = False

    @property
    def rank(self) -> int:
        """Rank of each matrix."""
        return self.A[0] // self.count

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each matrix."""
        out = self.B[0] // self.count if self.kind == "conv" else self.B[0]
        return out, math.prod(self.A[1:])

    @property
    def site(self) -> tuple:
        """What two adapters must agree on to adapt the same module."""
        return self.merged.kind, self.count, self.B[0], self.A[1:]

    @property
    def merged(self) -> "Layout":
        """How a merge stores the module."""
        return replace(self, kind="linear") if self.kind == "adalora" else self

    def tensors(self, module: str) -> tuple[str, str]:
        """Names of the two factors."""
        if self.kind in ("embedding", "adalora"):
            prefix = f"{module}.lora_embedding_" if self.kind == "embedding" else f"{module}.lora_"
            return f"{prefix}A", f"{prefix}B"
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def stored_names(self, module: str) -> list[str]:
        """Names of all tensors of the module."""
        more = [f"{module}.lora_E"] * (self.kind == "adalora") + [f"{module}.lora_B.bias"] * self.bias
        return [*self.tensors(module), *more]

    def names(self, module: str, bias: bool) -> list[str]:
        """A name for each matrix, the bias last where there is one."""
        matrices = [module] if self.count == 1 else [f"{module}[{i}]" for i in range(self.count)]
        return [*matrices, f"{module}.bias"] if bias else matrices

    def read(self, module: str, get: Callable[[str], Tensor], *, bias: bool = False) -> list[LowRank]:
        """The matrices in float32, scaling folded into B; with `bias` also (out, 1), zero where there is none."""
        A, B = (get(name).float() for name in self.tensors(module))
        B = B if self.scaling == 1 else B * self.scaling
        if self.kind == "conv":
            pairs = zip(B.flatten(1).chunk(self.count), A.flatten(1).chunk(self.count), strict=True)
        elif self.kind == "fused":
            pairs = zip(B.reshape(len(B), -1, self.count).unbind(-1), A.chunk(self.count), strict=True)
        else:
            pairs = zip([B], [A * get(f"{module}.lora_E").float() if self.kind == "adalora" else A], strict=True)
        matrices = [LowRank(*pair) for pair in pairs]
        if bias:
            value = get(f"{module}.lora_B.bias").float() * self.scaling if self.bias else B.new_zeros(self.B[0])
            matrices.append(LowRank(value[:, None], B.new_ones(1, 1)))
        return matrices

    def zeros(self, *, bias: bool = False) -> list[LowRank]:
        """What `read` gives for an adapter that leaves the module alone: matrices of rank 0."""
        out, columns = self.shape
        matrices = [LowRank(torch.zeros(out, 0), torch.zeros(0, columns)) for _ in range(self.count)]
        return [*matrices, LowRank(torch.zeros(self.B[0], 0), torch.zeros(0, 1))] if bias else matrices

    def write(self, module: str, matrices: Sequence[LowRank], rank: int, bias: bool) -> dict[str, Tensor]:
        """Tensors with scaling 1; every matrix is padded with zeros to `rank`, which they share in one tensor."""
        tensors, weights = {}, list(matrices)
        if bias:
            tensors[f"{module}.lora_B.bias"] = weights.pop().dense()[:, 0].contiguous()
        if self.kind in ("linear", "embedding") and weights[0].rank == rank:
            A, B = weights[0].A, weights[0].B
        else:
            A = torch.cat([F.pad(m.A, (0, 0, 0, rank - m.rank)) for m in weights])
            padded = [F.pad(m.B, (0, rank - m.rank)) for m in weights]
            B = torch.stack(padded, dim=-1).flatten(1) if self.kind == "fused" else torch.cat(padded)
        if self.kind == "conv":
            A, B = A.reshape(-1, *self.A[1:]), B.reshape(*B.shape, *(1,) * (len(self.A) - 2))
        return tensors | dict(zip(self.tensors(module), (A.contiguous(), B.contiguous()), strict=True))

    def stored_rank(self, rank: int) -> int:
        """The `r` that PEFT's configuration needs for matrices of `rank`."""
        return rank * self.count if self.kind == "conv" else rank


def find_layouts(
    config: Mapping, shapes: Mapping[str, Shape], problems: list[str], called: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, Layout], list]:
    """({module: Layout}, names of the other tensors) from plain tensor names and shapes; problems are appended.

    called: {module: (its name, that in the file)}, by which the configuration may call it too.
    """
    factors: dict[str, dict[str, Shape]] = {}
    others = []
    for name, shape in shapes.items():
        if match := FACTOR.match(name):
            factors.setdefault(match["module"], {})[match["tensor"]] = shape
        elif ".lora_" in name:
            problems.append(f"tensor {name} is not part of a plain LoRA")
        else:
            others.append(name)
    if not factors and not problems:
        problems.append("no lora_A / lora_B weights found")
    layouts = {module: _layout(config, called[module], tensors, problems) for module, tensors in factors.items()}
    return {module: layout for module, layout in layouts.items() if layout is not None}, others


def parameters_of(config: Mapping, module: str) -> list[str]:
    """Entries of `target_parameters` that name a parameter of this module (`.base_layer` nests several of them)."""
    plain = re.sub(r"(\.base_layer)+$", "", module)
    keys = {target: target.rpartition(".") for target in config.get("target_parameters") or []}
    return [key for key, (owner, _, _) in keys.items() if plain == owner or plain.endswith(f".{owner}")]


def match_pattern(patterns: Mapping | None, names: Sequence[str], default: float) -> float:
    """PEFT's lookup in rank_pattern and alpha_pattern: the first key that matches the end of a module's name."""
    for key, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            return value
    return default


def _layout(config: Mapping, called: Sequence[str], tensors: Mapping[str, Shape], problems: list[str]) -> Layout | None:
    module = called[0]
    adalora = peft_type(config) == "ADALORA"
    embedding = any(name.startswith("embedding") for name in tensors)
    wanted = {"embedding_A", "embedding_B"} if embedding else {"A.weight", "B.weight"}
    wanted = {"A", "B", "E"} if adalora else wanted
    if adalora and wanted <= set(tensors):
        return _adalora(config, module, tensors, problems)
    if wanted - set(tensors):
        only = min(tensors).removesuffix(".weight")
        problems.append(f"{module} has lora_{only} only; the file is incomplete")
        return None
    if more := set(tensors) - wanted - (set() if embedding else {"B.bias"}):
        problems.append(f"{module} has lora_{min(more)} beside {' and '.join(sorted(wanted))}; save it again with PEFT")
        return None
    A, B = (tensors[name] for name in sorted(wanted))
    parameters = parameters_of(config, module)
    if ".base_layer" in module and not parameters:
        problems.append(f"{module}: LoRA inside nn.MultiheadAttention is not supported; target its Linear layers")
        return None
    ends = [f".{parameter.rpartition('.')[2]}" for parameter in parameters] or [""]
    sizes = {_size(config, [name + end for name in called]) for end in ends}
    if len(sizes) > 1:
        problems.append(
            f"{module}: rank_pattern or alpha_pattern tell its fused parameters apart, the file does not say which "
            f"tensor belongs to which; train them with one rank and alpha"
        )
        return None
    rank, alpha = sizes.pop()
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    kind: LayoutKind = "linear"
    if embedding:
        kind = "embedding"
    elif parameters:
        kind = "fused"
    elif len(A) > 2:
        kind = "conv"
    count = _count(kind, int(rank), A, B)
    if count is None:
        problems.append(f"{module}: lora_A {A} and lora_B {B} are not the factors of a matrix")
    elif count == 0:
        overlap = "; give each module an entry of its own in rank_pattern" if config.get("rank_pattern") else ""
        stored = f"rank {A[0]}" if kind != "fused" else f"{A[0]} rows in lora_A, no multiple of it"
        problems.append(f"{module}: {ADAPTER_CONFIG} says rank {rank}, the weights have {stored}{overlap}")
    return Layout(kind, scaling, A, B, count, "B.bias" in tensors) if count else None


def _adalora(config: Mapping, module: str, tensors: Mapping[str, Shape], problems: list[str]) -> Layout | None:
    """B@(E∘A)·alpha/(init_r + 1e-5); modules that were pruned to rank 0 contribute nothing."""
    A, B, E = (tensors[name] for name in "ABE")
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or (A[0], 1) != E:
        problems.append(f"{module}: lora_A {A}, lora_E {E} and lora_B {B} are not the factors of a matrix")
        return None
    return Layout("adalora", config["lora_alpha"] / (config["init_r"] + RANK_NUMBER_OFFSET), A, B)


def _size(config: Mapping, names: Sequence[str]) -> tuple[float, float]:
    """(rank, alpha) that the configuration gives a module or parameter by one of its names."""
    names = [re.sub(r"\.base_layer", "", name) for name in names]
    rank = match_pattern(config.get("rank_pattern"), names, config["r"])
    return rank, match_pattern(config.get("alpha_pattern"), names, config["lora_alpha"])


def _count(kind: str, rank: int, A: Shape, B: Shape) -> int | None:
    """Number of matrices in the factors; 0 when they have another rank, None when they are no factors."""
    if 0 in (*A, *B) or len(A) < 2 or len(B) != len(A):
        return None
    if kind == "conv":
        groups = A[0] // B[1]
        fits = groups and A[0] == groups * B[1] and B[0] % groups == 0 and math.prod(B[2:]) == 1
        return (groups if A[0] == rank else 0) if fits else None
    if len(A) != 2 or A[0] != B[1]:
        return None
    if kind == "fused":
        return A[0] // rank if A[0] % rank == 0 else 0
    return int(A[0] == rank)


def peft_type(config: Mapping) -> str:
    """PEFT's name of the method, upper case."""
    kind = config.get("peft_type")
    return str(getattr(kind, "value", kind)).upper()
