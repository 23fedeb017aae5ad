"""Whether a written text is a copy of a training text, and the longest run of tokens that the two have in common."""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

RUN = 8  # tokens in a row that make a text a copy
OVERLAP = 0.8  # share of the longer text's tokens, in any order, that make a text a copy

Tokens = Sequence[int]


class TrainingTexts:
    """The token ids of a task's training texts, to compare written ones with."""

    def __init__(self, texts: Sequence[Tokens]) -> None:
        self._texts = [tuple(text) for text in texts]
        self._counts = [Counter(text) for text in texts]
        self._sizes = [len(text) for text in texts]
        self._runs = _all_runs(self._texts, RUN)
        self._holders: dict[int, list[int]] = defaultdict(list)  # {token: the texts that have it}
        for at, counts in enumerate(self._counts):
            for token in counts:
                self._holders[token].append(at)

    def copied(self, text: Tokens) -> bool:
        """Whether a training text has 8 tokens in a row of this one, or .8 of the tokens of the longer of the two.

        A text as short as that is a copy only where all its tokens stand in a training text of the same length.
        """
        return not self._runs.isdisjoint(_runs(text, RUN)) or self._overlaps(text)

    def longest_run(self, texts: Iterable[Tokens]) -> int:
        """Tokens of the longest run in one of these texts that stands in a training text too."""
        known = list(texts)
        longest = min(max(map(len, part), default=0) for part in (known, self._texts))

        def none_shared(size: int) -> bool:  # false up to the longest run, as a run's beginning is a run
            return _all_runs(self._texts, size).isdisjoint(_all_runs(known, size))

        return bisect_left(range(1, longest + 1), True, key=none_shared)

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


def _all_runs(texts: Iterable[Tokens], size: int) -> set[tuple[int, ...]]:
    return {run for text in texts for run in _runs(text, size)}
