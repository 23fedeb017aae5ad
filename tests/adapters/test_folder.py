"""Adapter folders against PEFT itself: what is read is PEFT's update, what is written PEFT loads as it is."""

import json
import warnings

import pytest
import torch
from helpers.adapter_folders import (
    CONFIG,
    HEAD,
    SHAPES,
    WEIGHTS,
    assert_same,
    dense,
    distance,
    edited,
    head,
    peft_quiet,
    saved_tensors,
    tree,
    write_folder,
)
from safetensors.torch import load_file
from torch import nn

from pm_hf import InputError, merge_adapters
from pm_hf.adapters.checks import config_problems
from pm_hf.adapters.folder import open_adapter, replace_head, save_adapter
from pm_hf.cli import main


class Deep(nn.Module):
    """Twelve square layers, so that the names of layer 1 and layer 11 can clash, and an inner twin of a top module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6)}) for _ in range(12))
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6)})

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer["q"](x)) + layer["v"](x) / 2
        return self.block["fc"](torch.tanh(self.fc(x)))


def deep():
    torch.manual_seed(0)
    return Deep()


@pytest.fixture(scope="session")
def classifier():
    """Function (number of labels) → tiny BERT classifier; the encoder is always the same."""
    from transformers import BertConfig, BertForSequenceClassification

    def build(num_labels):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        torch.manual_seed(num_labels)
        model = BertForSequenceClassification(
            BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=num_labels, **sizes)
        ).eval()
        torch.manual_seed(0)
        for parameter in model.bert.parameters():
            parameter.data.normal_(0, 0.2)
        model.config._name_or_path = model.name_or_path = "tiny/base"
        return model

    return build


def save_peft(model, path, seed, labels=None, dtype=None, **config):
    """A real PEFT adapter with random factors (and head), saved by save_pretrained; returns (folder, PeftModel)."""
    from peft import LoraConfig, get_peft_model

    with peft_quiet():
        wrapped = get_peft_model(model, LoraConfig(**({"r": 2, "lora_alpha": 4} | config)))
        generator = torch.Generator().manual_seed(seed)
        for name, value in wrapped.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                value.data = torch.randn(value.shape, generator=generator) * 0.3
        if dtype is not None:
            wrapped.to(dtype)
        wrapped.save_pretrained(path, save_embedding_layers=False)
    if labels is not None:
        (path / "labels.json").write_text(json.dumps({HEAD: labels}))
    return path, wrapped


def deltas(wrapped):
    """PEFT's own update of every module."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    layers = {n.removeprefix(prefix): m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}


def load(base, folder):
    """The adapter as any user loads it."""
    from peft import PeftModel

    with peft_quiet():
        return PeftModel.from_pretrained(base, str(folder)).eval()


