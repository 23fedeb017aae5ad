import io
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import refusal
from helpers.models import PICTURE_SIZE, SHAPES, draw, encoded, save_processor, write_npz
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from pm_hf.config.schema import ModelSettings, Source
from pm_hf.data.images import ImageEncoder, Pictures, random_crop
from pm_hf.data.rows import Rows
from pm_hf.data.sources import read_rows
from pm_hf.errors import InputError
from pm_hf.models.loading import load_image_processor

KIND = "image-classification"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    save_processor(folder)
    return load_image_processor(ModelSettings(str(folder)))


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """Data sets of folders are cached under tmp_path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(folder, *, side="train", extra=None, **source):
    return read_rows(KIND, Source(**source), str(folder), test=side == "test", extra=extra)


def pixels(rows):
    return [np.asarray(picture) for picture in (rows.inputs[i] for i in range(len(rows)))]


def file_column(files):
    """Pictures of encoded files, as a data set's Image column gives them."""
    data = datasets.Dataset.from_dict({"image": [{"bytes": file, "path": None} for file in files]})
    return Pictures(data.cast_column("image", datasets.Image(decode=False)))


# sources


def test_npz_gives_pictures_labels_and_domains_of_each_side(tmp_path):
    write_npz(tmp_path / "shapes.npz", train=3, test=2, domains=["bright", "dim"])
    rows, domains = read(tmp_path, train="shapes.npz", test="shapes.npz", extra="domain")
    held, _ = read(tmp_path, train="shapes.npz", test="shapes.npz", side="test")
    assert rows.labels == [label for label in SHAPES for _ in range(3)] * 2
    assert domains == ["bright"] * 18 + ["dim"] * 18
    assert len(held) == 24
    expected = draw(rows.labels[18:], SHAPES, seed=2, dim=0.5)
    assert all((found == wanted).all() for found, wanted in zip(pixels(rows)[18:], expected, strict=True))


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1)])
def test_grey_arrays_are_repeated_over_the_colours(tmp_path, shape):
    grey = np.arange(120, dtype=np.uint8).reshape(shape)
    labels = np.array(["a", "b", "a", "b"])
    np.savez(tmp_path / "grey.npz", x_train=grey, y_train=labels, classes=np.array(["a", "b"]))
    rows, domains = read(tmp_path, train="grey.npz")
    assert domains == []
    for found, wanted in zip(pixels(rows), grey.reshape(4, 5, 6), strict=True):
        assert found.shape == (5, 6, 3)
        assert (found == wanted[..., None]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": None}, "missing array y_train; found x_train, classes"),
        ({"x_train": np.zeros((2, 4, 4, 3))}, "x_train must be uint8 .* found float64"),
        ({"x_train": np.zeros((2, 4, 4, 4), np.uint8)}, r"x_train must be uint8 .* found uint8 \(2, 4, 4, 4\)"),
        ({"y_train": np.array([0, 2])}, "y_train: expected integers from 0 to 1"),
        ({"y_train": np.array([0, -1])}, "y_train: expected integers from 0 to 1"),
        ({"y_train": np.array([0.0, 1.0])}, "y_train: expected integers from 0 to 1"),
        ({"y_train": np.array([0, 1, 1])}, r"y_train: expected shape \(2,\), one for each picture, found \(3,\)"),
        ({"x_train": np.array([None, None])}, "is no .npz file of plain arrays"),
    ],
)
def test_bad_npz_is_one_clear_error(tmp_path, changes, message):
    arrays = {"x_train": np.zeros((2, 4, 4, 3), np.uint8), "y_train": np.array([0, 1]), "classes": np.array(["a", "b"])}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read(tmp_path, train="bad.npz")


