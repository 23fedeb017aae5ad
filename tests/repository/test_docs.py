"""README and docs/: what they link to and say of the code is there; every command and snippet runs (slow)."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from helpers.documents import EXCEPTIONS, LANGUAGES, PAGES, ROOT, RUN, Block, blocks, to_run
from helpers.processes import forked_pm_hf
from test_architecture import GROUND, MAY_IMPORT

import pm_hf
from pm_hf.config.loading import load_config
from pm_hf.config.presets import PRESETS
from pm_hf.config.schema import LoraSettings, RunConfig
from pm_hf.merging import METHODS as MERGING

DOCS = [page for page in PAGES if page.startswith("docs/")]
RUNNING = [page for page in PAGES if any(block.language in RUN for block in to_run(page))]
LINKING = ["results/README.md", "benchmarks/README.md", "CONTRIBUTING.md", "REPRODUCTION.md", "CHANGELOG.md"]
NEEDS = {"docs/trl.md": "trl"}


def module(path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def nav(entry):
    """Every page of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav(part)]


def anchor(heading):
    """The id of a heading as mkdocs and GitHub make it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


# ---- static


def test_navigation_lists_every_page_once():
    pages = nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(f"docs/{page}" for page in pages) == DOCS
    assert len(DOCS) == 22


@pytest.mark.parametrize("page", [*PAGES, *LINKING])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M) if heading else []
        assert not heading or heading in map(anchor, headings), link


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_written_shown_or_an_exception(page):
    from helpers.documents import FOLDERS

    for block in blocks(page):
        assert block.language in (LANGUAGES if page != "README.md" else (*LANGUAGES, "")), f"line {block.line}"
        assert block.language != "yaml" or block.title, f"line {block.line}: a YAML without a file name"
    assert (page in RUNNING) == (page in FOLDERS)


def test_exceptions_still_exist():
    for page, first in EXCEPTIONS:
        assert [block.first for block in blocks(page)].count(first) == 1, (page, first)


def test_every_yaml_of_the_pages_is_a_valid_config():
    yamls = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert len(yamls) >= 8
    for block in yamls:
        load_config(yaml.safe_load(block.text))


def test_method_page_has_the_tables_of_the_code():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    tables = module(ROOT / "docs" / "tables.py")
    assert tables.with_tables(page) == page, "run: python docs/tables.py"
    rows = [re.split(r"(?<!\\)\|", line) for line in page.split("\n") if line.startswith("| `")]
    cells = [[cell.strip().replace(r"\|", "|") for cell in row[1:-1]] for row in rows if row[1].strip() != "`method:`"]
    options = [[f"`{name}`", f"`{key}`"] for name, method in MERGING.items() for key in method.options]
    titles, presets = [f"`{name}`" for name in MERGING], [f"`{name}`" for name in PRESETS]
    count = len(titles) + len(options)
    assert [row[0] for row in cells[: len(titles)]] == titles
    assert [row[1] for row in cells[: len(titles)]] == [method.about.replace("*", r"\*") for method in MERGING.values()]
    assert [row[:2] for row in cells[len(titles) : count]] == options
    assert [row[0] for row in cells[count:]] == [*presets, *presets]  # in words, and their settings


def test_settings_page_has_every_setting():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    tables = module(ROOT / "docs" / "tables.py")
    assert tables.with_tables(page) == page, "run: python docs/tables.py"
    names = {f"`{field.name}`" for field in fields(RunConfig) if not is_dataclass(getattr(RunConfig(), field.name))}
    names |= {f"`{field.name}`" for field in fields(LoraSettings)}
    assert names <= {line.split("|")[1].strip() for line in page.split("\n") if line.startswith("| `")}


def test_architecture_page_says_what_the_tests_hold():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", page, flags=re.M)
    told = {
        name: set(re.findall(r"`([\w.]+)`", may)) | (set(GROUND) if "ground" in may else set()) for name, _, may in rows
    }
    assert told == {name: set(may) for name, may in MAY_IMPORT.items()}
    assert [name for name, *_ in rows] == list(MAY_IMPORT)
    for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", page):
        assert any((place / path).is_file() for place in (ROOT, ROOT / "pm_hf")), path


def test_results_page_is_that_of_the_results_with_its_pictures():
    hooks = module(ROOT / "docs" / "hooks.py")
    page = hooks.on_page_markdown((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    tables = [
        line for line in (ROOT / "results" / "README.md").read_text(encoding="utf-8").split("\n") if line[:1] == "|"
    ]
    assert len([line for line in page.split("\n") if line[:1] == "|"]) == len(tables)
    assert re.findall(r"\]\((?!http)(\S+)\)", page) == [path.relative_to(ROOT).as_posix() for path in hooks.pictures()]
    assert len(hooks.pictures()) == 2
    assert all(path.is_file() for path in hooks.pictures())


def test_figures_of_the_choice_of_methods_are_lines_of_the_results():
    text = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    measured = (ROOT / "results" / "README.md").read_text(encoding="utf-8").split("\n")
    table = [line for line in text.split("\n") if line.startswith("|") and line.count("|") == 9]
    assert len(table) == 8
    assert set(table) <= set(measured)


def test_every_public_name_is_on_the_api_page():
    named = re.findall(r"^::: [\w.]+\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M)
    assert set(pm_hf.__all__) <= set(named)


def test_plots_are_what_their_script_makes():
    plots = module(ROOT / "docs" / "plots" / "make.py")
    for chart in (plots.line_chart(), plots.ratio_chart()):
        made = plots.svg(chart, chart.name, alone=True) + "\n"
        assert made == (ROOT / "docs" / "plots" / f"{chart.name}.svg").read_text(encoding="utf-8")
    past, new, whole, chosen = plots.line_chart().series
    assert chosen.y[0] <= min(whole.y)
    assert min(new.y) == new.y[-1]  # the new task alone would be taken in full
    assert past.y[-1] > 0
    alpha, level = plots.ratio_chart().series
    assert sorted(alpha.y) == list(alpha.y)
    assert alpha.y[len(alpha.y) // 2] == pytest.approx(level.y[0], abs=0.15)


# ---- running


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # of trainers that miss a GPU
@pytest.mark.parametrize("page", RUNNING)
def test_every_command_and_snippet_of_the_page_runs(page, tiny_base, tmp_path, monkeypatch):
    from helpers.documents import FOLDERS

    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"{page} needs {NEEDS[page]}")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    snippets = ModuleType("snippets")  # one that classes can be pickled from
    monkeypatch.setitem(sys.modules, "snippets", snippets)
    names = vars(snippets)
    names |= FOLDERS[page](tiny_base)
    with tempfile.TemporaryDirectory(prefix="pm-") as place, forked_pm_hf(Path(place) / "bin") as commands:
        path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
        monkeypatch.setenv("PATH", path)
        for block in to_run(page):
            run(page, block, names)


def run(page: str, block: Block, names: dict) -> None:
    """One block in the working folder; a Python block sees the names of those before it."""
    if block.language == "yaml":
        Path(block.title).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
    else:
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ended.returncode == 0, f"{page}, line {block.line}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
