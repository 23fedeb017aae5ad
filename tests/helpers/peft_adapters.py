"""Real PEFT adapters of every kind, built in-process on tiny models, and what PEFT itself makes of a folder.

`build` saves two trained adapters of a kind with `save_pretrained`; `update` is the dense float64 difference that a
folder makes to the base's weights, through PEFT; `outputs` is the function.
"""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

LABELS = ("red", "green", "blue")


@dataclass(frozen=True)
class Kind:
    """A row of the table: a fresh base with always the same weights, and the LoraConfig of two adapters."""

    model: Callable[[], nn.Module]
    first: dict
    second: dict = field(default_factory=dict)  # what differs from the first
    inputs: Callable[[], Tensor] = lambda: torch.arange(20)[None]
    storage: torch.dtype = torch.float32
    labels: tuple[str, ...] = ()  # of the module `head`
    by_layer: bool = False  # PEFT cannot merge it into the base, so its update is taken from each layer
    warning: str | None = None  # PEFT's own, about the base, whenever such an adapter is loaded
    method: str = "LoraConfig"


class Net(nn.Module):
    """Embedding, two blocks, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(16, 24), "fc2": nn.Linear(24, 16)}) for _ in "ab")
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, len(LABELS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = x + layer["fc2"](torch.tanh(layer["fc1"](x)))
        return self.head(self.norm(x))


class Convolutions(nn.Module):
    """Every convolution that PEFT wraps: 3×3, strided, 1×1, grouped, one- and three-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, (3, 2), padding=1, stride=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.groups = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.line = nn.Conv1d(12, 6, 3)
        self.volume = nn.Conv3d(6, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(torch.tanh(self.point(torch.tanh(self.wide(x)))))
        x = self.line(torch.tanh(x.flatten(2)))
        return self.volume(x[:, :, :8].reshape(len(x), 6, 2, 2, 2))


class Experts(nn.Module):
    """Stacked experts in two parameters, (experts, in, out) when transposed, else (experts, out, in)."""

    def __init__(self, is_transposed: bool, count: int = 3, width: int = 16, hidden: int = 10) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (count, hidden, width), (count, width, hidden)
        self.gate_up_proj = nn.Parameter(torch.randn(down if is_transposed else up) / 4)
        self.down_proj = nn.Parameter(torch.randn(up if is_transposed else down) / 4)

    def forward(self, x: Tensor) -> Tensor:
        up, down = ("eio", "eio") if self.is_transposed else ("eoi", "eoi")
        hidden = torch.tanh(torch.einsum(f"...i,{up}->...eo", x, self.gate_up_proj))
        return torch.einsum(f"...ei,{down}->...o", hidden, self.down_proj)


class Mixture(nn.Module):
    """Embedding, stacked experts, head."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.emb, self.experts, self.head = nn.Embedding(20, 16), Experts(is_transposed), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        return self.head(x + self.experts(x))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the same weights at each call, in eval mode."""
    torch.manual_seed(0)
    return make().eval()


def llama(**settings) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **settings))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 20, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    model.set_experts_implementation("eager")  # the default has no float64
    return model


def _image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


NET, CONV = partial(seeded, Net), partial(seeded, Convolutions)
TIED = partial(seeded, partial(llama, tie_word_embeddings=True))
PLAIN = {"r": 3, "lora_alpha": 6, "target_modules": ["fc1", "fc2"]}
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9, "target_modules": ["fc1", "fc2"]}
PRUNED = {"layers.0.fc1.lora_E": [True, False, True, False], "layers.1.fc2.lora_E": [False] * 4}
GROUPS = "groups > 1. Merging is not supported"
UNTIED = "Model has `tie_word_embeddings=True`"