def test_folders_of_classes_are_read_in_the_order_of_their_names(tmp_path):
    drawn = draw(["box", "bar", "bar"], SHAPES, seed=0)
    for name, picture in zip(("box/1.png", "bar/2.PNG", "bar/1.png"), drawn, strict=True):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(encoded(picture))
    (tmp_path / "train" / "bar" / "notes.txt").write_text("no picture")
    rows, _ = read(tmp_path, train="train")
    assert rows.labels == ["bar", "bar", "box"]
    assert all((a == b).all() for a, b in zip(pixels(rows), drawn[[2, 1, 0]], strict=True))


def test_bad_folders_are_one_clear_error(tmp_path):
    (tmp_path / "empty" / "bar").mkdir(parents=True)
    (tmp_path / "broken" / "bar").mkdir(parents=True)
    (tmp_path / "broken" / "bar" / "1.png").write_bytes(b"no picture")
    (tmp_path / "broken" / "bar" / "2.png").write_bytes(encoded(draw(["bar"], SHAPES, 0)[0]))
    assert "holds no pictures: expected" in refusal(read, tmp_path, train="empty")
    assert "1 files are no pictures, first" in refusal(read, tmp_path, train="broken")
    assert "absent does not exist; set data_dir=FOLDER" in refusal(read, tmp_path, train="absent")
    assert "a folder has no column domain" in refusal(read, tmp_path, train="broken", extra="domain")


def test_image_column_of_a_data_set_in_any_file_format(tmp_path, no_cache):
    drawn = draw(["box", "bar", "bar"], SHAPES, seed=0)
    columns = {
        "img": [{"bytes": encoded(picture), "path": None} for picture in drawn],
        "kind": ["box", "bar", "bar"],
        "where": [1, 0, 1],
    }
    names = datasets.ClassLabel(names=["bar", "box"])
    features = datasets.Features({"img": datasets.Image(), "kind": names, "where": datasets.Value("int64")})
    (tmp_path / "owner" / "name" / "data").mkdir(parents=True)
    data = datasets.Dataset.from_dict(columns, features=features)
    data.to_parquet(tmp_path / "owner" / "name" / "data" / "train-00000-of-00001.parquet")
    data.to_parquet(tmp_path / "rows.parquet")
    for source in ({"dataset": "owner/name"}, {"train": "rows.parquet"}):
        rows, values = read(tmp_path, **source, image_column="img", label_column="kind", extra="where")
        assert (rows.labels, values) == (["box", "bar", "bar"], ["1", "0", "1"])
        assert all((a == b).all() for a, b in zip(pixels(rows), drawn, strict=True))
    assert "missing column image, label; found img, kind, where" in refusal(read, tmp_path, dataset="owner/name")
    columns = {"image_column": "where", "label_column": "kind"}
    assert "column where must hold images, found Value" in refusal(read, tmp_path, dataset="owner/name", **columns)


# decoding


def test_every_kind_of_file_becomes_upright_rgb():
    colour = draw(["box"], SHAPES, seed=0)[0]
    image = Image.fromarray(colour)
    grey = np.asarray(image.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 7)
    clear = image.quantize(8)
    clear.info["transparency"] = bytes(range(8))
    turned, tag = io.BytesIO(), Image.Exif()
    tag[0x0112] = 6  # shown turned by a quarter to the right
    image.save(turned, "PNG", exif=tag)
    cases = {
        "colour": (encoded(colour), colour),
        "alpha": (encoded(np.dstack([colour, np.full((PICTURE_SIZE, PICTURE_SIZE), 9, np.uint8)])), colour),
        "grey": (encoded(grey), np.dstack([grey] * 3)),
        "grey and alpha": (encoded(colour, mode="LA"), np.dstack([grey] * 3)),
        "16 bits": (saved(deep), np.dstack([grey] * 3)),
        "palette with transparency": (saved(clear), np.asarray(clear.convert("RGBA"))[..., :3]),
        "one bit": (encoded(colour, mode="1"), np.asarray(image.convert("1").convert("RGB"))),
        "turned": (turned.getvalue(), np.rot90(colour, -1)),
    }
    pictures = file_column([file for file, _ in cases.values()])
    for index, (name, (_, wanted)) in enumerate(cases.items()):
        found = pictures[index]
        assert found.mode == "RGB"
        assert (np.asarray(found) == wanted).all(), name


