"""Speed of control: training, memory, diagnosis and evaluation, on data of the paper's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.utils import TargetNetUpdater

from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.options import ALGORITHMS, QUALITY_BINS, TOP_10
from benchmarks.d4rl.run import sizes as widths
from benchmarks.speed.measure import MB, Check, Comparison, Times, paired, peak_mb_of_child
from benchmarks.speed.options import Options
from iwsft import datasets, environments
from iwsft.curation import curate
from iwsft.diagnostics import diagnose
from iwsft.evaluation import evaluate
from iwsft.objective import LOSS, ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy
from iwsft.presets import ImportanceWeights
from iwsft.proposals import EMA, HardSync
from iwsft.reference import annotate_reference
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.trajectory import (
    ACTION,
    MASK,
    MULTIPLICITY,
    OBSERVATION,
    REWARD,
    TRAJ_IDS,
    from_steps,
    lengths,
    pad,
)
from tests.oracles.iw_sft import NaiveIwSft
from tests.oracles.networks import PlainGaussian

GRADIENT_LIMIT = 1e-5
_NAIVE = "padded batch of every draw, live q and reference (plain torch)"
# halfcheetah-medium-replay in Table 4 of the paper.
K, DECAY, LR = 1.0, 0.995, 4e-5
_ROW, _ = paper.find_fine_tuning("hopper-replay", ALGORITHMS["iw-sft-q"])


@dataclass(frozen=True)
class Sizes:
    """Sizes of the synthetic dataset, of batches, repeats and episodes."""

    trajectories: int = 202
    steps: int = 1000
    draws: int = paper.FINE_TUNING_BATCH["trajectories"]
    many_draws: int = 4096
    # Copies of the bundled data; 9 make the size of the set that it is part of.
    copies: int = 9
    single_steps: int = paper.FINE_TUNING_BATCH["steps"]
    sync_every: int = _ROW.sync_every
    cloning_updates: int = 20
    episode: int = 1000
    # Episodes of HalfCheetah, and of the peer in Hopper; then those of Hopper.
    episodes: int = 10
    many_episodes: int = 64


SIZES = {
    "paper": Sizes(),
    "small": Sizes(
        trajectories=40,
        steps=50,
        draws=64,
        many_draws=256,
        copies=1,
        sync_every=10,
        cloning_updates=2,
        episode=20,
        episodes=2,
        many_episodes=4,
    ),
}
# Updates between two looks at the clock, in the part with single steps.
_BLOCK = 20


def cheetah_like(file: str | Path | None, trajectories: int, steps: int, seed: int) -> TensorDict:
    """Return the file's trajectories, or random ones of HalfCheetah's sizes and equal length."""
    if file is not None:
        return datasets.load(file).trajectories
    generator = torch.Generator().manual_seed(seed)
    total = trajectories * steps
    skill = torch.rand(trajectories, 1, generator=generator).repeat_interleave(steps, 0)
    # Each trajectory has its own corner of the state space, so that weights differ.
    place = 3 * torch.randn(trajectories, 17, generator=generator).repeat_interleave(steps, 0)
    return from_steps(
        {
            OBSERVATION: place + torch.randn(total, 17, generator=generator),
            ACTION: 2 * torch.rand(total, 6, generator=generator) - 1,
            REWARD: 10 * skill + torch.randn(total, 1, generator=generator),
        },
        torch.arange(trajectories).repeat_interleave(steps),
    )


def hopper_replay(times: int) -> TensorDict:
    """Return copies of the bundled data; 9 have as many episodes as the set it is part of."""
    part = datasets.load(datasets.DEFAULT).trajectories
    whole: TensorDict = torch.cat([part] * times)
    steps = lengths(part).repeat(times)
    whole.set(TRAJ_IDS, torch.arange(len(steps)).repeat_interleave(steps))
    return whole


def cut_evenly(trajectories: TensorDict) -> TensorDict:
    """Return the same steps cut into as many trajectories of equal length, up to one step."""
    count, total = len(lengths(trajectories)), len(trajectories)
    steps = torch.full((count,), total // count)
    steps[: total % count] += 1
    # The ends of the episodes, and the observations that follow, are those of other trajectories.
    even = trajectories.exclude(("next", "done"), ("next", "observation")).copy()
    even.set(TRAJ_IDS, torch.arange(count).repeat_interleave(steps))
    return even


@dataclass
class Training:
    """The updates of ``iwsft.training.fit``, one per call, without its files."""

    loss: ImportanceWeightedMLE
    sampler: StepSampler | TrajectorySampler
    updater: TargetNetUpdater | None = None
    lr: float = LR
    # Whether each update also looks at the weights of its batch.
    diagnosed: bool = False
    batch: TensorDictBase | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=self.lr, fused=True)

    def step(self) -> None:
        """Make one update."""
        self.batch = self.sampler.sample()
        terms = self.loss.terms(self.batch)
        out = self.loss.summary(terms)
        self.optimizer.zero_grad()
        out[LOSS].backward()
        if self.diagnosed:
            diagnose(self.loss, self.batch, terms)
        self.optimizer.step()
        if self.updater is not None:
            self.updater.step()


class SameDraws:
    """Ours and the naive way on the curated part of :func:`cheetah_like`, in batches of draws."""

    def __init__(
        self, file: str | Path | None, trajectories: int, steps: int, draws: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        curated = curate(cheetah_like(file, trajectories, steps, seed), cuts=QUALITY_BINS)
        observation_dim, action_dim = widths(curated)
        reference, policy = (GaussianPolicy(observation_dim, action_dim) for _ in range(2))
        annotate_reference(reference, curated)
        # The order of the naive policy's parameters, before the loss takes them out of the module.
        self._names = [tuple(name.split(".")) for name, _ in policy.named_parameters()]
        plain = PlainGaussian.of_sizes(observation_dim, action_dim)
        plain.copy_(reference.parameters())
        loss = ImportanceWeightedMLE(
            policy, importance_weights=ImportanceWeights.paper_control(K), proposal="lagged"
        )
        sampler = TrajectorySampler(curated, draws, seed=seed)
        self.ours = Training(loss, sampler, EMA(loss, decay=DECAY))
        padded = pad(curated)
        observation, action, mask = (padded.get(key) for key in (OBSERVATION, ACTION, MASK))
        self.naive = NaiveIwSft(observation, action, mask, plain, k=K, decay=DECAY, lr=LR)
        self.ids = curated.get(TRAJ_IDS).unique_consecutive()
        self.follow()

    def follow(self) -> None:
        """Give the naive policy and q the parameters of ours."""
        loss = self.ours.loss
        self.naive.policy.copy_(loss.actor_network_params[name] for name in self._names)
        self.naive.q.copy_(loss.target_actor_network_params[name] for name in self._names)

    def draws(self) -> Tensor:
        """Return the positions of the trajectories of our last batch, one entry per draw."""
        assert self.ours.batch is not None
        ids, steps = self.ours.batch.get(TRAJ_IDS).unique_consecutive(return_counts=True)
        first = steps.cumsum(0) - steps
        multiplicity = self.ours.batch.get(MULTIPLICITY)[first]
        return torch.searchsorted(self.ids, ids).repeat_interleave(multiplicity)

    def disagreement(self) -> float:
        """Return the largest relative difference of a parameter's last gradient, in the 2-norm."""
        ours = [self.ours.loss.actor_network_params[name].grad for name in self._names]
        naive = [p.grad for p in self.naive.policy.parameters() if p.grad is not None]
        pairs = [(a.double(), b.double()) for a, b in zip(ours, naive, strict=True)]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def measure(options: Options) -> Iterator[Comparison | Check]:
    """Yield all rows of control, as they are measured."""
    sizes = SIZES[options.scale]
    if options.dataset is not None:
        # A file that can't be read ends the command here, not a child process.
        datasets.load(options.dataset)
    yield from memory(options, sizes)
    yield from compare_whole_trajectories(options, sizes)
    yield from single_steps(options, sizes)
    yield from distinct_steps(options, sizes)
    yield from behaviour_cloning(options, sizes)
    # HalfCheetah's episodes never end early; neither do Hopper's here: the most work there is.
    yield evaluation(options, sizes, "HalfCheetah-v4", sizes.episodes, {})
    tireless = {"terminate_when_unhealthy": False}
    yield evaluation(options, sizes, "Hopper-v4", sizes.many_episodes, tireless)


