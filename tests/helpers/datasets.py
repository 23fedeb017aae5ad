"""Miniature data sets with the columns and types of the sources that the YAMLs in configs/ name.

Each writer takes (folder, stream): the run's data_dir and the YAML's `stream`. A data set of the Hub becomes the folder
data_dir/OWNER/NAME of parquet files (`write_hub`), which is what the run then finds under the data set's id.
"""

import csv
import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from helpers.models import draw, encoded, write_npz
from helpers.streams import CLASSES, write_rows
from pm_hf.files import write_json

FORMATS = (("PNG", None), ("PNG", "L"), ("PNG", "RGBA"), ("JPEG", None), ("PNG", "P"))


def write_hub(
    folder: Path, name: str, features: dict, splits: dict[str, dict[str, list]], config: str | None = None
) -> None:
    """A data set of the Hub as a local folder: splits are {split: {column: values}}, features {column: type}."""
    place = folder / name / (config or "data")
    place.mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        Dataset.from_dict(columns, features=Features(features)).to_parquet(place / f"{split}-00000-of-00001.parquet")
    if config is None:
        return
    card = folder / name / "README.md"
    known = yaml.safe_load(card.read_text().split("---")[1])["configs"] if card.exists() else []
    files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
    known.append({"config_name": config, "data_files": files})
    card.write_text(f"---\n{yaml.safe_dump({'configs': known})}---\n")


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Rows as CSV, compressed where the name ends in .gz."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# texts


def clinc150(folder: Path, stream: dict) -> None:
    """CSV of text,label and the JSON file of the class groups."""
    for side, count in (("train", 6), ("test", 2)):
        plain = write_rows(folder / "plain.csv", CLASSES, count, seed=count)
        with open(plain, encoding="utf-8", newline="") as handle:
            write_csv(folder / stream[side], list(csv.DictReader(handle)))
    write_json(folder / stream["class_groups"], {"one": list(CLASSES[:3]), "two": list(CLASSES[3:])})


def banking77(folder: Path, stream: dict) -> None:
    """CSV of text,label, two classes a task."""
    for side, count in (("train", 6), ("test", 2)):
        classes = [f"intent{i:02d}" for i in range(2 * stream["class_groups"])]
        rows = [{"text": f"{name} text {i}", "label": name} for name in classes for i in range(count)]
        write_csv(folder / stream[side], rows)


def docstrings(folder: Path, stream: dict) -> None:
    """The demo's CSV files, two classes a task."""
    for side, count in (("train", 6), ("test", 2)):
        classes = [label for pair in stream["class_groups"].values() for label in pair]
        write_rows(folder / stream[side], classes, count, seed=count)


def prompts(folder: Path, stream: dict) -> None:
    """A CSV of text,label for each side of each task; its labels are those that `answers` names, or two."""
    for task in stream["tasks"]:
        labels = list(task.get("answers", ["bad", "good"]))
        for side, count in (("train", 4), ("test", 1)):
            rows = [{"text": f"{label} text {i}", "label": label} for label in labels for i in range(count)]
            write_csv(folder / task[side], rows)


def chats(folder: Path, stream: dict) -> None:
    """JSON lines of messages for each side of each task."""
    for task in stream["tasks"]:
        for side, count in (("train", 4), ("test", 1)):
            rows = [
                [{"role": "user", "content": f"{answer} text {i}"}, {"role": "assistant", "content": answer}]
                for answer in (f"{task['name']} yes", f"{task['name']} no")
                for i in range(count)
            ]
            lines = [json.dumps({"messages": messages}) for messages in rows]
            (folder / task[side]).write_text("".join(f"{line}\n" for line in lines))


def parquet_pictures(folder: Path, stream: dict) -> None:
    """A parquet file of encoded pictures for each side, two classes a task, in two domains where they are asked for."""
    names = [f"class{i:02d}" for i in range(2 * (stream.get("class_groups") or 1))]
    areas = ["photo", "sketch"] if "domain_column" in stream else ["photo"]
    for side, count in (("train", 4), ("test", 2)):
        places = [(area, label) for area in range(len(areas)) for label in range(len(names)) for _ in range(count)]
        pictures = draw([label for _, label in places], range(len(names)), seed=count)
        content = {
            "image": [{"bytes": encoded(picture), "path": None} for picture in pictures],
            "label": [label for _, label in places],
            "domain": [area for area, _ in places],
        }
        features = Features(image=Image(), label=ClassLabel(names=names), domain=ClassLabel(names=areas))
        Dataset.from_dict(content, features=features).to_parquet(folder / stream[side])


