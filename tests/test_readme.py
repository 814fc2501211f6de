"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from iwsft import GaussianPolicy, datasets
from iwsft.samplers import TrajectorySampler


def test_the_lines_of_python_train_a_policy() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    trajectories = datasets.load(datasets.DEFAULT).trajectories
    policy = GaussianPolicy(11, 3)
    before = [parameter.clone() for parameter in policy.parameters()]
    names: dict[str, Any] = {
        "policy": policy,
        "trajectories": trajectories,
        "optimizer": torch.optim.Adam(policy.parameters(), lr=1e-3),
    }
    # The batch holds what the first lines write into the trajectories.
    *first, last = code.strip().splitlines()
    exec("\n".join(first), names)
    names["batch"] = TrajectorySampler(trajectories, 16).sample()
    exec(last, names)
    names["optimizer"].step()
    names["q"].step()
    assert all(
        not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True)
    )