def memory(options: Options, sizes: Sizes) -> Iterator[Comparison]:
    """Peak of a training step, each way in a process of its own; and a dataset in memory."""
    arguments = {name: getattr(sizes, name) for name in ("trajectories", "steps", "draws")}
    arguments |= {"file": options.dataset and str(options.dataset), "seed": options.seed}
    ours, naive = (
        peak_mb_of_child("benchmarks.speed.control", ours=ours, **arguments)
        for ours in (True, False)
    )
    name = f"peak memory of a step above the data, {sizes.draws} trajectories"
    yield Comparison(name, ours, naive, "MB", _NAIVE)
    ragged = hopper_replay(1)
    packed, padded = (td.bytes(count_duplicates=False) / MB for td in (ragged, pad(ragged)))
    yield Comparison(
        "dataset of hopper-replay's lengths in memory", packed, padded, "MB", "padded copy"
    )


def compare_whole_trajectories(options: Options, sizes: Sizes) -> Iterator[Comparison | Check]:
    """The paper's batch against the naive way, then with a diagnosis at every step."""
    pair = SameDraws(options.dataset, sizes.trajectories, sizes.steps, sizes.draws, options.seed)
    ours = pair.ours
    # Products that round alike: else an activation at the kink of a ReLU decides the difference.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    ours.step()
    pair.naive.step(pair.draws())
    torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
    name = f"gradient of {sizes.draws} trajectories against the naive one, relative difference"
    yield Check(name, pair.disagreement(), GRADIENT_LIMIT)
    times = paired(
        ours.step, lambda: pair.naive.step(pair.draws()), options.repeats, before=pair.follow
    )
    name = f"iw-SFT(Q) step, {sizes.draws} whole trajectories"
    yield times.row(name, _NAIVE, "ms", "per update")
    diagnosed = Training(ours.loss, ours.sampler, ours.updater, diagnosed=True)
    name = "iw-SFT(Q) step on whole trajectories with diagnose()"
    times = paired(diagnosed.step, ours.step, options.repeats)
    yield times.row(name, "our step without it", "ms", "per update")