CONFIGS = {
    "plain": {"target_modules": ["q", "v"]},
    "regex": {"target_modules": r"layers\.\d+\.(q|v)"},
    "all-linear": {"target_modules": "all-linear"},
    "chosen layers": {"target_modules": ["q"], "layers_to_transform": [1, 11], "layers_pattern": "layers"},
    "excluded": {"target_modules": ["q", "fc"], "exclude_modules": ["block.fc"]},
    "rslora": {"target_modules": ["q"], "use_rslora": True, "r": 4},
    "rank_pattern": {"target_modules": ["q", "v"], "rank_pattern": {"layers.1.q": 3, r".*\.v": 1}},
    "alpha_pattern": {"target_modules": ["q"], "alpha_pattern": {"layers.1.q": 7, "^layers.11.q": 1}},
    "both patterns": {
        "target_modules": ["q", "v"],
        "rank_pattern": {"v": 5},
        "alpha_pattern": {"v": 2},
        "use_rslora": True,
    },
    "gaussian": {"target_modules": ["q"], "init_lora_weights": "gaussian"},
    "random B": {"target_modules": ["q"], "init_lora_weights": False},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_product_is_the_update_that_peft_adds(tmp_path, config):
    folder, wrapped = save_peft(deep(), tmp_path / "a", 1, **config)
    assert_same({n: p.dense() for n, p in open_adapter(folder).products().items()}, deltas(wrapped))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file_is_read_as_float32(tmp_path, dtype):
    folder, wrapped = save_peft(deep(), tmp_path / "a", 1, dtype=dtype, target_modules=["q"])
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {dtype}
    products = open_adapter(folder).products()
    assert {product.A.dtype for product in products.values()} == {torch.float32}
    assert_same({n: p.dense() for n, p in products.items()}, deltas(wrapped.float()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_identity_merge_keeps_the_function_in_peft(tmp_path, config):
    folder, wrapped = save_peft(deep(), tmp_path / "a", 1, **config)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    merge_adapters([folder], tmp_path / "out", method="average")
    merged = load(deep(), tmp_path / "out")
    assert set(deltas(merged)) == set(deltas(wrapped))
    assert torch.allclose(merged(x), wrapped.eval()(x), atol=1e-5)
    assert (merged(x) - deep()(x)).abs().max() > 1e-2


RANKS = {"layers.1.q": 3, "layers.11.q": 5, "fc": 1, "block.fc": 4}


@pytest.mark.parametrize("names", [["layers.1.q", "layers.11.q"], ["fc", "block.fc"], list(RANKS)])
def test_names_that_end_alike_keep_their_own_rank_in_peft(tmp_path, names):
    shapes, base = dict.fromkeys(names, (6, 6)), deep()
    task = write_folder(tmp_path / "task", shapes, rank={n: RANKS[n] for n in names}, config={"rank_pattern": {}})
    anchored = {f"^{name}$": RANKS[name] for name in names}
    edited(task, rank_pattern=anchored)
    report = merge_adapters(task, tmp_path / "out")
    assert {name: module["rank_out"] for name, module in report.modules.items()} == {n: RANKS[n] for n in names}
    expected = {name: product.dense().double() for name, product in open_adapter(task).products().items()}
    assert_same(deltas(load(base, tmp_path / "out")), expected, 1e-5)


def test_target_that_is_the_end_of_another_name_touches_only_its_own_module(tmp_path):
    task = write_folder(tmp_path / "task", {"fc": (6, 6)}, seed=1, config={"target_modules": "fc"})
    merge_adapters(task, tmp_path / "out")
    assert set(deltas(load(deep(), tmp_path / "out"))) == {"fc"}  # not block.fc, which the adapter never had


def test_truncated_merge_with_unequal_ranks_reloads(tmp_path):
    left, _ = save_peft(deep(), tmp_path / "a", 1, target_modules=["q", "v"], rank_pattern={"v": 1})
    right, _ = save_peft(deep(), tmp_path / "b", 2, target_modules=["layers.1.q", "layers.11.q", "fc"], r=3)
    merge_adapters(right, tmp_path / "out", into=left, coefficient=0.4, energy=0.9)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert len({config["r"], *config["rank_pattern"].values()}) > 1
    assert_same(deltas(load(deep(), tmp_path / "out")), dense(tmp_path / "out"))


INPUTS = torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(5))


def reference(classifier, adapters, weights, head_rows):
    """Base + dense float64 updates and given head rows, without PEFT."""
    model = classifier(len(head_rows[0]))
    for folder, weight in zip(adapters, weights, strict=True):
        for name, product in open_adapter(folder).products().items():
            model.get_submodule(name).weight.data += weight * product.to(torch.float64).dense().float()
    model.classifier.weight.data, model.classifier.bias.data = head_rows
    with torch.no_grad():
        return model(INPUTS).logits


@pytest.mark.parametrize("max_rank", [None, 16], ids=["exact", "max_rank"])
def test_merged_classifier_gives_the_logits_of_base_plus_dense_updates(classifier, tmp_path, max_rank):
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    old, _ = save_peft(classifier(3), tmp_path / "merged", 1, ["a", "b", "c"], **settings, rank_pattern={"value": 3})
    settings["target_modules"] = r"bert.encoder.layer.\d.attention.self.(key|value)"
    new, _ = save_peft(classifier(2), tmp_path / "task", 2, ["d", "b"], **settings, use_rslora=True, r=4)
    out = tmp_path / "out"
    merge_adapters(new, out, into=old, coefficient=0.3, max_rank=max_rank)
    assert json.loads((out / "labels.json").read_text()) == {HEAD: ["a", "b", "c", "d"]}
    first, second = saved_tensors(old), saved_tensors(new)
    rows = []
    for name in (f"{HEAD}.weight", f"{HEAD}.bias"):
        (a, b, c), (d, b2) = first[name], second[name]
        rows.append(torch.stack([a, 0.7 * b + 0.3 * b2, c, d]))
    expected = reference(classifier, (old, new), (1.0, 0.3), rows)
    with torch.no_grad():
        found = load(classifier(4), out)(INPUTS).logits
        untouched = classifier(4)(INPUTS).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert (untouched - expected).abs().max() > 0.1


def test_identity_merge_of_a_classifier_keeps_its_logits(classifier, tmp_path):
    settings = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "use_rslora": True, "r": 3}
    folder, wrapped = save_peft(classifier(3), tmp_path / "a", 1, ["a", "b", "c"], **settings)
    merge_adapters([folder], tmp_path / "out", method="average")
    with torch.no_grad():
        found, expected = load(classifier(3), tmp_path / "out")(INPUTS).logits, wrapped.eval()(INPUTS).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_other_fields_of_the_configuration_are_kept(tmp_path):
    folder, _ = save_peft(deep(), tmp_path / "a", 1, target_modules=["q"], lora_dropout=0.25, revision="v7", r=3)
    merge_adapters(folder, tmp_path / "out", max_rank=2)
    before, after = (json.loads((f / CONFIG).read_text()) for f in (folder, tmp_path / "out"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "inference_mode"}
    assert after["lora_dropout"] == 0.25
    assert after["revision"] == "v7"
    assert after["lora_alpha"] == after["r"] == 2


def test_settings_of_an_initialisation_leave_no_warning_behind(tmp_path):
    folder = write_folder(
        tmp_path / "a", {"fc": (6, 6)}, config={"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}
    )
    merge_adapters(folder, tmp_path / "out")
    from peft import LoraConfig

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert [str(warning.message) for warning in seen] == []


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, ""),
        ({"init_lora_weights": "gaussian"}, ""),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, ""),
        ({"target_parameters": ["w"]}, ""),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_live_configuration_of_peft_is_judged_like_its_file(settings, refused):
    from peft import LoraConfig

    problems = config_problems(LoraConfig(**settings).to_dict())
    assert len(problems) == bool(refused)
    assert refused in "".join(problems)


def test_save_adapter_writes_the_factors_as_they_are(tmp_path):
    source = write_folder(tmp_path / "a", rank=3, saved=head(2, 1), labels={HEAD: ["x", "y"]})
    adapter = open_adapter(source)
    factors = {f"{m}.lora_{f}.weight": adapter.tensor(f"{m}.lora_{f}.weight") for m in SHAPES for f in "AB"}
    save_adapter(tmp_path / "b", adapter.config, factors, saved_tensors(source), adapter.labels)
    first, second = load_file(source / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert open_adapter(tmp_path / "b").scaling == adapter.scaling
    assert open_adapter(tmp_path / "b").labels == {HEAD: ["x", "y"]}


def test_save_adapter_that_cannot_be_read_leaves_nothing(tmp_path):
    source = write_folder(tmp_path / "a")
    adapter, before = open_adapter(source), tree(tmp_path)
    only_A = {"layers.0.q.lora_A.weight": adapter.tensor("layers.0.q.lora_A.weight")}
    with pytest.raises(InputError, match="has lora_A only"):
        save_adapter(tmp_path / "b", adapter.config, only_A, {}, {})
    assert tree(tmp_path) == before


def test_replace_head_changes_the_rows_only(tmp_path):
    folder = write_folder(tmp_path / "a", saved=head(2, 1, dtype=torch.bfloat16), labels={HEAD: ["x", "y"]})
    (folder / "merge_report.json").write_text('{"tasks": 3}')
    before, new = tree(folder), head(2, 8)
    factors = dense(folder)
    replace_head(folder, HEAD, new[f"{HEAD}.weight"], new[f"{HEAD}.bias"], ["x", "y"])
    found = saved_tensors(folder)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(distance(found[name], new[name].double()) < 1e-2 for name in new)
    assert_same(dense(folder), factors, 0.0)
    after = tree(folder)
    assert {name for name in after if after[name] != before.get(name)} == {WEIGHTS}
    with pytest.raises(InputError, match=r"classifier.weight needs shape \(2, 16\), found \(3, 16\)"):
        replace_head(folder, HEAD, torch.ones(3, 16), torch.ones(3), ["x", "y"])
    assert tree(folder) == after
    replace_head(folder, HEAD, torch.ones(3, 16), torch.ones(3), ["x", "y", "x"])
    assert open_adapter(folder).labels == {HEAD: ["x", "y", "x"]}


BASES = {
    "a trailing slash": ("models/x", "models/x/"),
    "a dot": ("models/x", "./models/x"),
    "two dots": ("models/x", "models/y/../x"),
    "relative and absolute": ("models/x", "{here}/models/x"),
    "a link": ("models/x", "link"),
    "a link above": ("{here}/models/x", "{here}/linked/x/"),
    "no folder": ("/no/such/x", "/no/such//x/"),
    "a repository": ("owner/x", "hf://owner/x"),
    "its snapshot": ("owner/x", "/cache/hub/models--owner--x/snapshots/0ab1/"),
    "a snapshot without owner": ("gpt2", "/cache/hub/models--gpt2/snapshots/0ab1"),
    "a package": ("/one/site-packages/pack/base", "/two/lib/site-packages/pack/base/"),
}


@pytest.mark.parametrize("names", BASES.values(), ids=BASES)
def test_one_base_by_two_names(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/x", "models/y"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "x")
    (tmp_path / "linked").symlink_to("models")
    written = [{"base_model_name_or_path": name.format(here=tmp_path)} for name in names]
    pair = [write_folder(tmp_path / str(seed), seed=seed, config=config) for seed, config in enumerate(written)]
    merge_adapters(pair, tmp_path / "out", method="average")
    assert (
        json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"]
        == written[1]["base_model_name_or_path"]
    )


@pytest.mark.parametrize(
    "names", [("owner/x", "unsloth/x-bnb-4bit"), ("models/x", "models/y"), ("x", "y/x"), (None, "x"), ("/a/x", "/b/x")]
)
def test_two_bases_are_refused_with_a_way_out_that_works(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    written = [{"base_model_name_or_path": name} for name in names]
    first, second = (write_folder(tmp_path / str(s), seed=s, config=config) for s, config in enumerate(written))
    message = (
        "different base models .* same weights .moved, or a quantised copy., write one of the names into base_model"
    )
    with pytest.raises(InputError, match=message):
        merge_adapters([first, second], tmp_path / "out", method="average")
    edited(first, **written[1])
    merge_adapters([first, second], tmp_path / "out", method="average")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["task"], "it has adapters in task: give .*parent/task"),
        (["checkpoint-500"], "it has adapters in checkpoint-500: give .*parent/checkpoint-500"),
        (["a", "b"], "it has adapters in a, b: give one of these folders"),
        (["task/checkpoint-9"], "it has adapters in task/checkpoint-9: give .*parent/task/checkpoint-9"),
        (
            [f"checkpoint-{n}" for n in range(10, 18)],
            "it has adapters in checkpoint-10, .*, checkpoint-14 and 3 more: ",
        ),
        ([], "expected a folder that PEFT's save_pretrained wrote"),
    ],
)
def test_a_folder_that_has_the_adapters_below_it(tmp_path, folders, message):
    (tmp_path / "parent").mkdir()
    for folder in folders:
        (tmp_path / "parent" / folder).parent.mkdir(parents=True, exist_ok=True)
        write_folder(tmp_path / "parent" / folder)
    with pytest.raises(InputError, match=f"parent has no {CONFIG}; {message}"):
        merge_adapters(tmp_path / "parent", tmp_path / "out")
    if folders:
        merge_adapters(tmp_path / "parent" / folders[-1], tmp_path / "out")


def test_a_whole_model_is_no_adapter(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="it holds a whole model; expected a LoRA adapter"):
        open_adapter(tmp_path)


TRAINING_KEYS = {"loraplus_lr_ratio": 16, "lora_dtype": "float32", "merge_weights": True, "lorap_lr_ratio": 16.0}


@pytest.mark.parametrize("key", TRAINING_KEYS)
def test_settings_of_the_training_alone_are_read(tmp_path, key):
    first, second = (write_folder(tmp_path / str(i), config=c) for i, c in enumerate([{}, {key: TRAINING_KEYS[key]}]))
    merge_adapters(first, tmp_path / "plain")
    merge_adapters(second, tmp_path / "keyed")
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "keyed" / WEIGHTS).read_bytes()
    assert_same(dense(tmp_path / "keyed"), dense(second))


