"""Names of the files and folders of a run: the only place that writes them."""

from pathlib import Path

from pm_hf.config.seeds import SEED_FOLDER
from pm_hf.files import expand

CONFIG_FILE, REPORT_FILE, STEP_FILE = "config.yaml", "report.json", "step.json"
MERGE_LINE_FILE = "coefficient.json"  # what `pm_hf.merge_line` has measured
ROWS_FILE = "rows.json"  # rows of the task that is being trained, and under which conditions
CURVATURE_FILE, STATISTICS_FILE = "curvature.safetensors", "head_statistics.safetensors"
POOL_FILE = "pool.jsonl"  # written rows of all tasks so far
WRITER_FOLDER = "writer"  # checkpoints of the writer's training, if it was stopped
WRITERS_FOLDER = "writers"  # the writers of all tasks so far, where they are kept in place of the pool
PAGE_FILE, PLOTS_FOLDER = "report.html", "plots"
LOGS_FOLDER, TRACKERS_FILE = "logs", "trackers.json"
TASK_PREFIX = "task-"
ADAPTER_FOLDER, MERGED_FOLDER, CHECKPOINTS_FOLDER = "adapter", "merged", "checkpoints"
OPTIMUM_FOLDER = "optimum"  # adapter folder of the last task's own optimum, for methods that train from it
GATE_FOLDER = "gate"  # what the gate keeps of the scales that it compares
DEPLOYED_FOLDER = "deployed"  # adapter folder of the merge at the scale that the gate chose, where that is not 1
# adapter folder of θ*_t − θ̂_{t−1}, where training started from the last optimum and not from θ̂_{t−1}
CHANGE_FOLDER = "change"


class TaskPaths:
    """Files of one task's folder; any folder will do where a task's files are made for a moment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.step, self.rows = folder / STEP_FILE, folder / ROWS_FILE
        self.adapter, self.merged = folder / ADAPTER_FOLDER, folder / MERGED_FOLDER
        self.curvature, self.statistics = folder / CURVATURE_FILE, folder / STATISTICS_FILE
        self.optimum, self.change = folder / OPTIMUM_FOLDER, folder / CHANGE_FOLDER
        self.gate, self.deployed = folder / GATE_FOLDER, folder / DEPLOYED_FOLDER
        self.checkpoints = folder / CHECKPOINTS_FOLDER
        self.pool, self.writer, self.writers = folder / POOL_FILE, folder / WRITER_FOLDER, folder / WRITERS_FOLDER

    @property
    def adapters(self) -> tuple[Path, Path]:
        """The adapter folders that every finished task keeps."""
        return self.adapter, self.merged

    @property
    def results(self) -> tuple[Path, ...]:
        """All that a finished task may leave to the next one."""
        state = (self.optimum, self.curvature, self.statistics, self.gate, self.pool, self.writers)
        return *self.adapters, self.deployed, *state

    @property
    def released(self) -> Path:
        """The adapter folder that is scored and published: the merge, or what the gate deployed of it."""
        return self.deployed if self.deployed.is_dir() else self.merged

    @property
    def finished(self) -> bool:
        """Whether the task is finished: its step.json is written last."""
        return self.step.exists()

    @property
    def has_checkpoints(self) -> bool:
        """Whether its training got as far as a checkpoint."""
        return any(self.checkpoints.glob("checkpoint-*"))


class RunPaths:
    """Files of a run's output folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = expand(folder, "run folder")
        self.config, self.report = self.folder / CONFIG_FILE, self.folder / REPORT_FILE
        self.merge_line, self.merged = self.folder / MERGE_LINE_FILE, self.folder / MERGED_FOLDER
        self.page, self.plots = self.folder / PAGE_FILE, self.folder / PLOTS_FOLDER
        self.logs = self.folder / LOGS_FOLDER
        self.trackers = self.logs / TRACKERS_FILE

    def task(self, index: int, name: str) -> TaskPaths:
        """Files of one task, `task-NN-name`."""
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
        return TaskPaths(self.folder / f"{TASK_PREFIX}{index:02d}-{safe}")

    def tasks(self) -> list[TaskPaths]:
        """The task folders that exist, in the order of their numbers."""
        return [task for _, task in self.numbered_tasks()]

    def numbered_tasks(self) -> list[tuple[int, TaskPaths]]:
        """(number, task folder) of those that exist, in order."""
        numbered = []
        for folder in self.folder.glob(f"{TASK_PREFIX}*"):
            number = folder.name.removeprefix(TASK_PREFIX).partition("-")[0]
            if number.isdecimal() and folder.is_dir():
                numbered.append((int(number), folder))
        return [(number, TaskPaths(folder)) for number, folder in sorted(numbered)]

    def seeds(self) -> list["RunPaths"]:
        """The runs of single seeds in this folder, in the order of their numbers."""
        numbered = ((folder.name.removeprefix(SEED_FOLDER), folder) for folder in self.folder.glob(f"{SEED_FOLDER}*"))
        by_seed = sorted((int(number), folder) for number, folder in numbered if number.isdecimal())
        return [RunPaths(folder) for _, folder in by_seed]
