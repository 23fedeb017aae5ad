"""The same layers under two names: adapters of one base from different versions of transformers, or refused."""

import json
import shutil
import sys

import pytest
import torch
from helpers.adapter_folders import CONFIG, WEIGHTS, assert_same, dense, edited, write_folder
from safetensors.torch import load_file, save_file

import pm_hf.adapters.architecture as architecture
from pm_hf import InputError, merge_adapters, relate
from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.naming import check_loads

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),  # PEFT's use of a name that changed
]
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {**TEXT, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, pad_token_id=0, **TEXT))


def llava():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(projection_dim=16, **PICTURE)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=llama().config, vision_config=vision))


def qwen():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**TEXT, "vocab_size": 50, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**PICTURE))


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, **TEXT))


def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(projection_dim=16, **PICTURE))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **TEXT))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def built(make):
    torch.manual_seed(0)
    return make().eval()


def adapter(make, path, seed, base="tiny/base", **settings):
    """A real adapter with random factors."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(built(make), LoraConfig(**{"r": 2, "lora_alpha": 4} | settings))
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            value.data += 0.3 * torch.randn_like(value)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(path)
    return path


def older(folder, path, changes, **settings):
    """The adapter as an earlier version, or another class, would have named its layers."""
    shutil.copytree(folder, path)
    tensors = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for new, old in changes:
            name = name.replace(new, old)
        tensors[name] = value
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    return edited(path, **settings)


def updates(make, folder):
    """{module: update in float64} as PEFT has it after loading."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(built(make).double(), str(folder))
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {n: m.get_delta_weight("default").detach() for n, m in modules.items() if "default" in m.scaling}


LAYERS = "base_model.model.model.layers"
VIT = [("vit.layers", "vit.encoder.layer"), ("n.q_proj", "n.attention.query"), ("n.v_proj", "n.attention.value")]
ARCHITECTURES = {
    "llava": (
        llava,
        {"target_modules": r".*language_model.*(q_proj|v_proj)"},
        [("model.model.language_model.layers", "model.language_model.model.layers")],
        {},
    ),
    "vision of llava": (
        llava,
        {"target_modules": r".*vision_tower.*(q_proj|v_proj)"},
        [("model.model.vision_tower.", "model.vision_tower.vision_model.")],
        {},
    ),
    "qwen2_vl": (
        qwen,
        {"target_modules": ["q_proj", "v_proj"]},
        [("model.model.language_model.layers", "model.model.layers")],
        {},
    ),
    "vit": (vit, {"target_modules": ["q_proj", "v_proj"]}, VIT, {"target_modules": ["query", "value"]}),
    "gpt_neox": (
        neox,
        {"target_modules": ["query_key_value", "lm_head"]},
        [("lm_head", "embed_out")],
        {"target_modules": ["query_key_value", "embed_out"]},
    ),
    "clip": (clip, {"target_modules": ["q_proj"]}, [("base_model.model.", "base_model.model.vision_model.")], {}),
    "another class": (llama, {"target_modules": ["q_proj"]}, [(LAYERS, "base_model.model.layers")], {}),
    "as if of a larger model": (
        llama,
        {"target_modules": ["q_proj"]},
        [(LAYERS, "base_model.model.model.language_model.layers")],
        {},
    ),
}


