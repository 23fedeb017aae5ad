"""Reading rows: files, folders and Hub data sets of texts, pictures or prompts."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import datasets
from datasets import load_dataset, load_dataset_builder
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from datasets.packaged_modules.json.json import Json, JsonConfig

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.schema import Source
from pm_hf.data.columns import cells, check_columns, label_names
from pm_hf.data.images import picture_column, read_folder, read_npz
from pm_hf.data.language import language_rows
from pm_hf.data.rows import Places, Rows
from pm_hf.data.tables import Table, TextTable, kind_of, read_table
from pm_hf.errors import InputError


def read_rows(
    kind: str, source: Source, folder: str | None, *, test: bool, task: str = "", extra: str | None = None
) -> tuple[Rows, list[str]]:
    """(rows of one split, values of the column `extra` where it is asked for).

    kind: the stream's; folder: what file names are relative to; task: its name, for prompts. Raises InputError.
    """
    holds = STREAM_KINDS[kind].rows
    if holds == "pictures":
        return _pictures(source, folder, test=test, extra=extra)
    data, where = _load(source, folder, test=test)
    if holds == "prompts":
        check_columns(data, [extra] if extra else [], where)
        rows = language_rows(
            data,
            where,
            text_column=source.text_column,
            label_column=source.label_column,
            prompt_template=source.prompt_template,
            answers=source.answers,
            task=task,
        )
        values = label_names(data, extra, where) if extra else []
        if extra and len(rows) != len(values):  # a conversation is a row for each of its answers
            values = [values[number] for _, numbers in rows.places.parts for number in numbers]
        return rows, values
    return _texts(data, where, source, extra)


def _texts(data: Table, where: str, source: Source, extra: str | None) -> tuple[Rows, list[str]]:
    text, label = source.text_column or "text", source.label_column or "label"
    check_columns(data, [text, label] + ([extra] if extra else []), where)
    texts = cells(data, text, where)
    odd = next((row for row, value in enumerate(texts) if type(value) is not str), None)
    if odd is not None:
        raise InputError(f"{where}: column {text} must hold text, row {odd} holds {texts[odd]!r:.80}")
    rows = Rows(texts, label_names(data, label, where, classes=True), Places.of(where, len(texts)))
    return rows, label_names(data, extra, where) if extra else []


def _pictures(source: Source, folder: str | None, *, test: bool, extra: str | None) -> tuple[Rows, list[str]]:
    file = source.test if test else source.train
    if source.dataset is None and file is not None:
        path = path_of(file, folder)
        if path.suffix == ".npz":
            pictures, labels, domains = read_npz(path, test=test, domain=extra)
            return Rows(pictures, labels), domains
        if _exists(path, file=False):
            if extra is not None:
                raise InputError(f"{path}: a folder has no column {extra}; list the domains' folders in stream.tasks")
            pictures, labels = read_folder(path)
            return Rows(pictures, labels), []
        if not path.suffix:
            raise InputError(f"folder {path} does not exist; set data_dir=FOLDER if it lies elsewhere")
    data, where = _load(source, folder, test=test)
    image, label = source.image_column or "image", source.label_column or "label"
    check_columns(data, [image, label] + ([extra] if extra else []), where)
    rows = Rows(picture_column(data, image, where), label_names(data, label, where, classes=True))
    return rows, label_names(data, extra, where) if extra else []


def _load(source: Source, folder: str | None, *, test: bool) -> tuple[Table, str]:
    """(table of one split, what messages call it)."""
    file = source.test if test else source.train
    if source.dataset is not None:
        split = (source.test_split or "test") if test else (source.train_split or "train")
        local = path_of(source.dataset, folder)
        name = str(local) if _exists(local, file=False) else source.dataset
        odd = next((sign for sign in ("*", "?", "[", "{", "::", "://") if sign in name), None)
        if odd:  # the library would take it for a pattern or an address
            raise InputError(f"data set {name}: the name of a data set has no {odd}; rename the folder")
        return _load_dataset(name, source, split), f"data set {name}, split {split}"
    if file is None:
        raise InputError(f"no {'test' if test else 'train'} file and no dataset given")
    path = path_of(file, folder)
    kind = kind_of(path.name)
    if kind is None:
        raise InputError(
            f"{path}: expected a file ending in .csv, .json, .jsonl (.gz too) or .parquet, found {path.name}"
        )
    if not _exists(path):
        raise InputError(f"file {path} does not exist; set data_dir=FOLDER if it lies elsewhere")
    return read_table(path, kind), str(path)


def _load_dataset(name: str, source: Source, split: str) -> Table:
    """A split of a data set folder or of the Hub: by its schema, and CSV and JSON files without one as they stand."""
    where, revision = f"data set {name}, split {split}", source.dataset_revision
    try:
        with _quiet():
            table = _text_files(name, source, split)
            return load_dataset(name, source.dataset_config, split=split, revision=revision) if table is None else table
    except InputError:
        raise
    except Exception as error:  # the library's errors have no class in common
        words = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        raise InputError(f"{where} cannot be loaded: {words}") from error


def _text_files(name: str, source: Source, split: str) -> TextTable | None:
    """A split that is CSV or JSON files; None for others, and where the data set says how they are to be read."""
    try:
        with tempfile.TemporaryDirectory() as fresh:  # another cache may know types that were guessed
            builder = load_dataset_builder(
                name, source.dataset_config, revision=source.dataset_revision, cache_dir=fresh
            )
    except ConnectionError:  # what is in the cache is all there is
        return None
    if not isinstance(builder, Csv | Json) or builder.info.features is not None:
        return None
    kind, own = ("csv", CsvConfig()) if isinstance(builder, Csv) else ("json", JsonConfig())
    of_location = {"name", "version", "data_dir", "data_files", "description"}
    if any(getattr(builder.config, f.name) != getattr(own, f.name) for f in fields(own) if f.name not in of_location):
        return None
    settings = datasets.DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    manager = datasets.DownloadManager(download_config=settings)

    tables: dict[str, TextTable] = {}
    splits = [str(known) for known in builder.config.data_files]
    for part in [split] if split in splits else splits:
        paths = [Path(manager.download_and_extract(file)) for file in builder.config.data_files[part]]
        if any(path.is_dir() for path in paths):  # an archive
            return None
        tables[part] = TextTable({}).with_rows(*(read_table(path, kind) for path in paths))
    if split in tables:
        return tables[split]
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({part: len(table) for part, table in tables.items()})
    taken = [tables[part.splitname].take(range(part.from_, part.to)) for part in parts]
    return taken[0].with_rows(*taken[1:])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's log of an error that is raised too."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def path_of(name: str, folder: str | None) -> Path:
    """A file name of the config as a path: exactly that name, ~ for the home where no file is called so."""
    above = _expanded(Path(folder or "."))
    plain = above / name
    return plain if not name.startswith("~") or _exists(plain) else above / _expanded(Path(name))


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # a user that does not exist
        return path


def _exists(path: Path, *, file: bool = True) -> bool:
    """Whether a file, or a folder, is there; InputError where the system cannot say."""
    try:
        return path.is_file() if file else path.is_dir()
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}") from error
