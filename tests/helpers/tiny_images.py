"""Tiny image classifiers and pictures whose class is the place of a bright square."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIZE, SQUARE = 12, 4  # pixels of a picture's edge and of the square's
SHAPES = ("bar", "box", "dot", "hat", "key", "zip")
TINY = {
    "image_size": SIZE,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,  # wide enough for a random encoder to carry the square to the [CLS] position
}
TARGETS = ["k_proj", "v_proj"]


def save_vit(folder: Path) -> Path:
    """A ViT of 2 layers of width 32 with a head of 3 rows, and its processor."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, num_labels=3)).save_pretrained(folder)
    save_processor(folder)
    return folder


def save_processor(folder: Path) -> None:
    """An image processor for pictures of SIZE pixels."""
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, **mean).save_pretrained(folder)


def draw(labels, classes, seed: int, dim: float = 0.0) -> np.ndarray:
    """uint8 (n, SIZE, SIZE, 3): noise and a bright square at the place of each label; dim: 0 to 1, how much darker."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 60, (len(labels), SIZE, SIZE, 3))
    across = SIZE // SQUARE
    for picture, label in zip(pictures, labels, strict=True):
        row, column = divmod(list(classes).index(label) % across**2, across)
        place = (slice(row * SQUARE, (row + 1) * SQUARE), slice(column * SQUARE, (column + 1) * SQUARE))
        picture[place] = rng.integers(200, 256, (SQUARE, SQUARE, 3)) * (1 - dim)
    return pictures.astype(np.uint8)


def write_npz(path: Path, classes=SHAPES, train: int = 16, test: int = 6, domains=None) -> Path:
    """An .npz file of all classes; with domains, each one draws with a brightness of its own."""
    arrays = {"classes": np.array(classes)}
    if domains:
        arrays["domains"] = np.array(domains)
    for side, count, seed in (("train", train, 1), ("test", test, 1001)):
        labels = [label for label in classes for _ in range(count)]
        parts = [draw(labels, classes, seed + i, dim=0.5 * i) for i in range(len(domains or [""]))]
        arrays[f"x_{side}"] = np.concatenate(parts)
        arrays[f"y_{side}"] = np.array([list(classes).index(label) for label in labels] * len(parts), dtype=np.int16)
        if domains:
            arrays[f"domain_{side}"] = np.repeat(np.arange(len(parts)), len(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def encoded(picture: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    """The bytes of a picture file."""
    buffer, image = io.BytesIO(), Image.fromarray(picture)
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def image_settings(base, data, output, method="pm", **changes) -> dict:
    """Settings of a class-incremental stream of 3 tasks with 2 classes each; `changes` are keys with __ for the dot."""
    config = {
        "output_dir": str(output),
        "data_dir": str(data),
        "method": method,
        "model": {"base": str(base)},
        "stream": {
            "kind": "image-classification",
            "train": "shapes.npz",
            "test": "shapes.npz",
            "class_groups": 3,
        },
        "lora": {"r": 2, "alpha": 4, "target_modules": TARGETS},
        "curvature": {"samples": 16},
        "training": {
            "num_train_epochs": 6,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 32,
            "learning_rate": 1e-2,
            "head_learning_rate": 2e-2,
        },
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config
