"""Pictures: reading them, augmenting them, making batches of them."""

import hashlib
import io
import math
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from datasets import Dataset, Image, concatenate_datasets
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor

from pm_hf.data.names import check_named
from pm_hf.data.rows import Rows
from pm_hf.data.tables import Table
from pm_hf.errors import InputError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


CROP_AREA, CROP_RATIO = (0.05, 1.0), (3 / 4, 4 / 3)  # of a random crop, as torchvision's RandomResizedCrop draws them


class Pictures:
    """Pictures of one data set, decoded to upright RGB when asked for (grey is repeated, alpha is dropped).

    store: uint8 array (n, h, w) or (n, h, w, 1 or 3), or a Dataset whose column `image` holds undecoded files.
    """

    def __init__(self, store: np.ndarray | Dataset) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> PillowImage.Image:
        if isinstance(self.store, np.ndarray):
            pixels = self.store[index]
            return PillowImage.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).convert("RGB")
        file = self.store[int(index)]["image"]
        try:
            with _opened(file) as picture:
                return _rgb(picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{file['path'] or f'picture {index}'} cannot be decoded: {error}") from error

    def select(self, indices: Sequence[int]) -> "Pictures":
        """The pictures with these indices, in this order."""
        rows = list(indices)
        return Pictures(self.store[rows] if isinstance(self.store, np.ndarray) else self.store.select(rows))

    def joined(self, others: "Pictures") -> "Pictures":
        """These pictures, then the others; InputError where they are stored in different ways."""
        first, second = self.store, others.store
        if isinstance(first, Dataset) and isinstance(second, Dataset):
            return Pictures(concatenate_datasets([first, second]))
        if isinstance(first, np.ndarray) and isinstance(second, np.ndarray) and first.shape[1:] == second.shape[1:]:
            return Pictures(np.concatenate([first, second]))
        raise InputError("tasks whose pictures are joined must all be files, or all be arrays of the same shape")

    def digest(self) -> str:
        """Digest of the pixels, or of the files' bytes."""
        digest = hashlib.sha256()
        if isinstance(self.store, np.ndarray):
            digest.update(repr(self.store.shape).encode() + np.ascontiguousarray(self.store).tobytes())
            return digest.hexdigest()
        for file in self.store["image"]:
            digest.update(hashlib.sha256(file["bytes"] or Path(file["path"]).read_bytes()).digest())
        return digest.hexdigest()


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
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
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
        if file.suffix.lower() in PICTURE_SUFFIXES
    ]
    if not files:
        raise InputError(f"{path} holds no pictures: expected {path}/CLASS/FILE with {', '.join(PICTURE_SUFFIXES)}")
    columns = {"image": [{"bytes": None, "path": name} for name, _ in files]}
    data = Dataset.from_dict(columns).cast_column("image", Image(decode=False))
    labels = [label for _, label in files]
    check_named(labels, f"{path}: the folder of a class")
    return _checked(Pictures(data), str(path)), labels


def picture_column(data: Table, column: str, where: str) -> Pictures:
    """The pictures of a data set's column; InputError when it is no Image column or a file cannot be read."""
    feature = data.features[column] if isinstance(data, Dataset) else "text"
    if not isinstance(data, Dataset) or not isinstance(feature, Image):
        raise InputError(f"{where}: column {column} must hold images, found {feature}")
    undecoded = data.select_columns([column]).cast_column(column, Image(decode=False))
    return _checked(Pictures(undecoded.rename_column(column, "image") if column != "image" else undecoded), where)


