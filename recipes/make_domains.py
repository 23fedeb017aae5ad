"""Texts and code of different kinds from this machine, as a domain stream: runs/domains/data/DOMAIN-{train,test}.jsonl.

python recipes/make_domains.py --data ../shared/data/text [--output runs/domains/data]

Domains: `posts` (news20 from --data), and from the installed packages `python` (networkx, sympy, pandas, sklearn),
`headers` (C++ of torch and pyarrow) and `licences`. A file, or post, is in train or in test, never in both, and so is a
text that many files have. general-test.jsonl: news from --data, which nothing is trained on.
"""

import argparse
import csv
import gzip
import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from pm_hf.errors import InputError

OUTPUT = Path("runs/domains/data")
TRAIN, TEST = 200, 50  # texts of each domain
LENGTHS = (120, 240)  # characters of a text
PER_FILE = 8  # texts of one file
# domain: (package and folder in it, …), what the files are called; the headers in torch/include/ATen are generated
CODE = {
    "python": (("networkx", "sympy", "pandas", "sklearn"), "*.py"),
    "headers": (("torch/include/c10", "torch/include/torch", "pyarrow/include"), "*.h"),
}
FILES = 300  # files taken of each folder


def main() -> int:
    """Collect every domain and write it; 2 where this machine lacks one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with news20_*.csv.gz and agnews_test.csv.gz")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    try:
        write(options.data, options.output)
    except InputError as error:
        print(f"domains: {error}", file=sys.stderr)
        return 2
    return 0


def write(data: Path, output: Path) -> None:
    """All files; written last is general-test.jsonl."""
    sources = {"posts": posts(data)}
    sources |= {domain: code(domain) for domain in CODE}
    sources |= {"licences": licences()}
    output.mkdir(parents=True, exist_ok=True)
    for domain, files in sources.items():
        train, test = split(domain, files)
        save(output / f"{domain}-train.jsonl", train)
        save(output / f"{domain}-test.jsonl", test)
    news = [text[: LENGTHS[1]] for text in column(data / "agnews_test.csv.gz")]
    save(output / "general-test.jsonl", random.Random("general").sample(news, TEST))


def split(domain: str, files: list[str]) -> tuple[list[str], list[str]]:
    """TRAIN and TEST texts of a domain, no file and no text in both."""
    files = sorted(files)
    random.Random(domain).shuffle(files)
    sides: list[list[str]] = [[], []]
    seen: set[str] = set()
    for number, content in enumerate(files):
        side, count = ((0, TRAIN), (1, TEST))[number % 5 == 4]  # every fifth file is for the test
        fresh = [text for text in pieces(content) if normal(text) not in seen][: count - len(sides[side])]
        seen |= {normal(text) for text in pieces(content)}
        sides[side] += fresh
    if [len(texts) for texts in sides] != [TRAIN, TEST]:
        counts = " and ".join(str(len(texts)) for texts in sides)
        raise InputError(f"{domain} has {counts} texts for train and test, expected {TRAIN} and {TEST}")
    return sides[0], sides[1]


def pieces(content: str) -> Iterator[str]:
    """Up to PER_FILE runs of whole lines, spread over the content, that do not overlap."""
    lines, blocks, size = content.splitlines(), list[str](), 0
    block: list[str] = []
    for line in lines:
        if size + len(line) > LENGTHS[1] or not line.strip():
            blocks += ["\n".join(block)] * (size >= LENGTHS[0])
            block, size = [], 0
        if line.strip() and len(line) <= LENGTHS[1]:
            block.append(line)
            size += len(line) + 1
    blocks += ["\n".join(block)] * (size >= LENGTHS[0])
    step = max(1, len(blocks) // PER_FILE)
    yield from dict.fromkeys(blocks[::step][:PER_FILE])


def posts(data: Path) -> list[str]:
    """The newsgroup posts, each a file of its own."""
    return [re.sub(r"(?<=[.!?]) ", "\n", text) for text in column(data / "news20_train.csv.gz")]


def code(domain: str) -> list[str]:
    """The files of a domain's packages."""
    places, pattern = CODE[domain]
    texts = []
    for package, _, folder in (place.partition("/") for place in places):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"package {package} is not installed")
        files = sorted((Path(next(iter(spec.submodule_search_locations))) / folder).rglob(pattern))
        random.Random(package).shuffle(files)
        texts += [read(file) for file in files[:FILES]]
    return texts


def licences() -> list[str]:
    """The licence texts of the installed distributions."""
    files = [file for distribution in distributions() for file in distribution.files or []]
    named = {str(file.locate()) for file in files if re.search("(licen[cs]e|copying|notice)[^/]*$", str(file), re.I)}
    paths = [Path(name) for name in sorted(named)]
    return [read(path) for path in paths if path.suffix not in (".py", ".pyc") and path.is_file()]


def read(file: Path) -> str:
    """A file's text, at most 200 kB of it."""
    return file.read_bytes()[:200_000].decode("utf-8", errors="replace")


def column(path: Path) -> list[str]:
    """The texts of a CSV of text,label."""
    if not path.is_file():
        raise InputError(f"file {path} does not exist")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        return [row["text"] for row in csv.DictReader(handle)]


def normal(text: str) -> str:
    """A text without case, digits, punctuation and white space: what counts as the same text."""
    return "".join(re.findall(r"[a-z]+", text.lower()))


def save(path: Path, texts: list[str]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
