"""The command line: pm-hf init, train, merge, evaluate, inspect, report, compare, methods, export, push, help, …"""

import argparse
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from pm_hf.errors import InputError
from pm_hf.text import printable_lines

DONE, FAILED, BAD_INPUT = 0, 1, 2
SHELLS = ("bash", "zsh", "fish")
MUCH_LOST = 0.1  # part of an update that rounding loses, above which an export says the way out
INTERRUPTED, CLOSED_PIPE = 128 + signal.SIGINT, 128 + getattr(signal, "SIGPIPE", 13)  # as a shell names those signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 when done, 1 when it failed while running, 2 for bad input (one line on stderr), 130
    after Ctrl-C (one line), 141 without a word where what it writes to is closed."""
    _write_any_character()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of CPU kernels whenever PEFT is imported
    try:
        try:
            return _run(arguments)
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
    except BrokenPipeError:
        _drop_what_is_closed()
        return CLOSED_PIPE
    except KeyboardInterrupt:
        if _reports_errors():
            trains = "train" in (sys.argv[1:2] if arguments is None else arguments[:1])
            way_on = "continues from the newest checkpoint" if trains else "begins again"
            _say(f"pm-hf: stopped by Ctrl-C; the same command {way_on}", error=True)
        return INTERRUPTED


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.overrides = rest
    if rest and options.run not in (_train, _evaluate) and not getattr(options, "line", False):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except InputError as error:
        if _reports_errors():
            _say(f"pm-hf: {error}", error=True)
        return BAD_INPUT
    except BrokenPipeError:
        raise
    except OSError as error:
        _say(f"pm-hf: {error}", error=True)
        return FAILED


def _say(text: str, *, error: bool = False) -> None:
    """Print lines; a name from a file that is in them commands no terminal."""
    print(printable_lines(text), file=sys.stderr if error else sys.stdout)


def _write_any_character() -> None:
    """What the locale cannot encode is written as \\u03b1."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_what_is_closed() -> None:
    """Let what is still to be written to a closed pipe go nowhere, so that the interpreter ends without a word."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Where stdin, stdout or stderr was closed, the next file to be opened would take its number, and get what is
    written there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 without it, print writes to stdout


def _reports_errors() -> bool:
    """Whether this process reports its error: of several that have not met yet, the first of each machine."""
    if int(os.environ.get("LOCAL_RANK", "0")) <= 0:
        return True
    from pm_hf.distributed import process_count

    return process_count() > 1


class _Parser(argparse.ArgumentParser):
    """Only changes: a wrong argument is one line on stderr; the help of a command that takes settings lists them."""

    takes_settings = False

    def format_help(self) -> str:
        """argparse's, and the settings."""
        if not self.takes_settings:
            return super().format_help()
        from pm_hf.config.reference import settings_help

        return f"{super().format_help()}\nsettings:\n{settings_help(_columns())}\n"

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def entry() -> None:
    """Console script."""
    _open_standard_streams()
    sys.exit(main())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pm-hf", description="Continual fine-tuning by merging LoRA adapters.")
    parser.add_argument("--version", action="store_true", help="print the versions of pm_hf and what it stands on")
    parser.set_defaults(run=_version_or_help)
    commands = parser.add_subparsers(metavar="COMMAND")

    init = commands.add_parser("init", help="look at data and write a first YAML that runs")
    init.add_argument("data", nargs="+", metavar="DATA", help="files of rows, folders of pictures, or a data set")
    init.add_argument("--output", default="stream.yaml", metavar="FILE", help="the YAML; default: stream.yaml")
    init.add_argument("--base", help="base model: Hub id or folder; default: a small one of the kind")
    init.add_argument(
        "--output-dir", default="runs/first", metavar="RUN", help="folder of the run; default: runs/first"
    )
    init.add_argument("--overwrite", action="store_true", help="replace the YAML")
    init.set_defaults(run=_init)

    train = commands.add_parser("train", help="run a stream of tasks, or continue it", allow_abbrev=False)
    train.add_argument("--config", required=True, help="YAML file")
    train.add_argument(
        "--seeds", nargs="+", metavar="N", help="a run for each seed, in output_dir/seed-N, and one report of them all"
    )
    train.epilog = "Any setting of the YAML follows as key=value, --key value or --flag, dotted: lora.r=4"
    train.add_argument(
        "--dry-run", action="store_true", help="read and check everything, say what would be done, and end"
    )
    train.add_argument("--timed", type=int, default=0, metavar="N", help="with --dry-run: time N real steps of task 1")
    train.takes_settings = True
    train.set_defaults(run=_train)

    merge = commands.add_parser("merge", help="fold a task adapter into a running merge, or merge several adapters")
    merge.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="adapter folder, or Hub id owner/name[@revision][/subfolder]"
    )
    merge.add_argument("--output", required=True, help="folder to write")
    merge.add_argument("--into", help="running merge to fold the adapter into")
    merge.add_argument("--method", default="pm", help="see pm-hf methods")
    merge.add_argument(
        "--curvature", nargs="+", help="curvature.safetensors saved with the task; for lot and cofima one an adapter"
    )
    merge.add_argument("--learned", help="coefficients for adamerging and adarank")
    merge.add_argument("--coefficient", type=float, help="a coefficient of your own")
    merge.add_argument("--freedom", default="global", help="global, module or free")
    merge.add_argument("--weights", nargs="+", type=float, help="one for each adapter")
    merge.add_argument("--option", action="append", default=[], metavar="key=value", help="setting of the method")
    merge.add_argument(
        "--rows-from", metavar="ADAPTER", help="whose head and embeddings to take where rows have no names"
    )
    merge.add_argument("--max-rank", type=_rank, help="largest rank kept, or full; default: exact")
    merge.add_argument("--energy", type=float, help="share of the squared norm kept")
    merge.add_argument("--dtype", help="float32, float16 or bfloat16; default float32")
    merge.add_argument("--overwrite", action="store_true", help="replace the output folder")
    merge.add_argument("--dry-run", action="store_true", help="print the report, write nothing")
    merge.set_defaults(run=_merge)

    evaluate = commands.add_parser("evaluate", help="score a merged adapter on the tasks of a config")
    evaluate.add_argument("--config", required=True, help="YAML file of the stream")
    evaluate.add_argument("--adapter", help="merged adapter; default: the newest of the run")
    evaluate.add_argument(
        "--allow-missing",
        action="store_true",
        help="exit code 0 also where tasks are left out",
    )
    evaluate.epilog = train.epilog
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser("inspect", help="what adapters are, and how each pair relates")
    inspect.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="adapter folder or Hub id; RUN of --coefficient"
    )
    inspect.add_argument(
        "--coefficient",
        action="store_true",
        dest="line",
        help="of a finished RUN instead: loss and score along every task's merge line, and the best coefficient there",
    )
    inspect.epilog = "With --coefficient settings of the RUN may follow as key=value: data_dir=FOLDER"
    inspect.add_argument("--json", action="store_true", help="machine-readable output")
    inspect.set_defaults(run=_inspect)

    report = commands.add_parser("report", help="runs side by side on one page that opens offline, with plots")
    report.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or a report.json")
    report.add_argument("--output", help="folder to write; default: the only run's, of several: report")
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="which of several runs won, by how much, is it more than the error")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run or of several seeds, report.json")
    compare.add_argument("--json", action="store_true", help="machine-readable output")
    compare.set_defaults(run=_compare)

    methods = commands.add_parser("methods", help="the merging methods, or those of a stream")
    methods.add_argument("--stream", action="store_true", help="what each `method:` of a run's YAML sets")
    methods.set_defaults(run=_methods)

    export = commands.add_parser("export", help="base and merged adapter as one checkpoint that needs no PEFT")
    export.add_argument("adapter", metavar="RUN_OR_ADAPTER", help="output_dir of a run, adapter folder or Hub id")
    export.add_argument("--output", required=True, help="folder to write")
    export.add_argument("--base", help="base model: folder or Hub id; default: the one that the run or adapter names")
    export.add_argument("--dtype", help="fp32, bf16 or fp16 for all weights; default: as the base stores each")
    export.add_argument("--overwrite", action="store_true", help="replace the output folder")
    export.set_defaults(run=_export)

    push = commands.add_parser("push", help="publish a finished run on the Hub: its adapters, card and report")
    push.add_argument("folder", metavar="RUN", help="output_dir of the run")
    push.add_argument("repo", metavar="REPO", help="repository owner/name, created if it is not there")
    push.add_argument(
        "--base-model-id", "--base_model_id", metavar="ID", help="the base model on the Hub; default: model.base"
    )
    push.add_argument("--license", metavar="ID", help="licence of the adapter, as the Hub writes it: apache-2.0")
    push.add_argument("--language", metavar="ID", help="language of its texts: en")
    push.add_argument("--public", action="store_true", help="a public repository; default: private")
    push.add_argument("--dry-run", action="store_true", help="print the files and the card, use no network")
    push.set_defaults(run=_push)

    explain = commands.add_parser("help", help="what a setting of a run is: type, range, default, unit, who sets it")
    explain.add_argument(
        "setting", nargs="?", metavar="SETTING", help="dotted, or a group: lora.r, merge, training.bf16"
    )
    explain.set_defaults(run=_help)

    schema = commands.add_parser("schema", help="JSON Schema of a run's YAML, for editors: pm-hf schema > FILE")
    schema.set_defaults(run=_schema)

    completion = commands.add_parser("completion", help="completion script of a shell: pm-hf completion bash > FILE")
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=_completion)
    return parser