class ImageEncoder:
    """Pictures and their class; the checkpoint's own processor resizes, rescales and normalises a batch at a time.

    augmentation: "none"; "flip", left to right with probability ½; "crop_flip", a random crop of 5–100 % of the area
    and a ratio of 3:4 to 4:3, resized to the size that the processor gives, then the flip. It is a function of (seed,
    epoch, row) alone, so a resumed run, another number of workers or of processes see the same pictures.
    """

    def __init__(self, processor: Any, augmentation: str, seed: int) -> None:
        self.processor, self.seed = processor, seed
        self._augment = _augmentation(augmentation, processor)
        self._crops = augmentation == "crop_flip"

    def training(self, rows: Rows, labels: Sequence[str]) -> "ImageExamples":
        """Examples with augmentation."""
        return ImageExamples(rows, labels, self._augment, self.seed, sized=self._crops)

    def examples(self, rows: Rows, labels: Sequence[str]) -> "ImageExamples":
        """The same without."""
        return ImageExamples(rows, labels, None, self.seed)

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """{"pixel_values": (N, 3, H, W) float32, "labels": (N,)}."""
        sized = {"do_resize": False, "do_center_crop": False} if examples[0]["sized"] else {}
        made = self.processor([example["image"] for example in examples], return_tensors="pt", **sized)
        return {
            "pixel_values": made["pixel_values"],
            "labels": torch.tensor([example["labels"] for example in examples]),
        }


class ImageExamples(torch.utils.data.Dataset):
    """{"image": PIL picture, "labels": class index, "sized": whether it has the model's size already}.

    The Trainer's loader tells it the epoch (`set_epoch`), which workers that outlive an epoch see too.
    """

    def __init__(self, rows: Rows, labels: Sequence[str], augment: Any, seed: int, *, sized: bool = False) -> None:
        index = {label: i for i, label in enumerate(labels)}
        self.pictures, self.targets = rows.inputs, [index[label] for label in rows.labels]
        self.augment, self.seed, self.sized = augment, seed, sized
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader at the start of each epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict:
        picture = self.pictures[index]
        if self.augment is not None:
            picture = self.augment(picture, random.Random(f"{self.seed}/{int(self._epoch)}/{index}"))
        return {"image": picture, "labels": self.targets[index], "sized": self.sized}


def random_crop(picture: PillowImage.Image, size: tuple[int, int], draw: random.Random) -> PillowImage.Image:
    """A box of 5–100 % of the area and a ratio of 3:4 to 4:3 (log-uniform), resized to `size` (height, width).

    Where ten boxes do not fit into the picture, the whole picture is taken.
    """
    width, height = picture.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = draw.uniform(*CROP_AREA) * width * height
        ratio = math.exp(draw.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
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
    size = _size(processor) if name == "crop_flip" else (0, 0)

    def augment(picture: PillowImage.Image, draw: random.Random) -> PillowImage.Image:
        if name == "crop_flip":
            picture = random_crop(picture, size, draw)
        return ImageOps.mirror(picture) if draw.random() < 0.5 else picture

    return augment


def _size(processor: Any) -> tuple[int, int]:
    """(height, width) of the pictures that a processor makes."""
    cropped = getattr(processor, "do_center_crop", None) and getattr(processor, "crop_size", None)
    size = dict(processor.crop_size if cropped else processor.size)
    edge = size.get("shortest_edge")
    height, width = size.get("height") or edge, size.get("width") or edge
    if not height or not width:
        raise InputError(f"stream.augmentation: crop_flip needs a processor of one size, found {size}; use flip")
    return height, width


def _named(what: str, values: np.ndarray, names: np.ndarray | None, count: int) -> list[str]:
    if values.shape != (count,):
        raise InputError(f"{what}: expected shape ({count},), one for each picture, found {values.shape}")
    if names is None or values.dtype.kind in "US":
        made = [str(value) for value in values]
        check_named(made, what)
        return made
    if values.dtype.kind not in "iu" or (count and not 0 <= int(values.min()) <= int(values.max()) < len(names)):
        raise InputError(f"{what}: expected integers from 0 to {len(names) - 1}, the number of names, found others")
    made = [str(names[value]) for value in values]
    check_named(made, what)
    return made


def _opened(file: dict) -> PillowImage.Image:
    return PillowImage.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"])


def _rgb(picture: PillowImage.Image) -> PillowImage.Image:
    """Turned as its EXIF data says; transparency dropped; 16 bits of grey scaled to 8."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = PillowImage.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


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
