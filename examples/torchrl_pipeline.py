"""Run iw-SFT inside TorchRL, with its replay buffer, slice sampler and Trainer.

Behaviour cloning on all data gives the reference. The same path with a lagged q then fine-tunes the
policy on the best trajectories. Run it with ``python examples/torchrl_pipeline.py``.

A slice counts as a trajectory here: its importance weight is that of its own steps. The method
weighs whole trajectories. To do so, set ``slice_len`` to the length of the longest episode, or take
``iwsft.samplers`` with cached weights, which costs less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from tensordict import TensorDict, TensorDictBase
from torchrl.data import SliceSampler, TensorDictReplayBuffer, TensorStorage
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers import DefaultOptimizationStepper, TargetNetUpdaterHook, Trainer

from iwsft import (
    EMA,
    GaussianPolicy,
    ImportanceWeightedMLE,
    ImportanceWeights,
    annotate_reference,
    curate,
    datasets,
)
from iwsft.trajectory import TRAJ_IDS


@dataclass(frozen=True)
class Settings:
    """The settings of the example; the defaults take about 15 seconds on one core."""

    dataset: str = datasets.DEFAULT
    """Name of a dataset, or path of an HDF5 file; see ``iwsft.datasets.load``."""
    slices: int = 16
    """Number of slices of trajectories in a batch."""
    slice_len: int = 64
    """Number of steps of a slice, which is weighed by itself; shorter trajectories are padded."""
    reference_updates: int = 300
    """Number of updates of behaviour cloning."""
    updates: int = 200
    """Number of updates of iw-SFT."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    temperature: float = 10.0
    """k in the weight exp(k mean log-ratio)."""
    decay: float = 0.95
    """Share of q that an update keeps."""
    updater: Literal["ema", "soft"] = "ema"
    """What moves q: our EMA or TorchRL's SoftUpdate; they compute the same."""
    seed: int = 0
    """Seed of the policy's initial weights and of the batches."""


class OfflineBatches:
    """The part of a collector that TorchRL's Trainer needs, over a full replay buffer."""

    init_random_frames = 0

    def __init__(self, buffer: TensorDictReplayBuffer, batches: int) -> None:
        self.buffer = buffer
        self.batches = batches

    def __iter__(self) -> Iterator[TensorDictBase]:
        return (self.buffer.sample() for _ in range(self.batches))

    def shutdown(self) -> None:
        """Do nothing, because nothing runs in the background."""


def slices(trajectories: TensorDictBase, settings: Settings) -> TensorDictReplayBuffer:
    """Return a replay buffer that samples slices of trajectories, padded and masked."""
    return TensorDictReplayBuffer(
        storage=TensorStorage(trajectories),
        sampler=SliceSampler(
            slice_len=settings.slice_len,
            traj_key=TRAJ_IDS,
            strict_length=False,
            pad_output=True,
            cache_values=True,
        ),
        batch_size=settings.slices * settings.slice_len,
        generator=torch.Generator().manual_seed(settings.seed),
    )


def train(
    loss: ImportanceWeightedMLE,
    trajectories: TensorDictBase,
    updates: int,
    settings: Settings,
    updater: TargetNetUpdater | None = None,
) -> list[dict[str, float]]:
    """Run TorchRL's Trainer and return the loss's output at every update."""
    trainer = Trainer(
        collector=OfflineBatches(slices(trajectories, settings), updates),
        total_frames=updates * settings.slices * settings.slice_len,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=settings.lr),
        optimization_stepper=DefaultOptimizationStepper(),
        progress_bar=False,
    )
    # Two slices of one trajectory may follow each other; separate rows keep them apart.
    trainer.register_op("process_optim_batch", lambda flat: flat.reshape(-1, settings.slice_len))
    if updater is not None:
        trainer.register_op("post_optim", TargetNetUpdaterHook(updater))
    history: list[dict[str, float]] = []

    def record(update: int, out: TensorDictBase) -> None:
        history.append({key: value.item() for key, value in out.items()})

    trainer.register_op("post_optim_complete_log", record)
    trainer.train()
    return history


def main(settings: Settings) -> list[dict[str, float]]:
    """Clone the reference, curate, and return the loss's output at every update of iw-SFT."""
    torch.manual_seed(settings.seed)
    data: TensorDict = datasets.load(settings.dataset).trajectories
    policy = GaussianPolicy(data["observation"].shape[-1], data["action"].shape[-1])
    cloning = ImportanceWeightedMLE(policy, proposal="reference")
    train(cloning, data, settings.reference_updates, settings)

    best = annotate_reference(policy, curate(data, cuts=[90]))
    loss = ImportanceWeightedMLE(
        policy,
        importance_weights=ImportanceWeights.authors_control(settings.temperature, normalize=True),
    )
    follow: dict[str, Any] = {"ema": EMA, "soft": SoftUpdate}
    rate = {"decay": settings.decay} if settings.updater == "ema" else {"eps": settings.decay}
    history = train(loss, best, settings.updates, settings, follow[settings.updater](loss, **rate))
    first, last = history[0], history[-1]
    print(
        f"iw-SFT in TorchRL's Trainer on {settings.dataset}: {len(history)} updates, loss "
        f"{first['loss_iw_mle']:.3f} -> {last['loss_iw_mle']:.3f}, ESS {last['ESS']:.3f}, "
        f"KL {last['kl_approx']:.3f}"
    )
    return history


if __name__ == "__main__":
    main(tyro.cli(Settings))