def _version_or_help(options: argparse.Namespace) -> int:
    if not options.version:
        _say(_parser().format_help().rstrip())
        return DONE
    from importlib.metadata import version

    _say(", ".join(f"{name} {version(name)}" for name in ("pm_hf", "torch", "transformers", "peft")))
    return DONE


def _help(options: argparse.Namespace) -> int:
    from pm_hf.config.reference import setting_help, settings_help

    _say(setting_help(options.setting, _columns()) if options.setting else settings_help(_columns()))
    return DONE


def _schema(_: argparse.Namespace) -> int:
    from pm_hf.config.reference import json_schema

    _say(json.dumps(json_schema(), indent=1, ensure_ascii=False))
    return DONE


def _completion(options: argparse.Namespace) -> int:
    import shtab

    _say(shtab.complete(_parser(), options.shell))
    return DONE


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def _init(options: argparse.Namespace) -> int:
    from pathlib import Path

    from pm_hf.config.loading import load_config
    from pm_hf.config.reference import json_schema
    from pm_hf.config.yaml_text import parse_value
    from pm_hf.data.proposal import SCHEMA_FILE, propose_config
    from pm_hf.data.stream import load_stream
    from pm_hf.files import write_text

    path = Path(options.output)
    if path.exists() and not options.overwrite:
        raise InputError(f"{path} exists; choose another --output, or --overwrite")
    text = propose_config(options.data, options.base, options.output_dir)
    stream = load_stream(load_config(parse_value(text)))  # what cannot be run is not written
    write_text(path, text)
    if not (schema := path.with_name(SCHEMA_FILE)).exists():
        write_text(schema, json.dumps(json_schema(), ensure_ascii=False, indent=1) + "\n")
    for task in stream.tasks:
        classes = f"{len(task.labels)} classes, " if task.labels else ""
        _say(f"task {task.name}: {classes}{len(task.train)} training rows, {len(task.test)} test rows")
    for note in stream.notes:
        _say(f"note: {note}")
    _say(f"written: {path}; next: pm-hf train --config {path}")
    return DONE


