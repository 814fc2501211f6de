"""How all figures of the benchmarks look."""

from __future__ import annotations

from matplotlib.axes import Axes


def style(ax: Axes) -> None:
    """A light grid and no frame."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", lw=0.8)
    ax.set_axisbelow(True)
