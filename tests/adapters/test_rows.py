"""What a saved module's rows are, read from names and shapes."""

import pytest
import torch
from helpers.adapter_folders import write_folder

from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.rows import feeds_another, row_kind, vocabulary_rows

H, CLASSES, WORDS = 16, 3, 40
HEAD = {"weight": (CLASSES, H), "bias": (CLASSES,)}


def opened(path, modules, **more):
    """An adapter that saves {module: {tensor: shape}}."""
    saved = {f"{module}.{name}": torch.zeros(shape) for module, own in modules.items() for name, shape in own.items()}
    return open_adapter(write_folder(path, saved=saved, config={"modules_to_save": list(modules)}, **more))


def layer(out, columns):
    return {"weight": (out, columns), "bias": (out,)}


@pytest.mark.parametrize(
    ("module", "tensors", "kind"),
    [
        *((name, HEAD, "classes") for name in ("classifier", "score", "head", "fc", "my_head.proj", "classifier.3")),
        *((name, HEAD, "classes") for name in ("heads.0.out", "class_embed", "decode_head.conv", "output", "decoder")),
        ("decode_head.classifier", {"weight": (CLASSES, H, 1, 1)}, "classes"),
        ("head.linear", {"bias": (CLASSES,)}, "classes"),
        *((name, {"weight": (WORDS, H)}, "tokens") for name in ("model.embed_tokens", "lm_head", "transformer.wte")),
        *((name, {"weight": (WORDS, H)}, "tokens") for name in ("shared", "bert.embeddings.word_embeddings")),
        *((name, layer(WORDS, H), "tokens") for name in ("cls.predictions.decoder", "lm_head.decoder")),
        *((name, {"weight": (9, H)}, "units") for name in ("transformer.wpe", "embeddings.position_embeddings")),
        *((name, {"weight": (H,), "bias": (H,)}, "units") for name in ("model.norm", "ln_f", "odd")),
        ("lm_head.dense", layer(H, H), "units"),
        ("layers.1.mlp.fc2", layer(H, H), "units"),  # LoRA adapts layers.0 and layers.1
        ("layers.1.exit", HEAD, "classes"),
        ("predictions", HEAD, "classes"),
        ("cls.predictions", {"bias": (WORDS,)}, "tokens"),
        ("blocks.1.mlp.fc2", layer(H, H), "classes"),
        ("qa_outputs", layer(2, H), "units"),
        *((name, layer(H, H), "hidden") for name in ("pooler.dense", "pre_classifier", "bert.pooler.dense")),
    ],
)
def test_a_module_alone(tmp_path, module, tensors, kind):
    assert row_kind(module, [opened(tmp_path / "a", {module: tensors})]) == kind


def test_an_odd_name_with_as_many_rows_as_the_vocabulary_is_a_table_of_tokens(tmp_path):
    adapter = opened(tmp_path / "a", {"tok_embeddings": {"weight": (WORDS, H)}, "output": {"weight": (WORDS, H)}})
    assert row_kind("output", [adapter]) == "tokens"
    assert vocabulary_rows(adapter) == WORDS


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_the_task_type_decides_nothing(tmp_path, task_type):
    saved = {f"fc.{name}": torch.zeros(shape) for name, shape in HEAD.items()}
    config = {"modules_to_save": ["fc"], "task_type": task_type}
    assert row_kind("fc", [open_adapter(write_folder(tmp_path / "a", saved=saved, config=config))]) == "classes"


def saved_under(path, roots, modules, labels=None):
    saved = {f"{module}.weight": torch.zeros(shape) for module, shape in modules.items()}
    return open_adapter(write_folder(path, saved=saved, config={"modules_to_save": roots}, labels=labels))


@pytest.mark.parametrize(
    ("roots", "modules", "hidden"),
    [
        (["classifier"], {"classifier.dense": (H, H), "classifier.out_proj": (CLASSES, H)}, {"classifier.dense"}),
        (["head"], {"head.0": (8, H), "head.2": (4, 8), "head.4": (CLASSES, 4)}, {"head.0", "head.2"}),
        (["head"], {"head.a": (H, H), "head.b": (H, H), "head.out": (CLASSES, H)}, {"head.a", "head.b"}),
        (["head", "classifier"], {"head.dense": (H, H), "classifier": (CLASSES, H)}, {"head.dense"}),  # ModernBERT
        (["projector", "classifier"], {"projector": (8, H), "classifier": (CLASSES, 8)}, {"projector"}),  # Whisper
        (["first", "second"], {"first": (H, H), "second": (CLASSES, H)}, set()),  # H classes, or hidden? not known
        (["classifier"], {"classifier.dense": (H, H), "classifier.out_proj": (H, H)}, set()),
    ],
)
def test_layers_of_a_head_that_feed_another(tmp_path, roots, modules, hidden):
    adapter = saved_under(tmp_path / "a", roots, modules)
    assert {m for m in modules if row_kind(m, [adapter]) == "hidden"} == hidden
    assert {m for m in modules if feeds_another(adapter, m)} == hidden


def test_labels_tell_which_of_two_square_layers_is_the_head(tmp_path):
    modules = {"classifier.dense": (H, H), "classifier.out_proj": (H, H)}
    labels = {"classifier.out_proj": [f"class {i}" for i in range(H)]}
    adapter = saved_under(tmp_path / "a", ["classifier"], modules, labels)
    assert row_kind("classifier.dense", [adapter]) == "hidden"
    assert not feeds_another(adapter, "classifier.out_proj")
