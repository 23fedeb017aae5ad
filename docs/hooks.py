"""What the pages take from the code and the README when they are built: `<!-- name -->` becomes a table or a text."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown

from pm_hf.config.presets import PRESETS as STREAM_METHODS
from pm_hf.config.schema import StrategySettings
from pm_hf.merging.methods import METHODS as MERGING_METHODS

ROOT = Path(__file__).parents[1]
README, SETTINGS = ROOT / "README.md", ROOT / "pm_hf" / "config" / "schema.py"
OFF = StrategySettings()


class PlainUnderscores(Extension):
    """No emphasis by underscores, nor by asterisks inside a word: they are indices and optima here, θ_t and θ*."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Markdown's own entry point."""
        md.delimiters.remove("_")
        md.delimiters.add("*", "strong,em", smart=True)


def on_config(config: Any) -> None:
    """mkdocs calls it once."""
    config.markdown_extensions.append(PlainUnderscores())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls it for every page."""
    for name, made in PARTS.items():
        markdown = markdown.replace(f"<!-- {name} -->", made())
    return re.sub(r"<!-- readme: (.+?) -->", lambda found: readme_section(found[1]), markdown)


def merging_methods() -> str:
    """One line a method: equation, paper, what it merges, where its training starts, needs and cost."""
    head = ["method", "result", "paper", "merges", "trained from", "needs", "cost"]
    rows = []
    for name, method in MERGING_METHODS.items():
        kinds = " and ".join(kind for kind, has in (("folds", method.fold), ("several", method.batch)) if has)
        about, paper = method.about.replace("*", r"\*"), _links(method.paper)
        rows.append([f"`{name}`", about, paper, kinds, method.train_from, method.needs, method.cost])
    return table(head, rows)


def merging_options() -> str:
    """One line an option of a method: default and meaning."""
    rows = [
        [f"`{name}`", f"`{key}`", f"`{option.default}`", option.about]
        for name, method in MERGING_METHODS.items()
        for key, option in method.options.items()
    ]
    return table(["method", "option", "default", "what it is"], rows)


def stream_methods() -> str:
    """One line a method of a stream: what it sets where the YAML is silent."""
    head = ["`method:`", "`merge.method`", "`merge.freedom`", "`merge.max_rank`", "`perturbation.scale`"]
    return table(
        [*head, "`curvature`", "`head.kind`", "further"], [_stream_row(*pair) for pair in STREAM_METHODS.items()]
    )


def settings() -> str:
    """The file of all settings."""
    return f"```python\n{SETTINGS.read_text(encoding='utf-8')}```"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def readme_section(title: str) -> str:
    """The text below a heading of the README."""
    found = re.search(rf"^## {re.escape(title)}\n+(.*?)(?=^## |\Z)", README.read_text(encoding="utf-8"), re.M | re.S)
    if found is None:
        raise ValueError(f"README.md has no section {title!r}")
    return found[1].strip()


def _stream_row(name: str, sets: Mapping[str, Any]) -> list[object]:
    merge, curvature = sets["merge"], {key: value for key, value in sets["curvature"].items() if value is not None}
    further = [f"`strategy.{key}: {value}`" for key, value in sets["strategy"].items() if value != getattr(OFF, key)]
    further += ["`head.training: seen`"] if sets["head"].get("training") == "seen" else []
    further += [] if sets["trains"] else ["`trains: false`"]
    rank = "exact" if merge["max_rank"] is None else merge["max_rank"]
    scale = sets["perturbation"]["scale"] or ""
    cells = (merge["method"], merge["freedom"], rank, scale, ", ".join(curvature.values()), sets["head"]["kind"])
    return [f"`{name}`", *cells, ", ".join(further)]


def _links(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"arXiv [\1](https://arxiv.org/abs/\1)", paper)


PARTS: dict[str, Callable[[], str]] = {
    "merging methods": merging_methods,
    "merging options": merging_options,
    "stream methods": stream_methods,
    "settings": settings,
}
