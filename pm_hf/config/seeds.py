"""One YAML, several seeds: the settings of each run, in a folder of its own."""

from collections.abc import Sequence
from pathlib import Path

from pm_hf.config.loading import load_config, parse_overrides
from pm_hf.config.schema import RunConfig
from pm_hf.errors import InputError

SEED_FOLDER = "seed-"  # of each run in the common output_dir, before its seed


def load_seeds(source: str | Path, overrides: Sequence[str], seeds: Sequence[str]) -> list[RunConfig]:
    """The settings for each seed: those of `load_config`, with output_dir `OUTPUT_DIR/seed-N`.

    seeds: as typed on a command line. InputError for what is no whole number, a seed given twice, or a `seed` among the
    overrides too.
    """
    wrong = [text for text in seeds if not text.isdecimal()]
    if wrong or not seeds:
        raise InputError(f"--seeds: expected whole numbers from 0 on, found {' '.join(wrong) or 'none'}")
    numbers = [int(text) for text in seeds]
    twice = [number for number in dict.fromkeys(numbers) if numbers.count(number) > 1]
    if twice:
        raise InputError(f"--seeds: {twice[0]} is given twice; each seed is one run")
    if any(key == "seed" for key, _ in parse_overrides(overrides, [])):
        raise InputError("seed and --seeds are both given, and say the same; leave one of them out")
    output = Path(load_config(source, overrides).output_dir)
    return [
        load_config(source, overrides, {"seed": number, "output_dir": str(output / f"{SEED_FOLDER}{number}")})
        for number in numbers
    ]
