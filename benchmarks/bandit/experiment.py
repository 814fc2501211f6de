"""The bandit, its two policies, the figure and the table."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from benchmarks.bandit.options import Options
from benchmarks.report import figures
from benchmarks.report.document import INK, Grid, interval_text
from benchmarks.report.figures import Panels
from benchmarks.report.scores import algorithm_label
from benchmarks.runs import hardware, versions, write_json
from benchmarks.statistics import t_interval
from iwsft import ImportanceWeightedMLE, ImportanceWeights, annotate_reference, weights
from iwsft.files import written_whole
from iwsft.progress import Progress
from iwsft.trajectory import REWARD, from_steps, select

# Probability of reward 1 of the left and the right arm.
ARMS = (0.5, 1.0)
# Limit of the mean reward with D+ of infinite size (paper, Section 3.5).
LIMITS = {"sft": 5 / 6, "iw-sft": 1.0}


@dataclass(frozen=True)
class BanditRun:
    """One seed of one algorithm."""

    right: NDArray[np.float64]  # P(right) before each update and after the last ``[steps + 1]``
    successes: float  # share of right pulls in D+, which SFT copies

    @property
    def reward(self) -> NDArray[np.float64]:
        """Mean reward of the policy in closed form ``[steps + 1]``."""
        return ARMS[0] * (1 - self.right) + ARMS[1] * self.right


def uniform_policy() -> ProbabilisticActor:
    """Return a TorchRL actor of two logits, both 0."""
    logits = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(logits.weight)
    return ProbabilisticActor(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
    )


def successes(pulls: int, seed: int) -> TensorDictBase:
    """Return D+: the rewarded ones of ``pulls`` uniform pulls, packed trajectories of one step."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(2, (pulls,), generator=generator)
    reward = torch.bernoulli(torch.tensor(ARMS)[arm], generator=generator)
    if not bool(reward.any()):
        raise ValueError(f"none of the {pulls} pulls was rewarded, D+ is empty; raise --pulls")
    steps = {"observation": torch.ones(pulls, 1), "action": nn.functional.one_hot(arm, 2)}
    data = from_steps({**steps, REWARD: reward[:, None]}, torch.arange(pulls))
    return select(data, reward.nonzero().squeeze(-1))


def train(algorithm: str, data: TensorDictBase, steps: int, lr: float) -> BanditRun:
    """Train a uniform policy on D+, annotated with pi_ref."""
    policy = uniform_policy()
    loss = ImportanceWeightedMLE(
        policy,
        proposal="reference" if algorithm == "sft" else "current",
        importance_weights=ImportanceWeights(step=[weights.Temperature(1.0)], reduce="sum"),
    )
    optimizer = torch.optim.SGD(loss.parameters(), lr=lr)
    (logits,) = policy.parameters()
    curve = [logits.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(data)["loss_iw_mle"].backward()
        optimizer.step()
        curve.append(logits.detach().clone())
    right = torch.stack(curve).squeeze(-1).softmax(-1)[:, 1]
    share = data["action"][:, 1].double().mean()
    return BanditRun(right.double().numpy(), float(share))


def summary(runs: dict[str, list[BanditRun]]) -> dict[str, dict[str, Any]]:
    """Return the numbers of the figure and the table: means over seeds and 95 % intervals."""
    out: dict[str, dict[str, Any]] = {}
    for algorithm, seeds in runs.items():
        rewards = np.stack([run.reward for run in seeds])
        low, high = t_interval(rewards) if len(seeds) > 1 else (rewards[0], rewards[0])
        out[algorithm] = {
            "limit": LIMITS[algorithm],
            "p_right": [float(run.right[-1]) for run in seeds],
            "right_share_of_successes": [run.successes for run in seeds],
            "mean_reward": [float(run.reward[-1]) for run in seeds],
            "curve": {"mean": rewards.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()},
        }
    return out


def draw(numbers: dict[str, dict[str, Any]]) -> Panels:
    """Draw the mean reward over updates: its mean over seeds, the 95 % interval, and the limit."""
    seeds = len(numbers["sft"]["p_right"])
    colours = {algorithm: figures.COLOURS[algorithm] for algorithm in numbers}
    ax = figures.make_panel(f"Two-armed bandit, successes only ({seeds} seeds)", 2.5, colours)
    for algorithm, row in numbers.items():
        curve, colour = row["curve"], colours[algorithm]
        updates = range(len(curve["mean"]))
        ax.plot(updates, curve["mean"], color=colour, lw=1.6)
        ax.fill_between(updates, curve["low"], curve["high"], color=colour, alpha=0.2, lw=0)
        ax.axhline(row["limit"], color=colour, ls=":", lw=1.2)
    style: Any = {"ha": "right", "va": "top", "fontsize": 7.5, "color": INK}
    where = ("axes fraction", "data")
    for height, name in ((5 / 6, "5/6: P(right) = 2/3"), (1.0, "1: always right")):
        ax.annotate(name, (1, height), (-4, -4), where, "offset points", **style)
    ax.set(xlabel="update", ylabel="mean reward of the policy", ylim=(0.74, 1.02))
    return figures.finish({"reward": ax})


def table(numbers: dict[str, dict[str, Any]]) -> Grid:
    """Table of the last policies: mean over seeds and 95 % interval."""
    columns = ["algorithm", "P(right)", "right in D+", "mean reward", "95 % interval", "limit"]
    grid = Grid(columns, left=1)
    for algorithm, row in numbers.items():
        keys = ("p_right", "right_share_of_successes", "mean_reward")
        ends = row["curve"]["low"][-1], row["curve"]["high"][-1]
        means = [f"{np.mean(row[key]):.4f}" for key in keys]
        limit = f"{row['limit']:.4f}"
        grid.rows.append([algorithm_label(algorithm), *means, interval_text(ends, 4), limit])
    return grid


def main(options: Options) -> dict[str, list[BanditRun]]:
    """Train, write ``bandit.json`` and ``bandit.png``, print the table."""
    start = time.perf_counter()
    runs: dict[str, list[BanditRun]] = {algorithm: [] for algorithm in LIMITS}
    with Progress() as progress:
        for seed in progress.track(range(options.seeds), description="bandit, seeds"):
            data = annotate_reference(uniform_policy(), successes(options.pulls, seed))
            for algorithm, seeds in runs.items():
                seeds.append(train(algorithm, data, options.steps, options.lr))
    numbers = summary(runs)
    figure, file = options.out / "bandit.png", options.out / "bandit.json"
    (image,) = draw(numbers).values()
    with written_whole(figure) as partial:
        image.savefig(partial, dpi=150, format="png")
    about = {"benchmark": "bandit", "settings": {**asdict(options), "out": str(options.out)}}
    about |= {"versions": versions(), "hardware": hardware("cpu")}
    write_json(file, {**about, "wall_seconds": time.perf_counter() - start, "algorithms": numbers})
    console = Console()
    console.print(table(numbers).rich("Two-armed bandit: the last policies"))
    console.print(f"{figure}\n{file}", soft_wrap=True)
    return runs