@pytest.mark.parametrize(("make", "settings", "changes", "old"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_adapters_of_two_versions_merge_as_one_and_load_in_the_installed_one(tmp_path, make, settings, changes, old):
    first, second = (adapter(make, tmp_path / f"new{seed}", seed, **settings) for seed in (1, 2))
    first_old, second_old = (
        older(folder, tmp_path / f"{folder.name}-old", changes, **old) for folder in (first, second)
    )
    parts = [updates(make, folder) for folder in (first, second)]
    wanted = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert set(load_file(first_old / WEIGHTS)) != set(load_file(first / WEIGHTS))
    pairs = [(first, second_old), (first_old, second)] + [(first_old, second_old)] * (make is not llama)
    for index, pair in enumerate(pairs):
        report = merge_adapters(pair, tmp_path / f"out{index}", method="task_arithmetic", weights=[1, 1])
        assert not report.notes
        assert_same(updates(make, tmp_path / f"out{index}"), wanted, 1e-6)
        assert set(load_file(tmp_path / f"out{index}" / WEIGHTS)) == set(load_file(first / WEIGHTS))
        relation = relate(*pair)
        assert not relation["only_left"] + relation["warnings"]


def test_one_old_adapter_is_written_with_the_names_of_today(tmp_path):
    new = adapter(vit, tmp_path / "new", 1, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    old = older(new, tmp_path / "old", VIT, target_modules=["query", "value"])
    with pytest.raises(InputError, match="has not the name that PEFT looks for; .* pm-hf merge .*old --output NEW"):
        check_loads(open_adapter(old))
    merge_adapters(old, tmp_path / "out")
    check_loads(open_adapter(tmp_path / "out"))
    assert_same(updates(vit, tmp_path / "out"), updates(vit, new))
    assert open_adapter(tmp_path / "out").saved == open_adapter(new).saved


def test_a_saved_head_that_was_renamed(tmp_path):
    settings = {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}
    first, second = (adapter(neox, tmp_path / f"new{seed}", seed, **settings) for seed in (1, 2))
    old = older(second, tmp_path / "old", [("lm_head", "embed_out")], modules_to_save=["embed_out"])
    for name, pair in {"new": [first, second], "mixed": [first, old], "turned": [old, first]}.items():
        merge_adapters(pair, tmp_path / name, method="average")
        assert json.loads((tmp_path / name / CONFIG).read_text())["modules_to_save"] == ["lm_head"]
    assert (tmp_path / "mixed" / WEIGHTS).read_bytes() == (tmp_path / "new" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("rows", [None, [f"w{row}" for row in range(50)]], ids=["the same in all", "labelled"])
def test_rows_that_labels_name_by_a_heads_old_name(tmp_path, rows):
    settings = {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}
    news = [adapter(neox, tmp_path / f"new{seed}", seed, **settings) for seed in (1, 2)]
    renaming = [("lm_head", "embed_out")]
    olds = [older(new, tmp_path / f"{new.name}-old", renaming, modules_to_save=["embed_out"]) for new in news]
    for folders, head in ((news, "lm_head"), (olds, "embed_out")):
        for folder in folders:
            (folder / "labels.json").write_text(json.dumps({head: rows}))
    merge_adapters(news, tmp_path / "new", method="average")
    merge_adapters(olds, tmp_path / "old", method="average")
    for file in (WEIGHTS, "labels.json"):
        assert (tmp_path / "old" / file).read_bytes() == (tmp_path / "new" / file).read_bytes()
    assert json.loads((tmp_path / "old" / "labels.json").read_text()) == {"lm_head": rows}


@pytest.mark.parametrize("place", ["folder", "cache"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_the_bases_config_tells_where_the_adapter_does_not(tmp_path, monkeypatch, place, task):
    base = "tiny/llava" if place == "cache" else tmp_path / "base"
    settings = ARCHITECTURES["llava"][1]
    first, second = (adapter(llava, tmp_path / f"new{seed}", seed, base, **settings) for seed in (1, 2))
    told = {"task_type": task, "auto_mapping": None}
    first = older(first, tmp_path / "first", [], **told)
    old = older(second, tmp_path / "old", ARCHITECTURES["llava"][2], **told)
    with pytest.raises(
        InputError, match=r"calls a layer model\.l.*calls a|calls a layer .* adapter .*old language_model"
    ):
        merge_adapters([first, old], tmp_path / "out", method="average")
    if place == "folder":
        llava().config.save_pretrained(base)
    else:
        snapshot = tmp_path / "hub" / "models--tiny--llava" / "snapshots" / "abc"
        llava().config.save_pretrained(snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = json.loads(
        next(tmp_path.glob("**/base/config.json" if place == "folder" else "**/abc/config.json")).read_text()
    )
    for file in tmp_path.glob("**/config.json"):
        file.write_text(json.dumps(config | {"architectures": ["LlavaForConditionalGeneration"]}))
    merge_adapters([first, old], tmp_path / "out", method="average")
    merge_adapters([first, second], tmp_path / "expected", method="average")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("known", [True, False])
def test_parts_of_one_model_that_look_alike_stay_apart(tmp_path, known):
    for make, places in ((t5, ("encoder", "decoder")), (llava, ("vision_tower", "language_model"))):
        parts = [
            adapter(make, tmp_path / f"{place}", seed, target_modules=rf".*{place}.*(q|v|q_proj|v_proj)")
            for seed, place in enumerate(places)
        ]
        if not known:
            parts = [older(part, tmp_path / f"{part.name}-", [], auto_mapping=None, task_type="X") for part in parts]
        report = merge_adapters(parts, tmp_path / f"out{places[0]}", method="task_arithmetic", weights=[1, 1])
        assert_same(dense(tmp_path / f"out{places[0]}"), dense(parts[0]) | dense(parts[1]))
        assert report.notes == [
            "no module is adapted by two of the adapters; right if each was trained on other layers"
        ]


@pytest.mark.parametrize("known", [True, False])
def test_adapters_of_other_layers_of_one_list_stay_exact(tmp_path, known):
    parts = [adapter(llama, tmp_path / name, 1, target_modules=[name]) for name in ("q_proj", "v_proj")]
    if not known:
        parts = [older(part, tmp_path / f"{part.name}-", [], auto_mapping=None) for part in parts]
    merge_adapters(parts, tmp_path / "out", method="task_arithmetic", weights=[1, 1])
    assert_same(dense(tmp_path / "out"), dense(parts[0]) | dense(parts[1]))


FOREIGN = {
    "moved": ([("model.layers", "model.language_model.layers")], {}),
    "without its root": ([("model.layers", "layers")], {}),
    "under another root": ([("model.layers", "transformer.layers")], {}),
    "in another list": ([("model.layers", "transformer.h")], {}),
    "in another order": ([("model.layers", "language_model.model.layers")], {}),
}


@pytest.mark.parametrize(("changes", "settings"), FOREIGN.values(), ids=FOREIGN)
def test_two_names_of_what_may_be_one_layer_are_refused_where_nothing_tells(tmp_path, changes, settings):
    first = write_folder(tmp_path / "first", {"model.layers.0.q": (6, 8), "model.layers.1.q": (6, 8)})
    other = older(first, tmp_path / "other", [(f".{old}", f".{new}") for old, new in changes], target_modules=["q"])
    place = changes[0][1]
    message = (
        rf"first calls a layer model\.layers\.\d\.q, adapter .*other {place}\.\d\.q: the same layer under two names"
    )
    with pytest.raises(InputError, match=message + r".*\(hf download tiny/base config\.json"):
        merge_adapters([first, other], tmp_path / "out", method="average")
    assert not (tmp_path / "out").exists()
    assert [text for text in relate(first, other)["warnings"] if "under two names" in text]


def test_names_that_the_class_does_not_have_are_refused_with_both(tmp_path):
    first, second = (adapter(bert, tmp_path / f"{seed}", seed, target_modules=["query"]) for seed in (1, 2))
    other = older(second, tmp_path / "other", [("bert.encoder.layer", "bert.stack.layer")])
    message = "calls a layer bert.encoder.layer.0.attention.self.query, adapter .*other bert.stack.layer.0.attention"
    with pytest.raises(
        InputError, match=message + ".*BertForSequenceClassification of the installed .* has no bert.stack"
    ):
        merge_adapters([first, other], tmp_path / "out", method="average")


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=50, **sizes, **TEXT))


def on_base(tmp_path, make, name, seed, changes=(), told=True, **settings):
    """An adapter of a base whose config.json is on disk; `told`: its auto_mapping names the class."""
    base = tmp_path / f"base-{make.__name__}"
    if not base.exists():
        built(make).save_pretrained(base)
    folder = adapter(make, tmp_path / f"{name}-new", seed, base, **settings)
    task = {"llama": "CAUSAL_LM", "mixtral": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}[make.__name__]
    return older(folder, tmp_path / name, changes, **({} if told else {"auto_mapping": None, "task_type": task}))


HALF = [("model.model.layers.1", "model.model.language_model.layers.1")]


@pytest.mark.parametrize("told", [True, False])
def test_an_adapter_that_is_half_renamed_merges_under_one_name(tmp_path, told):
    first, half = (
        on_base(tmp_path, llama, name, seed, changes, told, target_modules=["q_proj"])
        for seed, (name, changes) in enumerate({"first": (), "half": HALF}.items())
    )
    assert set(load_file(half / WEIGHTS)) != set(load_file(first / WEIGHTS))
    for name, pair in {"new": (first, tmp_path / "half-new"), "mixed": (first, half)}.items():
        merge_adapters(pair, tmp_path / name, method="average")
    merge_adapters((half, first), tmp_path / "turned", method="average")
    assert (tmp_path / "mixed" / WEIGHTS).read_bytes() == (tmp_path / "new" / WEIGHTS).read_bytes()
    assert_same(dense(tmp_path / "turned"), dense(tmp_path / "new"), 1e-6)


def test_an_adapter_that_is_half_renamed_is_refused_where_nothing_tells(tmp_path):
    first = write_folder(tmp_path / "first", {"model.layers.0.q": (6, 8), "model.layers.1.q": (6, 8)})
    half = {"model.layers.0.q": (6, 8), "model.language_model.layers.1.q": (6, 8)}
    other = write_folder(tmp_path / "other", half, seed=1)
    message = r"first calls a layer model\.layers\.1\.q, adapter .*other model\.language_model\.layers\.1\.q"
    with pytest.raises(InputError, match=message):
        merge_adapters([first, other], tmp_path / "out", method="average")


@pytest.mark.parametrize("old", [False, True], ids=["today's names", "older names"])
@pytest.mark.parametrize("headless", [True, False], ids=["base without a head", "adapter without a head"])
def test_the_head_of_the_checkpoint_says_nothing_of_the_adapters(tmp_path, headless, old):
    """A base saved without a head (ViTModel) is trained with one, and the other way round; PEFT names no task."""
    whole = vit()
    plain = whole.vit
    (plain if headless else whole).save_pretrained(tmp_path / "base")
    folder = adapter(
        lambda: whole if headless else plain, tmp_path / "a", 0, tmp_path / "base", target_modules=["q_proj"]
    )
    edited(folder, auto_mapping=None, task_type=None)
    names = sorted(load_file(folder / WEIGHTS))
    assert any(name.startswith("base_model.model.vit.") for name in names) == headless
    if old:
        changes = [("layers", "encoder.layer"), ("n.q_proj", "n.attention.query")]
        folder = older(folder, tmp_path / "old", changes, target_modules=["query"])
    merge_adapters(folder, tmp_path / "merged")
    assert sorted(load_file(tmp_path / "merged" / WEIGHTS)) == names


def test_one_layer_under_both_names_in_one_adapter_is_refused(tmp_path):
    first, second = (on_base(tmp_path, llama, name, 1, target_modules=["q_proj"]) for name in ("first", "second"))
    tensors = load_file(second / WEIGHTS)
    twice = {name.replace(*HALF[0]): value.clone() for name, value in tensors.items()}
    save_file(tensors | twice, second / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"has no .*model\.language_model\.layers\.1\.self_attn\.q_proj"):
        merge_adapters([first, second], tmp_path / "out", method="average")


STRANGE = {
    "a layer too many": ("layers.1", "layers.7", r"layers\.7\.self_attn\.q_proj", r"layers\.[01]\.self_attn\.q_proj"),
    "a wrapper": (
        *("layers.1.self_attn", "layers.1.self_attn._flat_param"),
        *(r"layers\.1\.self_attn\._flat_param\.q_proj", r"layers\.1\.self_attn\.q_proj"),
    ),
    "like none": ("model.layers.1.self_attn", "xyz", r"xyz\.q_proj", None),
}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("new", "old", "name", "near"), STRANGE.values(), ids=STRANGE)
def test_a_module_that_the_model_does_not_have_is_refused(tmp_path, told, new, old, name, near):
    first = on_base(tmp_path, llama, "first", 1, (), told, target_modules=["q_proj"])
    other = on_base(tmp_path, llama, "other", 2, [(new, old)], told, target_modules=["q_proj"])
    nearest = rf" \(nearest: model\.{near}\)" if near else ""
    message = rf"other: LlamaForCausalLM of .*base-llama/config.json, has no module \S*{name}{nearest}; load .* save it"
    for pair in ((first, other), (other, first)):
        with pytest.raises(InputError, match=message):
            merge_adapters(pair, tmp_path / "out", method="average")
    assert not (tmp_path / "out").exists()
    assert [text for text in relate(first, other)["warnings"] if "has no module" in text]


@pytest.mark.parametrize("told", [True, False])
def test_modules_of_the_model_stay_valid(tmp_path, told):
    targets = {
        "llama": (llama, ["q_proj"], ["v_proj", "lm_head", "embed_tokens"]),
        "t5": (t5, r".*encoder.*(q|v)", r".*decoder.*(q|v)|shared"),
        "bert": (bert, ["query"], ["value"]),
    }
    for name, (make, *pair) in targets.items():
        saved = {"modules_to_save": ["classifier"]} if make is bert else {}
        parts = [
            on_base(tmp_path, make, f"{name}{i}", i, (), told, target_modules=target, **saved)
            for i, target in enumerate(pair)
        ]
        rows = {"rows_from": parts[0]} if saved else {}
        merge_adapters(parts, tmp_path / f"out-{name}", method="task_arithmetic", weights=[1, 1], **rows)
        assert_same(dense(tmp_path / f"out-{name}"), dense(parts[0]) | dense(parts[1]))


@pytest.mark.parametrize("told", [True, False])
def test_fused_experts_of_the_model_stay_valid(tmp_path, told):
    fused = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    parts = [
        on_base(tmp_path, mixtral, name, i, (), told, target_modules=[name], **fused)
        for i, name in enumerate(("q_proj", "v_proj"))
    ]
    merge_adapters(parts, tmp_path / "out", method="average")
    written = {name for part in parts for name in load_file(part / WEIGHTS)}
    assert set(load_file(tmp_path / "out" / WEIGHTS)) == written


def test_a_class_that_only_the_task_names_and_that_has_no_layer_of_any_is_not_the_models(tmp_path):
    parts = [
        on_base(
            tmp_path, llama, f"{name}", 1, [("model.model.layers", "model.tower.blocks")], False, target_modules=[name]
        )
        for name in ("q_proj", "v_proj")
    ]
    merge_adapters(parts, tmp_path / "out", method="task_arithmetic", weights=[1, 1])
    assert_same(dense(tmp_path / "out"), dense(parts[0]) | dense(parts[1]))


def test_experts_of_an_older_version_are_left_to_peft(tmp_path):
    shapes = {f"model.layers.0.block_sparse_moe.experts.{i}.w1": (24, 16) for i in range(2)}
    mapping = {
        "base_model_class": "MixtralForCausalLM",
        "parent_library": "transformers.models.mixtral.modeling_mixtral",
    }
    experts = write_folder(tmp_path / "experts", shapes, seed=1, config={"auto_mapping": mapping})
    attention = {"model.layers.0.self_attn.q_proj": (16, 16)}
    other = write_folder(tmp_path / "attention", attention, seed=2, config={"auto_mapping": mapping})
    merge_adapters([experts, other], tmp_path / "out", method="task_arithmetic", weights=[1, 1])
    assert_same(dense(tmp_path / "out"), dense(experts) | dense(other))


def test_ordinary_adapters_never_ask_transformers(tmp_path, monkeypatch):
    first, second = (adapter(llama, tmp_path / f"{seed}", seed, target_modules=["q_proj"]) for seed in (1, 2))
    monkeypatch.setattr(architecture, "_build", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    merge_adapters([first, second], tmp_path / "out", method="average")


def test_no_random_number_is_drawn_for_it(tmp_path):
    first, second = (adapter(vit, tmp_path / f"{seed}", seed, target_modules=["q_proj"]) for seed in (1, 2))
    architecture._build.cache_clear()
    torch.manual_seed(3)
    merge_adapters([first, second], tmp_path / "out", method="average")
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


CONFIGS = ['{"model_type": "llava"', "[]", '{"model_type": "no such model"}', '{"architectures": 3}', "{}"]


@pytest.mark.parametrize("content", CONFIGS)
def test_a_base_that_cannot_be_built_is_as_if_unknown(tmp_path, content):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(content)
    settings = {"config": {"base_model_name_or_path": str(base)}}
    first = write_folder(tmp_path / "first", {"model.layers.0.q": (6, 8)}, **settings)
    twin = write_folder(tmp_path / "twin", {"model.layers.0.q": (6, 8)}, seed=1, **settings)
    merge_adapters([first, twin], tmp_path / "out", method="average")
    other = write_folder(tmp_path / "other", {"layers.0.q": (6, 8)}, **settings)
    with pytest.raises(
        InputError, match="installed transformers cannot build .*base to tell; load both into one class"
    ):
        merge_adapters([first, other], tmp_path / "none", method="average")


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("llava", "LlavaForConditionalGeneration"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
        ("siglip", "SiglipVisionModel"),
        ("swin", "SwinForImageClassification"),
    ],
)
def test_every_former_name_of_a_class_comes_back(library, name):
    """Against transformers' own table read backwards, for every Linear of the class."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    source = architecture.ModelSource(f"transformers.models.{library}.modeling_{library}", name, None, None)
    (model,) = architecture.model_names(source)
    table = [entry.reverse_transform() for entry in get_model_conversion_mapping(model.model, add_legacy=False)]
    backwards = [entry for entry in table[::-1] if isinstance(entry, WeightRenaming)]
    linears = [n for n, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    former = {
        rename_source_key(f"{n}.weight", backwards, [], reverse=True)[0].removesuffix(".weight"): n for n in linears
    }
    changed = {old: new for old, new in former.items() if old != new}
    assert len(changed) > len(linears) / 2
    assert model.renamed(changed) == changed
    assert model.renamed(linears) == {}
    assert architecture.may_be_renamed(source)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification", "GPT2LMHeadModel", "T5Model"])
def test_classes_that_never_changed_cost_no_import(name):
    library = f"transformers.models.{name[:4].lower()}.modeling"
    assert not architecture.may_be_renamed(architecture.ModelSource(library, name, None, None))
