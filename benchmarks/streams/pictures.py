"""Pictures of a stream as the model's processor makes them, made once for all runs on a machine.

A run looks at each picture a dozen times, which takes 2 ms of a core each time, more than a GPU needs for the rest.
Here they are kept in a file that all processes map. A batch is that of `pm_hf.data.images.ImageEncoder`, bit for bit.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from pm_hf.config.schema import RunConfig
from pm_hf.data.encoders import ENCODERS
from pm_hf.data.images import ImageEncoder, ImageExamples
from pm_hf.data.rows import Rows
from pm_hf.data.stream import load_stream
from pm_hf.models.loading import load_image_processor

KIND = "image-classification"
FILES = ("pictures.npy", "digests.npy")  # (n, 3, H, W) float32; (n,) digests of the files
TOGETHER = 100  # pictures that a thread prepares at a time


def keep(config: RunConfig, folder: Path, jobs: int) -> None:
    """Write the pictures of a run's stream into a folder, unless they are there.

    Nothing for pictures that are no files, and where the augmentation crops: a crop comes before the resizing.
    """
    if all((folder / name).exists() for name in FILES):
        return
    rows = Rows([], [])
    for task in load_stream(config).tasks:
        rows = rows.with_rows(task.train).with_rows(task.test)
    if not isinstance(rows.inputs.store, Dataset) or config.stream.augmentation == "crop_flip":
        return
    encoder = ImageEncoder(load_image_processor(config.model), "none", 0)
    examples = encoder.examples(rows, list(dict.fromkeys(rows.labels)))

    def prepared(start: int) -> np.ndarray:
        part = range(start, min(start + TOGETHER, len(rows)))
        return encoder.collate([examples[i] for i in part])["pixel_values"].numpy()

    with ThreadPoolExecutor(jobs) as threads:
        pictures = np.concatenate(list(threads.map(prepared, range(0, len(rows), TOGETHER))))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / FILES[0], pictures)
    np.save(folder / FILES[1], np.array(_digests(rows)))


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Within the block runs of this process take the pictures from a folder, where `keep` wrote one."""
    usual = ENCODERS[KIND]
    if all((folder / name).exists() for name in FILES):
        ENCODERS[KIND] = lambda config, _: KeptEncoder(
            load_image_processor(config.model), config.stream.augmentation, config.seed, folder
        )
    try:
        yield
    finally:
        ENCODERS[KIND] = usual


def _digests(rows: Rows) -> list[str]:
    return [hashlib.sha256(file["bytes"]).hexdigest()[:32] for file in rows.inputs.store["image"]]


class KeptEncoder(ImageEncoder):
    """ImageEncoder with pictures that `keep` wrote; augmentation: none or flip."""

    def __init__(self, processor: Any, augmentation: str, seed: int, folder: Path) -> None:
        super().__init__(processor, augmentation, seed)
        self.pictures = np.load(folder / FILES[0], mmap_mode="r")
        self.places = {digest: row for row, digest in enumerate(np.load(folder / FILES[1]).tolist())}

    def training(self, rows: Rows, labels: Sequence[str]) -> "KeptExamples":
        """Examples with augmentation."""
        return KeptExamples(self, rows, labels, self._augment)

    def examples(self, rows: Rows, labels: Sequence[str]) -> "KeptExamples":
        """The same without."""
        return KeptExamples(self, rows, labels, None)

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """{"pixel_values": (N, 3, H, W) float32, "labels": (N,)}."""
        pixels = torch.from_numpy(np.stack([example["image"] for example in examples]))
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}


class KeptExamples(ImageExamples):
    """ImageExamples whose pictures are arrays (3, H, W), flipped where those would be."""

    def __init__(self, encoder: KeptEncoder, rows: Rows, labels: Sequence[str], augment: Any) -> None:
        super().__init__(rows, labels, augment, encoder.seed)
        self.kept, self.places = encoder.pictures, [encoder.places[digest] for digest in _digests(rows)]

    def __getitem__(self, index: int) -> dict:
        picture = self.kept[self.places[index]]
        draw = random.Random(f"{self.seed}/{int(self._epoch)}/{index}")
        if self.augment is not None and draw.random() < 0.5:
            picture = picture[..., ::-1]
        return {"image": picture, "labels": self.targets[index]}
