"""Pictures: reading them, augmenting them, making batches of them."""

import hashlib
import io
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, concatenate_datasets
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.utils import logging

from pm_hf.errors import InputError
from pm_hf.rows import Rows

FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
AREA, RATIO = (0.05, 1.0), (3 / 4, 4 / 3)  # of a random crop, as torchvision's RandomResizedCrop draws them


class Pictures:
    """Pictures of one data set, decoded to RGB when asked for (grey is repeated, alpha is dropped).

    store: uint8 array (n, h, w) or (n, h, w, 1 or 3), or a Dataset whose column `image` holds undecoded files.
    """

    def __init__(self, store: np.ndarray | Dataset) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> PillowImage.Image:
        if isinstance(self.store, np.ndarray):
            return PillowImage.fromarray(self.store[index].squeeze()).convert("RGB")
        with _opened(self.store[int(index)]["image"]) as picture:
            return picture.convert("RGB")

    def select(self, indices: Sequence[int]) -> "Pictures":
        """The pictures with these indices, in this order."""
        kept = list(indices)
        return Pictures(self.store[kept] if isinstance(self.store, np.ndarray) else self.store.select(kept))

    def joined(self, others: "Pictures") -> "Pictures":
        """These pictures, then the others, which must be stored in the same way."""
        if isinstance(self.store, np.ndarray):
            return Pictures(np.concatenate([self.store, others.store]))
        return Pictures(concatenate_datasets([self.store, others.store]))

    def digest(self) -> str:
        """Digest of the pixels or of the files' bytes; of files outside the data set: of their names and sizes."""
        if isinstance(self.store, np.ndarray):
            return hashlib.sha256(np.ascontiguousarray(self.store).tobytes()).hexdigest()
        found = hashlib.sha256()
        for file in self.store["image"]:
            path = Path(file["path"] or "")
            found.update(file["bytes"] or f"{path.parent.name}/{path.name}: {path.stat().st_size}".encode())
        return found.hexdigest()


def read_npz(path: Path, *, test: bool, domain: str | None) -> tuple[Pictures, list[str], list[str]]:
    """(pictures, label names, domain names or []) of one side of an .npz file.

    Its arrays: x_train, y_train, x_test, y_test (uint8 pictures (n, h, w[, 1 or 3]), integers into `classes`), classes
    (names); with `domain` also domain_train and domain_test, names or integers into `domains`.
    """
    if not path.is_file():
        raise InputError(f"file {path} does not exist; set data_dir=FOLDER if it lies elsewhere")
    side = "test" if test else "train"
    needed = [f"x_{side}", f"y_{side}", "classes"] + ([f"domain_{side}"] if domain else [])
    try:
        with np.load(path) as arrays:
            lost = [name for name in needed if name not in arrays]
            if lost:
                raise InputError(f"{path}: missing array {', '.join(lost)}; found {', '.join(arrays.files)}")
            x, y, classes = (arrays[name] for name in needed[:3])
            values = arrays[needed[3]] if domain else None
            names = arrays["domains"] if domain and "domains" in arrays else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no .npz file of plain arrays: {error}") from error
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise InputError(f"{path}: x_{side} must be uint8 (n, h, w) or (n, h, w, 1 or 3), found {x.dtype} {x.shape}")
    labels = _named(f"{path}: y_{side}", y, classes, len(x))
    return Pictures(x), labels, [] if values is None else _named(f"{path}: domain_{side}", values, names, len(x))


def read_folder(path: Path) -> tuple[Pictures, list[str]]:
    """(pictures, label names) of path/CLASS/FILE, classes and files in the order of their names."""
    files = [
        (str(file), folder.name)
        for folder in sorted(path.iterdir())
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in FILES
    ]
    if not files:
        raise InputError(f"{path} holds no pictures: expected {path}/CLASS/FILE with {', '.join(FILES)}")
    columns = {"image": [{"bytes": None, "path": name} for name, _ in files]}
    data = Dataset.from_dict(columns).cast_column("image", Image(decode=False))
    return _checked(Pictures(data), str(path)), [label for _, label in files]


def picture_column(data: Dataset, column: str, where: str) -> Pictures:
    """The pictures of a data set's column; InputError when it is no Image column or a file cannot be read."""
    if not isinstance(data.features[column], Image):
        raise InputError(f"{where}: column {column} must hold images, found {data.features[column]}")
    undecoded = data.select_columns([column]).cast_column(column, Image(decode=False))
    return _checked(Pictures(undecoded.rename_column(column, "image") if column != "image" else undecoded), where)


