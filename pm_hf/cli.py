"""The command line: pm-hf train | merge | evaluate | inspect | methods."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pm_hf.errors import InputError

DONE, FAILED, BAD_INPUT = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 when done, 1 when it failed while running, 2 for bad input (one line on stderr)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.overrides = rest
    if rest and options.run not in (_train, _evaluate):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except InputError as error:
        print(f"pm-hf: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"pm-hf: {error}", file=sys.stderr)
        return FAILED


class _Parser(argparse.ArgumentParser):
    """Only change: a wrong argument is one line on stderr."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def entry() -> None:
    """Console script."""
    sys.exit(main())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pm-hf", description="Continual fine-tuning by merging LoRA adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a stream of tasks, or continue it", allow_abbrev=False)
    train.add_argument("--config", required=True, help="YAML file")
    train.epilog = "Any setting of the YAML follows as key=value, --key value or --flag, dotted: lora.r=4"
    train.set_defaults(run=_train)

    merge = commands.add_parser("merge", help="fold a task adapter into a running merge, or merge several adapters")
    merge.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapter folder")
    merge.add_argument("--output", required=True, help="folder to write")
    merge.add_argument("--into", help="running merge to fold the adapter into")
    merge.add_argument("--method", default="pm", help="see pm-hf methods")
    merge.add_argument("--curvature", help="curvature.safetensors saved with the task")
    merge.add_argument("--coefficient", type=float, help="a coefficient of your own")
    merge.add_argument("--freedom", default="global", help="global, module or free")
    merge.add_argument("--weights", nargs="+", type=float, help="one for each adapter")
    merge.add_argument("--option", action="append", default=[], metavar="key=value", help="setting of the method")
    merge.add_argument("--max-rank", type=int, help="largest rank kept; default: exact")
    merge.add_argument("--energy", type=float, help="share of the squared norm kept")
    merge.add_argument("--dtype", help="float32, float16 or bfloat16; default float32")
    merge.add_argument("--overwrite", action="store_true", help="replace the output folder")
    merge.add_argument("--dry-run", action="store_true", help="print the report, write nothing")
    merge.set_defaults(run=_merge)

    evaluate = commands.add_parser("evaluate", help="score a merged adapter on the tasks of a config")
    evaluate.add_argument("--config", required=True, help="YAML file of the stream")
    evaluate.add_argument("--adapter", help="merged adapter; default: the newest of the run")
    evaluate.epilog = train.epilog
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser("inspect", help="what an adapter is, and how two relate")
    inspect.add_argument("adapters", nargs="+", metavar="ADAPTER")
    inspect.add_argument("--json", action="store_true", help="machine-readable output")
    inspect.set_defaults(run=_inspect)

    methods = commands.add_parser("methods", help="the merging methods")
    methods.set_defaults(run=_methods)
    return parser


def _train(options: argparse.Namespace) -> int:
    import datasets

    from pm_hf.config import load_config
    from pm_hf.learner import ForgettingError, learn

    datasets.disable_progress_bars()
    config = load_config(options.config, options.overrides)
    try:
        report = learn(config)
    except ForgettingError as error:
        print(error.report.table())
        print(f"pm-hf: {error}", file=sys.stderr)
        return FAILED
    print(report.table())
    print(f"merged adapter: {report.folder / 'merged'}")
    return DONE


def _merge(options: argparse.Namespace) -> int:
    from pm_hf.merge import merge_adapters

    report = merge_adapters(
        options.adapters,
        options.output,
        into=options.into,
        method=options.method,
        curvature=options.curvature,
        coefficient=options.coefficient,
        freedom=options.freedom,
        weights=options.weights,
        options=_pairs(options.option),
        max_rank=options.max_rank,
        energy=options.energy,
        dtype=options.dtype,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
    )
    alpha = report.coefficient
    if alpha is not None:
        print(f"coefficient {alpha.used:.6f} (raw {alpha.raw:.6f}, 1/t {alpha.one_over_t:.6f})")
    for name, module in report.modules.items():
        ranks = "+".join(str(rank) for rank in module["ranks_in"])
        print(f"{name}: rank {ranks} -> {module['rank_out']}, relative error {module['error']:.2e}")
    print("dry run: nothing written" if options.dry_run else f"written: {options.output}")
    return DONE


def _evaluate(options: argparse.Namespace) -> int:
    from pm_hf.config import load_config
    from pm_hf.learner import evaluate

    config = load_config(options.config, options.overrides)
    scores = evaluate(config, options.adapter or Path(config.output_dir) / "merged")
    for name, score in scores.items():
        whole, inside = score["class_incremental"], score["task_incremental"]
        print(f"{name}: class-incremental {whole:.4f}, task-incremental {inside:.4f}")
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    from pm_hf.inspection import describe, relate

    described = [describe(path) for path in options.adapters]
    relation = relate(*options.adapters[:2]) if len(options.adapters) == 2 else None
    if options.json:
        print(json.dumps({"adapters": described, "relation": relation}, indent=2))
        return DONE
    for adapter in described:
        _print_table(f"{adapter['path']}: base {adapter['base_model']}, {adapter['tasks']} task(s)", adapter["modules"])
    if relation is not None:
        _print_table("cosine of the two updates", relation)
    return DONE


def _methods(_: argparse.Namespace) -> int:
    from pm_hf.merging.methods import METHODS

    for name, method in METHODS.items():
        kinds = " and ".join(kind for kind, has in (("fold", method.fold), ("several", method.batch)) if has)
        print(f"{name:<12}{kinds:<18}needs {method.needs:<18}{method.about} ({method.paper})")
    return DONE


def _pairs(options: Sequence[str]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise InputError(f"--option {option}: expected key=value")
    return dict(option.split("=", 1) for option in options)


def _print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(title)
    width = max(len(name) for name in rows)
    for name, values in rows.items():
        cells = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        print(f"  {name:<{width}}  {cells}")
