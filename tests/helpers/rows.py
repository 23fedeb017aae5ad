"""Rows of text whose class is the kind of word they have most of."""

import csv
import random
from pathlib import Path

WORDS = [f"{kind}{i}" for kind in ("apple", "bird", "car", "dog", "egg", "fog", "the", "of") for i in range(6)]
CLASSES = ("apple", "bird", "car", "dog", "egg", "fog")  # a text's class is the kind of word it has most of


def write_rows(path: Path, classes, per_class: int, seed: int, **columns) -> Path:
    """CSV of texts with `per_class` rows of each class; further columns hold a constant, or one value a row."""
    rng = random.Random(seed)
    rows = []
    for label in classes:
        for _ in range(per_class):
            kinds = [label] * 3 + rng.choices(["the", "of"], k=rng.randint(1, 4))
            rng.shuffle(kinds)
            rows.append({"text": " ".join(f"{kind}{rng.randrange(6)}" for kind in kinds), "label": label, **columns})
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
