"""Streams with written rows: their settings, what they leave, and what a run's coefficient was searched for with."""

from statistics import fmean

import torch

from helpers.models import log_probabilities
from helpers.streams import LANGUAGE_TASKS, THIRD, language_settings, loaded, steps
from pm_hf.adapters.merge import merge_adapters
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.pool import Pool, PoolRow, targets
from pm_hf.data.stream import load_stream

TASKS = LANGUAGE_TASKS | THIRD
REHEARSAL = {
    "strategy__replay": "generated",
    "strategy__pool_rows": 12,
    "strategy__base_samples": 3,
    "merge__coefficient": "search",
    "training__num_train_epochs": 2,
}


def settings(data, output, model="llama", tasks=TASKS, **changes):
    """A stream that rehearses a pool of 12 rows and three samples of the base; `data`: the folder of language_data."""
    listed = [
        {"name": n, "train": str(data / f"{n}-train.jsonl"), "test": str(data / f"{n}-test.jsonl")} for n in tasks
    ]
    return language_settings(data, output, model, "average", **REHEARSAL | {"stream__tasks": listed} | changes)


def pool_of(folder):
    """The newest pool of a finished run."""
    return Pool.load(max(folder.glob("task-*/pool.jsonl")))


def rows_of(folder):
    """Its rows that stand for a task."""
    return pool_of(folder).of_tasks.rows


def assert_searched(config, folder, index, pool, place):
    """The α of a task is the smallest within one error of the best: every α merged on disk, loaded as users load it,
    one row at a time. pool: the rows of the earlier tasks; place: a folder to merge in."""
    encoder, task = make_encoder(load_config(config)), load_stream(load_config(config)).tasks[index]
    old, values, before = pool.of_tasks.examples(encoder), {}, sorted(folder.glob("task-*"))[index - 1 : index + 1]
    for tenth in range(11):
        merge_adapters(
            before[1] / "adapter",
            place / "merged",
            into=before[0] / "merged",
            coefficient=tenth / 10,
            max_rank=64,
            overwrite=True,
        )
        model, parts = loaded(config, place / "merged"), (encoder.examples(task.eval), old)
        values[tenth / 10] = [[_loss(model, example) for example in examples] for examples in parts]
    objective = {alpha: fmean(new) + index * fmean(written) for alpha, (new, written) in values.items()}
    step = steps(folder)[index]
    expected = {point["coefficient"]: point["objective"] for point in step["search"]}
    assert all(abs(expected[alpha] - value) <= 1e-3 * value for alpha, value in objective.items())
    lowest = min(objective, key=objective.get)
    within = []
    for alpha, parts in values.items():
        gaps = [torch.tensor(a) - torch.tensor(b) for a, b in zip(parts, values[lowest], strict=True)]
        error = float(gaps[0].var() / len(gaps[0]) + index**2 * gaps[1].var() / len(gaps[1])) ** 0.5
        within += [alpha] * (objective[alpha] - objective[lowest] <= error)
    assert step["coefficient"]["used"] == min(within)
    assert step["coefficient"]["source"] == "line_search"


@torch.no_grad()
def _loss(model, example):
    """Mean of −Σ q log p over an example's target tokens."""
    aims, ids = targets(example), torch.tensor([example["input_ids"]])
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id, *aims[:-1]]])
        logits = model(input_ids=ids, decoder_input_ids=start).logits[0].log_softmax(-1)
    else:
        logits = model(input_ids=ids).logits[0, -len(aims) - 1 : -1].log_softmax(-1)
    soft = example.get("soft") or [{token: 1.0} for token in aims]
    return fmean(float(soft_term(line, target)) for line, target in zip(logits, soft, strict=True))


def soft_term(log_p, target):
    """−Σ q log p of a target position, the tokens without a q as one event, given the log-probabilities (V,)."""
    term = -sum(q * log_p[token] for token, q in target.items())
    rest, others = 1 - sum(target.values()), [token for token in range(len(log_p)) if token not in target]
    return term - rest * log_p[others].exp().sum().log() if rest > 1e-4 else term


def expected_labels(config, merged, rows, answers):
    """(probability of each answer after each row's prompt, (rows, answers)) of a merged adapter, loaded as users do."""
    encoder, model = make_encoder(load_config(config)), loaded(config, merged)
    sums = [
        [
            float(log_probabilities(model, encoder.prompt(row.prompt), encoder.completion(row.prompt, answer))[0].sum())
            for answer in answers
        ]
        for row in rows
    ]
    return torch.tensor(sums).softmax(1).tolist()


def some_pool(count=6):
    """Rows of three answers, a and one of free text, b, for the words of the tiny models."""
    answers = {" red": 0.6, " red1 blue": 0.3, " pale": 0.1}
    free = [[[7, 9, 11], [0.5, 0.3, 0.1]], [[3], [1.0]]]  # another token has .1
    rows = [PoolRow("a", "", f"Text: blue{at % 5}", list(answers)[at % 3], answers, []) for at in range(count - 1)]
    return Pool((*rows, PoolRow("b", "", "Text: dark1", " dark", {}, free)))


def soft_loss(model, examples):
    """Sum over the rows' target tokens of −Σ q log p, each row in a forward pass of its own; number of targets."""
    total, count = 0.0, 0
    for example in examples:
        aims = targets(example)
        soft = example.get("soft") or [{token: 1.0} for token in aims]
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id, *aims[:-1]]])
            logits = model(input_ids=torch.tensor([example["input_ids"]]), decoder_input_ids=start).logits[0]
        else:
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, -len(aims) - 1 : -1]
        for line, target in zip(logits, soft, strict=True):
            total = total + soft_term(line.log_softmax(0), target)
        count += len(aims)
    return total, count
