"""Beam search of one window (openai/whisper `decoding.BeamSearchDecoder`, quirks included).

Hypotheses are rows of the running batch; this page decides which rows go on, with which token, and which sequences
are finished. It is shown the best next tokens and their log-probabilities and knows no tensors, no model, no lanes.
"""

from __future__ import annotations

from collections.abc import Sequence


class Beam:
    """`size` hypotheses. Ends when `round(size * patience)` sequences are finished, or when it is told to."""

    def __init__(self, size: int, patience: float | None, eot: int) -> None:
        self.size = size
        self.rows: list[list[int]] = [[] for _ in range(size)]  # the tokens of each hypothesis
        self.sums = [0.0] * size  # and its summed log-probability
        self._eot = eot
        self._most = round(size * (patience or 1.0))
        self._finished: dict[tuple[int, ...], float] = {}  # without the end token

    @property
    def is_complete(self) -> bool:
        return len(self._finished) >= self._most

    def advance(self, scores: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]) -> list[int]:
        """Each row's `size` + 1 best next tokens, best first, with the *summed* log-probabilities they would lead to.

        Returns which row each hypothesis in `rows` continues. The first time all rows are one: sequences that two
        rows agree on count once.
        """
        candidates: dict[tuple[int, ...], tuple[float, int]] = {}
        for row, before in enumerate(self.rows):
            for score, token in zip(scores[row], tokens[row], strict=True):
                candidates[(*before, token)] = (score, row)
        sources: list[int] = []
        rows: list[list[int]] = []
        sums: list[float] = []
        finished: list[tuple[tuple[int, ...], float]] = []
        for sequence, (score, row) in sorted(candidates.items(), key=lambda item: item[1][0], reverse=True):
            if sequence[-1] == self._eot:
                finished.append((sequence[:-1], score))
                continue
            rows.append(list(sequence))
            sources.append(row)
            sums.append(score)
            if len(rows) == self.size:
                break
        for sequence, score in finished[: self._most - len(self._finished)]:
            self._finished[sequence] = score
        self.rows, self.sums = rows, sums
        return sources

    def answers(self) -> list[tuple[list[int], float]]:
        """(tokens without the end, sum of log-probabilities) of the finished sequences; where these are fewer than
        `size`, the best unfinished ones make them up."""
        found = dict(self._finished)
        for row in sorted(range(self.size), key=lambda row: self.sums[row], reverse=True):
            if len(found) >= self.size:
                break
            found[tuple(self.rows[row])] = self.sums[row]
        return [(list(sequence), score) for sequence, score in found.items()]
