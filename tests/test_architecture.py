"""Imports only go down the tiers, and the mathematics stands alone."""

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pm_hf

PACKAGE = Path(pm_hf.__file__).parent
TIERS = [
    [
        "conditions",
        "errors",
        "files",
        "memory",
        "versions",
        "merging",
        "merging.*",
        "heads",
        "loss_log",
        "metrics",
        "perturbation",
        "processes",
    ],
    [
        "layouts",
        "refusals",
        "adapters",
        "adapter_*",
        "download",
        "plan",
        "saved",
        "merge",
        "settings",
        "checks",
        "config",
        "typed",
        "rows",
        "images",
        "language",
        "language_scoring",
        "sources",
        "tasks",
        "targets",
        "encoding",
        "scoring",
        "modeling",
        "sharding",
        "quantized",
        "gguf",
        "inspection",
    ],
    [
        "trainer",
        "checkpoints",
        "penalties",
        "regularised",
        "fisher",
        "training",
        "stopping",
        "adaptive",
        "adaptive_model",
    ],
    [
        "learner",
        "merge_line",
        "runs",
        "released",
        "report",
        "analytic",
        "strategies",
        "published",
        "tracking",
        "card",
        "hub",
        "saved_runs",
        "charts",
        "run_charts",
        "pictures",
        "page",
        "page_*",
    ],
    ["cli"],
]
MAX_LINES = 400


def module_name(path: Path) -> str:
    """`merging.solve` for pm_hf/merging/solve.py, `merging` for its __init__, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in SOURCES if name]  # the package's own __init__ hands names of every tier on, lazily


def tier(module: str) -> int | None:
    found = [level for level, patterns in enumerate(TIERS) if any(fnmatchcase(module, p) for p in patterns)]
    return found[0] if len(found) == 1 else None


def imports(source: str, package: str = "") -> set[str]:
    """Modules of pm_hf that a source imports anywhere, inside functions too; "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["pm_hf", *package.split(".")] if package else ["pm_hf"]
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            submodules = {f"{base}.{name.name}" for name in node.names if f"{base}.{name.name}"[6:] in SOURCES}
            names_of_base = len(submodules) < len(node.names)
            found |= submodules | ({base} if names_of_base else set())
    return {name[6:] for name in found if name == "pm_hf" or name.startswith("pm_hf.")}


GRAPH = {
    name: imports(
        SOURCES[name].read_text(encoding="utf-8"),
        name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0],
    )
    for name in MODULES
}


def test_the_parser_sees_every_way_to_import():
    source = """
import pm_hf.heads
from pm_hf import errors, learn
from .files import write_json
if TYPE_CHECKING:
    from pm_hf.merging.solve import Coefficient
def later():
    from pm_hf.merging import curvature
    import torch, pm_hf_other
"""
    assert imports(source) == {"heads", "errors", "", "files", "merging.solve", "merging.curvature"}
    assert imports("from ..errors import InputError\nfrom . import lowrank", "merging") == {"errors", "merging.lowrank"}


def test_every_module_is_in_one_tier():
    homeless = [name for name in MODULES if tier(name) is None]
    assert not homeless, f"give {homeless} a tier in {Path(__file__).name}"


def test_imports_never_go_up():
    upward = [
        f"{module} (tier {tier(module)}) imports {target} (tier {tier(target)})"
        for module in MODULES
        for target in GRAPH[module]
        if target and (tier(target) or 0) > (tier(module) or 0)
    ]
    assert not upward, "; ".join(upward)


def test_no_module_goes_through_the_package_itself():
    around = [module for module in MODULES if "" in GRAPH[module]]
    assert not around, f"{around} import from pm_hf, which leads to every tier; name the module"


def test_modules_do_not_import_in_a_circle():
    TopologicalSorter(
        {name: targets - {""} for name, targets in GRAPH.items()}
    ).prepare()  # CycleError names the circle


@pytest.mark.parametrize("module", SOURCES, ids=lambda name: name or "__init__")
def test_no_file_is_too_long(module):
    lines = len(SOURCES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{SOURCES[module].name} has {lines} lines: split it along its sections"


def test_the_package_and_its_mathematics_need_no_model_library():
    tier_zero = ", ".join(["pm_hf", *(f"pm_hf.{name}" for name in MODULES if tier(name) == 0)])
    assert "pm_hf.merging.solve" in tier_zero
    program = (
        f"import sys, {tier_zero}\n"
        "print(sorted({'transformers', 'peft', 'datasets', 'evaluate', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_alone_does_not_even_load_torch():
    program = "import sys, pm_hf; print('torch' in sys.modules, [name for name in sys.modules if 'pm_hf.' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"
