"""Whether a written text is a copy of a training text, and the longest run of tokens that the two have in common."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

RUN = 8  # tokens in a row that make a text a copy
OVERLAP = 0.8  # share of the longer text's tokens, in any order, that make a text a copy

Tokens = Sequence[int]


class TrainingTexts:
    """The token ids of a task's training texts, to compare written ones with."""

    def __init__(self, texts: Sequence[Tokens]) -> None:
        self._counts = [Counter(text) for text in texts]
        self._sizes = [len(text) for text in texts]
        self._runs = {size: {run for text in texts for run in _runs(text, size)} for size in range(1, RUN + 1)}
        self._holders: dict[int, list[int]] = defaultdict(list)  # {token: the texts that have it}
        for at, counts in enumerate(self._counts):
            for token in counts:
                self._holders[token].append(at)

    def copied(self, text: Tokens) -> bool:
        """Whether a training text has 8 tokens in a row of this one, or .8 of the tokens of the longer of the two.

        A text as short as that is a copy only where all its tokens stand in a training text of the same length.
        """
        return not self._runs[RUN].isdisjoint(_runs(text, RUN)) or self._overlaps(text)

    def longest_run(self, text: Tokens) -> int:
        """Tokens in the longest run that stands in a training text too, 8 at most."""
        return next((size for size in range(RUN, 0, -1) if not self._runs[size].isdisjoint(_runs(text, size))), 0)

    def _overlaps(self, text: Tokens) -> bool:
        """Only texts that share one of the rarest tokens can share enough of them: of the others .2 are too few."""
        counts = Counter(text)
        rarest = sorted(text, key=lambda token: (len(self._holders.get(token, ())), token))
        spare = math.floor(len(text) - OVERLAP * len(text) + 1e-9) + 1
        candidates = {at for token in rarest[:spare] for at in self._holders.get(token, ())}
        return any(
            (counts & self._counts[at]).total() >= OVERLAP * max(len(text), self._sizes[at]) - 1e-9 for at in candidates
        )


def _runs(text: Tokens, size: int) -> set[tuple[int, ...]]:
    return {tuple(text[start : start + size]) for start in range(len(text) - size + 1)}
