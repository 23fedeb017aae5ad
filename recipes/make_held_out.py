"""Texts that no task has, to see what training costs elsewhere (`stream.held_out`): runs/held-out/NAME.jsonl.

python recipes/make_held_out.py --data ../shared/data/text [--output runs/held-out]

news: beginnings of agnews's test texts. plots: the objective sentences of subj's. code: Python of installed packages
(networkx, sympy, pandas, sklearn). A row is {"text": …}; no text is there twice.
"""

import argparse
import csv
import gzip
import random
import sys
from html import unescape
from pathlib import Path

from make_domains import code, normal, pieces, save

from pm_hf.errors import InputError

OUTPUT = Path("runs/held-out")
ROWS = 150  # of each
LONGEST = 200  # characters of prose


def main() -> int:
    """Write every text; 2 where this machine lacks one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with agnews_test.csv.gz and subj_test.csv.gz")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    try:
        write(options.data, options.output)
    except InputError as error:
        print(f"held-out texts: {error}", file=sys.stderr)
        return 2
    return 0


def write(data: Path, output: Path) -> None:
    """All three, of which the same come again: the files are sorted and drawn by name."""
    texts = {
        "news": [unescape(text)[:LONGEST].rpartition(" ")[0] for text, _ in rows(data / "agnews_test.csv.gz")],
        "plots": [text for text, label in rows(data / "subj_test.csv.gz") if label == "objective"],
        "code": [piece for content in code("python") for piece in pieces(content)],
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, all_texts in texts.items():
        save(output / f"{name}.jsonl", drawn(name, all_texts))


def drawn(name: str, texts: list[str]) -> list[str]:
    """ROWS of the texts, none of them twice; InputError where there are fewer."""
    distinct = list({normal(text): text for text in texts if text.strip()}.values())
    if len(distinct) < ROWS:
        raise InputError(f"{name} has {len(distinct)} texts, expected {ROWS}")
    return random.Random(name).sample(distinct, ROWS)


def rows(path: Path) -> list[tuple[str, str]]:
    """(text, label) of each row of a gzipped CSV."""
    if not path.is_file():
        raise InputError(f"file {path} does not exist")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        return [(row["text"], row["label"]) for row in csv.DictReader(handle)]


if __name__ == "__main__":
    sys.exit(main())