def saved(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_a_truncated_file_is_named_when_it_is_decoded(tmp_path):
    whole = encoded(draw(["box"], SHAPES, seed=0)[0])
    (tmp_path / "train" / "box").mkdir(parents=True)
    (tmp_path / "train" / "box" / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows, _ = read(tmp_path, train="train")
    with pytest.raises(InputError, match="cut.png cannot be decoded"):
        rows.inputs[0]


def test_digest_changes_with_a_pixel_and_not_with_the_place(tmp_path):
    drawn = draw(["box", "bar"], SHAPES, seed=0)
    changed = drawn.copy()
    changed[1, 3, 3, 0] ^= 1
    assert Pictures(drawn).digest() == Pictures(drawn.copy()).digest() != Pictures(changed).digest()
    assert Pictures(drawn).digest() != Pictures(drawn.reshape(2, 6, 24, 3)).digest()
    found = []
    for name, pictures in (("one", drawn), ("two", drawn), ("three", changed)):
        files = [encoded(picture, "BMP") for picture in pictures]  # every file has the same size
        for index, file in enumerate(files):
            (tmp_path / name / "box").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "box" / f"{index}.bmp").write_bytes(file)
        folder = read(tmp_path, train=name)[0].inputs
        assert folder.digest() == file_column(files).digest()
        found.append(folder.digest())
    assert found[0] == found[1] != found[2]


def test_pictures_are_selected_and_joined_in_order():
    drawn = draw(["box", "bar", "key"], SHAPES, seed=0)
    for made in (Pictures(drawn), file_column([encoded(picture) for picture in drawn])):
        joined = made.select([2, 0]).joined(made.select([1]))
        assert [np.asarray(joined[i]).tolist() for i in range(3)] == drawn[[2, 0, 1]].tolist()
    with pytest.raises(InputError, match="must all be files, or all be arrays of the same shape"):
        Pictures(drawn).joined(Pictures(drawn[:, :8]))


# augmentation


def examples(processor, augmentation="crop_flip", seed=3, count=12):
    drawn = draw([SHAPES[i % 6] for i in range(count)], SHAPES, seed=0)
    rows = Rows(Pictures(drawn), [SHAPES[i % 6] for i in range(count)])
    return ImageEncoder(processor, augmentation, seed).training(rows, SHAPES)


def seen(made, epoch, order=None):
    made.set_epoch(epoch)
    return {i: made[i]["image"].tobytes() for i in order or range(len(made))}


def test_augmentation_is_a_function_of_seed_epoch_and_row_alone(processor):
    first = seen(examples(processor), epoch=2)
    again = examples(processor)
    seen(again, epoch=0)
    assert seen(again, epoch=2, order=list(reversed(range(12)))) == first
    for other in (seen(examples(processor), epoch=1), seen(examples(processor, seed=4), epoch=2)):
        assert sum(other[i] != first[i] for i in first) >= 11


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one core is enough
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_same_pictures_in_every_epoch(processor, persistent):
    made = examples(processor)
    collate = ImageEncoder(processor, "crop_flip", 3).collate
    workers = {"num_workers": 2, "persistent_workers": persistent, "multiprocessing_context": "fork"}
    loader = torch.utils.data.DataLoader(made, batch_size=5, collate_fn=collate, **workers)
    plain = torch.utils.data.DataLoader(made, batch_size=5, collate_fn=collate)
    for epoch in range(2):
        made.set_epoch(epoch)
        for found, wanted in zip(loader, plain, strict=True):
            assert torch.equal(found["pixel_values"], wanted["pixel_values"])


def test_flip_mirrors_half_of_the_pictures_and_none_changes_nothing(processor):
    flipped, plain = examples(processor, "flip", count=400), examples(processor, "none", count=400)
    count = 0
    for i in range(400):
        found, whole = np.asarray(flipped[i]["image"]), np.asarray(plain[i]["image"])
        mirrored = bool((found == whole[:, ::-1]).all())
        assert mirrored or (found == whole).all()
        count += mirrored
    assert 160 <= count <= 240


def test_crops_have_the_stated_areas_and_ratios():
    boxes = []

    class Recorder:
        size = (400, 300)

        def resize(self, size, resample, box):
            assert size == (32, 24)
            boxes.append(box)

    for i in range(2000):
        random_crop(Recorder(), (24, 32), random.Random(i))
    left, top, right, bottom = np.array(boxes).T
    width, height = right - left, bottom - top
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 400
    assert bottom.max() <= 300
    area, ratio = width * height / 120_000, width / height
    assert 0.045 < area.min() < 0.07
    assert 0.95 < area.max() <= 1
    assert 0.72 < ratio.min() < 0.78
    assert 1.3 < ratio.max() < 1.37
    assert abs(np.log(ratio[area < 0.4]).mean()) < 0.02  # small boxes always fit: log-uniform
    assert abs(area[area < 0.6].mean() - 0.325) < 0.02  # uniform from 0.05


def test_a_picture_too_long_for_any_box_is_taken_whole():
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(100, 1, 3))
    found = random_crop(picture, (10, 10), random.Random(0))
    assert (np.asarray(found) == np.asarray(picture.resize((10, 10), Image.Resampling.BILINEAR))).all()


