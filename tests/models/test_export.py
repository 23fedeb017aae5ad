"""An exported checkpoint is the model that base and adapter are, without PEFT."""

import json
import shutil

import pytest
import torch
from helpers.models import save_vit, tiny_folder
from helpers.peft_adapters import load, save, train, wrap
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from pm_hf.cli import main
from pm_hf.errors import InputError
from pm_hf.models import export as module
from pm_hf.models.export import export_model

IDS = torch.arange(6, 18)[None]


def adapter(folder, auto, out, **lora):
    return save(train(wrap(auto.from_pretrained(folder), LoraConfig(r=2, lora_alpha=6, **lora))), out)


def logits(model, auto):
    with torch.no_grad():
        more = {"decoder_input_ids": IDS[:, :3]} if auto is AutoModelForSeq2SeqLM else {}
        return model.eval()(input_ids=IDS, **more).logits


LM = AutoModelForCausalLM
KINDS = {
    "llama": ("llama", LM, {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    "rslora, ranks": (
        "llama",
        LM,
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 1}, "task_type": "CAUSAL_LM"},
    ),
    "class named by auto_mapping": ("llama", LM, {"target_modules": ["v_proj"]}),
    "transposed weights": ("gpt2", LM, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "embedding of its own": ("llama", LM, {"target_modules": ["embed_tokens", "q_proj"]}),
    "table tied to the output": ("qwen2", LM, {"target_modules": ["embed_tokens", "q_proj"]}),
    "output tied to the table": ("qwen2", LM, {"target_modules": ["lm_head"]}),
    "saved table, tied": ("qwen2", LM, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved norm": ("llama", LM, {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}),
    "encoder and decoder": ("t5", AutoModelForSeq2SeqLM, {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied weights
def test_model_is_that_of_base_and_adapter(kind, tmp_path):
    name, auto, lora = KINDS[kind]
    folder = tiny_folder(name, tmp_path / "base")
    out = adapter(folder, auto, tmp_path / "adapter", **lora)
    report = export_model(out, tmp_path / "whole", base=str(folder))
    expected = logits(load(auto.from_pretrained(folder), out, ".*"), auto)
    model, info = auto.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values()), info
    assert not isinstance(model, PeftModel)
    assert type(model).__name__ == report.model_class
    assert torch.allclose(logits(model, auto), expected, atol=2e-5)
    assert not torch.allclose(logits(auto.from_pretrained(folder), auto), expected, atol=1e-2)
    assert bool(report.untied) == ("tied" in kind)
    assert max(report.rounding.values()) == 0  # float32 as the base
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(base, adapter) of a language model."""
    place = tmp_path_factory.mktemp("llama")
    folder = tiny_folder("llama", place / "base")
    return folder, adapter(folder, LM, place / "adapter", target_modules="all-linear", task_type="CAUSAL_LM")


def test_a_run_of_a_classifier_is_exported_with_its_labels(finished_run, tmp_path, capsys):
    run = finished_run(24, method="best")
    assert main(["export", str(run), "--output", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    assert "load it with BertForSequenceClassification.from_pretrained" in printed
    labels = json.loads((run / "merged" / "labels.json").read_text())["classifier"]
    settings = json.loads((run / "merged" / "adapter_config.json").read_text())
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.id2label == dict(enumerate(labels))
    names = {"id2label": dict(enumerate(labels)), "ignore_mismatched_sizes": True}
    start = AutoModelForSequenceClassification.from_pretrained(settings["base_model_name_or_path"], **names)
    expected = load(start, run / "merged", ".*")
    assert torch.allclose(logits(model, None), logits(expected, None), atol=1e-5)
    assert torch.equal(model.classifier.weight, expected.base_model.model.classifier.modules_to_save["default"].weight)


def test_convolutions_and_pictures(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    ResNetForImageClassification(ResNetConfig(**sizes)).eval().save_pretrained(tmp_path / "resnet")
    save_vit(tmp_path / "vit")
    picture = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    for name, targets in (("resnet", ["convolution"]), ("vit", ["k_proj"])):
        folder, auto = tmp_path / name, AutoModelForImageClassification
        head = {"modules_to_save": ["classifier"]}
        out = adapter(folder, auto, tmp_path / f"{name}-adapter", target_modules=targets, **head)
        export_model(out, tmp_path / f"{name}-whole", base=str(folder))
        with torch.no_grad():
            expected = load(auto.from_pretrained(folder), out, ".*")(pixel_values=picture).logits
            found = auto.from_pretrained(tmp_path / f"{name}-whole").eval()(pixel_values=picture).logits
        assert torch.allclose(found, expected, atol=1e-5), name
    assert (tmp_path / "vit-whole" / "preprocessor_config.json").is_file()


def test_new_tokens_come_with_their_rows_and_their_tokenizer(tmp_path):
    folder = tiny_folder("llama", tmp_path / "base")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LM.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    torch.manual_seed(3)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    out = save(
        train(wrap(model, LoraConfig(r=2, target_modules=["q_proj"]))), tmp_path / "adapter", save_embedding_layers=True
    )
    tokenizer.save_pretrained(out)
    export_model(out, tmp_path / "whole", base=str(folder))
    whole = LM.from_pretrained(tmp_path / "whole")
    assert whole.config.vocab_size == len(tokenizer) == len(whole.get_output_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").convert_tokens_to_ids("<new>") == len(tokenizer) - 1
    assert torch.equal(whole.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_sum_is_rounded_once_and_the_rounding_is_told(llama, tmp_path):
    folder, out = llama
    report = export_model(out, tmp_path / "whole", base=str(folder), dtype="bf16")
    stored, weights = load_file(tmp_path / "whole" / "model.safetensors"), load_file(folder / "model.safetensors")
    merged = load(LM.from_pretrained(folder), out).merge_and_unload().state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, exact in merged.items():
        if name in stored:
            gap = (stored[name].float() - exact).norm() / exact.norm()
            assert gap < 2**-8
    assert len(report.rounding) == 14
    name, told = max(report.rounding.items(), key=lambda item: item[1])
    update = merged[name] - weights[name]
    assert (stored[name].float() - merged[name]).norm() / update.norm() == pytest.approx(told, rel=1e-3)
    assert 1e-4 < told < 0.05
    assert LM.from_pretrained(tmp_path / "whole").dtype == torch.bfloat16


def test_experts_that_are_fused_when_loaded_are_written_as_the_base_stores_them(tmp_path):
    from helpers.peft_adapters import mixtral

    torch.manual_seed(0)
    mixtral().save_pretrained(tmp_path / "base")
    out = adapter(tmp_path / "base", LM, tmp_path / "adapter", target_modules=["q_proj"])
    export_model(out, tmp_path / "whole", base=str(tmp_path / "base"))
    base, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "whole"))
    assert set(base) == set(whole)
    assert [name for name in base if not torch.equal(base[name], whole[name])] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    stacked = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    out = adapter(tmp_path / "base", LM, tmp_path / "experts", **stacked)
    with pytest.raises(InputError, match="a parameter of stacked experts; merge it in memory"):
        export_model(out, tmp_path / "never", base=str(tmp_path / "base"))
    assert not (tmp_path / "never").exists()


WIDE = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 32}  # 42 times 4 MB


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from pm_hf.environment import anonymous_mb, release_memory

    if anonymous_mb() is None:
        pytest.skip("needs /proc with RssAnon")
    model = LlamaForCausalLM(LlamaConfig(**WIDE, num_attention_heads=8))
    model.save_pretrained(tmp_path / "base")
    out = adapter(tmp_path / "base", LM, tmp_path / "adapter", target_modules="all-linear")
    del model
    release_memory()
    report = export_model(out, tmp_path / "whole", base=str(tmp_path / "base"), shard_bytes=16 * 2**20)
    whole = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors")) / 2**20
    assert report.shards == len(list((tmp_path / "whole").glob("model-*.safetensors"))) >= 7
    assert report.peak_memory_mb - report.start_memory_mb < 5 * 16 < whole / 2
    assert LM.from_pretrained(tmp_path / "whole").config.num_hidden_layers == 6


def test_failure_while_writing_leaves_what_was_there(llama, tmp_path, monkeypatch):
    folder, out = llama
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "old").write_text("kept")
    with pytest.raises(InputError, match="exists; choose another folder"):
        export_model(out, tmp_path / "whole", base=str(folder))
    monkeypatch.setattr(
        module, "save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        export_model(out, tmp_path / "whole", base=str(folder), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert (tmp_path / "whole" / "old").read_text() == "kept"


REFUSED = {
    "GGUF": (
        lambda b: (b / "model.safetensors").rename(b / "model.gguf"),
        r"has no model.safetensors, found \['model.gguf'\]; give the model that the GGUF file was made from",
    ),
    "pickle": (lambda b: (b / "model.safetensors").rename(b / "pytorch_model.bin"), "save it as safetensors"),
    "quantised": (lambda b: change(b, quantization_config={"quant_method": "fp8"}), "has quantised weights"),
    "code": (lambda b: change(b, auto_map={"AutoConfig": "own.Config"}), "has Python code of its own"),
    "cut": (lambda b: (b / "model.safetensors").write_bytes(b"cut"), "is not a whole safetensors file"),
    "another width": (lambda b: change(b, intermediate_size=40), r"has shape \(48, 32\), expected \(40, 32\)"),
    "fewer layers": (lambda b: change(b, num_hidden_layers=1), "adapts model.layers.1"),
}


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("case", REFUSED)
def test_base_that_does_not_fit_is_refused_before_anything_is_written(case, llama, tmp_path):
    spoil, message = REFUSED[case]
    folder = tmp_path / "base"
    shutil.copytree(llama[0], folder)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        export_model(llama[1], tmp_path / "whole", base=str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_wrong_dtype_and_run_without_a_merge_are_one_line(finished_run, llama, tmp_path, capsys):
    assert main(["export", str(llama[1]), "--output", str(tmp_path / "a"), "--dtype", "int4"]) == 2
    assert "expected one of float32, bfloat16, float16, fp32, bf16, fp16, found int4" in capsys.readouterr().err
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((finished_run(24, method="best") / "config.yaml").read_text())
    assert main(["export", str(folder), "--output", str(tmp_path / "a")]) == 2
    assert "merged is not a folder" in capsys.readouterr().err
