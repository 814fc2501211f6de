"""Control: training steps, memory, diagnosis, evaluation, behaviour cloning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase

from benchmarks.d4rl import settings as paper
from benchmarks.speed import data, plain
from benchmarks.speed.measure import Check, Options, Row, Times, checked, paired
from benchmarks.speed.memory import MB, in_child
from benchmarks.speed.trajectories import SameDraws, Training
from iwsft import datasets, environments
from iwsft.curation import curate
from iwsft.evaluation import evaluate
from iwsft.objective import ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy
from iwsft.proposals import HardSync
from iwsft.reference import annotate_reference
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.trajectory import pad

GRADIENT_LIMIT = 1e-5


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        trajectories: of the synthetic dataset.
        steps: of each of its trajectories.
        draws: trajectories of a batch.
        many_draws: the same, far more.
        copies: of the bundled data; 9 make the size of the set that it is part of.
        single_steps: steps of a batch of single steps.
        sync_every: updates between syncs of cached weights.
        cloning_updates: updates of a repeat of behaviour cloning.
        episode: steps of an evaluation episode.
        episodes: of HalfCheetah, and for the peer of Hopper.
        many_episodes: of Hopper.
    """

    trajectories: int = 202
    steps: int = 1000
    draws: int = paper.FINE_TUNING_BATCH["trajectories"]
    many_draws: int = 4096
    copies: int = 9
    single_steps: int = paper.FINE_TUNING_BATCH["steps"]
    sync_every: int = paper.fine_tuning("hopper-replay", paper.ALGORITHMS["iw-sft-q"])[0].sync_every
    cloning_updates: int = 20
    episode: int = 1000
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


def measure(options: Options) -> Iterator[Row | Check]:
    """All rows of control, as they come."""
    sizes = SIZES[options.scale]
    if options.dataset is not None:
        # A file that can't be read ends here, not in a child.
        datasets.load(options.dataset)
    yield from memory(options, sizes)
    yield from whole_trajectories(options, sizes)
    yield from single_steps(options, sizes)
    yield from what_a_step_grows_with(options, sizes)
    yield from behaviour_cloning(options, sizes)
    yield from evaluation(options, sizes)


def whole_trajectories(options: Options, sizes: Sizes) -> Iterator[Row | Check]:
    """The paper's batch against the naive way, then with a diagnosis at every step."""
    both = SameDraws(options.dataset, sizes.trajectories, sizes.steps, sizes.draws, options.seed)
    both.ours.step()
    times = paired(
        both.ours.step,
        lambda: both.naive.step(both.draws()),
        options.repeats,
        before=both.follow,
    )
    yield checked(
        f"gradient of {sizes.draws} trajectories against the naive one, relative difference",
        both.disagreement(),
        GRADIENT_LIMIT,
    )
    yield times.row(
        f"iw-SFT(Q) step, {sizes.draws} whole trajectories",
        "padded batch of every draw, live q and reference (plain torch)",
        "ms",
        "per update",
    )
    plainly = both.ours
    diagnosed = Training(plainly.loss, plainly.sampler, plainly.updater, diagnosed=True)
    yield paired(diagnosed.step, plainly.step, options.repeats).row(
        "iw-SFT(Q) step on whole trajectories with diagnose()",
        "our step without it",
        "ms",
        "per update",
    )


def single_steps(options: Options, sizes: Sizes) -> Iterator[Row]:
    """Cached weights and single steps on hopper-replay's curated set, against cloning."""
    curated = curate(data.hopper_replay(sizes.copies), cuts=paper.QUALITY_BINS, seed=options.seed)
    row = paper.fine_tuning("hopper-replay", paper.ALGORITHMS["iw-sft-q"])[0]
    chain = paper.importance_weights("paper", row, per_step=False, target_ess=None)
    torch.manual_seed(options.seed)
    annotate_reference(GaussianPolicy(*data.widths(curated)), curated)
    loss = ImportanceWeightedMLE(
        GaussianPolicy(*data.widths(curated)), importance_weights=chain, proposal="cached"
    )
    ours = Training(
        loss,
        StepSampler(curated, sizes.single_steps, seed=options.seed),
        HardSync(loss, every=sizes.sync_every, trajectories=curated),
        lr=row.lr,
    )
    peer = plain.cloning(curated, sizes.single_steps, lr=row.lr, seed=options.seed)
    # Whole windows, so that each update carries its share of a sync; at least 300 of the paper's.
    updates = 2 * sizes.sync_every
    blocks = [min(_BLOCK, updates - start) for start in range(0, updates, _BLOCK)]
    peer()
    parts = [paired(repeated(ours.step, n), repeated(peer, n), 1) for n in blocks]
    total = Times([sum(p.ours[0] for p in parts)], [sum(p.peer[0] for p in parts)])
    name = f"iw-SFT(Q) update, {sizes.single_steps:,} single steps, syncs included"
    peer_name = "behaviour cloning at the same batch with default Adam (plain torch)"
    yield total.row(name, peer_name, "ms", "per update", per=updates)
    yield total.row(
        f"{row.steps:,} iw-SFT(Q) updates of {sizes.single_steps:,} single steps",
        peer_name,
        "s",
        f"(scaled from {updates})",
        per=updates / row.steps,
    )


