"""PEFT's add_weighted_adapter beside merge_adapters on every kind of adapter: results/merging/exactness.*

python benchmarks/merging/exactness.py [--only NAME] [--no-results]

Each number is ‖update − expected‖/‖expected‖ over all weights of the model, in float64; expected is Σ wᵢΔᵢ of the
updates that PEFT itself makes of the adapters. Identity is one adapter with weight 1, the mix 0.3 and 0.7. "a → b": a
in memory, b after saving and loading again. PEFT's svd keeps its default rank, the larger of the two. The rows on 4-bit
and 8-bit bases need bitsandbytes; run the script with an environment that has it.
"""

# mypy: disable-error-code="import-not-found"
import argparse
import copy
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from environment import environment  # noqa: E402
from helpers.peft_adapters import (  # noqa: E402
    KINDS,
    Kind,
    active_update,
    build,
    combine,
    distance,
    load,
    save,
    seeded,
    update,
)
from helpers.peft_refused import REFUSED, trained  # noqa: E402

from pm_hf import InputError, merge_adapters  # noqa: E402
from pm_hf.files import write_json  # noqa: E402

RESULTS = ROOT / "results" / "merging"
WEIGHTS = [0.3, 0.7]
COMBINATIONS = ("cat", "svd", "linear")
Cell = dict[str, object]


def main() -> int:
    """Measure every row, print the tables, write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--no-results", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, refused = {}, {}
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (name, kind) in enumerate((KINDS | quantised(Path(temporary))).items()):
            if options.only in name:
                rows[name] = measure(kind, Path(temporary) / f"kind-{i}")
        for name in REFUSED:
            if options.only in name:
                refused[name] = measure_refused(name, Path(temporary) / f"refused-{name}")
    text = table(rows) + "\n" + refused_table(refused)
    print(text)
    if not options.no_results:
        RESULTS.mkdir(parents=True, exist_ok=True)
        extra = {"bitsandbytes": version("bitsandbytes")} if any("bit base" in name for name in rows) else {}
        write_json(RESULTS / "exactness.json", {"rows": rows, "refused": refused, **extra, **environment()})
        (RESULTS / "exactness.md").write_text(text, encoding="utf-8")
    return 0


def measure(kind: Kind, folder: Path) -> dict[str, Cell]:
    """Relative errors of one kind: PEFT's in memory and saved and loaded again, and ours."""
    adapters = build(kind, folder)
    updates = [update(kind, adapter) for adapter in adapters]
    mixed = combine(updates, WEIGHTS)
    cells: dict[str, Cell] = {
        "PEFT identity": peft_cell(kind, adapters[:1], [1.0], "svd", updates[0], folder / "peft-identity"),
        "ours identity": our_cell(kind, adapters[:1], [1.0], updates[0], folder / "ours-identity"),
    }
    for combination in COMBINATIONS:
        output = folder / f"peft-{combination}"
        cells[f"PEFT {combination}"] = peft_cell(kind, adapters, WEIGHTS, combination, mixed, output)
    return cells | {"ours": our_cell(kind, adapters, WEIGHTS, mixed, folder / "ours")}


def our_cell(kind: Kind, adapters: list[Path], weights: list[float], expected: dict, output: Path) -> Cell:
    """Our relative error, as PEFT reads the folder."""

    def merge() -> Cell:
        merge_adapters(adapters, output, method="average", weights=weights)
        return {"reloaded": distance(update(kind, output), expected)}

    return attempt(merge)


def peft_cell(
    kind: Kind, adapters: list[Path], weights: list[float], combination: str, expected: dict, output: Path
) -> Cell:
    """PEFT's relative error in memory, and as it reads the folder that it saved."""
    names = [f"adapter_{i}" for i in range(len(adapters))]

    def merge() -> Cell:
        model = load(kind.model(), adapters[0], ".*")
        for name, adapter in zip(names, adapters, strict=True):
            model.load_adapter(adapter, name)
        model.add_weighted_adapter(names, weights, "merged", combination_type=combination)
        model.set_adapter("merged")
        save(model, output, selected_adapters=["merged"])
        again = attempt(lambda: {"reloaded": distance(update(loose(kind), output / "merged"), expected)})
        problem = {"reload": again["raises"]} if "raises" in again else again
        return {"in memory": distance(active_update(kind, copy.deepcopy(model).double()), expected)} | problem

    return attempt(merge)


