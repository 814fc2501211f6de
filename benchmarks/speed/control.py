"""Speed of control: training, memory, diagnosis and evaluation, on data of the paper's shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives.utils import TargetNetUpdater

import iwsft
from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.options import ALGORITHMS, QUALITY_BINS, TOP_10
from benchmarks.d4rl.run import sizes as widths
from benchmarks.speed import measure as speed
from benchmarks.speed.measure import MB, Check, Comparison, Way, compare
from benchmarks.speed.options import Options
from iwsft import datasets, environments
from iwsft.diagnostics import diagnose
from iwsft.objective import LOSS
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
from iwsft.update import denormals_flushed, loss_alone
from tests.oracles.iw_sft import NaiveIwSft
from tests.oracles.networks import PlainGaussian

GRADIENT_LIMIT = 1e-5
_NAIVE = "padded batch of every draw, live q and reference (plain torch)"
# halfcheetah-medium-replay in Table 4 of the paper.
K, DECAY, LR = 1.0, 0.995, 4e-5
# As in fit.
_LOG_EVERY = 50
_ROW, _ = paper.find_fine_tuning("hopper-replay", ALGORITHMS["iw-sft-q"])


def sizes_of(options: Options) -> SimpleNamespace:
    """Return the sizes of synthetic data, batches and repeats, also of baselines and gpu."""
    return speed.scaled(
        options,
        trajectories=(202, 40),
        steps=(1000, 50),
        draws=(paper.FINE_TUNING_BATCH["trajectories"], 64),
        many_draws=(4096, 256),
        # Copies of the bundled data; 9 make the size of the set that it is part of.
        copies=(9, 1),
        single_steps=(paper.FINE_TUNING_BATCH["steps"], 64),
        sync_every=(_ROW.sync_every, 10),
        batch=(256, 16),
        # Updates of a repeat, which is so short that both ways see the same machine.
        updates=(20, 2),
        # Updates before them: Adam's moments of inactive units are as small as in most of a run.
        settled=(1000, 2),
        episode=(1000, 20),
        # Episodes of HalfCheetah, and of the peer in Hopper; then those of Hopper.
        episodes=(10, 2),
        many_episodes=(64, 4),
    )


def cheetah_like(options: Options, trajectories: int = 0, steps: int = 0) -> TensorDict:
    """Return random trajectories of HalfCheetah's sizes and equal length."""
    trajectories = trajectories or sizes_of(options).trajectories
    steps = steps or sizes_of(options).steps
    generator = torch.Generator().manual_seed(options.seed)
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


def policies(data: TensorDictBase, seed: int) -> list[iwsft.GaussianPolicy]:
    """Return a reference and a policy, not trained."""
    torch.manual_seed(seed)
    return [iwsft.GaussianPolicy(*widths(data)) for _ in range(2)]


def cached(data: TensorDictBase, row: paper.FineTuning, every: int, seed: int) -> iwsft.HardSync:
    """Return syncs of iw-SFT(Q) with cached weights, and with the settings of a row."""
    reference, policy = (each.to(data.get(ACTION).device) for each in policies(data, seed))
    iwsft.annotate_reference(reference, data)
    chain = paper.choose_weights("paper", row)
    loss = iwsft.ImportanceWeightedMLE(policy, importance_weights=chain, proposal="cached")
    return iwsft.HardSync(loss, every=every, trajectories=data)


def updates(
    loss: iwsft.ImportanceWeightedMLE,
    sampler: StepSampler | TrajectorySampler,
    updater: TargetNetUpdater | None = None,
    *,
    lr: float = LR,
    diagnosed: bool = False,
    flushed: bool = True,
) -> Way:
    """Return what makes an update, as ``iwsft.training.fit`` does, perhaps with diagnoses.

    ``flushed=False`` keeps denormal numbers.
    """
    optimizer = torch.optim.Adam(loss.parameters(), lr=lr, fused=True)
    steps = itertools.count()

    def update() -> None:
        logged = next(steps) % _LOG_EVERY == 0
        with denormals_flushed() if flushed else nullcontext():
            batch = sampler.sample()
            terms = loss.terms(batch)
            with nullcontext() if logged else loss_alone(loss):
                out = loss.summary(terms)
            optimizer.zero_grad()
            out[LOSS].backward()
            if diagnosed:
                diagnose(loss, batch, terms)
            optimizer.step()
            if updater is not None:
                updater.step()

    return update