class ImageEncoder:
    """Pictures and their class; the checkpoint's own processor resizes, rescales and normalises a batch at a time.

    augmentation: "none"; "flip", left to right with probability ½; "crop_flip", a random crop of 5–100 % of the area
    and a ratio of 3:4 to 4:3, resized, then the flip. It is a function of (seed, epoch, row) alone, so a resumed run,
    another number of workers or of processes see the same pictures.
    """

    def __init__(self, processor: Any, augmentation: str, seed: int) -> None:
        self.processor, self.seed = processor, seed
        self._augment = _augmentation(augmentation, processor)

    def training(self, rows: Rows, labels: Sequence[str]) -> "ImageExamples":
        """Examples with augmentation."""
        return ImageExamples(rows, labels, self._augment, self.seed)

    def examples(self, rows: Rows, labels: Sequence[str]) -> "ImageExamples":
        """The same without."""
        return ImageExamples(rows, labels, None, self.seed)

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """{"pixel_values": (N, 3, H, W) float32, "labels": (N,)}."""
        pixels = self.processor([example["image"] for example in examples], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}


class ImageExamples(torch.utils.data.Dataset):
    """{"image": PIL picture, "labels": class index}; the Trainer's loader tells it the epoch (`set_epoch`)."""

    def __init__(self, rows: Rows, labels: Sequence[str], augment: Any, seed: int) -> None:
        index = {label: i for i, label in enumerate(labels)}
        self.pictures, self.targets = rows.inputs, [index[label] for label in rows.labels]
        self.augment, self.seed, self.epoch = augment, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict:
        picture = self.pictures[index]
        if self.augment is not None:
            picture = self.augment(picture, random.Random(f"{self.seed}/{self.epoch}/{index}"))
        return {"image": picture, "labels": self.targets[index]}


def load_image_processor(base: str, revision: str | None = None) -> Any:
    """The checkpoint's image processor, with Pillow's resizing where torchvision is missing."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns that torchvision is missing
    try:
        return AutoImageProcessor.from_pretrained(base, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"model.base {base} has no image processor: {str(error).splitlines()[0]}") from error
    finally:
        logging.set_verbosity(level)


def random_crop(picture: PillowImage.Image, size: tuple[int, int], draw: random.Random) -> PillowImage.Image:
    """A box of 5–100 % of the area and a ratio of 3:4 to 4:3 (log-uniform), resized to `size` (height, width).

    Where ten boxes do not fit into the picture, the whole picture is taken.
    """
    width, height = picture.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = draw.uniform(*AREA) * width * height
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    return picture.resize((size[1], size[0]), PillowImage.Resampling.BILINEAR, box=box)


def _augmentation(name: str, processor: Any) -> Any:
    """The function (picture, random numbers) → picture, None for none."""
    if name == "none":
        return None
    size = dict(processor.size)
    edges = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2

    def augment(picture: PillowImage.Image, draw: random.Random) -> PillowImage.Image:
        if name == "crop_flip":
            picture = random_crop(picture, edges, draw)
        return ImageOps.mirror(picture) if draw.random() < 0.5 else picture

    return augment


def _named(what: str, values: np.ndarray, names: np.ndarray | None, count: int) -> list[str]:
    if values.shape != (count,):
        raise InputError(f"{what}: expected shape ({count},), one for each picture, found {values.shape}")
    if names is None or values.dtype.kind in "US":
        return [str(value) for value in values]
    if values.dtype.kind not in "iu" or (count and not 0 <= int(values.min()) <= int(values.max()) < len(names)):
        raise InputError(f"{what}: expected integers from 0 to {len(names) - 1}, the number of names, found others")
    return [str(names[value]) for value in values]


def _opened(file: dict) -> PillowImage.Image:
    return PillowImage.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"])


def _checked(pictures: Pictures, where: str) -> Pictures:
    """The pictures, if the header of every file can be read."""
    broken = []
    assert isinstance(pictures.store, Dataset)
    for row, file in enumerate(pictures.store["image"]):
        try:
            _opened(file).close()
        except (UnidentifiedImageError, OSError):
            broken.append(file["path"] or f"row {row}")
    if broken:
        raise InputError(f"{where}: {len(broken)} files are no pictures, first {broken[0]}")
    return pictures