def _train(options: argparse.Namespace) -> int:
    from pm_hf.config.loading import load_config
    from pm_hf.config.seeds import load_seeds

    if options.seeds is None:
        configs = [load_config(options.config, options.overrides)]  # first: what follows takes seconds to load
    else:
        typed = [text for text in options.seeds if "=" in text]  # settings that follow the seeds
        seeds = [text for text in options.seeds if "=" not in text]
        configs = load_seeds(options.config, [*typed, *options.overrides], seeds)
    if options.timed < 0 or options.timed and not options.dry_run:
        raise InputError(f"--timed takes a number of steps beside --dry-run, found {options.timed}")

    import datasets

    if options.dry_run:
        from pm_hf.distributed import process_index
        from pm_hf.runs.preview import preview

        datasets.disable_progress_bars()
        said = [str(preview(of_seed, options.timed)) for of_seed in configs]
        if process_index() == 0:
            _say("\n\n".join(said))
        return DONE

    from pm_hf.distributed import OtherProcessError, process_index
    from pm_hf.runs.folder import ForgettingError
    from pm_hf.runs.learner import learn
    from pm_hf.runs.paths import RunPaths
    from pm_hf.runs.seeds import learn_seeds
    from pm_hf.training.callbacks import StoppedError
    from pm_hf.training.task_trainer import DivergedError

    datasets.disable_progress_bars()
    try:
        reports = [learn(configs[0])] if options.seeds is None else learn_seeds(configs)
    except ForgettingError as error:
        _say(error.report.table())
        _say(f"pm-hf: {error}", error=True)
        return FAILED
    except (StoppedError, DivergedError) as error:
        _say(f"pm-hf: {error}", error=True)
        return FAILED
    except OtherProcessError as error:  # that process says what it is
        return BAD_INPUT if error.bad_input else FAILED
    if process_index() == 0 and options.seeds is None:
        _say(reports[0].table())
        _say(f"merged adapter: {RunPaths(reports[0].folder).merged}")
    elif process_index() == 0:
        _write_seeds([config.output_dir for config in configs])
    return DONE


