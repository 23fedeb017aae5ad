"""What the pages take from elsewhere when they are built: `<!-- results -->`."""

import re
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
LINK = re.compile(r"(!?)\[([^]]+)\]\((?!http)([^)#]+)\)")


class PlainUnderscores(Extension):
    """No emphasis by underscores, nor by asterisks inside a word: they are indices and optima here, θ_t and θ*."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Markdown's own entry point."""
        md.delimiters.remove("_")
        md.delimiters.add("*", "strong,em", smart=True)


def on_config(config: Any) -> None:
    """mkdocs calls it once."""
    config.markdown_extensions.append(PlainUnderscores())


def on_files(files: Any, config: Any) -> None:
    """mkdocs calls it once: the pictures of the results are files of the site."""
    from mkdocs.structure.files import File

    for path in pictures():
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls it for every page."""
    filled = markdown.replace("<!-- results -->", results())
    return filled.replace("](../results/", "](results/")  # a picture of the results, where the site has it


def results() -> str:
    """results/README.md below its title; what it links to is not in the site, but its pictures are."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8").partition("\n")[2]
    return LINK.sub(lambda link: f"![{link[2]}](results/{link[3]})" if link[1] else link[2], text).strip()


def pictures() -> list[Path]:
    """The pictures that results/README.md shows."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    return [RESULTS / link[3] for link in LINK.finditer(text) if link[1]]
