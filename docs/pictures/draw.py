"""Draw the pictures of the page of concepts: ``python docs/pictures/draw.py``.

Grey text and middle colours on no background are readable on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

GREY, BLUE, ORANGE, GREEN = "#7d7d7d", "#3a87c8", "#d9722e", "#2f9e77"
STYLE: dict[Any, Any] = {
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.transparent": True,
    "svg.hashsalt": "iwsft",
}


def path() -> Figure:
    """The way of the data from a file to a score."""
    figure = Figure(figsize=(7.2, 3.3))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 100), ylim=(-2, 46))
    ax.axis("off")
    boxes = {
        "data": (2, 33, "data", "load, read", GREY),
        "curate": (28, 33, "curated set", "curate", GREY),
        "reference": (54, 33, "log pi_ref", "annotate_reference", BLUE),
        "score": (80, 33, "score", "evaluate", GREY),
        "policy": (2, 6, "log p", "policy", ORANGE),
        "weights": (28, 6, "weights w", "q / pi_ref", BLUE),
        "loss": (54, 6, "loss", "-w log p", ORANGE),
        "step": (80, 6, "step, q follows", "Adam, EMA", ORANGE),
    }
    for x, y, name, by, colour in boxes.values():
        box = FancyBboxPatch((x, y), 18, 9, "round,pad=0.6,rounding_size=1.5", fill=False)
        box.set(edgecolor=colour, linewidth=1.6)
        ax.add_patch(box)
        ax.text(x + 9, y + 6, name, ha="center", va="center", weight="bold", color=colour)
        about: dict[str, Any] = {"fontsize": 8.5, "family": "monospace"}
        ax.text(x + 9, y + 2, by, ha="center", va="center", **about)

    def arrow(start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
        style = f"arc3,rad={bend}"
        patch = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=GREY)
        patch.set_connectionstyle(style)
        ax.add_patch(patch)

    for x in (21, 47):
        arrow((x, 37.5), (x + 6.2, 37.5))
    for x in (21, 47, 73):
        arrow((x, 10.5), (x + 6.2, 10.5))
    arrow((63, 32), (37, 16.4))
    arrow((89, 16.4), (89, 31.6))
    arrow((89, 4.6), (11, 4.6), bend=-0.06)
    ax.text(50, 0.2, "each update", ha="center", va="center", color=ORANGE)
    ax.text(95.5, 24, "at the\nend", ha="center", va="center", fontsize=9)
    return figure


def weights() -> Figure:
    """Weights of twelve trajectories at three temperatures, with their effective sample size."""
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    log_ratio = np.sort(np.random.default_rng(3).normal(0.0, 1.0, 12))
    for ax, k in zip(figure.subplots(1, 3, sharey=True), (0.0, 0.3, 1.0), strict=True):
        weight = np.exp(k * log_ratio)
        weight /= weight.mean()
        ess = weight.sum() ** 2 / (len(weight) * (weight**2).sum())
        ax.bar(np.arange(1, 13), weight, color=BLUE if k else GREY, width=0.75)
        name = "SFT: all weights 1" if not k else f"iw-SFT, k = {k:g}"
        ax.set_title(f"{name}\nESS {ess:.2f}", fontsize=11, color=GREY)
        ax.axhline(1, color=GREY, lw=0.8, ls=":")
        ax.set_xticks([1, 12], ["lowest", "highest"])
        ax.set_xlabel("trajectories, by log q - log pi_ref", fontsize=9)
    figure.axes[0].set_ylabel("weight")
    return figure


def estimators() -> Figure:
    """What a batch of each estimator takes from five trajectories."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    generator = np.random.default_rng(1)
    lengths = np.array([9, 16, 5, 12, 7])
    weight = np.array([0.4, 1.9, 0.7, 1.3, 0.7])
    names = ("trajectories: whole ones, weights of the batch", "steps: single ones, cached weights")
    for ax, name in zip(figure.subplots(1, 2), names, strict=True):
        whole = name.startswith("trajectories")
        for row, length in enumerate(lengths):
            if whole:
                chosen = np.full(length, row in (1, 3))
            else:
                chosen = np.arange(length) == generator.integers(length)
            for step, taken in enumerate(chosen):
                colour = ORANGE if taken else GREY
                ax.scatter(
                    step, -row, s=42, marker="s", color=colour, alpha=1 if taken else 0.35, lw=0
                )
            if whole == (row in (1, 3)) or not whole:
                ax.text(17, -row, f"w = {weight[row]:g}", va="center", fontsize=10, color=BLUE)
        ax.set_title(name, fontsize=10, color=GREY)
        ax.set(xlim=(-1, 22), ylim=(-4.7, 0.7))
        ax.axis("off")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "path": path,
    "weights": weights,
    "estimators": estimators,
}


def main(folder: Path = Path(__file__).parent) -> None:
    """Draw all pictures as SVG files."""
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            # Without a date, the same picture is the same file.
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