def same_draws(options: Options) -> tuple[Way, Way, Way, Callable[[], float]]:
    """Return our update, the naive one, ours with diagnosis; and how far gradients are apart."""
    count = sizes_of(options).draws
    curated = iwsft.curate(cheetah_like(options), cuts=QUALITY_BINS)
    reference, policy = policies(curated, options.seed)
    iwsft.annotate_reference(reference, curated)
    # The order of the naive policy's parameters, before the loss takes them out of the module.
    names = [tuple(name.split(".")) for name, _ in policy.named_parameters()]
    plain = PlainGaussian.of_sizes(*widths(curated))
    plain.copy_(reference.parameters())
    chain = iwsft.ImportanceWeights.paper_control(K)
    loss = iwsft.ImportanceWeightedMLE(policy, importance_weights=chain, proposal="lagged")
    # The second makes the same draws.
    sampler, other = (TrajectorySampler(curated, count, seed=options.seed) for _ in range(2))
    q = iwsft.EMA(loss, decay=DECAY)
    padded = pad(curated)
    observation, action, mask = (padded.get(key) for key in (OBSERVATION, ACTION, MASK))
    naive = NaiveIwSft(observation, action, mask, plain, k=K, decay=DECAY, lr=LR)
    naive.policy.copy_(loss.actor_network_params[name] for name in names)
    naive.q.copy_(loss.target_actor_network_params[name] for name in names)
    every = curated.get(TRAJ_IDS).unique_consecutive()

    def plain_update() -> None:
        batch = other.sample()
        ids, steps = batch.get(TRAJ_IDS).unique_consecutive(return_counts=True)
        multiplicity = batch.get(MULTIPLICITY)[steps.cumsum(0) - steps]
        naive.step(torch.searchsorted(every, ids).repeat_interleave(multiplicity))

    def difference() -> float:
        both = (loss.actor_network_params[name] for name in names), naive.policy.parameters()
        mine, other = ([p.grad for p in some if p.grad is not None] for some in both)
        return speed.relative_difference(mine, other)

    ours, diagnosed = (updates(loss, sampler, q, diagnosed=look) for look in (False, True))
    return ours, plain_update, diagnosed, difference


def measure(options: Options) -> Iterator[Comparison | Check]:
    """Yield all rows of control, as they are measured."""
    sizes = sizes_of(options)
    yield from memory(options, sizes.draws)
    yield from whole_trajectories(options, sizes.draws)
    yield from single_steps(options, sizes)
    yield from distinct_steps(options, sizes)
    yield from behaviour_cloning(options)
    yield from denormals(options)
    # HalfCheetah's episodes never end early; neither do Hopper's here: the most work there is.
    yield evaluation(options, sizes, "HalfCheetah-v4", sizes.episodes)
    tireless = {"terminate_when_unhealthy": False}
    yield evaluation(options, sizes, "Hopper-v4", sizes.many_episodes, **tireless)


def memory(options: Options, draws: int) -> Iterator[Comparison]:
    """Peak of a training step, each way in a process of its own; and a dataset in memory."""
    name = f"a step above the data, {draws} trajectories"
    yield speed.compare_peaks(name, _NAIVE, "benchmarks.speed.control", options)
    ragged = hopper_replay(1)
    packed, padded = (td.bytes(count_duplicates=False) / MB for td in (ragged, pad(ragged)))
    name = "dataset of hopper-replay's lengths in memory"
    yield Comparison(name, packed, padded, "MB", "padded copy")


def whole_trajectories(options: Options, draws: int) -> Iterator[Comparison | Check]:
    """The paper's batch against the naive way, then with a diagnosis at every step."""
    ours, naive, diagnosed, difference = same_draws(options)
    # Products that round alike: else an activation at the kink of a ReLU decides the difference.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    ours()
    naive()
    torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
    name = f"gradient of {draws} trajectories against the naive one, relative difference"
    yield Check(name, difference(), GRADIENT_LIMIT)
    name, unit = f"iw-SFT(Q) step, {draws} whole trajectories", "ms per update"
    yield compare(name, ours, naive, _NAIVE, unit, options.repeats)
    name, peer_name = "iw-SFT(Q) step on whole trajectories with diagnose()", "our step without it"
    yield compare(name, diagnosed, ours, peer_name, unit, options.repeats)


def single_steps(options: Options, sizes: SimpleNamespace) -> Iterator[Comparison]:
    """Cached weights and single steps on hopper-replay's curated set, against cloning."""
    curated = iwsft.curate(hopper_replay(sizes.copies), cuts=QUALITY_BINS, seed=options.seed)
    updater = cached(curated, _ROW, sizes.sync_every, options.seed)
    sampler = StepSampler(curated, sizes.single_steps, seed=options.seed)
    row = compare(
        f"iw-SFT(Q) update, {sizes.single_steps:,} single steps, syncs included",
        updates(updater.loss_module, sampler, updater, lr=_ROW.lr),
        plain_cloning(curated, sizes.single_steps, lr=_ROW.lr, seed=options.seed),
        "behaviour cloning at the same batch with default Adam (plain torch)",
        "ms per update",
        options.repeats,
        # Whole windows, so that each update carries its share of a sync.
        calls=sizes.sync_every,
        warm_up=sizes.settled,
    )
    yield row
    name = f"{_ROW.steps:,} iw-SFT(Q) updates of {sizes.single_steps:,} single steps"
    ours, peer = (_ROW.steps / 1e3 * ms for ms in (row.ours, row.peer))
    unit = f"CPU s (scaled from {options.repeats * sizes.sync_every})"
    yield Comparison(name, ours, peer, unit, row.peer_name)


