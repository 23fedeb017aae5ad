"""The house: which package may import which, and what stands alone."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pm_hf
import pm_hf.merging
from pm_hf.merging import METHODS, Method

PACKAGE = Path(pm_hf.__file__).parent
GROUND = ("errors", "files", "distributed", "environment", "text")
# {package: what it may import besides itself}; docs/architecture.md says it in words
MAY_IMPORT = {
    "errors": ("text",),
    "files": ("errors",),
    "distributed": ("errors", "text"),
    "environment": ("errors", "distributed"),
    "text": (),
    "merging": GROUND,
    "config": (*GROUND, "merging"),
    "adapters": (*GROUND, "merging"),
    "models": (*GROUND, "merging", "config", "adapters"),
    "data": (*GROUND, "config", "models"),
    "measuring": (*GROUND, "merging", "config", "adapters", "models", "data"),
    "training": (*GROUND, "merging", "config", "adapters", "models", "data"),
    "runs": (*GROUND, "merging", "config", "adapters", "models", "data", "measuring", "training"),
    "reports": (*GROUND, "merging.coefficient", "config", "adapters", "measuring.metrics", "runs"),
    "cli": (*GROUND, "merging", "config", "adapters", "models", "data", "measuring", "training", "runs", "reports"),
}
LIGHT = (*GROUND, "merging", "config", "adapters")  # load neither transformers nor peft
PUBLIC = {
    "pm_hf": [
        *("Coefficient", "Curvature", "InputError", "MergeReport", "PMConfig", "PMTrainer"),
        *("PerturbationArguments", "PerturbationMixin", "Report", "describe", "estimate_curvature", "evaluate"),
        *("inspect_adapters", "learn", "learn_coefficients", "merge_adapters", "merge_line", "optimal_coefficient"),
        *("Pool", "RehearsalMixin", "WrittenRows", "label_rows", "relate", "write_rows"),
    ],
    "pm_hf.merging": [
        *("METHODS", "Coefficient", "Curvature", "LowRank", "Matrix", "Method", "Option", "free_solution"),
        *("get_method", "optimal_coefficient", "read_options"),
    ],
}


def module_name(path: Path) -> str:
    """`merging.lowrank` for pm_hf/merging/lowrank.py, `merging` for its __init__, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in SOURCES if name]  # the package's own __init__ hands names of every package on, lazily


def package(module: str) -> str:
    return module.partition(".")[0]


def imported_names(source: str, inside: str = "") -> set[tuple[str, str]]:
    """(module of pm_hf, name) of every import, inside functions too; (module, "") of a module imported whole."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(name.name, "") for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["pm_hf", *inside.split(".")] if inside else ["pm_hf"]
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            for name in node.names:
                whole = f"{base}.{name.name}"
                found.add((whole, "") if whole[6:] in SOURCES else (base, name.name))
    return {(module[6:], name) for module, name in found if module == "pm_hf" or module.startswith("pm_hf.")}


def imports(source: str, inside: str = "") -> set[str]:
    """Modules of pm_hf that a source imports anywhere; "" is the package itself."""
    return {module for module, _ in imported_names(source, inside)}


NAMES = {
    name: imported_names(
        SOURCES[name].read_text(encoding="utf-8"),
        name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0],
    )
    for name in MODULES
}
GRAPH = {name: {module for module, _ in found} for name, found in NAMES.items()}


def allowed(module: str, target: str) -> bool:
    """Whether a module may import another: of its own package, or of one that its package may import."""
    home = package(module)
    return package(target) == home or any(target == may or target.startswith(f"{may}.") for may in MAY_IMPORT[home])


def test_the_parser_sees_every_way_to_import():
    source = """
import pm_hf.measuring.metrics
from pm_hf import errors, learn
from .files import write_json
if TYPE_CHECKING:
    from pm_hf.merging.coefficient import Coefficient
def later():
    from pm_hf.merging import curvature
    import torch, pm_hf_other
