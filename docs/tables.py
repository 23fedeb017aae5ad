"""The tables of methods.md and settings.md, from the code: python docs/tables.py writes them between their marks."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pm_hf.config.presets import PRESETS
from pm_hf.config.reference import SettingRow, setting_rows, task_rows
from pm_hf.config.schema import StrategySettings
from pm_hf.merging.methods import METHODS

PAGES = [Path(__file__).with_name(name) for name in ("methods.md", "settings.md")]
BLOCK = re.compile(r"(<!-- ([\w ]+) -->\n\n).*?(<!-- end -->)", re.S)
OFF = StrategySettings()


def main() -> None:
    """Write the tables as they are now."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    """A text with every block `<!-- NAME --> … <!-- end -->` filled by the table of that name."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n\n{block[3]}", text)


def merging_methods() -> str:
    """One line a method: equation, paper, and its use: what it merges, where its training starts, needs, cost."""
    head = ["method", "result", "paper", "use"]
    rows = []
    for name, method in METHODS.items():
        kinds = " and ".join(kind for kind, has in (("folds", method.fold), ("several", method.batch)) if has)
        about, paper = method.about.replace("*", r"\*"), _links(method.paper)
        use = f"{kinds}; trained from {method.train_from}; needs {method.needs}; cost: {method.cost}"
        rows.append([f"`{name}`", about, paper, use])
    return table(head, rows)


def merging_options() -> str:
    """One line an option of a method: default and meaning."""
    rows = [
        [f"`{name}`", f"`{key}`", f"`{option.default}`", option.about]
        for name, method in METHODS.items()
        for key, option in method.options.items()
    ]
    return table(["method", "option", "default", "what it is"], rows)


def stream_methods() -> str:
    """One line a method of a stream: what it sets where the YAML is silent."""
    head = ["`method:`", "`merge.method`", "`merge.freedom`", "`merge.max_rank`", "`perturbation.scale`"]
    return table([*head, "`curvature`", "`head.kind`", "further"], [_stream_row(*pair) for pair in PRESETS.items()])


def settings() -> str:
    """A table a group of settings, those without a group first, and one of what a task says."""
    groups: dict[str, list[SettingRow]] = {}
    for row in setting_rows():
        groups.setdefault(row.name.rpartition(".")[0], []).append(row)
    groups["stream.tasks"] = task_rows()
    parts = []
    for group, rows in groups.items():
        lines = [[f"`{row.name.rpartition('.')[2]}`", row.takes, f"`{row.default}`", row.about] for row in rows]
        heading = [f"## {group}"] if group else []
        parts.append("\n\n".join([*heading, table(["setting", "takes", "default", "what it is"], lines)]))
    return "\n\n".join(parts)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _stream_row(name: str, sets: Mapping[str, Any]) -> list[object]:
    merge, curvature = sets["merge"], {key: value for key, value in sets["curvature"].items() if value is not None}
    further = [f"`strategy.{key}: {value}`" for key, value in sets["strategy"].items() if value != getattr(OFF, key)]
    shown = ("method", "freedom", "max_rank")
    further += [f"`merge.{key}: {value}`" for key, value in merge.items() if key not in shown and value is not None]
    further += ["`head.training: seen`"] if sets["head"].get("training") == "seen" else []
    further += [] if sets["trains"] else ["`trains: false`"]
    rank = "exact" if merge["max_rank"] is None else merge["max_rank"]
    scale = sets["perturbation"]["scale"] or ""
    cells = (merge["method"], merge["freedom"], rank, scale, ", ".join(curvature.values()), sets["head"]["kind"])
    return [f"`{name}`", *cells, ", ".join(further)]


def _links(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"arXiv [\1](https://arxiv.org/abs/\1)", paper)


TABLES: dict[str, Callable[[], str]] = {
    "merging methods": merging_methods,
    "merging options": merging_options,
    "stream methods": stream_methods,
    "settings": settings,
}


if __name__ == "__main__":
    main()
