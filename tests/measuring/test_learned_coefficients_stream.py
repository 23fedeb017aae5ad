"""Coefficients learned on the inputs of our own task stream, the merge loaded as every user loads it."""

from helpers.streams import merged_accuracy, trained_adapter

from pm_hf import learn_coefficients, merge_adapters
from pm_hf.config.loading import load_config
from pm_hf.config.schema import ModelSettings
from pm_hf.data.stream import load_stream
from pm_hf.models.loading import load_base


def test_learned_coefficients_beat_the_mean_on_three_tasks(stream_config, tiny_base, tmp_path):
    tasks = load_stream(load_config(stream_config)).tasks
    adapters, data = zip(
        *(trained_adapter(t, i, tiny_base, tmp_path / t.name) for i, t in enumerate(tasks)), strict=True
    )
    base, _ = load_base(ModelSettings(base=str(tiny_base)), [label for task in tasks for label in task.labels], 0)
    learned = learn_coefficients(base, list(data), adapters, per="task", steps=60, learning_rate=0.01)
    assert learned.history[-1] < 0.9 * learned.history[0]
    merge_adapters(adapters, tmp_path / "mean", method="average")
    merge_adapters(adapters, tmp_path / "learned", method="adamerging", learned=learned)
    mean, found = (merged_accuracy(tasks, tiny_base, tmp_path / name) for name in ("mean", "learned"))
    assert found > mean + 0.1
