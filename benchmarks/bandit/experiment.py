"""The bandit, its two policies, the figure and the table."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import rich
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from benchmarks.bandit.options import Options
from benchmarks.llm.options import ALGORITHMS, Algorithm
from benchmarks.llm.settings import Settings
from benchmarks.report import figures
from benchmarks.report.document import INK, NOTHING, Grid, interval_text
from benchmarks.report.figures import Panels
from benchmarks.report.scores import algorithm_colour, algorithm_label
from benchmarks.results import read_json
from benchmarks.runs import hardware, versions
from benchmarks.statistics import MIN_SEEDS, t_interval
from iwsft import EMA, HardSync, ImportanceWeightedMLE, annotate_reference
from iwsft.checkpoint import differences
from iwsft.files import write_json, written_whole
from iwsft.progress import Progress
from iwsft.trajectory import DATA_WEIGHT, REWARD, SUCCESS_RATE, from_steps, select

# Probability of reward 1 of the left and the right arm.
ARMS = (0.5, 1.0)
# The weights are q / pi_ref, and the clips of language models are out of reach.
SETTINGS = Settings(learning_rate=1.0, batch_size=1, reduce="sum", sync_every=10, ema_decay=0.9)


def limits(right: float) -> dict[str, float]:
    """Limits of the mean reward with D of infinite size, from P(right) of pi_ref.

    SFT copies D+ (paper, Section 3.5).
    """
    copied = ARMS[1] * right / (ARMS[0] * (1 - right) + ARMS[1] * right)
    best = dict.fromkeys(("iw-sft", "iw-sft-hard", "iw-sft-ema"), max(ARMS))
    return {"sft": ARMS[0] * (1 - copied) + ARMS[1] * copied, **best}


@dataclass(frozen=True)
class BanditRun:
    """One seed of one algorithm."""

    right: NDArray[np.float64]  # P(right) before each update and after the last ``[steps + 1]``
    successes: float  # share of right pulls in D+, which SFT copies
    ESS: float  # effective share of the pulls at the last update

    @property
    def reward(self) -> NDArray[np.float64]:
        """Mean reward of the policy in closed form ``[steps + 1]``."""
        return ARMS[0] * (1 - self.right) + ARMS[1] * self.right


def reference_policy(right: float = 0.5) -> ProbabilisticActor:
    """Return a TorchRL actor of two logits that pulls the right arm with this chance."""
    logits = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        logits.weight.copy_(torch.tensor([[0.0], [math.log(right / (1 - right))]]))
    return ProbabilisticActor(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
    )


def draw_pulls(pulls: int, seed: int, right: float = 0.5) -> TensorDictBase:
    """Return D: ``pulls`` pulls of pi_ref, packed trajectories of one step."""
    generator = torch.Generator().manual_seed(seed)
    arm = (torch.rand(pulls, generator=generator) < right).long()
    reward = torch.bernoulli(torch.tensor(ARMS)[arm], generator=generator)
    if not bool(reward.any()):
        raise ValueError(f"none of the {pulls} pulls was rewarded, D+ is empty; raise --pulls")
    steps = {"observation": torch.ones(pulls, 1), "action": nn.functional.one_hot(arm, 2)}
    data = from_steps({**steps, REWARD: reward[:, None]}, torch.arange(pulls))
    return annotate_reference(reference_policy(right), data)


def training_data(method: Algorithm, data: TensorDictBase) -> TensorDictBase:
    """Return D+, the successes of D; or D with its signs as data weights, less a baseline."""
    reward = data[REWARD].squeeze(-1)
    if not method.signed:
        return select(data, reward.nonzero().squeeze(-1))
    rate = reward.mean()
    weight = 2 * reward - 1
    if method.related == "asymre":
        weight = reward - (rate - SETTINGS.baseline_margin)
    return data.copy().set(DATA_WEIGHT, weight).set(SUCCESS_RATE, rate.expand_as(reward).clone())


def train(
    algorithm: str, pulls: TensorDictBase, steps: int, lr: float, right: float = 0.5
) -> BanditRun:
    """Train pi_ref, which pulls the right arm with chance ``right``, on its pulls D."""
    method, policy = ALGORITHMS[algorithm], reference_policy(right)
    data = training_data(method, pulls)
    loss = ImportanceWeightedMLE(
        policy,
        proposal=method.proposal,
        importance_weights=method.importance_weights(SETTINGS),
    )
    follow = _updater(method, loss, data)
    optimizer = torch.optim.SGD(loss.parameters(), lr=lr)
    (logits,) = policy.parameters()
    curve = [logits.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        out = loss(data)
        out["loss_iw_mle"].backward()
        optimizer.step()
        if follow is not None:
            follow.step()
        curve.append(logits.detach().clone())
    chances = torch.stack(curve).squeeze(-1).softmax(-1)[:, 1]
    share = training_data(ALGORITHMS["sft"], pulls)["action"][:, 1].double().mean()
    return BanditRun(chances.double().numpy(), float(share), float(out["ESS"]))


def _updater(
    method: Algorithm, loss: ImportanceWeightedMLE, data: TensorDictBase
) -> EMA | HardSync | None:
    """What moves q, or what q is divided by."""
    if method.proposal == "lagged":
        return EMA(loss, decay=SETTINGS.ema_decay)
    if method.proposal == "cached" or method.syncs_reference:
        return HardSync(loss, every=SETTINGS.sync_every, trajectories=data)
    return None


def summary(runs: dict[str, list[BanditRun]], right: float) -> dict[str, dict[str, Any]]:
    """Return the numbers of the figure and the table: means over seeds and 95 % intervals."""
    out: dict[str, dict[str, Any]] = {}
    for algorithm, seeds in runs.items():
        rewards = np.stack([run.reward for run in seeds])
        low, high = t_interval(rewards) if len(seeds) > 1 else (rewards[0], rewards[0])
        out[algorithm] = {
            "limit": limits(right).get(algorithm),
            "p_right": [float(run.right[-1]) for run in seeds],
            "right_share_of_successes": [run.successes for run in seeds],
            "mean_reward": [float(run.reward[-1]) for run in seeds],
            "ESS": [run.ESS for run in seeds],
            "curve": {"mean": rewards.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()},
        }
    return out


def draw(numbers: dict[str, dict[str, Any]]) -> Panels:
    """Draw the mean reward over updates: its mean over seeds, the 95 % interval, and the limit."""
    seeds = len(next(iter(numbers.values()))["p_right"])
    colours = {algorithm: algorithm_colour(algorithm) for algorithm in numbers}
    ax = figures.make_panel(f"Two-armed bandit ({seeds} seeds)", 2.5, colours)
    for algorithm, row in numbers.items():
        curve, colour = row["curve"], colours[algorithm]
        updates = range(len(curve["mean"]))
        ax.plot(updates, curve["mean"], color=colour, lw=1.6)
        ax.fill_between(updates, curve["low"], curve["high"], color=colour, alpha=0.2, lw=0)
        if row["limit"] is not None:
            ax.axhline(row["limit"], color=colour, ls=":", lw=1.2)
    style: Any = {"ha": "right", "va": "top", "fontsize": 7.5, "color": INK}
    where = ("axes fraction", "data")
    for height in sorted({row["limit"] for row in numbers.values()} - {None}):
        right = (height - ARMS[0]) / (ARMS[1] - ARMS[0])
        name = "1: always right" if right == 1 else f"{height:.3f}: P(right) = {right:.2f}"
        ax.annotate(name, (1, height), (-4, -4), where, "offset points", **style)
    least = min(min(row["curve"]["mean"]) for row in numbers.values())
    ax.set(xlabel="update", ylabel="mean reward of the policy", ylim=(least - 0.01, 1.02))
    return figures.finish({"reward": ax})


def table(numbers: dict[str, dict[str, Any]]) -> Grid:
    """Table of the last policies: mean over seeds, and from three on the 95 % interval."""
    columns = ["algorithm", "P(right)", "right in D+", "mean reward", "95 % interval", "limit"]
    columns.append("ESS")
    grid = Grid(columns, left=1)
    for algorithm, row in numbers.items():
        keys = ("p_right", "right_share_of_successes", "mean_reward")
        few = len(row["p_right"]) < MIN_SEEDS
        ends = None if few else (row["curve"]["low"][-1], row["curve"]["high"][-1])
        means = [f"{np.mean(row[key]):.4f}" for key in keys]
        limit = NOTHING if row["limit"] is None else f"{row['limit']:.4f}"
        row_of = [algorithm_label(algorithm), *means, interval_text(ends, 4), limit]
        grid.rows.append([*row_of, f"{np.mean(row['ESS']):.2f}"])
    return grid


def main(options: Options) -> dict[str, list[BanditRun]]:
    """Train, write ``bandit.json`` and ``bandit.png``, print the table.

    A ``bandit.json`` of other settings is refused with a FileExistsError.
    """
    start = time.perf_counter()
    # A wrong --out ends the command here, not after the training.
    options.out.mkdir(parents=True, exist_ok=True)
    figure, file = options.out / "bandit.png", options.out / "bandit.json"
    settings = asdict(options) | {"out": str(options.out)}
    if file.exists():
        # The same settings write the same numbers, wherever the folder is now.
        earlier = read_json(file).get("settings", {}) | {"out": settings["out"]}
        if differ := differences(earlier, settings):
            raise FileExistsError(f"{file} is of other settings: {differ}; choose another --out")
    runs: dict[str, list[BanditRun]] = {algorithm: [] for algorithm in options.algo}
    with Progress() as progress:
        for seed in progress.track(range(options.seeds), description="bandit, seeds"):
            pulls = draw_pulls(options.pulls, seed, options.right)
            for algorithm, seeds in runs.items():
                # A sync writes into the data.
                seeds.append(
                    train(algorithm, pulls.clone(), options.steps, options.lr, options.right)
                )
    numbers = summary(runs, options.right)
    (image,) = draw(numbers).values()
    with written_whole(figure) as partial:
        image.savefig(partial, dpi=150, format="png")
    about = {"benchmark": "bandit", "settings": settings, "versions": versions()}
    about |= {"hardware": hardware("cpu")}
    write_json(file, {**about, "wall_seconds": time.perf_counter() - start, "algorithms": numbers})
    rich.print(table(numbers).rich("Two-armed bandit: the last policies"))
    print(f"{figure}\n{file}")
    return runs
