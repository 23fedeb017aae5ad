"""One name for a module, whatever wrapped the model that wrote the file."""

import json
from functools import partial

import pytest
import torch
from helpers.adapter_folders import (
    CONFIG,
    HEAD,
    PREFIX,
    SHAPES,
    WEIGHTS,
    assert_same,
    dense,
    edited,
    head,
    write_folder,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from pm_hf import InputError, describe, merge_adapters, relate
from pm_hf.adapters.folder import open_adapter, replace_head
from pm_hf.adapters.names import WRAPPERS, plain_path, read_names

PEFT, Q = PREFIX, "layers.0.q"


def rewritten(folder, change, **settings):
    """The folder with other tensor names and settings."""
    tensors = {change(name): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file({name: value for name, value in tensors.items() if name}, folder / WEIGHTS, {"format": "pt"})
    return edited(folder, **settings)


def inside(*pairs):
    def change(name):
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return change


FORMS = {
    "data parallel": inside((PEFT, PEFT + "module.")),
    "data parallel around PEFT": lambda name: "module." + name,
    "data parallel twice": lambda name: "module." + name.replace(PEFT, PEFT + "module.module."),
    "FSDP": inside((PEFT, PEFT + "_fsdp_wrapped_module."), ("0.q", "0._fsdp_wrapped_module.q")),
    "FSDP around PEFT": lambda name: "_fsdp_wrapped_module." + name.replace("1.v", "1._fsdp_wrapped_module.v"),
    "checkpointing": inside(("layers.0", "layers.0._checkpoint_wrapped_module")),
    "FSDP and checkpointing": inside(("0.q", "0._fsdp_wrapped_module._checkpoint_wrapped_module.q")),
    "compiled": inside((PEFT, PEFT + "_orig_mod.")),
    "compiled around PEFT": lambda name: "_orig_mod." + name,
    "compiled layers": inside(("layers.0.", "layers.0._orig_mod."), ("v.lora", "v._orig_mod.lora")),
    "compiled data parallel": lambda name: "_orig_mod.module." + name.replace(PEFT, PEFT + "module._orig_mod."),
    "an adapter on an adapter": inside((PEFT, PEFT + PEFT)),
    "an adapter on a parallel adapter": inside((PEFT, PEFT + "module." + PEFT + "module.")),
    "an adapter's name": inside((".weight", ".default.weight")),
    "another adapter's name": inside((".weight", ".default_0.weight")),
    "a name like a factor": inside((".weight", ".lora.weight")),
    "a name in one module": inside(("0.q.lora_A.weight", "0.q.lora_A.task-1.weight")),
    "all at once": inside(
        (PEFT, "module." + PEFT + "_orig_mod."), ("0.q", "0._fsdp_wrapped_module.q"), ("weight", "a.weight")
    ),
}


@pytest.mark.parametrize("change", FORMS.values(), ids=FORMS)
def test_wrapped_adapters_merge_as_the_plain_ones_byte_for_byte(tmp_path, change):
    first, second = (write_folder(tmp_path / f"plain{seed}", seed=seed) for seed in (1, 2))
    odd, alone = (rewritten(write_folder(tmp_path / f"odd{seed}", seed=seed), change) for seed in (2, 1))
    merge_adapters([first, second], tmp_path / "expected", method="average")
    for name, pair in {"mixed": [first, odd], "both": [alone, odd]}.items():
        merge_adapters(pair, tmp_path / name, method="average")
        for file in (WEIGHTS, CONFIG):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    relation = relate(first, odd)
    assert not relation["only_left"]
    assert not relation["warnings"]
    assert list(describe(odd)["modules"]) == list(describe(second)["modules"])


@pytest.mark.parametrize("change", FORMS.values(), ids=FORMS)
def test_ranks_and_targets_may_mean_either_name(tmp_path, change):
    ranks = dict(zip(SHAPES, (2, 3), strict=True))
    written = {module: change(f"{PEFT}{module}.lora_A.weight").partition(PEFT)[2] for module in SHAPES}
    written = {module: name.rpartition(".lora_A")[0] for module, name in written.items()}
    named = {"rank_pattern": {written[m]: r for m, r in ranks.items()}, "target_modules": list(written.values())}
    named |= {"alpha_pattern": {f"^{written['layers.1.v']}": 12}}
    for kind, settings in {"plain": {"alpha_pattern": {"layers.1.v": 12}}, "written": named}.items():
        folder = write_folder(tmp_path / kind, rank=ranks, seed=1)
        expected = dense(rewritten(folder, str, alpha_pattern={"layers.1.v": 12}))
        adapter = open_adapter(rewritten(folder, change, **settings))
        assert_same({m: adapter.product(m).dense() for m in adapter.layouts}, expected)


names = st.lists(
    st.sampled_from(["model", "layers", "0", "11", "q_proj", "module", "base_model"]), min_size=2, max_size=6
)


@given(names, st.data())
def test_wrappers_anywhere_leave_no_trace(parts, data):
    path = ".".join(["encoder", *parts, "q"])
    wrapped = [
        p
        for part in path.split(".")
        for p in (*data.draw(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=2)), part)
    ]
    assert plain_path(".".join(wrapped)) == plain_path(path) == path
    stored = (
        data.draw(st.sampled_from(["", "module.", "_orig_mod.module."])) + PEFT + ".".join(wrapped) + ".lora_A.weight"
    )
    found = read_names([stored], {})
    assert found.stored == {f"{path}.lora_A.weight": stored}
    assert not found.problems


class Own(nn.Module):
    """A model whose own modules are called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"base_model": nn.ModuleDict({"model": nn.Linear(6, 6)}), "fc": nn.Linear(6, 6)})
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"fc": nn.Linear(6, 6)})})

    def forward(self, x):
        return self.base_model["model"]["fc"](self.module["fc"](self.module["base_model"]["model"](x)))


def peft_folder(path, make, seed, wrap=lambda model: model, **settings):
    """A real adapter with random factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(wrap(make()), LoraConfig(**{"r": 2, "lora_alpha": 4} | settings))
    for name, value in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            value.data += torch.randn_like(value)
    model.peft_config["default"].base_model_name_or_path = "tiny/base"
    model.save_pretrained(path)
    return path, model


def outputs(make, folder, x):
    from peft import PeftModel

    torch.manual_seed(0)
    with torch.no_grad():
        return PeftModel.from_pretrained(make(), str(folder)).eval()(x)


def fixed(make):
    def build():
        torch.manual_seed(5)
        return make()

    return build


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_modules_of_ones_own_class_keep_their_names(tmp_path):
    make, x = fixed(Own), torch.randn(4, 6)
    folder, model = peft_folder(
        tmp_path / "own", make, 1, target_modules=["fc", "model"], exclude_modules=r"base_model\.model"
    )
    merge_adapters(folder, tmp_path / "merged")
    assert set(open_adapter(folder).layouts) >= {"module.fc", "module.base_model.model", "base_model.model.fc"}
    assert torch.allclose(outputs(make, tmp_path / "merged", x), model.eval()(x), atol=1e-5)


def layers():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_what_real_wrappers_write_loads_into_the_model_without_them(tmp_path):
    make, x = fixed(layers), torch.randn(4, 6)
    wraps = {
        "parallel": nn.DataParallel,
        "compiled": partial(torch.compile, backend="eager"),
    }
    plain, model = peft_folder(tmp_path / "plain", make, 1, target_modules=["0", "2"])
    expected = model.eval()(x)
    for kind, wrap in wraps.items():
        folder, _ = peft_folder(tmp_path / kind, make, 1, wrap, target_modules=["0", "2"])
        assert not set(load_file(folder / WEIGHTS)) <= set(load_file(plain / WEIGHTS))
        state = load_file(plain / WEIGHTS)
        own = {name: state[PEFT + n] for n, name in open_adapter(folder).stored.items()}
        save_file(own, folder / WEIGHTS, {"format": "pt"})
        merge_adapters([plain, folder], tmp_path / f"{kind}-merged", method="average")
        assert torch.allclose(outputs(make, tmp_path / f"{kind}-merged", x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "inner", "parallel", "inner and parallel"])
def test_saved_modules_by_every_name(tmp_path, kind):
    labels = {HEAD: ["x", "y"]}
    first = write_folder(tmp_path / "first", seed=1, saved=head(2, 1), labels=labels)
    second = write_folder(tmp_path / "second", seed=2, saved=head(2, 2), labels=labels)
    merge_adapters([first, second], tmp_path / "expected", method="average")
    changes = []
    if "parallel" in kind:
        changes.append((PEFT, PEFT + "module."))
    if "inner" in kind:
        changes.append((f"{HEAD}.", f"{HEAD}.modules_to_save.default."))
        state = load_file(second / WEIGHTS)
        state |= {f"{PEFT}{HEAD}.original_module.weight": torch.zeros(7, 16)}
        save_file(state, second / WEIGHTS, {"format": "pt"})
        changes.append((f"{HEAD}.modules_to_save.default.original_module", f"{HEAD}.original_module"))
    rewritten(second, inside(*changes), modules_to_save=["module.classifier"] if kind == "parallel" else [HEAD])
    merge_adapters([first, second], tmp_path / "merged", method="average")
    merge_adapters([second, first], tmp_path / "turned", method="average")
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "turned" / CONFIG).read_text())["modules_to_save"] == [HEAD]
    replace_head(second, HEAD, torch.ones(2, 16), torch.ones(2), ["x", "y"])
    assert torch.equal(open_adapter(second).tensor(f"{HEAD}.weight"), torch.ones(2, 16))