def distinct_steps(options: Options, sizes: SimpleNamespace) -> Iterator[Comparison]:
    """Time grows with the distinct steps of a batch, not with its draws or uneven lengths."""
    top = iwsft.curate(cheetah_like(options), cuts=TOP_10)
    ragged = iwsft.curate(hopper_replay(1), cuts=TOP_10, seed=options.seed)
    many = sizes.many_draws
    for name, ours, peer_name, peer in (
        (
            f"SFT step, {many:,} draws of the same trajectories",
            sft(top, many),
            f"our step with {sizes.draws} draws",
            sft(top, sizes.draws),
        ),
        (
            "SFT step, trajectories of hopper-replay's lengths",
            sft(ragged, many),
            "our step on as many steps cut to equal lengths",
            sft(cut_evenly(ragged), many),
        ),
    ):
        yield compare(name, ours, peer, peer_name, "ms per update", options.repeats)


def cut_evenly(trajectories: TensorDictBase) -> TensorDictBase:
    """Return the same steps cut into as many trajectories of equal length, up to one step."""
    count, total = len(lengths(trajectories)), len(trajectories)
    steps = torch.full((count,), total // count)
    steps[: total % count] += 1
    # The ends of the episodes, and the observations that follow, are those of other trajectories.
    even = trajectories.exclude(("next", "done"), ("next", "observation")).copy()
    return even.set(TRAJ_IDS, torch.arange(count).repeat_interleave(steps))


def sft(curated: TensorDictBase, draws: int) -> Way:
    """SFT on whole trajectories."""
    loss = iwsft.ImportanceWeightedMLE(policies(curated, 0)[0], proposal="reference")
    return updates(loss, TrajectorySampler(curated, draws))


def behaviour_cloning(options: Options) -> Iterator[Comparison]:
    """The loss at weight 1 on single steps: the cost of everything around the network."""
    whole, sizes = cheetah_like(options), sizes_of(options)
    ours = cloning(options)
    for adam, fused in (("default Adam", None), ("fused Adam", True)):
        peer = plain_cloning(whole, sizes.batch, lr=1e-3, seed=options.seed, fused=fused)
        peer_name = f"behaviour cloning with {adam} (plain torch)"
        yield compare_cloning(options, f"against {adam}", ours, peer, peer_name)


def denormals(options: Options) -> Iterator[Comparison]:
    """What it saves to set the smallest numbers to 0."""
    ours, kept = cloning(options), cloning(options, flushed=False)
    peer_name = "our step with denormals kept"
    yield compare_cloning(options, "denormals flushed", ours, kept, peer_name)


def cloning(options: Options, *, flushed: bool = True) -> Way:
    """Return our update of behaviour cloning."""
    whole, sizes = cheetah_like(options), sizes_of(options)
    loss = iwsft.ImportanceWeightedMLE(policies(whole, options.seed)[0], proposal="reference")
    sampler = StepSampler(whole, sizes.batch, seed=options.seed)
    return updates(loss, sampler, lr=1e-3, flushed=flushed)


def compare_cloning(
    options: Options, what: str, ours: Way, peer: Way, peer_name: str
) -> Comparison:
    """Compare two ways of cloning, long after the start."""
    sizes = sizes_of(options)
    return compare(
        f"behaviour cloning step, 3 x 256, batch {sizes.batch}, {what}",
        ours,
        peer,
        peer_name,
        "ms per update",
        5 * options.repeats,
        calls=sizes.updates,
        warm_up=sizes.settled,
    )


def plain_cloning(
    trajectories: TensorDictBase, batch_size: int, lr: float, seed: int, fused: bool | None = None
) -> Way:
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
    options: Options, sizes: SimpleNamespace, env_id: str, episodes: int, **env_kwargs: Any
) -> Comparison:
    """Environments side by side with one call of the policy, against one after the other."""
    env_kwargs["max_episode_steps"] = sizes.episode
    env: Any = environments.make(env_id, **env_kwargs)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    torch.manual_seed(options.seed)
    policy, peer = iwsft.GaussianPolicy(*dims), PlainGaussian.of_sizes(*dims)
    peer.copy_(policy.parameters())
    given: dict[str, Any] = {"seed": options.seed, "env_kwargs": env_kwargs}
    row = compare(
        f"evaluate: {env_id}, {episodes} episodes of {sizes.episode} steps",
        lambda: iwsft.evaluate(policy, env_id, episodes=episodes, **given),
        lambda: plain_evaluation(peer, env, sizes.episodes),
        f"{sizes.episodes} episodes one by one, a policy call each step",
        "us per step",
        options.repeats,
        per=sizes.episodes * sizes.episode,
        ours_per=episodes * sizes.episode,
    )
    env.close()
    return row


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


def job(options: Options, *, ours: bool) -> Way:
    """Return a step whose memory is measured, ours or the naive one."""
    return same_draws(options)[0 if ours else 1]
