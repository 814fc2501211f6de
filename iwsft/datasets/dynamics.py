"""The dynamics of a recording: what a row's observation and action tell about the next one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iwsft.datasets.episodes import CHUNK, Flags, Floats, Steps


def column_spread(observations: Floats) -> Floats:
    """Return the standard deviation of each column, of an even subset of the rows."""
    return np.asarray(observations[:: 1 + len(observations) // CHUNK].std(axis=0) + 1e-9)


def distance(first: Floats, second: Floats) -> Floats:
    """Return the largest difference of a column, in standard deviations, ``[rows]``."""
    return np.asarray(
        (np.abs(first - second) / column_spread(np.concatenate((first, second)))).max(axis=1)
    )


def _near(rows: Flags) -> Flags:
    """Return these rows, the one before and the one after each."""
    return rows | np.append(rows[1:], False) | np.append(False, rows[:-1])


class Dynamics:
    """The observation of row i + lag, predicted by a linear function of row i.

    Resets surprise far more than steps do, and rows of another environment cannot be predicted.
    ``unexplained`` is the share of variance that is not predicted, the median of the columns, and
    infinite with too few rows to fit. ``apart`` has rows that are not fitted.
    """

    def __init__(self, steps: Steps, lag: int = 1, *, apart: Flags | None = None) -> None:
        self._steps, self._lag = steps, lag
        now, ends = steps.observations, steps.ends
        self._spread = column_spread(now)
        self._columns = self._spread > 1e-6
        self._mean = now[:: 1 + len(now) // CHUNK].mean(axis=0)
        rows = np.arange(0, len(now) - lag, 1 + len(now) // CHUNK)
        rows = rows[~(ends if apart is None else ends | apart)[rows]]
        usual = rows[~_near(ends)[rows]]
        self.unexplained = np.inf
        least = 8 * (1 + self._columns.sum() + steps.actions.shape[1])
        if len(rows) < least or len(usual) < 30 or not self._columns.any():
            return  # too few to fit
        then = self._scaled(rows + lag)
        self._weights = np.linalg.lstsq(self._given(rows), then)[0]
        # Once more, without steps whose end may not be marked.
        errors = self._errors(rows)
        each = (errors**2).mean(axis=1)
        fitted = each <= np.quantile(each, 0.8)
        self._weights = np.linalg.lstsq(self._given(rows[fitted]), then[fitted])[0]
        errors = self._errors(rows[fitted])
        shares = errors.var(axis=0) / then[fitted].var(axis=0).clip(1e-6)
        self.unexplained = float(np.median(shares))
        self._scale = np.quantile(np.abs(self._errors(usual)), 0.75, axis=0) + 1e-3
        self._usual = self.surprise(usual)

    def _scaled(self, rows: NDArray[np.int64]) -> Floats:
        scaled = (self._steps.observations[rows] - self._mean) / self._spread
        return np.asarray(scaled[:, self._columns])

    def _given(self, rows: NDArray[np.int64]) -> Floats:
        one = np.ones((len(rows), 1), dtype=np.float32)
        return np.concatenate((self._scaled(rows), self._steps.actions[rows], one), axis=1)

    def _errors(self, rows: NDArray[np.int64]) -> Floats:
        return np.asarray(self._scaled(rows + self._lag) - self._given(rows) @ self._weights)

    @property
    def predictable(self) -> bool:
        """Whether steps can be predicted, so that a surprise shows a reset."""
        return self.unexplained < 0.5

    def surprise(self, rows: NDArray[np.int64]) -> Floats:
        """Return the errors at these rows in those of usual steps, as a mean over the columns."""
        if len(rows) == 0:
            return np.empty(0, dtype=np.float32)
        parts = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        errors = [(np.abs(self._errors(p)) / self._scale).clip(max=20).mean(axis=1) for p in parts]
        return np.concatenate(errors)

    def usual(self, share: float) -> float:
        """Return the surprise that this share of the usual steps does not exceed."""
        return float(np.quantile(self._usual, share))

    def as_usual(self, rows: NDArray[np.int64]) -> bool:
        """Return whether steps from most of these rows surprise no more than usual ones."""
        return bool(np.median(self.surprise(rows)) <= self.usual(0.95))

    def end_after(self, rows: NDArray[np.int64], shift: int, *, sure: bool = False) -> bool:
        """Return whether resets follow the rows ``shift`` after these, and not these.

        A few rows must show it more clearly, unless other evidence makes it ``sure``.
        """
        if not self.predictable or len(rows) == 0:
            return False
        here, there = self.surprise(rows), self.surprise(rows + shift)
        most = self.usual(0.95) if sure or len(rows) > 4 else 2 * self.usual(0.99)
        return bool(((there > most) & (here < there / 2)).mean() > 0.8)