KINDS = {
    "plain": Kind(NET, PLAIN),
    "rslora": Kind(NET, PLAIN | {"use_rslora": True}),
    "rslora and plain": Kind(NET, PLAIN | {"use_rslora": True}, {"use_rslora": False, "lora_alpha": 5}),
    "rank_pattern": Kind(NET, PLAIN | {"rank_pattern": {"fc1": 2, "layers.1.fc2": 5}}, {"rank_pattern": {"fc2": 1}}),
    "alpha_pattern": Kind(NET, PLAIN | {"alpha_pattern": {"fc1": 7, "^layers.0.fc2": 1}}, {"alpha_pattern": {}}),
    "unequal ranks": Kind(NET, PLAIN, {"r": 5}),
    "rank above the width": Kind(NET, PLAIN | {"r": 11}),
    "unequal target modules": Kind(NET, PLAIN | {"target_modules": ["fc1"]}, {"target_modules": ["fc2", "head"]}),
    "regex targets": Kind(NET, PLAIN | {"target_modules": r".*\.0\.fc\d"}, {"target_modules": r"layers.*fc1|head"}),
    "regex and list": Kind(NET, PLAIN | {"target_modules": r".*fc\d"}, {"target_modules": ["head"]}),
    "layers_to_transform": Kind(
        partial(seeded, llama),
        {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [0]},
    ),
    "exclude_modules": Kind(NET, PLAIN, {"exclude_modules": ["layers.0.fc1"]}),
    "fan_in_fan_out": Kind(
        partial(seeded, gpt2), {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, {"r": 2}
    ),
    "embedding": Kind(NET, PLAIN | {"target_modules": ["emb", "fc1"]}, {"r": 2}),
    "conv2d": Kind(CONV, PLAIN | {"target_modules": ["wide", "point"]}, {"r": 2}, _image),
    "conv2d, groups": Kind(
        CONV, PLAIN | {"target_modules": ["groups", "wide"], "r": 4}, {"r": 2}, _image, by_layer=True, warning=GROUPS
    ),
    "conv1d, conv3d": Kind(CONV, PLAIN | {"target_modules": ["line", "volume"]}, {"r": 2}, _image),
    "target_parameters": Kind(
        partial(seeded, partial(Mixture, False)), {"r": 3, "target_modules": [], "target_parameters": FUSED}, {"r": 2}
    ),
    "target_parameters, transposed": Kind(
        partial(seeded, partial(Mixture, True)),
        {"r": 3, "target_modules": ["head"], "target_parameters": FUSED[1:], "use_rslora": True},
        {"r": 2},
    ),
    "target_parameters, Linear": Kind(
        NET, {"r": 3, "target_modules": [], "target_parameters": ["fc1.weight"]}, {"r": 2}
    ),
    "target_parameters, Mixtral": Kind(
        partial(seeded, mixtral), {"r": 2, "target_modules": ["q_proj"], "target_parameters": FUSED}, {"r": 1}
    ),
    "lora_bias": Kind(NET, PLAIN | {"lora_bias": True}, {"r": 2}),
    "lora_bias of one": Kind(NET, PLAIN | {"lora_bias": True}, {"lora_bias": False, "target_modules": ["fc1", "head"]}),
    "lora_bias, conv": Kind(CONV, PLAIN | {"lora_bias": True, "target_modules": ["wide", "line"]}, {"r": 2}, _image),
    "head by label": Kind(NET, PLAIN | {"modules_to_save": ["head"]}, labels=LABELS),
    "modules_to_save": Kind(NET, PLAIN | {"modules_to_save": ["norm", "layers.0.fc2"], "target_modules": ["fc1"]}),
    "fp16 storage": Kind(NET, PLAIN, storage=torch.float16),
    "bf16 storage": Kind(NET, PLAIN, storage=torch.bfloat16),
    "tied embeddings": Kind(TIED, {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}, warning=UNTIED),
    "tied embeddings, head": Kind(TIED, {"r": 2, "target_modules": ["lm_head", "q_proj"]}, warning=UNTIED),
    "tied embeddings, ensure_weight_tying": Kind(
        TIED, {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, {"r": 3}
    ),
    "tied embeddings, modules_to_save": Kind(
        TIED,
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "orthogonal": Kind(NET, PLAIN | {"init_lora_weights": "orthogonal", "r": 4}),
    "mica": Kind(NET, PLAIN | {"init_lora_weights": "mica"}),
    "adalora": Kind(NET, ADALORA, {"init_r": 3}, method="AdaLoraConfig"),
    "adalora, pruned": Kind(
        NET, ADALORA | {"rank_pattern": PRUNED}, method="AdaLoraConfig", warning="The following rank_pattern keys"
    ),
}


def build(kind: Kind, folder: Path) -> list[Path]:
    """Two trained adapters of a kind in folder/0 and folder/1, every trainable parameter moved by its own noise."""
    import peft

    paths = []
    for seed, settings in enumerate((kind.first, kind.first | kind.second)):
        model = wrap(kind.model(), getattr(peft, kind.method)(**copy.deepcopy(settings)))
        train(model, seed)
        if kind.storage != torch.float32:
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(kind.storage) if "lora_" in name else parameter.data
        paths.append(save(model, folder / str(seed)))
        if kind.labels:
            (paths[-1] / "labels.json").write_text(json.dumps({"head": kind.labels}))
    return paths


def wrap(model: nn.Module, config) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def train(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save(model: nn.Module, path: Path, **settings) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path, **settings)
    return path


def load(base: nn.Module, path: Path, allow: str | None = None) -> nn.Module:
    """PeftModel of a folder; any warning is an error, but PEFT's own about the base (`allow`)."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        if allow is not None:
            warnings.filterwarnings("ignore", message=f".*{allow}")
        return PeftModel.from_pretrained(base, path).eval()


def update(kind: Kind, path: Path) -> dict[str, Tensor]:
    """{weight or bias: merged − base} in float64, where they differ; computed by PEFT in float64."""
    model = load(kind.model(), path, kind.warning).double()
    return active_update(kind, model)


def active_update(kind: Kind, model: nn.Module) -> dict[str, Tensor]:
    """The dense update of a model's active adapter."""
    return layer_updates(model) if kind.by_layer else merged_difference(kind, model)


def merged_difference(kind: Kind, model: nn.Module) -> dict[str, Tensor]:
    """What merging the active adapter changes in the base's weights."""
    base = kind.model().double().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload().state_dict()
    difference = {name: (merged[name] - weight).detach() for name, weight in base.items()}
    return {name: change for name, change in difference.items() if change.abs().max() > 0}


def layer_updates(model: nn.Module) -> dict[str, Tensor]:
    """s·(lora_B ∘ lora_A) of each layer as a weight (out, in, …): PEFT's own lora_B applied to lora_A's rows."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            weight = layer.lora_B[adapter](layer.lora_A[adapter].weight.transpose(0, 1)).transpose(0, 1)
            found[f"{name.removeprefix('base_model.model.')}.weight"] = layer.scaling[adapter] * weight.detach()
    return found


def outputs(kind: Kind, path: Path | None) -> Tensor:
    """The function of base and adapter (None: of the base) on the kind's inputs, in float64."""
    model = kind.model() if path is None else load(kind.model(), path, kind.warning)
    model, inputs = model.double(), kind.inputs()
    with torch.no_grad():
        result = model(inputs.double() if inputs.is_floating_point() else inputs)
    return getattr(result, "logits", result)


def combine(updates: list[Mapping[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """Σ wᵢΔᵢ; a weight that an update lacks counts as zero."""
    total: dict[str, Tensor] = {}
    for found, weight in zip(updates, weights, strict=True):
        for name, change in found.items():
            total[name] = total.get(name, 0) + weight * change
    return total


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖found − expected‖/‖expected‖ over all weights together."""
    gap = combine([found, expected], [1.0, -1.0])
    return float(sum(x.square().sum() for x in gap.values()) / sum(x.square().sum() for x in expected.values())) ** 0.5