def _write_seeds(runs: Sequence[str]) -> None:
    """The answer of several seeds on the terminal, as a page and as JSON in the folder that holds their runs."""
    from pathlib import Path

    from pm_hf.files import write_json
    from pm_hf.reports.comparison import compare_runs, comparison_content, comparison_text
    from pm_hf.reports.page import write_report
    from pm_hf.runs.paths import RunPaths

    common = RunPaths(Path(runs[0]).parent)
    groups = compare_runs(runs)
    page, notes = write_report(runs, common.folder)
    write_json(common.report, comparison_content(groups))
    _say(comparison_text(groups))
    for note in notes:
        _say(note, error=True)
    _say(f"written: {page}, {common.report}")


def _merge(options: argparse.Namespace) -> int:
    from pathlib import Path

    from pm_hf.adapters.merge import merge_adapters
    from pm_hf.reports.merge_card import write_merge_card

    report = merge_adapters(
        options.adapters,
        options.output,
        into=options.into,
        method=options.method,
        curvature=options.curvature,
        coefficient=options.coefficient,
        freedom=options.freedom,
        weights=options.weights,
        options=_option_pairs(options.option),
        learned=options.learned,
        rows_from=options.rows_from,
        max_rank=options.max_rank,
        energy=options.energy,
        dtype=options.dtype,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
    )
    alpha = report.coefficient
    if alpha is not None:
        note = f"; {alpha.note}" if alpha.note and alpha.source != "given" else ""
        _say(f"coefficient {alpha.used:.6f} (raw {alpha.raw:.6f}, 1/t {alpha.one_over_t:.6f}){note}")
    elif report.weights is not None:
        _say("weights " + " ".join(f"{weight:.6g}" for weight in report.weights))
    for name, module in report.modules.items():
        ranks = "+".join(str(rank) for rank in module["ranks_in"])
        _say(f"{name}: rank {ranks} -> {module['rank_out']}, relative error {module['error']:.2e}")
    for name, how in report.heads.items():
        _say(f"{name}: {how}")
    for note in report.notes:
        _say(f"note: {note}")
    _say(f"largest error {report.error:.2e} of the truncation, {report.cast_error:.2e} of the storage dtype")
    memory = "" if report.peak_memory_mb is None else f", peak memory {report.peak_memory_mb:.0f} MB"
    _say(f"{report.seconds:.2f} s{memory}")
    if not options.dry_run and not write_merge_card(Path(options.output), report):
        _say("note: README.md was written by hand and is kept")
    _say("dry run: nothing written" if options.dry_run else f"written: {options.output}")
    return DONE


def _evaluate(options: argparse.Namespace) -> int:
    from pm_hf.config.loading import load_config
    from pm_hf.runs.learner import evaluate
    from pm_hf.runs.paths import RunPaths

    config = load_config(options.config, options.overrides)
    scores = evaluate(config, options.adapter or RunPaths(config.output_dir).merged)
    for name, score in scores.items():
        _say(f"{name}: " + ", ".join(f"{metric.replace('_', '-')} {value:.4f}" for metric, value in score.items()))
    for note in scores.notes:
        _say(f"pm-hf: {note}", error=True)
    for name, reason in scores.left_out.items():
        _say(f"pm-hf: {name} is left out: {reason}", error=True)
    if scores.left_out and not options.allow_missing:
        _say("pm-hf: not every task was scored; --allow-missing takes that as it is", error=True)
        return FAILED
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    if options.line:
        return _inspect_line(options)
    from pm_hf.adapters.inspection import inspect_adapters, tables

    described = inspect_adapters(options.adapters)
    _say(json.dumps(described, indent=2) if options.json else tables(described))
    return DONE


