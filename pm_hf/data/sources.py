"""Reading rows: files, folders and Hub data sets of texts, pictures or prompts."""

import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.schema import Source
from pm_hf.data.columns import check_columns, label_names
from pm_hf.data.images import picture_column, read_folder, read_npz
from pm_hf.data.language import language_rows
from pm_hf.data.rows import Rows
from pm_hf.errors import InputError

LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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
        return rows, label_names(data, extra, where) if extra else []
    return _texts(data, where, source, extra)


def _texts(data: Dataset, where: str, source: Source, extra: str | None) -> tuple[Rows, list[str]]:
    text, label = source.text_column or "text", source.label_column or "label"
    check_columns(data, [text, label] + ([extra] if extra else []), where)
    texts = list(data[text])
    odd = next((row for row, value in enumerate(texts) if not isinstance(value, str)), None)
    if odd is not None:
        raise InputError(f"{where}: column {text} must hold text, row {odd} holds {texts[odd]!r}")
    return Rows(texts, label_names(data, label, where)), label_names(data, extra, where) if extra else []


def _pictures(source: Source, folder: str | None, *, test: bool, extra: str | None) -> tuple[Rows, list[str]]:
    file = source.test if test else source.train
    if source.dataset is None and file is not None:
        path = path_of(file, folder)
        if path.suffix == ".npz":
            pictures, labels, domains = read_npz(path, test=test, domain=extra)
            return Rows(pictures, labels), domains
        if path.is_dir():
            if extra is not None:
                raise InputError(f"{path}: a folder has no column {extra}; list the domains' folders in stream.tasks")
            pictures, labels = read_folder(path)
            return Rows(pictures, labels), []
        if not path.suffix:
            raise InputError(f"folder {path} does not exist; set data_dir=FOLDER if it lies elsewhere")
    data, where = _load(source, folder, test=test)
    image, label = source.image_column or "image", source.label_column or "label"
    check_columns(data, [image, label] + ([extra] if extra else []), where)
    rows = Rows(picture_column(data, image, where), label_names(data, label, where))
    return rows, label_names(data, extra, where) if extra else []


def _load(source: Source, folder: str | None, *, test: bool) -> tuple[Dataset, str]:
    file = source.test if test else source.train
    if source.dataset is not None:
        split = (source.test_split or "test") if test else (source.train_split or "train")
        local = path_of(source.dataset, folder)
        name = str(local) if local.is_dir() else source.dataset
        where = f"data set {name}, split {split}"
        try:
            return load_dataset(name, source.dataset_config, split=split, revision=source.dataset_revision), where
        except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
            raise InputError(f"{where} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if file is None:
        raise InputError(f"no {'test' if test else 'train'} file and no dataset given")
    path = path_of(file, folder)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in LOADERS or path.name.endswith(".parquet.gz"):
        raise InputError(
            f"{path}: expected a file ending in .csv, .json, .jsonl (.gz too) or .parquet, found {path.name}"
        )
    if not path.is_file():
        raise InputError(f"file {path} does not exist; set data_dir=FOLDER if it lies elsewhere")
    # keep_default_na: a text such as "null" or "NA" is text
    options = {"keep_default_na": False} if LOADERS[suffix] == "csv" else {}
    try:
        # a cache of its own: the shared one tells files apart by time of change only
        with tempfile.TemporaryDirectory() as cache:
            data = load_dataset(LOADERS[suffix], data_files=str(path), split="train", cache_dir=cache, **options)
            return Dataset.from_dict(data.to_dict(), features=data.features), str(path)
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise InputError(f"{path} cannot be read as {LOADERS[suffix]}: {' '.join(str(cause).split())[:300]}") from error


def path_of(name: str, folder: str | None) -> Path:
    """A file name of the config as a path."""
    return Path(folder or ".").expanduser() / Path(name).expanduser()