# processors


def test_batches_are_what_the_checkpoint_s_processor_makes(processor):
    drawn = [Image.fromarray(draw(["box"], SHAPES, seed=i)[0]).resize((20 + i, 17)) for i in range(3)]
    rows = Rows(file_column([saved(picture) for picture in drawn]), ["box", "key", "bar"])
    encoder = ImageEncoder(processor, "none", 0)
    made = encoder.examples(rows, SHAPES)
    batch = encoder.collate([made[i] for i in range(3)])
    assert batch["labels"].tolist() == [1, 4, 0]
    for found, picture in zip(batch["pixel_values"], drawn, strict=True):
        resized = np.asarray(picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BILINEAR), np.float32)
        assert torch.allclose(found, torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    "made",
    [
        ConvNextImageProcessorPil(size={"shortest_edge": 32}),
        BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    ],
)
def test_cropped_pictures_are_not_cropped_again_by_the_processor(made):
    rows = Rows(Pictures(draw(["box", "key"], SHAPES, seed=0)), ["box", "key"])
    encoder = ImageEncoder(made, "crop_flip", 0)
    example = encoder.training(rows, SHAPES)[0]
    assert example["image"].size == (32, 32)
    found = encoder.collate([example])["pixel_values"][0]
    mean, std = (np.array(value)[:, None, None] for value in (made.image_mean, made.image_std))
    wanted = (np.asarray(example["image"], np.float64).transpose(2, 0, 1) / 255 - mean) / std
    assert np.allclose(found, wanted, atol=1e-5)
    plain = encoder.collate([encoder.examples(rows, SHAPES)[0]])["pixel_values"]
    assert plain.shape == (1, 3, 32, 32)


def test_processors_without_one_size_and_folders_without_a_processor_are_refused(tmp_path):
    made = BitImageProcessorPil(size={"longest_edge": 40, "shortest_edge": None}, do_center_crop=False)
    with pytest.raises(InputError, match="crop_flip needs a processor of one size, found .* use flip"):
        ImageEncoder(made, "crop_flip", 0)
    with pytest.raises(InputError, match=f"model.base {tmp_path} has no image processor"):
        load_image_processor(ModelSettings(str(tmp_path)))


def test_loading_a_processor_is_silent_and_keeps_the_verbosity(tmp_path, capfd):
    from transformers.utils import logging

    save_processor(tmp_path)
    before = logging.get_verbosity()
    assert type(load_image_processor(ModelSettings(str(tmp_path)))).__name__ == "ViTImageProcessorPil"
    assert logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
    assert (Path(tmp_path) / "preprocessor_config.json").exists()