def _inspect_line(options: argparse.Namespace) -> int:
    from pm_hf.reports.page import write_report
    from pm_hf.runs.merge_line import merge_line, merge_line_table
    from pm_hf.runs.paths import RunPaths

    run, *settings = options.adapters
    line = merge_line(run, [*settings, *options.overrides])
    page, notes = write_report([run])
    for note in notes:
        _say(note, error=True)
    _say(json.dumps(line, indent=2) if options.json else merge_line_table(line))
    _say(f"written: {RunPaths(run).merge_line}, {page} and its plots", error=True)
    return DONE


def _report(options: argparse.Namespace) -> int:
    from pm_hf.reports.page import write_report

    path, notes = write_report(options.runs, options.output)
    for note in notes:
        _say(note, error=True)
    _say(f"written: {path}")
    return DONE


def _compare(options: argparse.Namespace) -> int:
    from pm_hf.reports.comparison import compare_runs, comparison_content, comparison_text

    groups = compare_runs(options.runs)
    _say(json.dumps(comparison_content(groups), indent=2) if options.json else comparison_text(groups))
    return DONE


def _methods(options: argparse.Namespace) -> int:
    from pm_hf.merging.methods import METHODS

    if options.stream:
        return _stream_methods()

    for name, method in METHODS.items():
        kinds = " and ".join(kind for kind, has in (("fold", method.fold), ("several", method.batch)) if has)
        _say(f"{name}: {method.about}")
        _say(f"    {method.paper}; merges {kinds}; trains from {method.train_from}; needs {method.needs}")
        _say(f"    cost: {method.cost}")
        for option, setting in method.options.items():
            _say(f"    --option {option}={setting.default}: {setting.about}")
    return DONE


def _stream_methods() -> int:
    from pm_hf.config.presets import PRESETS
    from pm_hf.config.reference import as_yaml, method_settings

    for name in PRESETS:
        for streams, row in method_settings(name).items():
            _say(f"{name}, {streams}:" if streams else f"{name}:")
            _say("    " + "  ".join(f"{setting}={as_yaml(value)}" for setting, value in row.items()))
    return DONE


def _export(options: argparse.Namespace) -> int:
    from pm_hf.config.loading import load_config
    from pm_hf.models.export import export_model
    from pm_hf.runs.paths import RunPaths

    adapter, base, revision = options.adapter, options.base, None
    run = RunPaths(options.adapter)
    if run.config.is_file():
        model = load_config(run.config).model
        adapter = run.merged
        if base is None and model.gguf_file is not None:
            made = f"run {run.folder} was trained on {model.gguf_file}, whose weights are quantised"
            raise InputError(f"{made}; give the model that it was made from: --base")
        base, revision = (model.base, model.revision) if base is None else (base, None)
    kind = options.dtype
    report = export_model(
        adapter, options.output, base=base, revision=revision, dtype=kind, overwrite=options.overwrite
    )
    if report.rounding:
        worst = max(report.rounding, key=lambda name: report.rounding[name])
        lost = report.rounding[worst]
        way_out = "; --dtype fp32 keeps them" if lost > MUCH_LOST else ""
        _say(f"{len(report.rounding)} weights updated; rounding loses up to {lost:.1e} of an update ({worst}){way_out}")
    for name in report.untied:
        _say(f"{name} has weights of its own now: the adapter changes the other table of tokens, or this one")
    if report.left_out:
        named = ", ".join(report.left_out[:3])
        _say(f"{report.model_class} does not have {len(report.left_out)} tensors of the base, left out: {named}")
    memory = "" if report.peak_memory_mb is None else f", peak memory {report.peak_memory_mb:.0f} MB"
    _say(f"{report.seconds:.2f} s{memory}, {report.shards} files of weights")
    _say(f"written: {report.folder}, load it with {report.model_class}.from_pretrained")
    return DONE


def _push(options: argparse.Namespace) -> int:
    from pm_hf.reports.hub import build_upload, push

    card = {"base_model_id": options.base_model_id, "license": options.license, "language": options.language}
    if options.dry_run:
        upload = build_upload(options.folder, options.repo, **card)
        for name, size in upload.sizes().items():
            _say(f"{size:>12,d}  {name}")
        _say(f"\n{upload.card}\ndry run: nothing uploaded to {upload.repo}")
        return DONE
    _say(push(options.folder, options.repo, **card, public=options.public))
    return DONE


def _rank(text: str) -> int | str:
    try:
        return text if text == "full" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number or full, found {text!r}") from error


def _option_pairs(options: Sequence[str]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise InputError(f"--option {option}: expected key=value")
    return dict(option.split("=", 1) for option in options)
