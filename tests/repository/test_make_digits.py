import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pm_hf.errors import InputError
from pm_hf.runs.learner import learn

ROOT = Path(__file__).parents[2]
SMALLER = {"stream.train_rows": 200, "stream.test_rows": 100, "training.num_train_epochs": 3}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("make_digits", ROOT / "recipes" / "make_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared(recipe, tmp_path_factory):
    """The recipe's folder, with a backbone trained for 3 epochs instead of 15, and its accuracy."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, recipe.prepare(folder, epochs=3)


def stream(folder, method):
    changes = {"data_dir": str(folder / "data"), "model.base": str(folder / "backbone")} | SMALLER
    return learn(ROOT / "configs/image/digits.yaml", method=method, output_dir=str(folder / method), **changes)


def test_backbone_reads_upright_digits_and_pm_forgets_less_than_sequential(prepared):
    folder, accuracy = prepared
    assert accuracy > 0.7
    pm, sequential = stream(folder, "pm"), stream(folder, "sequential")
    assert pm.tasks == ["upright", "turned090", "turned180", "turned270"]
    assert pm.scenario == "domain_incremental"
    assert pm.scores[0][0] > 0.6
    assert pm.metrics["forgetting"] < sequential.metrics["forgetting"] - 0.05


def test_domains_hold_the_same_digits_turned_and_none_that_the_backbone_saw(recipe, prepared):
    pictures, labels = recipe.digits()
    with np.load(prepared[0] / "data" / "digits.npz") as arrays:
        for side, first, count in (("train", 800, 700), ("test", 1500, 297)):
            x, y, domain = (arrays[f"{name}_{side}"] for name in ("x", "y", "domain"))
            for turn in range(4):
                own = domain == turn
                assert (y[own] == labels[first : first + count]).all()
                upright = np.rot90(x[own], -turn, axes=(1, 2))
                assert (upright == pictures[first : first + count]).all()
    assert pictures.dtype == np.uint8
    assert pictures.max() <= 255


def test_recipe_is_deterministic_and_its_processor_makes_the_pixels_it_trained_on(recipe, tmp_path):
    from PIL import Image

    from pm_hf.config.schema import ModelSettings
    from pm_hf.models.loading import load_image_processor

    assert recipe.prepare(tmp_path / "one", epochs=1) == recipe.prepare(tmp_path / "two", epochs=1)
    for name in ("backbone/model.safetensors", "backbone/preprocessor_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    picture = recipe.digits()[0][0]
    made = load_image_processor(ModelSettings(str(tmp_path / "one" / "backbone")))(
        Image.fromarray(picture).convert("RGB"), return_tensors="pt"
    )["pixel_values"]
    assert np.allclose(made, recipe.pixels(picture[None]), atol=1e-6)


def test_main_says_what_to_run_next_and_what_is_missing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "OUTPUT", tmp_path)
    monkeypatch.setattr(recipe, "prepare", lambda folder: 0.5)
    assert recipe.main() == 0
    assert "next: pm-hf train --config configs/image/digits.yaml" in capsys.readouterr().out

    def missing(folder):
        raise InputError("scikit-learn is missing")

    monkeypatch.setattr(recipe, "prepare", missing)
    assert recipe.main() == 2
    assert capsys.readouterr().err == "digits: scikit-learn is missing\n"
