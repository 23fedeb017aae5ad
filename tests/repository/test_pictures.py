"""Pictures that benchmarks/streams/pictures.py keeps are those that a run would make."""

import sys

import pytest
import torch
from data.test_images import file_column
from helpers.models import SHAPES, draw, encoded, image_settings, save_processor
from repository.test_benchmarks import ROOT, load

from pm_hf.config.loading import load_config
from pm_hf.data.encoders import ENCODERS, make_encoder
from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task, TaskStream


@pytest.fixture(scope="module")
def pictures():
    return load(ROOT / "benchmarks" / "streams" / "pictures.py")


@pytest.mark.parametrize("augmentation", ["none", "flip"])
def test_batches_are_those_of_the_encoder_bit_for_bit(pictures, tmp_path, monkeypatch, augmentation):
    save_processor(tmp_path / "base")
    config = image_settings(tmp_path / "base", tmp_path, tmp_path / "run", stream__augmentation=augmentation)
    config = load_config(config)
    drawn = draw([SHAPES[i % 6] for i in range(40)], SHAPES, seed=0)
    rows = Rows(file_column([encoded(picture) for picture in drawn]), [SHAPES[i % 6] for i in range(40)])
    task = Task("all", SHAPES, rows.take(range(30)), rows.take(range(30, 40)), SHAPES)
    monkeypatch.setattr(pictures, "load_stream", lambda _: TaskStream("class_incremental", (task,)))
    monkeypatch.setattr(pictures, "TOGETHER", 7)
    usual = make_encoder(config)
    pictures.keep(config, tmp_path / "kept", 2)
    with pictures.kept(tmp_path / "kept"):
        encoder = make_encoder(config)
    assert isinstance(encoder, pictures.KeptEncoder)
    assert not isinstance(make_encoder(config), pictures.KeptEncoder)
    order = [29, 3, 17, 0, 8, 9]
    for kind in ("training", "examples"):
        for epoch in (0, 1):
            found, wanted = (getattr(maker, kind)(rows.take(range(5, 40)), SHAPES) for maker in (encoder, usual))
            found.set_epoch(epoch)
            wanted.set_epoch(epoch)
            batches = [maker.collate([made[i] for i in order]) for maker, made in ((encoder, found), (usual, wanted))]
            assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("pixel_values", "labels"))


def test_nothing_is_kept_of_pictures_that_are_cropped_before_they_are_resized(pictures, tmp_path, monkeypatch):
    save_processor(tmp_path / "base")
    config = image_settings(tmp_path / "base", tmp_path, tmp_path / "run", stream__augmentation="crop_flip")
    rows = Rows(file_column([encoded(draw(["box"], SHAPES, seed=0)[0])]), ["box"])
    task = Task("all", SHAPES, rows, rows, SHAPES)
    monkeypatch.setattr(pictures, "load_stream", lambda _: TaskStream("class_incremental", (task,)))
    pictures.keep(load_config(config), tmp_path / "kept", 1)
    assert not (tmp_path / "kept").exists()
    before = dict(ENCODERS)
    with pictures.kept(tmp_path / "kept"):
        assert before == ENCODERS


def test_a_seed_shuffles_the_classes_and_the_first_one_does_not(pictures):
    load(ROOT / "benchmarks" / "streams" / "suite.py")
    common = sys.modules["common"]
    labels = [f"c{i}" for i in range(10)]
    plain = common.class_groups(labels, 4, 0, None)
    assert plain == {
        "classes-00": labels[:3],
        "classes-01": labels[3:6],
        "classes-02": labels[6:8],
        "classes-03": labels[8:],
    }
    mixed = common.class_groups(labels, 4, 1, None)
    assert [len(group) for group in mixed.values()] == [3, 3, 2, 2]
    assert sorted(sum(mixed.values(), [])) == sorted(labels)
    assert mixed != plain
    assert mixed == common.class_groups(labels, 4, 1, None) != common.class_groups(labels, 4, 2, None)
    assert common.class_groups(labels, 4, 1, 2) == dict(list(mixed.items())[:2])