def domains(folder: Path, stream: dict) -> None:
    """JSON lines of plain texts for each side of each task, and a test file of each held-out text."""
    for task in stream["tasks"] + stream["held_out"]:
        for side, count in (("train", 6), ("test", 2)):
            if side in task:
                lines = [json.dumps({"text": f"{task['name']} text {i} of some words"}) for i in range(count)]
                (folder / task[side]).write_text("".join(f"{line}\n" for line in lines))


TEXT, FLAGS = Value("string"), ClassLabel(names=["False", "True"])
THREE = {"glue": ["entailment", "neutral", "contradiction"], "super_glue": ["entailment", "contradiction", "neutral"]}
STARS = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
TOPICS = ["Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet"]
TOPICS += ["Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"]
THINGS = ["Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building"]
THINGS += ["NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"]
# (Hub id, configuration): columns in their order; the hidden labels of SuperGLUE's and GLUE's test splits are -1
HUB: dict[tuple[str, str | None], dict] = {
    ("fancyzhx/dbpedia_14", None): {"label": ClassLabel(names=THINGS), "title": TEXT, "content": TEXT},
    ("fancyzhx/ag_news", None): {"text": TEXT, "label": ClassLabel(names=["World", "Sports", "Business", "Sci/Tech"])},
    ("Yelp/yelp_review_full", None): {"label": ClassLabel(names=STARS), "text": TEXT},
    ("stanfordnlp/imdb", None): {"text": TEXT, "label": ClassLabel(names=["neg", "pos"])},
    ("community-datasets/yahoo_answers_topics", None): {
        "id": Value("int32"),
        "topic": ClassLabel(names=TOPICS),
        "question_title": TEXT,
        "question_content": TEXT,
        "best_answer": TEXT,
    },
    ("nyu-mll/glue", "mnli"): {"premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=THREE["glue"])},
    ("nyu-mll/glue", "qqp"): {
        "question1": TEXT,
        "question2": TEXT,
        "label": ClassLabel(names=["not_duplicate", "duplicate"]),
    },
    ("nyu-mll/glue", "rte"): {
        "sentence1": TEXT,
        "sentence2": TEXT,
        "label": ClassLabel(names=["entailment", "not_entailment"]),
    },
    ("nyu-mll/glue", "sst2"): {"sentence": TEXT, "label": ClassLabel(names=["negative", "positive"])},
    ("aps/super_glue", "cb"): {"premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=THREE["super_glue"])},
    ("aps/super_glue", "copa"): {
        "premise": TEXT,
        "choice1": TEXT,
        "choice2": TEXT,
        "question": TEXT,
        "label": ClassLabel(names=["choice1", "choice2"]),
    },
    ("aps/super_glue", "multirc"): {"paragraph": TEXT, "question": TEXT, "answer": TEXT, "label": FLAGS},
    ("aps/super_glue", "boolq"): {"question": TEXT, "passage": TEXT, "label": FLAGS},
    ("aps/super_glue", "wic"): {"word": TEXT, "sentence1": TEXT, "sentence2": TEXT, "label": FLAGS},
}


def olora(folder: Path, stream: dict) -> None:
    """Every data set of the stream with its splits; yahoo's question_content is often empty; amazon is a CSV."""
    for task in stream["tasks"]:
        name, config = task["dataset"], task.get("dataset_config")
        if name.startswith("yassiracharki/"):
            _amazon(folder / name)
            continue
        features, splits = HUB[name, config], {}
        for split in ("train", task.get("test_split", "test"), "test"):
            splits[split] = {column: _cells(column, kind) for column, kind in features.items()}
            hidden = split == "test" and "test_split" in task
            if hidden:
                splits[split]["label"] = [-1] * len(splits[split]["label"])
        write_hub(folder, name, features, splits, config=config)


def _cells(column: str, kind: ClassLabel | Value) -> list:
    """28 cells of a column: each label in turn, numbers, or texts."""
    if isinstance(kind, ClassLabel):
        return [i % kind.num_classes for i in range(28)]
    if kind.dtype != "string":
        return list(range(28))
    return ["" if column == "question_content" and i % 2 else f"{column} {i}" for i in range(28)]


def _amazon(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("train", "test"):
        rows = [{"class_index": i % 5 + 1, "review_title": f"title {i}", "review_text": f"text {i}"} for i in range(10)]
        write_csv(folder / f"{side}.csv", [rows[0] | {"review_title": ""}, *rows])


# pictures


def arrays(folder: Path, stream: dict) -> None:
    """An .npz file, by domains where the stream is."""
    domains = ["photo", "sketch"] if stream.get("domain_column") else None
    write_npz(folder / stream["train"], _names(stream), train=3, test=1, domains=domains)


def imagenet_r(folder: Path, stream: dict) -> None:
    """axiong/imagenet-r: one split, `test`; the class as WordNet id and as name."""
    features = {"image": Image(), "wnid": Value("string"), "class_name": Value("string")}
    labels = [name for name in _names(stream) for _ in range(3)]
    columns = {"image": _files(labels), "wnid": labels, "class_name": [f"name of {name}" for name in labels]}
    write_hub(folder, "axiong/imagenet-r", features, {"test": columns})


def imagenet_a(folder: Path, stream: dict) -> None:
    """barkermrl/imagenet-a: one split, `train`."""
    names = _names(stream)
    features = {"image": Image(), "label": ClassLabel(names=names)}
    labels = [name for name in names for _ in range(3)]
    write_hub(folder, "barkermrl/imagenet-a", features, {"train": {"image": _files(labels), "label": labels}})


def domainnet(folder: Path, stream: dict) -> None:
    """wltjr1007/DomainNet: all domains in each split."""
    names, domains = _names(stream), ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
    features = {
        "image": Image(),
        "label": ClassLabel(names=names),
        "domain": ClassLabel(names=domains),
        "image_path": Value("string"),
    }
    splits = {}
    for split, count in (("train", 3), ("test", 1)):
        labels = [name for name in names for _ in range(count)]
        drawn = [domain for domain, _ in zip(itertools.cycle(domains), labels, strict=False)]
        paths = [f"{domain}/{label}/{i}.jpg" for i, (domain, label) in enumerate(zip(drawn, labels, strict=True))]
        splits[split] = {"image": _files(labels), "label": labels, "domain": drawn, "image_path": paths}
    write_hub(folder, "wltjr1007/DomainNet", features, splits)


def cifar100(folder: Path, stream: dict) -> None:
    """uoft-cs/cifar100: the picture in `img`, fine and coarse labels."""
    names, coarse = _names(stream), ["coarse0", "coarse1"]
    features = {"img": Image(), "fine_label": ClassLabel(names=names), "coarse_label": ClassLabel(names=coarse)}
    splits = {}
    for split, count in (("train", 3), ("test", 1)):
        labels = [name for name in names for _ in range(count)]
        above = [coarse[names.index(label) % 2] for label in labels]
        splits[split] = {"img": _files(labels), "fine_label": labels, "coarse_label": above}
    write_hub(folder, "uoft-cs/cifar100", features, splits, config="cifar100")


def cub200(folder: Path, stream: dict) -> None:
    """bentrevett/caltech-ucsd-birds-200-2011: a bounding box beside the label."""
    names = [f"{i + 1:03d}.{name}" for i, name in enumerate(_names(stream))]
    features = {"image": Image(), "label": ClassLabel(names=names), "bbox": List(Value("float64"))}
    splits = {}
    for split, count in (("train", 3), ("test", 1)):
        labels = [name for name in names for _ in range(count)]
        splits[split] = {"image": _files(labels), "label": labels, "bbox": [[1.0, 2.0, 5.0, 6.0]] * len(labels)}
    write_hub(folder, "bentrevett/caltech-ucsd-birds-200-2011", features, splits)


def _names(stream: dict) -> list[str]:
    """Two classes for each group, three where the tasks are domains."""
    groups = stream.get("class_groups")
    return [f"n{i:04d}" for i in range(2 * groups if groups else 3)]


def _files(labels: list[str]) -> list[dict]:
    """Pictures of the labels as files of different formats."""
    pictures = draw(labels, sorted(set(labels)), seed=len(labels))
    formats = itertools.cycle(FORMATS)
    return [{"bytes": encoded(picture, *next(formats)), "path": None} for picture in pictures]
