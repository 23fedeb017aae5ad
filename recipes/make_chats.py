"""Four text sets as chats, for a stream of skills: runs/chats/data/TASK-{train,test}.jsonl.

python recipes/make_chats.py --data ../shared/data/text [--output runs/chats/data]

A row is `messages`: a system prompt, a user who asks in one of two phrasings of the task, and the answer in a word or
two. --data has trec6, snips, sst2 and mpqa as gzipped CSV files of text,label.
"""

import argparse
import csv
import gzip
import json
import random
import sys
from pathlib import Path

from pm_hf.errors import InputError

OUTPUT = Path("runs/chats/data")
ROWS = {"train": 2000, "test": 400}  # at most, of each task
SYSTEM = "You are a careful assistant. Answer in one or two words."
# task: (set, two phrasings, {label: answer})
TASKS: dict[str, tuple[str, tuple[str, str], dict[str, str]]] = {
    "question": (
        "trec6",
        ("What does this question ask for? {text}", "{text}\nWhich kind of answer is expected here?"),
        {
            "DESC": "description",
            "ABBR": "description",
            "ENTY": "entity",
            "HUM": "person",
            "NUM": "number",
            "LOC": "location",
        },
    ),
    "command": (
        "snips",
        ("Which skill handles this request: {text}", 'A user says "{text}". Which skill should act?'),
        {
            "PlayMusic": "music",
            "AddToPlaylist": "playlist",
            "RateBook": "book",
            "SearchScreeningEvent": "screening",
            "BookRestaurant": "restaurant",
            "GetWeather": "weather",
            "SearchCreativeWork": "title",
        },
    ),
    "review": (
        "sst2",
        ("Is this review positive or negative? {text}", "{text}\nHow did the critic like the film?"),
        {"positive": "positive", "negative": "negative"},
    ),
    "phrase": (
        "mpqa",
        ('Does "{text}" sound good or bad?', "Tone of the phrase: {text}"),
        {"positive": "good", "negative": "bad"},
    ),
}


def main() -> int:
    """Write every file; 2 where a text set is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with trec6_train.csv.gz and the others")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    try:
        write(options.data, options.output)
    except InputError as error:
        print(f"chats: {error}", file=sys.stderr)
        return 2
    return 0


def write(data: Path, output: Path) -> None:
    """All files; the last is phrase-test.jsonl."""
    output.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for side in ROWS:
            lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats(data, task, side)]
            (output / f"{task}-{side}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def chats(data: Path, task: str, side: str) -> list[list[dict[str, str]]]:
    """The messages of each row of one file, in an order drawn with its name."""
    name, phrasings, answers = TASKS[task]
    path = data / f"{name}_{side}.csv.gz"
    if not path.is_file():
        raise InputError(f"file {path} does not exist")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    draw = random.Random(f"{task}/{side}")
    return [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": draw.choice(phrasings).format(text=row["text"])},
            {"role": "assistant", "content": answers[row["label"]]},
        ]
        for row in draw.sample(rows, min(ROWS[side], len(rows)))
    ]


if __name__ == "__main__":
    sys.exit(main())
