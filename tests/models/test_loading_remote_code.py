"""Code that comes with a base model is run where the setting says so, and otherwise nobody is asked."""

import io
import json
import pickle
import shutil
import sys

import pytest
import torch
from helpers.streams import settings, write_yaml

from pm_hf.cli import main
from pm_hf.config.schema import ModelSettings
from pm_hf.errors import InputError
from pm_hf.models.loading import load_base, load_image_processor, load_tokenizer
from pm_hf.reports.card import loading_lines
from pm_hf.runs.learner import learn

MODELS = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({mark!r}).write_text("executed")
class EvilConfig(BertConfig):
    model_type = "evil"
class EvilModel(BertForSequenceClassification):
    config_class = EvilConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({mark!r}).write_text("executed")
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
PROCESSOR = """
from pathlib import Path
from transformers import ViTImageProcessorPil
Path({mark!r}).write_text("executed")
class EvilProcessor(ViTImageProcessorPil):
    pass
"""
REFUSED = "it comes with Python code of its own, which is not run; .* set model.trust_remote_code: true"


class Terminal(io.StringIO):
    """A terminal on which everything is answered with y."""

    def isatty(self):
        return True

    def readline(self, *_):
        raise AssertionError("asked on the terminal")


@pytest.fixture(autouse=True)
def _terminal(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", Terminal("y\n" * 100))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


def edit(path, **changes):
    """Change keys of a JSON file."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


@pytest.fixture
def evil(tiny_base, tmp_path, mark):
    """A base whose model class is its own evil.py."""
    base = shutil.copytree(tiny_base, tmp_path / "evil")
    (base / "evil.py").write_text(MODELS.format(mark=str(mark)))
    classes = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForSequenceClassification": "evil.EvilModel",
    }
    edit(base / "config.json", model_type="evil", auto_map=classes)
    return base


def test_code_of_a_base_is_refused_and_nobody_is_asked(evil, mark):
    with pytest.raises(InputError, match=REFUSED) as caught:
        load_base(ModelSettings(str(evil)), ["a", "b"], 0)
    assert str(evil) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_code_of_a_base_runs_where_it_is_trusted(evil, mark):
    model, lacking = load_base(ModelSettings(str(evil), trust_remote_code=True), ["a", "b"], 0)
    assert type(model).__name__ == "EvilModel"
    assert model.config.num_labels == 2
    assert lacking[0] == "bert.pooler" or "classifier" in lacking
    assert mark.read_text() == "executed"


def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(tiny_base, tmp_path, mark):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "evil.py").write_text(TOKENIZER.format(mark=str(mark)))
    edit(
        base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    try:
        load_tokenizer(ModelSettings(str(base)))  # what transformers has itself is taken
    except InputError as error:
        assert "model.trust_remote_code: true" in str(error)  # noqa: PT017
    assert not mark.exists()
    assert type(load_tokenizer(ModelSettings(str(base), trust_remote_code=True))).__name__ == "EvilTokenizer"
    assert mark.exists()


def test_code_of_an_image_processor_is_neither_run_nor_asked_about(tmp_path, mark):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "evil.py").write_text(PROCESSOR.format(mark=str(mark)))
    edit(
        tmp_path / "base" / "preprocessor_config.json",
        auto_map={"AutoImageProcessor": "evil.EvilProcessor"},
        image_processor_type="EvilProcessor",
    )
    with pytest.raises(InputError, match=REFUSED):
        load_image_processor(ModelSettings(str(tmp_path / "base")))
    assert not mark.exists()
    trusted = ModelSettings(str(tmp_path / "base"), trust_remote_code=True)
    assert type(load_image_processor(trusted)).__name__ == "EvilProcessor"
    assert mark.exists()


def test_command_line_refuses_code_in_one_line_and_makes_no_folder(evil, mark, stream_config, tmp_path, capsys):
    config = stream_config | {"model": {"base": str(evil)}}
    assert main(["train", "--config", str(write_yaml(tmp_path / "c.yaml", config))]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "model.trust_remote_code: true" in err
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def load_classifier(base):
    return load_base(base, ["a"], 0)


class Payload:
    """What a pickle must not do."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return exec, (f"open({self.mark!r}, 'w').write('executed')",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickle_with_a_payload_is_one_line(tiny_base, tmp_path, mark, legacy):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    weights = {"bert.pooler.dense.bias": torch.zeros(32), "x": Payload(mark)}
    torch.save(weights, base / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="its weights are a pickle that holds more than tensors") as caught:
        load_base(ModelSettings(str(base)), ["a"], 0)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("pytorch_model.bin", b""),
        ("pytorch_model.bin", b"\0" * 1000),
        ("pytorch_model.bin", pickle.dumps([1, 2])),
        ("config.json", b"[1]"),
        ("config.json", b'{"model_type": "bert", "hidden_size": "wide"}'),
        ("config.json", b'{"model_type": 3}'),
        ("config.json", b"\xff\xfe"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 5000),
        ("tokenizer_config.json", b"[]"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:12]),
)
def test_damaged_file_of_a_base_is_one_line(tiny_base, tmp_path, file, content):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    if file == "pytorch_model.bin":
        (base / "model.safetensors").unlink()
    (base / file).write_bytes(content)
    use = load_tokenizer if file.startswith("tokenizer") else load_classifier
    with pytest.raises(InputError, match=f"model.base {base} cannot be loaded: .") as caught:
        use(ModelSettings(str(base)))
    assert "\n" not in str(caught.value)


def test_the_setting_is_a_bool_and_off(tiny_base, stream_data, tmp_path):
    from pm_hf.config.loading import load_config

    config = settings(tiny_base, stream_data(8), tmp_path / "run")
    assert load_config(config).model.trust_remote_code is False
    assert load_config(config, ["model.trust_remote_code=true"]).to_dict()["model"]["trust_remote_code"] is True
    with pytest.raises(InputError, match="model.trust_remote_code: expected bool, found 'y'"):
        load_config(config, ["model.trust_remote_code=y"])


def test_a_run_on_trusted_code_says_so_and_the_default_says_nothing(evil, mark, stream_data, tmp_path):
    changes = {"method": "frozen", "groups": 1, "model": {"base": str(evil), "trust_remote_code": True}}
    report = learn(settings(evil, stream_data(8), tmp_path / "run", **changes))
    assert mark.exists()
    assert "model.trust_remote_code was true: Python code that comes with the base model may have run" in report.notes
    assert "trust_remote_code: true" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_lines_of_a_card_trust_where_the_run_did():
    for head, kind in (("classifier", "text-classification"), (None, "causal-lm")):
        trusted = loading_lines("a/b", "c/d", head, kind, trust_remote_code=True)
        assert trusted.count("trust_remote_code=True") == trusted.count("from_pretrained(") - 1  # not PeftModel's
        assert "trust_remote_code" not in loading_lines("a/b", "c/d", head, kind)