def test_labels_by_the_name_that_data_parallel_gives_a_head(tmp_path):
    saved = [head(2, seed) for seed in (1, 2)]
    for name, module in (("plain", HEAD), ("parallel", f"module.{HEAD}")):
        pair = [
            write_folder(tmp_path / f"{name}{i}", seed=i, saved=own, labels={module: labels})
            for i, (own, labels) in enumerate(zip(saved, (["x", "y"], ["y", "z"]), strict=True))
        ]
        if name == "parallel":
            pair = [rewritten(folder, FORMS["data parallel"]) for folder in pair]
        merge_adapters(pair, tmp_path / name, method="average")
        assert json.loads((tmp_path / name / "labels.json").read_text()) == {HEAD: ["x", "y", "z"]}
    assert (tmp_path / "parallel" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


@pytest.mark.filterwarnings("ignore:Adapter .default.. . LoRA tensor.s. have invalid shape")  # PEFT, of a bias
@pytest.mark.parametrize("kind", ["lora_embedding", "lora_bias", "adalora"])
def test_an_adapters_name_in_every_kind_of_factor(tmp_path, kind):
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.ModuleDict({"emb": nn.Embedding(7, 6), "fc": nn.Linear(6, 6)})
    net.forward = lambda ids: net["fc"](net["emb"](ids))
    config = {
        "lora_embedding": LoraConfig(r=2, target_modules=["emb", "fc"]),
        "lora_bias": LoraConfig(r=2, target_modules=["fc"], lora_bias=True),
        "adalora": AdaLoraConfig(init_r=2, target_r=2, total_step=10, target_modules=["fc"]),
    }[kind]
    model = get_peft_model(net, config)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn_like(value)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "named")
    state = {name: value for name, value in model.state_dict().items() if ".lora_" in name and "ranknum" not in name}
    assert all(".default" in name for name in state)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, tmp_path / "named" / WEIGHTS, {"format": "pt"}
    )
    plain, named = (open_adapter(tmp_path / folder) for folder in ("plain", "named"))
    assert plain.layouts == named.layouts
    for module in plain.layouts:
        for left, right in zip(plain.read(module, bias=True), named.read(module, bias=True), strict=True):
            assert torch.equal(left.dense(), right.dense())


REFUSED = {
    "two adapters": (
        inside(("0.q.lora_A", "0.q.lora_A.a"), ("1.v.lora_A", "1.v.lora_A.b")),
        "of several adapters, a, b;",
    ),
    "no prefix": (inside(("base_model.model.", "model.")), "expected tensor names that start with base_model.model."),
    "inside something": (lambda name: "policy." + name, "start with base_model.model., found policy.base_model.model"),
    "unknown factor": (inside(("0.q.lora_A", "0.q.lora_C")), "layers.0.q.lora_C.weight is not part of a plain LoRA"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_one_name_is_refused(tmp_path, change, message):
    folder = rewritten(write_folder(tmp_path / "a"), change)
    with pytest.raises(InputError, match=message):
        merge_adapters(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