def what_a_step_grows_with(options: Options, sizes: Sizes) -> Iterator[Row]:
    """Time follows the distinct steps of a batch: not its draws, nor how lengths are spread."""
    top = curate(
        data.cheetah_like(options.dataset, sizes.trajectories, sizes.steps, options.seed),
        cuts=paper.TOP_10,
    )
    many, few = on_trajectories(top, sizes.many_draws), on_trajectories(top, sizes.draws)
    yield compared(many, few, options.repeats).row(
        f"SFT step, {sizes.many_draws:,} draws of the same trajectories",
        f"our step with {sizes.draws} draws",
        "ms",
        "per update",
    )
    ragged = curate(data.hopper_replay(1), cuts=paper.TOP_10, seed=options.seed)
    even = on_trajectories(data.cut_evenly(ragged), sizes.many_draws)
    uneven = on_trajectories(ragged, sizes.many_draws)
    yield compared(uneven, even, options.repeats).row(
        "SFT step, trajectories of hopper-replay's lengths",
        "our step on as many steps cut to equal lengths",
        "ms",
        "per update",
    )


def memory(options: Options, sizes: Sizes) -> Iterator[Row]:
    """Peak of a training step, each way in a process of its own; and a dataset in memory."""
    arguments: dict[str, Any] = {
        "file": None if options.dataset is None else str(options.dataset),
        "trajectories": sizes.trajectories,
        "steps": sizes.steps,
        "draws": sizes.draws,
        "seed": options.seed,
    }
    ours, naive = (
        in_child("benchmarks.speed.trajectories", {**arguments, "ours": ours})
        for ours in (True, False)
    )
    yield Row(
        f"peak memory of a step above the data, {sizes.draws} trajectories",
        ours,
        naive,
        "MB",
        "padded batch of every draw, live q and reference (plain torch)",
    )
    ragged = data.hopper_replay(1)
    held, padded = (td.bytes(count_duplicates=False) / MB for td in (ragged, pad(ragged)))
    yield Row("dataset of hopper-replay's lengths in memory", held, padded, "MB", "padded copy")


def behaviour_cloning(options: Options, sizes: Sizes) -> Iterator[Row]:
    """The loss at weight 1 on single steps, with what is ours around the network."""
    whole = data.cheetah_like(options.dataset, sizes.trajectories, sizes.steps, options.seed)
    torch.manual_seed(options.seed)
    loss = ImportanceWeightedMLE(GaussianPolicy(*data.widths(whole)), proposal="reference")
    ours = Training(loss, StepSampler(whole, 256, seed=options.seed), lr=1e-3)
    for name, fused in (("default Adam", None), ("fused Adam", True)):
        peer = plain.cloning(whole, 256, lr=1e-3, seed=options.seed, fused=fused)
        ours.step()
        peer()
        yield paired(
            repeated(ours.step, sizes.cloning_updates),
            repeated(peer, sizes.cloning_updates),
            5 * options.repeats,
        ).row(
            f"behaviour cloning step, 3 x 256, batch 256, against {name}",
            f"behaviour cloning with {name} (plain torch)",
            "ms",
            "per update",
            per=sizes.cloning_updates,
        )


def evaluation(options: Options, sizes: Sizes) -> Iterator[Row]:
    """Environments side by side with one call of the policy, against one after the other."""
    # Episodes that never end early: all of full length, the most work there is.
    tireless = {"terminate_when_unhealthy": False}
    yield rolled_out(options, sizes, "HalfCheetah-v4", sizes.episodes, {})
    yield rolled_out(options, sizes, "Hopper-v4", sizes.many_episodes, tireless)


def rolled_out(
    options: Options, sizes: Sizes, env_id: str, episodes: int, env_kwargs: dict[str, Any]
) -> Row:
    """``evaluate`` of an untrained policy on as many episodes, the peer on fewer."""
    env_kwargs = {**env_kwargs, "max_episode_steps": sizes.episode}
    env = environments.make(env_id, **env_kwargs)
    assert env.observation_space.shape and env.action_space.shape
    size = env.observation_space.shape[0], env.action_space.shape[0]
    torch.manual_seed(options.seed)
    policy, peer = GaussianPolicy(*size), plain.PlainPolicy(*size)
    peer.copy_(policy.parameters())

    def ours() -> None:
        evaluate(policy, env_id, episodes=episodes, seed=options.seed, env_kwargs=env_kwargs)

    times = paired(ours, lambda: plain.roll_out(peer, env, sizes.episodes), options.repeats)
    env.close()
    return times.row(
        f"evaluate: {env_id}, {episodes} episodes of {sizes.episode} steps",
        f"{sizes.episodes} episodes one by one, a policy call each step",
        "us",
        "per step",
        per=sizes.episodes * sizes.episode,
        ours_per=episodes * sizes.episode,
    )


def on_trajectories(curated: TensorDictBase, draws: int) -> Training:
    """SFT on whole trajectories."""
    torch.manual_seed(0)
    loss = ImportanceWeightedMLE(GaussianPolicy(*data.widths(curated)), proposal="reference")
    return Training(loss, TrajectorySampler(curated, draws))


def compared(ours: Training, peer: Training, repeats: int) -> Times:
    """Both warmed up, then timed in turn."""
    ours.step()
    peer.step()
    return paired(ours.step, peer.step, repeats)


def repeated(call: Callable[[], object], n: int) -> Callable[[], None]:
    """``call``, n times."""

    def again() -> None:
        for _ in range(n):
            call()

    return again
