"""lora.modules_to_save: norms and embeddings that are trained whole, and merged along the adapter's own line."""

import pytest
import torch
from helpers import interrupt_second_call, refusal
from helpers.models import OLD_NAME, tiny_folder
from helpers.streams import Seen, language_settings, loaded, same_tensors, settings, steps, tensors, write_base
from torch import nn
from transformers import AutoModelForCausalLM, ResNetConfig, ResNetForImageClassification

import pm_hf.runs.learner
from pm_hf.adapters.folder import open_adapter
from pm_hf.config.loading import load_config
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.models.export import export_model
from pm_hf.models.task_model import build_task_model
from pm_hf.runs.learner import learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
WHOLE = ["input_layernorm", "model.norm", "embed_tokens"]
NORMS = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
NAMES = [*NORMS, "model.norm.weight", "model.embed_tokens.weight"]
QUICK = {"training__num_train_epochs": 2, "training__learning_rate": 1e-2, "lora__modules_to_save": WHOLE}
ALPHA = 0.3


@pytest.fixture(scope="module", params=["full", pytest.param("nf4", marks=pytest.mark.slow)])
def run(request, language_data, tmp_path_factory):
    """(settings, folder, models as each task was trained) of two tasks merged with one coefficient."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    changes = {"method": "average", "merge__coefficient": ALPHA, "perturbation__scale": 0.3, **QUICK}
    changes |= {"model__quantization": None if request.param == "full" else request.param}
    config = language_settings(language_data, folder, **changes)
    begun = []
    with pytest.MonkeyPatch.context() as patch:

        class Kept(Seen):
            def _products(self, model):
                begun.append({name: value.clone() for name, value in whole_values(model).items()})
                return super()._products(model)

        seen = Kept(patch)
        learn(config)
    return config, folder, begun, seen


def whole_values(model):
    """The trained values of the modules that are held whole, by their names in the base."""
    named = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    inner = ".modules_to_save.task"
    return {name.replace(inner, "").removeprefix("base_model.model."): v for name, v in named.items() if inner in name}


def base_values(config):
    base = AutoModelForCausalLM.from_pretrained(config["model"]["base"])
    return {name: value.detach() for name, value in base.named_parameters() if name in NAMES}


def test_each_task_starts_at_the_merge_and_trains_them(run):
    config, folder, begun, _ = run
    assert begun[0].keys() == set(NAMES)
    for name, value in base_values(config).items():
        assert torch.equal(begun[0][name], value)
    first = tensors(folder / "task-00-first" / "merged")
    for name in NAMES:
        assert torch.equal(begun[2][name], first[name])
        for before, after in ((0, 1), (2, 3)):
            assert not torch.equal(begun[before][name], begun[after][name])
        for task, after in (("task-00-first", 1), ("task-01-second", 3)):
            assert torch.equal(tensors(folder / task / "adapter")[name], begun[after][name])


def test_they_merge_by_the_coefficient_along_the_same_line_as_the_product(run):
    _, folder, begun, _ = run
    assert [step["coefficient"]["used"] for step in steps(folder)] == [1.0, ALPHA]
    first, merged = (tensors(folder / task / "merged") for task in ("task-00-first", "task-01-second"))
    for name in NAMES:
        assert torch.equal(first[name], begun[1][name])  # the first task is taken as it is
        torch.testing.assert_close(merged[name], begun[2][name] + ALPHA * (begun[3][name] - begun[2][name]))
    before, after, table = begun[2][NAMES[3]], begun[3][NAMES[3]], merged[NAMES[3]]
    untrained = (before == after).all(1)
    assert 0 < untrained.sum() < len(untrained)  # rows of words that the task does not have
    torch.testing.assert_close(table[untrained], before[untrained], rtol=1e-6, atol=0)


@torch.no_grad()
def test_plain_peft_and_the_export_have_them(run, tmp_path):
    config, folder, _, seen = run
    merged, ids = folder / "merged", torch.arange(6, 20)[None]
    adapter = open_adapter(merged)
    assert set(adapter.saved) == set(NAMES)
    assert sorted(adapter.config["modules_to_save"]) == sorted(name.removesuffix(".weight") for name in NAMES)
    by_hand = AutoModelForCausalLM.from_pretrained(config["model"]["base"])
    for name in NAMES:
        by_hand.get_parameter(name).copy_(tensors(merged)[name])
    for module, product in adapter.products().items():
        by_hand.get_submodule(module).weight += product.dense()
    expected = by_hand.eval()(ids).logits
    torch.testing.assert_close(loaded(config, merged)(ids).logits, expected, rtol=1e-4, atol=1e-5)
    export_model(merged, tmp_path / "whole")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_trains_a_norm_beside_its_head_and_goes_on_from_it(tiny_base, stream_data, tmp_path):
    name = "bert.embeddings.LayerNorm.weight"
    changes = {"training__num_train_epochs": 1, "lora__modules_to_save": ["embeddings.LayerNorm"]}
    learn(settings(tiny_base, stream_data(12), tmp_path / "run", "sequential", groups=1, **changes))
    first = tensors(tmp_path / "run" / "merged")
    assert {"classifier.weight", name} <= first.keys()
    learn(settings(tiny_base, stream_data(12), tmp_path / "run", "sequential", groups=2, **changes))
    second = sorted((tmp_path / "run").glob("task-*"))[1]
    assert torch.equal(tensors(tmp_path / "run" / "merged")[name], tensors(second / "adapter")[name])  # α = 1
    assert not torch.equal(tensors(second / "adapter")[name], first[name])


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("pm", {}, "no curvature is measured of them, so neither a computed coefficient nor a penalty knows"),
        ("ewc", {}, "no curvature is measured of them"),
        ("best", {}, "set merge.coefficient to average or a number"),
        ("magmax", {}, "merge.method magmax with train_from last merges what adapters add to the base"),
        ("slao", {}, "merge.method slao with train_from"),
        ("average", {"merge__train_from": "last"}, "merge.method average with train_from last"),
        ("base_kl", {}, "strategy.base_kl_weight compares with the base, and they stay in it"),
        ("sfa", {}, "strategy.averaging_period averages the adapter and not them"),
        ("frozen", {}, "trains: false and head.strict train no backbone"),
        ("average", {"model__dtype": "bfloat16"}, "they train in float32, and model.dtype is bfloat16"),
        ("average", {"lora__modules_to_save": []}, "names no module; leave it out"),
        (
            "average",
            {"head__kind": "lda", "merge__coefficient": "search"},
            "merge.coefficient: search scales the adapter and leaves them as they are",
        ),
        ("average", {"head__kind": "lda", "head__gate": True}, "head.gate scales the adapter and leaves them"),
    ],
)
def test_what_they_cannot_be_merged_with_is_refused(tmp_path, method, changes, message):
    given = {"lora__modules_to_save": ["LayerNorm"]} | changes
    told = refusal(load_config, settings(tmp_path / "base", tmp_path, tmp_path / "run", method, **given))
    assert f"lora.modules_to_save: {message}" in told or message in told
    assert "lora.modules_to_save: " in told


@pytest.mark.parametrize("method", ["average", "sequential", "coma", "olora", "replay", "joint", "individual"])
def test_methods_that_move_along_a_line_take_them(tmp_path, method):
    given = {"lora__modules_to_save": ["LayerNorm"]}
    config = load_config(settings(tmp_path / "base", tmp_path, tmp_path / "run", method, **given))
    assert config.lora.modules_to_save == ["LayerNorm"]


def test_a_module_that_the_start_adapts_is_not_trained_whole(run, language_data, tmp_path):
    _, folder, *_ = run
    changes = {"method": "average", "start_from": str(folder / "merged"), "lora__target_modules": ["up_proj"]}
    changes |= {"lora__modules_to_save": ["q_proj"]}
    message = refusal(learn, language_settings(language_data, tmp_path / "run", **changes))
    assert (
        f"lora.modules_to_save: adapter {folder / 'merged'} adapts model.layers.0.self_attn.q_proj by LoRA" in message
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_task_that_is_begun_again_goes_on_with_them(language_data, tmp_path, monkeypatch):
    changes = {"method": "sequential", **QUICK, "lora__modules_to_save": ["model.norm"], "training__max_steps": 2}
    changes |= {"training__save_strategy": "steps", "training__save_steps": 1}
    whole, broken = (language_settings(language_data, tmp_path / name, **changes) for name in ("whole", "broken"))
    learn(whole)
    calls = interrupt_second_call(monkeypatch, pm_hf.runs.learner, "merge_adapters")
    with pytest.raises(KeyboardInterrupt):
        learn(broken)
    learn(broken)  # from the checkpoint of the last step
    assert len(calls) == 3
    assert same_tensors(tmp_path / "broken" / "merged", tmp_path / "whole" / "merged")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "bert")
    for name in ("llama", "qwen2"):
        tiny_folder(name, folder / name)
    shape = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**shape)).save_pretrained(folder / "resnet")
    return folder


KINDS = {"bert": "text-classification", "resnet": "image-classification"}  # others are causal-lm
MLP = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("name", "whole", "targets", "message"),
    [
        ("llama", ["layernorm"], ["q_proj"], "layernorm names no module of LlamaForCausalLM; its norms and embeddings"),
        ("llama", ["q_proj", "norm"], ["q_proj"], "lora.target_modules names it too; leave it out of one of them"),
        ("llama", ["self_attn"], ["q_proj"], "names model.layers.0.self_attn.q_proj of it too"),
        ("llama", ["mlp"], r".*\.(q|up)_proj", f"{MLP} is to be trained whole, and lora.target_modules names {MLP}.up"),
        ("llama", ["mlp", "up_proj"], ["q_proj"], f"{MLP}.up_proj is a part of {MLP}; name one of the two"),
        ("llama", ["act_fn"], ["q_proj"], "act_fn has no weights of its own"),
        ("qwen2", ["embed_tokens"], ["q_proj"], "embed_tokens is tied to lm_head.weight: PEFT would train a copy"),
        ("bert", ["classifier"], ["key"], "classifier is of the class head, whose rows the run trains and merges by"),
        ("resnet", ["normalization"], "all-linear", "normalization keeps num_batches_tracked besides its weights"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_refused(bases, name, whole, targets, message):
    lora = LoraSettings(r=2, target_modules=targets, modules_to_save=whole)
    kind = KINDS.get(name, "causal-lm")
    labels = ("a", "b") if name in KINDS else ()
    told = refusal(
        build_task_model, ModelSettings(str(bases / name)), lora, labels, None, 0, 0, kind=kind, skeleton=True
    )
    assert told.startswith("lora.modules_to_save: ")
    assert message in told


def test_of_a_quantized_base_only_whole_weights_train(bases):
    lora = LoraSettings(r=2, target_modules=["q_proj"], modules_to_save=["v_proj"])
    settings = ModelSettings(str(bases / "llama"), quantization="nf4")
    message = refusal(build_task_model, settings, lora, (), None, 0, 0, kind="causal-lm")
    assert "v_proj is quantized on this base, and only whole weights can be trained; name norms or" in message


def test_exactly_these_train_besides_the_adapter(bases):
    lora = LoraSettings(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    model = build_task_model(ModelSettings(str(bases / "llama")), lora, (), None, 0, 0, kind="causal-lm").model
    trained = {name for name, value in model.named_parameters() if value.requires_grad and ".lora_" not in name}
    prefix, inner = "base_model.model.", ".modules_to_save.task"
    assert trained == {f"{prefix}{name.removesuffix('.weight')}{inner}.weight" for name in NORMS}
    assert all(isinstance(value, nn.Parameter) for value in model.parameters())
