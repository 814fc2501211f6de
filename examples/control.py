"""The whole method for control in one file: iw-SFT(Q) on a bundled MuJoCo dataset.

The library's parts appear in the order in which data pass through them. Run it with
``python examples/control.py``. It takes about a minute on one core.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro

from iwsft import (
    EMA,
    GaussianPolicy,
    ImportanceWeightedMLE,
    ImportanceWeights,
    annotate_reference,
    curate,
    datasets,
    evaluate,
    weights,
)
from iwsft.samplers import StepSampler, TrajectorySampler


@dataclass(frozen=True)
class Settings:
    """Settings of the example."""

    dataset: str = datasets.DEFAULT
    """Name of a dataset, or path of an HDF5 file, see ``iwsft.datasets.load``."""
    reference_updates: int = 2000
    """Updates of behaviour cloning, which gives the reference policy."""
    updates: int = 500
    """Updates of iw-SFT(Q)."""
    batch_size: int = 32
    """Trajectories of a batch of iw-SFT(Q)."""
    temperature: float = 1.0
    """k in the weight exp(k mean log-ratio) of a trajectory (paper, Table 4)."""
    decay: float = 0.99
    """Decay of q, a moving average of the policy's parameters."""
    episodes: int = 10
    """Episodes of each score."""
    seed: int = 0
    """Seed of the initial parameters, the batches and the episodes."""


def main(settings: Settings) -> dict[str, float]:
    """Train and score the reference and the fine-tuned policy; their mean returns."""
    torch.manual_seed(settings.seed)

    # 1. Trajectories: a TensorDict of steps, one trajectory after the other.
    data = datasets.load(settings.dataset, scale_actions=True)
    trajectories, env_id = data.trajectories, data.env_id
    assert env_id is not None, "the data name no environment to score the policy in"
    print(f"{data.name}: {len(trajectories)} steps of {env_id}")

    # 2. The reference pi_ref: behaviour cloning on all data. With q = pi_ref every weight is 1.
    policy = GaussianPolicy(trajectories["observation"].shape[-1], trajectories["action"].shape[-1])
    cloning = ImportanceWeightedMLE(policy, proposal="reference")
    optimizer = torch.optim.Adam(cloning.parameters(), lr=1e-3)
    sampler = StepSampler(trajectories, 1024, seed=settings.seed)
    for _ in range(settings.reference_updates):
        optimizer.zero_grad()
        cloning(sampler.sample())["loss_iw_mle"].backward()
        optimizer.step()

    def score(name: str) -> float:
        kwargs, episodes, seed = data.env_kwargs, settings.episodes, settings.seed
        result = evaluate(policy, env_id, env_kwargs=kwargs, episodes=episodes, seed=seed)
        print(f"{name}: {result}")
        return result.return_mean

    returns = {"reference": score("reference")}

    # 3. Curation: D_Q+ holds the best 2 % three times, the next 3 % twice, and the next 5 % once.
    best = curate(trajectories, cuts=(90, 95, 98), seed=settings.seed)

    # 4. log pi_ref of every step, computed once. The denominator of every weight comes from here.
    annotate_reference(policy, best)

    # 5. The loss: w = exp(k mean_i(log q - log pi_ref)) weighs log p of the trajectory. All weights
    # of a batch are divided by their mean.
    loss = ImportanceWeightedMLE(
        policy,
        importance_weights=ImportanceWeights(
            step=[weights.Temperature(settings.temperature)],
            reduce="mean",
            trajectory=[weights.SelfNormalize()],
        ),
        proposal="lagged",
    )
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4)
    q = EMA(loss, decay=settings.decay)
    batches = TrajectorySampler(best, settings.batch_size, seed=settings.seed)
    for update in range(settings.updates):
        out = loss(batches.sample())
        optimizer.zero_grad()
        out["loss_iw_mle"].backward()
        optimizer.step()
        # 6. q follows the policy.
        q.step()
        if update % 100 == 0:
            print(
                f"update {update:4d}: loss {out['loss_iw_mle'].item():.3f}, "
                f"ESS {out['ESS'].item():.2f}, largest weight {out['weight_max'].item():.2f}"
            )

    returns["iw-sft-q"] = score("iw-SFT(Q)")
    return returns


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