def single_steps(options: Options, sizes: Sizes) -> Iterator[Comparison]:
    """Cached weights and single steps on hopper-replay's curated set, against cloning."""
    curated = curate(hopper_replay(sizes.copies), cuts=QUALITY_BINS, seed=options.seed)
    chain = paper.choose_weights("paper", _ROW)
    torch.manual_seed(options.seed)
    annotate_reference(GaussianPolicy(*widths(curated)), curated)
    loss = ImportanceWeightedMLE(
        GaussianPolicy(*widths(curated)), importance_weights=chain, proposal="cached"
    )
    ours = Training(
        loss,
        StepSampler(curated, sizes.single_steps, seed=options.seed),
        HardSync(loss, every=sizes.sync_every, trajectories=curated),
        lr=_ROW.lr,
    )
    peer = plain_cloning(curated, sizes.single_steps, lr=_ROW.lr, seed=options.seed)
    # Whole windows, so that each update carries its share of a sync; at least 300 of the paper's.
    updates = 2 * sizes.sync_every
    blocks = [min(_BLOCK, updates - start) for start in range(0, updates, _BLOCK)]
    peer()
    parts = [paired(ours.step, peer, 1, calls=n) for n in blocks]
    total = Times([sum(p.ours[0] for p in parts)], [sum(p.peer[0] for p in parts)])
    name = f"iw-SFT(Q) update, {sizes.single_steps:,} single steps, syncs included"
    peer_name = "behaviour cloning at the same batch with default Adam (plain torch)"
    yield total.row(name, peer_name, "ms", "per update", per=updates)
    name = f"{_ROW.steps:,} iw-SFT(Q) updates of {sizes.single_steps:,} single steps"
    yield total.row(name, peer_name, "s", f"(scaled from {updates})", per=updates / _ROW.steps)


