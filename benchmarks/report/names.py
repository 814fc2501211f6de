"""Names of algorithms and tasks in a report, and the order of algorithms."""

from __future__ import annotations

import re

# Name of --algo -> the paper's notation where it has one, in the order of its tables' columns.
ALGORITHMS = {
    "bc": "BC",
    "bc-10": "BC-10%",
    "awac": "AWAC",
    "td3-bc": "TD3+BC",
    "cql": "CQL",
    "iql": "IQL",
    "dt": "DT",
    "base": "base",
    "sft": "SFT",
    "sft-q": "SFT(Q)",
    "iw-sft": "iw-SFT",
    "iw-sft-hard": "iw-sft-hard",
    "iw-sft-ema": "iw-sft-ema",
    "iw-sft-q": "iw-SFT(Q)",
    "iw-sft-step": "iw-SFT-step",
}
_SHARE = re.compile(r"bc-(\d+(?:\.\d+)?)")
# Between the data of pre-training and of fine-tuning in a task's name.
_TO = "--to--"


def base(algo: str) -> str:
    """The algorithm of a variant, ``sft-q`` of ``authors/sft-q``; any other name as it is."""
    return algo.rsplit("/", 1)[-1]


def is_variant(algo: str) -> bool:
    """Whether the name is ``VARIANT/algo``."""
    return "/" in algo


def algorithm_label(algo: str) -> str:
    """The paper's notation for an algorithm, its variant in front; unknown names as they are."""
    name = base(algo)
    share = _SHARE.fullmatch(name)
    label = f"BC-{share[1]}%" if share else ALGORITHMS.get(name, name)
    return algo.removesuffix(name) + label


def algorithm_rank(algo: str) -> tuple[int, list[str | float], str]:
    """Sorting key: the known algorithms in their order, each before its variants, then others.

    Numbers in the names of variants count as numbers: k3 is before k10.
    """
    known = list(ALGORITHMS)
    name = base(algo)
    if _SHARE.fullmatch(name):
        name = "bc-10"
    rank = known.index(name) if name in known else len(known)
    # Every second part is a number.
    parts = re.split(r"(\d+(?:\.\d+)?)", algo.removesuffix(name))
    return rank, [float(part) if i % 2 else part for i, part in enumerate(parts)], name


def dataset_label(dataset: str) -> str:
    """``kitchen-partial -> complete`` for ``kitchen-partial-v0--to--kitchen-complete-v0``.

    Versions that agree and first words that agree are left out after the arrow. Names without
    pre-training data stay as they are.
    """
    before, to, after = dataset.partition(_TO)
    if not to:
        return dataset
    (stem, version), (last, last_version) = map(_versioned, (before, after))
    if version != last_version:
        stem, last = before, after
    return f"{stem} -> {last.removeprefix(stem.split('-')[0] + '-')}"


def _versioned(name: str) -> tuple[str, str]:
    stem, dash, version = name.rpartition("-")
    return (stem, dash + version) if re.fullmatch(r"v\d+", version) else (name, "")
