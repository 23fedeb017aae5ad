"""PEFT adapters that are no LoRA on the base's own weights, and the ways to turn them into one, run with PEFT."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.peft_adapters import NET, PLAIN, Kind, llama, merged_difference, save, seeded, train, wrap

FC = {"target_modules": ["fc1", "fc2"]}
SAVE_AS_LORA, DIFFERENCE = r"peft\.save_as_lora\(folder, model, rank=", r"merge_and_unload\(\)"
INITIAL = "path_initial_model_for_weight_conversion"


@dataclass(frozen=True)
class Refused:
    """A PEFT configuration, what the refusal must name, and what turns the adapter into a LoRA."""

    config: str
    settings: dict
    named: str  # the setting, as a pattern
    way_out: str  # the words of the way out, as a pattern
    convert: str | None = None  # "save_as_lora", "initial" or "difference"; None: nothing does
    model: Callable[[], nn.Module] = NET
    prepare: Callable[[nn.Module, object], None] | None = None


def _corda(base: nn.Module, config) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    generator = torch.Generator().manual_seed(2)
    preprocess_corda(
        base, config, run_model=lambda: [base(ids) for ids in torch.randint(20, (8, 8), generator=generator)]
    )


def _lora_ga(base: nn.Module, config) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(base, config, lambda: base(torch.arange(20)).logsumexp(-1).mean().backward())


def _lora(named: str, way_out: str, convert: str | None = None, prepare=None, model=NET, **settings) -> Refused:
    return Refused("LoraConfig", PLAIN | settings, named, way_out, convert, model, prepare)


def _other(config: str, way_out: str, convert: str | None, **settings) -> Refused:
    return Refused(config, FC | settings, f"found {config.removesuffix('Config').upper()}", way_out, convert)


NESTED = {
    "corda_config": "CordaConfig",
    "lora_ga_config": "LoraGAConfig",
    "kasa_config": "KasaConfig",
    "use_bdlora": "BdLoraConfig",
    "velora_config": "VeloraConfig",
    "monteclora_config": "MontecloraConfig",
}
REFUSED = {
    "dora": _lora("use_dora", "full rank; train with use_dora=False", "difference", use_dora=True),
    "pissa": _lora("init_lora_weights='pissa'", INITIAL, "initial", init_lora_weights="pissa"),
    "pissa_niter": _lora("init_lora_weights='pissa_niter_4'", INITIAL, "initial", init_lora_weights="pissa_niter_4"),
    "olora": _lora("init_lora_weights='olora'", INITIAL, "initial", init_lora_weights="olora"),
    "corda": _lora("init_lora_weights='corda'", INITIAL, "initial", _corda, init_lora_weights="corda", corda_config={}),
    "lora_ga": _lora(
        "init_lora_weights='lora_ga'", INITIAL, "initial", _lora_ga, init_lora_weights="lora_ga", lora_ga_config={}
    ),
    "kasa": _lora("kasa_config", DIFFERENCE, "difference", kasa_config={}),
    "alora": _lora("alora_invocation_tokens", "train a plain LoRA", alora_invocation_tokens=[1, 2]),
    "bdlora": _lora(
        "use_bdlora", DIFFERENCE, "difference", r=4, use_bdlora={"target_modules_bd_a": ["fc1"], "match_strict": False}
    ),
    "velora": _lora("velora_config", SAVE_AS_LORA, "save_as_lora", velora_config={"num_groups": 4}),
    "monteclora": _lora("monteclora_config", SAVE_AS_LORA, "save_as_lora", monteclora_config={}),
    "qalora": _lora("use_qalora", "use_qalora=False", use_qalora=True),
    "bias all": _lora("bias='all'", "bias='none', or with lora_bias=True", bias="all"),
    "bias lora_only": _lora("bias='lora_only'", "bias='none', or with lora_bias=True", bias="lora_only"),
    "token indices": _lora(
        "trainable_token_indices", "LoRA or in modules_to_save", "difference", trainable_token_indices={"emb": [1, 3]}
    ),
    "layer replication": Refused(
        "LoraConfig",
        {"r": 2, "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        "layer_replication",
        "save the expanded base once and set layer_replication to null",
        model=partial(seeded, llama),
    ),
    "loha": _other("LoHaConfig", SAVE_AS_LORA, "save_as_lora", r=4),
    "lokr": _other("LoKrConfig", SAVE_AS_LORA, "save_as_lora", r=4),
    "vera": _other("VeraConfig", SAVE_AS_LORA, "save_as_lora", r=4, target_modules=["fc1"]),
    "randlora": _other("RandLoraConfig", SAVE_AS_LORA, "save_as_lora", r=4, target_modules=["fc1"]),
    "fourierft": _other("FourierFTConfig", SAVE_AS_LORA, "save_as_lora", n_frequency=50),
    "miss": _other("MissConfig", SAVE_AS_LORA, "save_as_lora", r=4),
    "vblora": _other("VBLoRAConfig", SAVE_AS_LORA, "save_as_lora", r=2, num_vectors=8, vector_length=4),
    "c3a": _other("C3AConfig", SAVE_AS_LORA, "save_as_lora", block_size=8),
    "delora": _other("DeloraConfig", SAVE_AS_LORA, "save_as_lora", r=4),
    "oft": _other("OFTConfig", DIFFERENCE, "difference", r=0, oft_block_size=4),
    "boft": _other("BOFTConfig", DIFFERENCE, "difference", boft_block_size=4),
    "hra": _other("HRAConfig", DIFFERENCE, "difference", r=4),
    "shira": _other("ShiraConfig", DIFFERENCE, "difference", r=4),
    "ia3": _other("IA3Config", DIFFERENCE, "difference", feedforward_modules=["fc1", "fc2"]),
}


@dataclass(frozen=True)
class Trained:
    """A trained model, its folder, the folder of the adapter before training, and W' − W of its base."""

    row: Refused
    model: nn.Module
    path: Path
    initial: Path
    update: dict[str, Tensor] | None  # None: PEFT cannot merge it