"""
    assert imports(source) == {
        *("measuring.metrics", "errors", "", "files", "merging.coefficient", "merging.curvature"),
    }
    assert imports("from ..errors import InputError\nfrom . import lowrank", "merging") == {"errors", "merging.lowrank"}


def test_the_rule_tells_what_goes_up_or_sideways():
    assert allowed("data.stream", "models.loading")
    assert allowed("data.stream", "data.rows")
    assert allowed("reports.page", "measuring.metrics")
    assert not allowed("reports.page", "measuring.scores")
    assert not allowed("measuring.curvature", "training.trainer")
    assert not allowed("merging.lowrank", "adapters.folder")


def test_every_module_is_in_a_package_of_the_table():
    homeless = [name for name in MODULES if package(name) not in MAY_IMPORT]
    assert not homeless, f"{homeless}: a new package needs a row in MAY_IMPORT and in docs/architecture.md"


def test_imports_go_one_way():
    against = [
        f"{module} imports {target}"
        for module in MODULES
        for target in sorted(GRAPH[module])
        if target and not allowed(module, target)
    ]
    assert not against, "; ".join(against)


def test_no_module_goes_through_the_package_itself():
    around = [module for module in MODULES if "" in GRAPH[module]]
    assert not around, f"{around} import from pm_hf, which leads to every package; name the module"


def test_modules_do_not_import_in_a_circle():
    # a package's __init__ hands its own names on, so it is no station of a path through them
    graph = {
        name: {target for target in targets if target and SOURCES[target].name != "__init__.py"}
        for name, targets in GRAPH.items()
    }
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_no_module_takes_a_private_name_of_another():
    private = [
        f"{module} takes {name} of {target}"
        for module, found in NAMES.items()
        for target, name in sorted(found)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not private, "; ".join(private)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    assert sorted(sys.modules[module].__all__ if module in sys.modules else []) == sorted(PUBLIC[module])


# where a merging method may be named: its row, the presets of a stream, what two public functions do by default
METHOD_NAMES_IN = ("merging.methods", "config.presets")
DEFAULTS = {("adapters.merge", "pm"), ("cli", "pm"), ("measuring.learned_coefficients", "adamerging")}
# "average" is also what decides α, and what is done where the curvature is zero
OTHER_WORDS = {(module, "average") for module in ("config.schema", "merging.coefficient", "runs.records")}


def test_a_merging_method_is_named_at_its_row_only():
    strange = []
    for module, path in SOURCES.items():
        if any(module == home or module.startswith(f"{home}.") for home in METHOD_NAMES_IN):
            continue
        texts = {n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)}
        strange += [(module, text) for text in texts if isinstance(text, str) and text in METHODS]
    assert set(strange) == DEFAULTS | OTHER_WORDS


# where a row is asked for by itself, which is a name too
ROWS_IN = {
    ("config.schema", "PM"),  # the default of merge.method
    ("config.rules", "PM"),  # in a message
    ("config.rules", "SEQUENTIAL"),  # O-LoRA needs every A unscaled in the running merge
    ("runs.start", "SEQUENTIAL"),  # the exact sum of two adapters
    ("measuring.learned_coefficients", "AVERAGE"),  # heads are averaged while coefficients are learned
}


def test_a_merging_methods_row_is_taken_from_the_table():
    rows = set()
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pm_hf.merging.methods."):
                home = sys.modules[node.module]
                rows |= {(module, n.name) for n in node.names if isinstance(getattr(home, n.name), Method)}
    assert {row for row in rows if not row[0].startswith("merging.methods")} == ROWS_IN


def test_no_local_is_called_found_one_or_there():
    vague = [
        f"{module}:{node.lineno} {node.id}"
        for module, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in ("found", "one", "there")
    ]
    assert not vague, f"{vague}: call it by what it holds"


def test_ground_merging_config_and_adapters_need_no_model_library():
    light = ", ".join(["pm_hf", *(f"pm_hf.{name}" for name in MODULES if package(name) in LIGHT)])
    assert "pm_hf.merging.coefficient" in light
    assert "pm_hf.adapters.merge" in light
    program = (
        f"import sys, {light}\n"
        "print(sorted({'transformers', 'peft', 'datasets', 'evaluate', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_alone_does_not_even_load_torch():
    program = "import sys, pm_hf; print('torch' in sys.modules, [name for name in sys.modules if 'pm_hf.' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"
