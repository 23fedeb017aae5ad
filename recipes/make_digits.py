"""An offline stream of pictures: scikit-learn's 8×8 digits, upright at first, then turned by 90°, 180° and 270°.

Trains a tiny ViT on upright digits that the stream does not have, and leaves it with the stream's data in runs/digits:

    pip install 'pm_hf[demo]'
    python recipes/make_digits.py
    pm-hf train --config configs/image/digits.yaml
    pm-hf train --config configs/image/digits.yaml method=sequential output_dir=runs/digits-sequential

Half a minute on one core; the same bytes every time.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pm_hf.errors import InputError

OUTPUT = Path("runs/digits")
TURNS = ("upright", "turned090", "turned180", "turned270")
BACKBONE, TRAIN, TEST = 800, 700, 297  # upright digits that train the backbone; digits of each domain of the stream
EPOCHS, BATCH, LEARNING_RATE = 15, 32, 3e-3
MEAN, STD = 0.5, 0.5


def main() -> int:
    """Prepare everything and say what to run next."""
    start = time.perf_counter()
    try:
        accuracy = prepare(OUTPUT)
    except InputError as error:
        print(f"digits: {error}", file=sys.stderr)
        return 2
    print(f"{OUTPUT}/backbone: accuracy {accuracy:.3f} on upright digits, {time.perf_counter() - start:.0f} s")
    print("next: pm-hf train --config configs/image/digits.yaml")
    return 0


def prepare(folder: Path, epochs: int = EPOCHS) -> float:
    """Write folder/backbone and folder/data/digits.npz; the backbone's accuracy on the upright test digits."""
    pictures, labels = digits()
    known, train, test = np.split(np.arange(BACKBONE + TRAIN + TEST), [BACKBONE, BACKBONE + TRAIN])
    write_stream(folder / "data" / "digits.npz", pictures, labels, train, test)
    model = fit(pictures[known], labels[known], epochs)
    model.save_pretrained(folder / "backbone")
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    processor.save_pretrained(folder / "backbone")
    with torch.no_grad():
        right = model(pixel_values=pixels(pictures[test])).logits.argmax(1) == torch.from_numpy(labels[test])
    return right.float().mean().item()


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(uint8 pictures (1797, 8, 8), labels (1797,)) in a seeded order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("scikit-learn is missing; pip install scikit-learn (extra: demo)") from error
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images * 15.9).astype(np.uint8)[order], data.target[order]


def write_stream(path: Path, pictures: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> None:
    """The same training and test digits in every domain, turned by a quarter more each time."""
    arrays = {"classes": np.arange(10).astype(str), "domains": np.array(TURNS)}
    for side, rows in (("train", train), ("test", test)):
        turned = [np.rot90(pictures[rows], turn, axes=(1, 2)) for turn in range(len(TURNS))]
        arrays[f"x_{side}"] = np.concatenate(turned)
        arrays[f"y_{side}"] = np.tile(labels[rows], len(TURNS))
        arrays[f"domain_{side}"] = np.repeat(np.arange(len(TURNS)), len(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def fit(pictures: np.ndarray, labels: np.ndarray, epochs: int) -> ViTForImageClassification:
    """A ViT of 3 layers of width 64 on patches of 2×2, trained with AdamW and a one-cycle schedule."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"image_size": 8, "patch_size": 2, "num_hidden_layers": 3, "num_attention_heads": 4}
        size = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1, "num_labels": 10}
        model = ViTForImageClassification(ViTConfig(**shape, **size))
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
        steps = epochs * len(labels) // BATCH
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
        x, y = pixels(pictures), torch.from_numpy(labels)
        for _ in range(steps):
            rows = torch.randint(len(y), (BATCH,))
            model(pixel_values=x[rows], labels=y[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def pixels(pictures: np.ndarray) -> Tensor:
    """(n, 3, 8, 8) float32 as the image processor makes them."""
    scaled = (torch.from_numpy(pictures).float() / 255 - MEAN) / STD
    return scaled[:, None].expand(-1, 3, -1, -1)


if __name__ == "__main__":
    sys.exit(main())