def distinct_steps(options: Options, sizes: Sizes) -> Iterator[Comparison]:
    """Time grows with the distinct steps of a batch, not with its draws or uneven lengths."""
    whole = cheetah_like(options.dataset, sizes.trajectories, sizes.steps, options.seed)
    top = curate(whole, cuts=TOP_10)
    ragged = curate(hopper_replay(1), cuts=TOP_10, seed=options.seed)
    for name, ours, peer_name, peer in (
        (
            f"SFT step, {sizes.many_draws:,} draws of the same trajectories",
            sft(top, sizes.many_draws),
            f"our step with {sizes.draws} draws",
            sft(top, sizes.draws),
        ),
        (
            "SFT step, trajectories of hopper-replay's lengths",
            sft(ragged, sizes.many_draws),
            "our step on as many steps cut to equal lengths",
            sft(cut_evenly(ragged), sizes.many_draws),
        ),
    ):
        ours.step()
        peer.step()
        times = paired(ours.step, peer.step, options.repeats)
        yield times.row(name, peer_name, "ms", "per update")


def sft(curated: TensorDictBase, draws: int) -> Training:
    """SFT on whole trajectories."""
    torch.manual_seed(0)
    loss = ImportanceWeightedMLE(GaussianPolicy(*widths(curated)), proposal="reference")
    return Training(loss, TrajectorySampler(curated, draws))


def behaviour_cloning(options: Options, sizes: Sizes) -> Iterator[Comparison]:
    """The loss at weight 1 on single steps: the cost of everything around the network."""
    whole = cheetah_like(options.dataset, sizes.trajectories, sizes.steps, options.seed)
    torch.manual_seed(options.seed)
    loss = ImportanceWeightedMLE(GaussianPolicy(*widths(whole)), proposal="reference")
    ours = Training(loss, StepSampler(whole, 256, seed=options.seed), lr=1e-3)
    updates = sizes.cloning_updates
    for adam, fused in (("default Adam", None), ("fused Adam", True)):
        peer = plain_cloning(whole, 256, lr=1e-3, seed=options.seed, fused=fused)
        ours.step()
        peer()
        times = paired(ours.step, peer, 5 * options.repeats, calls=updates)
        name = f"behaviour cloning step, 3 x 256, batch 256, against {adam}"
        peer_name = f"behaviour cloning with {adam} (plain torch)"
        yield times.row(name, peer_name, "ms", "per update", per=updates)


def plain_cloning(
    trajectories: TensorDictBase, batch_size: int, lr: float, seed: int, fused: bool | None = None
) -> Callable[[], None]:
    """Return one update of behaviour cloning in plain torch, on steps drawn uniformly."""
    observation, action = trajectories.get(OBSERVATION), trajectories.get(ACTION)
    policy = PlainGaussian.of_sizes(*widths(trajectories))
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=fused)
    generator = torch.Generator().manual_seed(seed)

    def update() -> None:
        rows = torch.randint(len(observation), (batch_size,), generator=generator)
        loss = -policy.log_prob(observation[rows], action[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


def evaluation(
    options: Options, sizes: Sizes, env_id: str, episodes: int, env_kwargs: dict[str, Any]
) -> Comparison:
    """Environments side by side with one call of the policy, against one after the other."""
    env_kwargs = {**env_kwargs, "max_episode_steps": sizes.episode}
    env: Any = environments.make(env_id, **env_kwargs)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    torch.manual_seed(options.seed)
    policy, peer = GaussianPolicy(*dims), PlainGaussian.of_sizes(*dims)
    peer.copy_(policy.parameters())

    def ours() -> None:
        evaluate(policy, env_id, episodes=episodes, seed=options.seed, env_kwargs=env_kwargs)

    times = paired(ours, lambda: plain_evaluation(peer, env, sizes.episodes), options.repeats)
    env.close()
    name = f"evaluate: {env_id}, {episodes} episodes of {sizes.episode} steps"
    peer_name = f"{sizes.episodes} episodes one by one, a policy call each step"
    per, ours_per = sizes.episodes * sizes.episode, episodes * sizes.episode
    return times.row(name, peer_name, "us", "per step", per=per, ours_per=ours_per)


@torch.no_grad()
def plain_evaluation(policy: PlainGaussian, env: gym.Env, episodes: int) -> None:
    """Run episodes one after the other, with a call of the policy for each step."""
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            action = policy.mean(torch.as_tensor(observation, dtype=torch.float32)).numpy()
            observation, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated


def job(*, ours: bool, **arguments: Any) -> Callable[[], object]:
    """Return a step whose memory is measured, ours or the naive one."""
    pair = SameDraws(**arguments)
    if ours:
        return pair.ours.step
    draws = torch.arange(pair.ours.sampler.batch_size) % len(pair.ids)
    return lambda: pair.naive.step(draws)