def trained(name: str, folder: Path) -> Trained:
    """Train a refused kind and save it as PEFT does."""
    row = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, config = row.model(), _config(row)
        if row.prepare is not None:
            row.prepare(base, config)
        model = wrap(base, config)
    initial = folder / "initial"
    if row.convert == "initial":  # as PEFT's guides say: an adapter that no longer initialises, saved before training
        config.init_lora_weights = True
        save(model, initial)
        config.init_lora_weights = row.settings["init_lora_weights"]
    path = save(train(model), folder / "trained")
    mergeable = name not in ("alora", "layer replication")
    # merged in float32, the precision of its training: VeRA and others compute in it whatever the base's is
    update = merged_difference(Kind(row.model, {}), copy.deepcopy(model)) if mergeable else None
    return Trained(row, model, path, initial, update)


def exists(name: str) -> bool:
    """Whether the installed PEFT has this kind: KaSA is younger than the oldest that is supported."""
    from peft.tuners.lora import config

    return all(hasattr(config, NESTED[key]) for key in NESTED if key in REFUSED[name].settings)


def _config(row: Refused):
    import peft
    from peft.tuners.lora import config

    settings = copy.deepcopy(row.settings)
    settings |= {key: getattr(config, NESTED[key])(**settings[key]) for key in NESTED if key in settings}
    return getattr(peft, row.config)(**settings)


def convert(found: Trained, folder: Path) -> Path:
    """The adapter as plain LoRA, by the way out that the refusal names."""
    import peft

    if found.row.convert == "difference":
        assert found.update is not None
        return factored(found.update, folder)
    if found.row.convert == "initial":
        return save(found.model, folder, **{INITIAL: str(found.initial)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_as_lora(folder, found.model, rank=16)  # the smaller side of every matrix
    return folder


def factored(update: dict[str, Tensor], folder: Path) -> Path:
    """W' − W of Linear and Embedding weights as a LoRA of its numerical rank."""
    from peft import LoraConfig

    tensors, ranks = {}, {}
    for name, change in update.items():
        U, s, Vh = torch.linalg.svd(change, full_matrices=False)
        module = name.removesuffix(".weight")
        ranks[module] = rank = int((s > 1e-5 * s[0]).sum())
        B, A = (U[:, :rank] * s[:rank]).float(), Vh[:rank].float()
        factors = {"lora_A.weight": A, "lora_B.weight": B}
        if module == "emb":
            factors = {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
        tensors |= {f"base_model.model.{module}.{key}": factor.contiguous() for key, factor in factors.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    r = max(ranks.values())
    config = LoraConfig(r=r, lora_alpha=r, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
    config.save_pretrained(folder)
    return folder
