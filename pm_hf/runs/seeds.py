"""The same stream with several seeds, one run after the other."""

from collections.abc import Sequence
from pathlib import Path

from pm_hf.config.schema import RunConfig
from pm_hf.distributed import on_main_process
from pm_hf.errors import InputError
from pm_hf.runs import learner
from pm_hf.runs.paths import RunPaths
from pm_hf.runs.records import Report


def learn_seeds(configs: Sequence[RunConfig]) -> list[Report]:
    """`learn` for each of the settings of `load_seeds`, in their order; finished runs are read, a stopped one goes on.

    The input of all of them, finished runs included, is checked before the first one trains. Raises what `learn` does,
    and InputError where the common folder holds a run itself.
    """
    common = Path(configs[0].output_dir).parent
    if RunPaths(common).config.exists():
        raise InputError(f"output_dir {common} holds a run of one seed; choose another output_dir for several")
    for config in configs:
        run = learner.prepare(config)[0]
        if done := on_main_process(run.folder.finished):
            on_main_process(lambda of=run.folder, count=done: of.check_left(count))  # type: ignore[misc]
    return [learner.learn(config) for config in configs]