def loose(kind: Kind) -> Kind:
    """The kind, with PEFT's warnings about what it saved let pass."""
    return Kind(kind.model, kind.first, by_layer=kind.by_layer, warning=".*")


def attempt(work: Callable[[], Cell]) -> Cell:
    """The cell, or what was raised."""
    try:
        return work()
    except InputError as error:
        return {"refused": str(error)}
    except Exception as error:  # whatever PEFT raises is the result
        return {"raises": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def measure_refused(name: str, folder: Path) -> dict[str, Cell]:
    """What PEFT makes of an adapter that we refuse: identity merge, and save_as_lora."""
    import peft

    adapter = trained(name, folder)
    kind, expected = Kind(adapter.row.model, {}, warning=".*"), adapter.update
    ours = attempt(lambda: {"report": repr(merge_adapters(adapter.path, folder / "ours", method="average"))})
    cells: dict[str, Cell] = {"ours": {key: str(text).replace(str(adapter.path), name) for key, text in ours.items()}}
    if expected is None:
        return cells  # PEFT has no merged weights to compare with
    lora = adapter.row.config == "LoraConfig"
    absent: Cell = {"raises": "AttributeError: no add_weighted_adapter"}
    identity = peft_cell(kind, [adapter.path], [1.0], "svd", expected, folder / "peft") if lora else absent

    def convert() -> Cell:
        peft.save_as_lora(folder / "lora", copy.deepcopy(adapter.model), rank=16)  # the smaller side of every matrix
        return {"reloaded": distance(update(kind, folder / "lora"), expected)}

    return cells | {"PEFT identity": identity, "PEFT save_as_lora": attempt(convert)}


def quantised(folder: Path) -> dict[str, Kind]:
    """Adapters on 4-bit and 8-bit bases, where bitsandbytes is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        print("4-bit and 8-bit bases: not run, bitsandbytes is not installed here", file=sys.stderr)
        return {}
    from helpers.peft_adapters import llama
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    seeded(llama).save_pretrained(folder / "base")

    def base(**settings) -> Callable[[], torch.nn.Module]:
        config = BitsAndBytesConfig(**settings)
        return lambda: LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=config, device_map="cpu")

    settings = {"r": 3, "target_modules": ["q_proj", "v_proj"]}
    return {
        "4-bit base": Kind(base(load_in_4bit=True), settings, {"r": 2}, by_layer=True),
        "8-bit base": Kind(base(load_in_8bit=True), settings, {"r": 2}, by_layer=True),
    }


def table(rows: dict[str, dict[str, Cell]]) -> str:
    """One line for each kind, as Markdown."""
    columns = ["PEFT identity", "ours identity", *(f"PEFT {combination}" for combination in COMBINATIONS), "ours"]
    lines = ["| adapter | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(show(cells[column]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def refused_table(rows: dict[str, dict[str, Cell]]) -> str:
    """What is refused, beside what PEFT does with it."""
    lines = ["| refused | PEFT identity | PEFT save_as_lora, full rank | ours |", "|---|---|---|---|"]
    for name, cells in rows.items():
        ours = "refused" if "refused" in cells["ours"] else show(cells["ours"])
        lines.append(
            f"| {name} | {show(cells.get('PEFT identity', {}))} | {show(cells.get('PEFT save_as_lora', {}))} | {ours} |"
        )
    return "\n".join(lines) + "\n"


def show(cell: Cell) -> str:
    """A relative error, or what happened instead."""
    if "raises" in cell or "refused" in cell:
        return "raises " + str(cell["raises"]).partition(":")[0] if "raises" in cell else "refused"
    numbers = [cell[key] for key in ("in memory", "reloaded") if key in cell]
    text = " → ".join(dict.fromkeys(f"{number:.1e}" for number in numbers)) or "–"
    return f"{text}, cannot be loaded again" if "reload" in cell else text


if __name__ == "__main__":
    sys.exit(main())
