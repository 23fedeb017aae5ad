"""A small T5, trained from scratch on this machine's texts: the base of the stream t5-text.

python recipes/make_t5.py --data ../shared/data/text [--output runs/t5-text/base]

1.1 million parameters (width 128, 2 + 2 layers, a byte-level BPE of 2,048 tokens trained here), 2,600 steps of 32 rows,
about nine minutes on one core. It has read clinc150, banking77, agnews and news20 (24 words of a text), never the sets
that the stream's tasks are made of, nor a text that is in one of them too. Three kinds of rows in equal shares: spans
of a text to be filled in (T5, arXiv 1910.10683, section 3.1.4: .15 of the tokens, spans of 3), the label of a text, the
text of a label. Adafactor, whose steps are relative to a weight's size as in that paper: AdamW leaves T5's large
embeddings where they began.
"""

import argparse
import csv
import gzip
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from pm_hf.data.language import pad_rows
from pm_hf.errors import InputError
from pm_hf.models.language_model import IGNORED

OUTPUT = Path("runs/t5-text/base")
READ, OF_TASKS = ("clinc150", "banking77", "agnews", "news20"), ("trec6", "snips", "sst2", "mpqa")
VOCABULARY, SENTINELS, LONGEST = 2048, 16, 48  # tokens; tokens of an input or an output at most
WORDS = 24  # of a text
STEPS, BATCH, WARMUP, RATE, SEED = 2600, 32, 100, 1e-2, 0
CORRUPTED, SPAN = 0.15, 3  # share of the tokens that are left out, tokens of a span
SHAPE = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}


def main() -> int:
    """Train it and write the checkpoint; 2 where a file is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clinc150_*.csv.gz and the others")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    try:
        write(options.data, options.output, options.steps)
    except InputError as error:
        print(f"t5: {error}", file=sys.stderr)
        return 2
    return 0


def write(data: Path, output: Path, steps: int = STEPS) -> None:
    """Tokenizer, weights and making.json (steps, CPU seconds, last losses), written last."""
    pairs = texts(data)
    tokenizer = train_tokenizer([part for pair in pairs for part in pair])
    model, record = train(tokenizer, pairs, steps)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    (output / "making.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def texts(data: Path) -> list[tuple[str, str]]:
    """(beginning of a text, label in words) of the sets that are read, without the texts of the tasks' sets."""
    known = {normal(text) for name in OF_TASKS for side in ("train", "test") for text, _ in rows(data, name, side)}
    found = [pair for name in READ for pair in rows(data, name, "train")]
    pairs = [(" ".join(text.split()[:WORDS]), re.sub("[_.]+", " ", label).strip().lower()) for text, label in found]
    return [pair for pair in dict.fromkeys(pairs) if normal(pair[0]) not in known]


def rows(data: Path, name: str, side: str) -> list[tuple[str, str]]:
    """(text, label) of a set."""
    path = data / f"{name}_{side}.csv.gz"
    if not path.is_file():
        raise InputError(f"file {path} does not exist")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        return [(row["text"], row["label"]) for row in csv.DictReader(handle)]


def normal(text: str) -> str:
    """A text without case, digits, punctuation and white space: what counts as the same text."""
    return "".join(re.findall(r"[a-z]+", text.lower()))


def train_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with T5's special tokens; every text ends with </s>."""
    special = ["<pad>", "</s>", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def train(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], steps: int
) -> tuple[T5ForConditionalGeneration, dict]:
    """The model after so many steps with a cosine schedule, and what became of its loss."""
    torch.manual_seed(SEED)
    config = T5Config(
        **SHAPE,
        vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config).train()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, steps))
    began, losses = time.process_time(), list[float]()
    for batch in batches(tokenizer, pairs, steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss.detach()))
        if len(losses) % 200 == 0:
            print(f"step {len(losses)}/{steps}: loss {sum(losses[-200:]) / 200:.3f}", file=sys.stderr, flush=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    last = losses[-200:]
    return model.eval(), {
        "steps": steps,
        "parameters": parameters,
        "texts": len(pairs),
        "loss": sum(last) / len(last),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def share_of_rate(step: int, steps: int) -> float:
    """Of the learning rate: up over WARMUP steps, then down along a cosine."""
    return min((step + 1) / WARMUP, (1 + math.cos(math.pi * step / steps)) / 2)


def batches(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], steps: int) -> Iterator[dict]:
    """`steps` batches of input_ids, attention_mask and labels, each of one kind of rows and of texts of like length."""
    rng, made = random.Random(SEED), 0
    while made < steps:
        order = rng.sample(pairs, len(pairs))
        pools = [sorted(order[at : at + 20 * BATCH], key=lambda pair: len(pair[0])) for at in range(0, len(order), 640)]
        parts = [pool[at : at + BATCH] for pool in pools for at in range(0, len(pool), BATCH)]
        for part in rng.sample(parts, len(parts))[: steps - made]:
            kind = made % 3
            sides = [example(tokenizer, kind, text, label, rng) for text, label in part]
            ids = [source[:LONGEST] for source, _ in sides]
            yield {
                "input_ids": pad_rows(ids, tokenizer.pad_token_id),
                "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
                "labels": pad_rows([target[:LONGEST] for _, target in sides], IGNORED),
            }
            made += 1


def example(
    tokenizer: PreTrainedTokenizerFast, kind: int, text: str, label: str, rng: random.Random
) -> tuple[list[int], list[int]]:
    """(input, target) tokens of a row of a kind."""
    if kind == 0:
        return corrupted(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"][: LONGEST - 8], rng)
    source, target = (f"{text}\nAnswer:", f" {label}") if kind == 1 else (f"Answer: {label}\nText:", f" {text}")
    return tokenizer(source)["input_ids"], tokenizer(target)["input_ids"]


def corrupted(tokenizer: PreTrainedTokenizerFast, ids: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """(the tokens with a sentinel in place of each span, the spans each after its sentinel)."""
    count = min(SENTINELS, max(1, round(CORRUPTED * len(ids) / SPAN)))
    width = min(SPAN, max(1, len(ids) // (2 * count)))
    starts = sorted(rng.sample(range(max(1, len(ids) // width)), min(count, max(1, len(ids) // width))))
    source, target, at = list[int](), list[int](), 0
    for number, place in enumerate(starts):
        sentinel, start = tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>"), place * width
        source += [*ids[at:start], sentinel]
        target += [sentinel, *ids[start : start + width]]
        at = start + width
    end = tokenizer.eos_token_id
    return [*source, *ids[at:], end], [*target, end]


if __name__ == "__main__":
    sys.exit(main())