def test_an_unknown_setting_is_refused_with_a_way_out_that_works(tmp_path):
    folder = write_folder(tmp_path / "a", config={"new_trick": [1] * 100})
    message = (
        rf"new_trick=\[1, .*… is a setting that this pm_hf does not know; .* remove it from {CONFIG}; if the layers"
    )
    with pytest.raises(InputError, match=message):
        merge_adapters(folder, tmp_path / "out")
    merge_adapters(edited(folder, new_trick=...), tmp_path / "out")


def test_ranks_that_differ_are_told_to_users_of_other_tools(tmp_path):
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", {"layers.0.q": SHAPES["layers.0.q"]})
    report = merge_adapters([first, second], tmp_path / "out", method="average")
    assert len(report.notes) == 1
    assert report.notes[0].startswith("the modules have ranks from 2 to 4, each with an alpha of its own")
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["notes"] == report.notes
    assert merge_adapters([first, first], tmp_path / "same", method="average").notes == []


def test_names_from_a_file_reach_the_terminal_escaped(tmp_path, capsys):
    root = "classifier\x1b[31m"
    saved = {f"{root}.weight": torch.ones(2, 3)}
    folder = write_folder(tmp_path / "a", {"layers.\u202e0.q": (6, 8)}, saved=saved, config={"modules_to_save": [root]})
    assert main(["merge", str(folder), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "layers.\\u202e0.q: rank 2 -> 2" in shown
    assert "classifier\\x1b[31m.weight: from the only adapter" in shown
    assert not {"\x1b", "\u202e"} & set(shown)
