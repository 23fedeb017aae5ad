"""What a model says of written rows: their soft targets in the pool."""

from collections.abc import Sequence

from pm_hf.data.chat import Prompt
from pm_hf.data.pool import MOST_CHOICES, PoolRow, likeliest, rounded
from pm_hf.data.rows import Rows
from pm_hf.data.writing import Assignment
from pm_hf.measuring.language_scores import LanguageScorer


def labelled(
    scorer: LanguageScorer, assignment: Assignment, texts: Sequence[tuple[str, str]], answers: Sequence[str]
) -> list[PoolRow]:
    """Rows with the model's distribution over the answers (its 20 likeliest, to six digits); of free text with its own
    completion, of plain text with the text itself, and the 20 likeliest tokens in each place.

    texts: (answer that it was written for, text); answers: those of all tasks seen.
    """
    form, task = assignment.form, assignment.task
    pairs = [form.row(text) for _, text in texts]
    rows = Rows([prompt for prompt, _ in pairs], [completion for _, completion in pairs])
    if not len(rows):
        return []
    if form.closed:
        probabilities = scorer.answer_probabilities(rows, answers).tolist()
        soft = [likeliest(dict(zip(answers, values, strict=True))) for values in probabilities]
        return [
            PoolRow(task, answer, prompt, max(target, key=lambda key: target[key]), target, [])
            for (answer, _), prompt, target in zip(texts, rows.inputs, soft, strict=True)
        ]
    if not form.plain:
        rows = Rows(rows.inputs, scorer.completions(rows, assignment.answer_longest, set(assignment.answer_ends)))
    return with_likeliest_tokens(scorer, rows, task)


def with_likeliest_tokens(scorer: LanguageScorer, rows: Rows, task: str) -> list[PoolRow]:
    """Rows with the model's 20 likeliest tokens in each place of their completions; what is missing to 1 is the
    probability of all the others together."""
    prompts: Sequence[Prompt] = rows.inputs
    tokens = scorer.likeliest_tokens(scorer.encoder.examples(rows), MOST_CHOICES)
    soft = [[[list(part), list(part.values())] for part in map(rounded, of_row)] for of_row in tokens]
    return [
        PoolRow(task, "", prompt, completion, {}, tokens)
        for prompt, completion, tokens in zip(prompts, rows.labels, soft, strict=True)
    ]
