"""Checks of whole data: wherever they enter, what is wrong is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from iwsft import (
    GaussianPolicy,
    HardSync,
    ImportanceWeightedMLE,
    annotate_reference,
    curate,
    evaluate,
    reweight,
)
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.training import Schedule, fit
from iwsft.trajectory import (
    DATA_WEIGHT,
    DONE,
    IMPORTANCE_WEIGHT,
    MASK,
    MULTIPLICITY,
    NEXT_OBSERVATION,
    REF_LOG_PROB,
    REWARD,
    TRAJ_IDS,
    from_steps,
    pad,
)
from iwsft.validation import check_tensordict, validate
from tests.test_trajectory import packed_of


def chain(lengths: list[int], ids: list[int], more: dict[Any, Tensor] | None = None) -> TensorDict:
    """Episodes whose next observations are the observations that follow, under given ids."""
    generator = torch.Generator().manual_seed(3)
    episodes = [torch.randn(length + 1, 2, generator=generator) for length in lengths]
    steps = {
        "observation": torch.cat([episode[:-1] for episode in episodes]),
        "action": torch.zeros(sum(lengths), 1),
        NEXT_OBSERVATION: torch.cat([episode[1:] for episode in episodes]),
        REWARD: torch.ones(sum(lengths)),
        **(more or {}),
    }
    return from_steps(steps, torch.tensor(ids).repeat_interleave(torch.tensor(lengths)))


def use(trajectories: TensorDict) -> None:
    """Every door that whole datasets enter by."""
    curate(trajectories, cuts=(0,), ties=">=")
    StepSampler(trajectories, 2)
    annotate_reference(GaussianPolicy(2, 1, hidden=(4,)), trajectories.clone())
    validate(trajectories)


def test_two_episodes_under_one_id_are_refused() -> None:
    use(chain([4, 3], [0, 1]))
    merged = torch.cat([chain([4], [5]), chain([3], [5])])
    for door in (
        lambda: curate(merged),
        lambda: StepSampler(merged, 2),
        lambda: annotate_reference(GaussianPolicy(2, 1, hidden=(4,)), merged),
        lambda: validate(merged),
    ):
        with pytest.raises(ValueError, match="step 4 does not begin where step 3"):
            door()


def test_episodes_that_say_where_they_end_or_have_no_links_are_not_refused() -> None:
    done = torch.zeros(7, dtype=torch.bool)
    done[3] = True
    use(chain([4, 3], [5, 5], {DONE: done}))
    # Next observations of another kind, such as differences, tell nothing.
    use(chain([4, 3], [5, 5], {NEXT_OBSERVATION: torch.zeros(7, 2)}))


@pytest.mark.parametrize("shape", [(), (2,), (2, 1, 3)])
def test_observations_may_have_any_shape(shape: tuple[int, ...]) -> None:
    whole = chain([4, 3], [0, 1])
    for key in ("observation", NEXT_OBSERVATION):
        whole[key] = whole[key][:, 0].reshape(-1, *[1] * len(shape)).expand(-1, *shape)
    StepSampler(whole, 2)
    whole["collector", "traj_ids"] = torch.zeros(7, dtype=torch.int64)
    with pytest.raises(ValueError, match="step 4 does not begin where step 3"):
        curate(whole)


def test_valid_data_passes() -> None:
    packed = packed_of([2, 3, 1])
    validate(packed)
    validate(pad(packed))
    padded = pad(packed)
    padded["observation"][~padded[MASK]] = torch.nan
    validate(padded)
    validate(padded.exclude(TRAJ_IDS))
    validate(packed, keys=("observation", "action", REWARD))


def _set(key: Any, value: torch.Tensor) -> Any:
    return lambda batch: batch.set(key, value)


def _poke(key: Any, value: float) -> Any:
    def change(batch: TensorDict) -> TensorDict:
        batch.get(key)[4] = value
        return batch

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: b.exclude("action"), KeyError, "action.* is missing; there are .*observation"),
        (lambda b: b.exclude(TRAJ_IDS), KeyError, "traj_ids"),
        (_set("action", torch.zeros(6, 2, dtype=torch.int64)), ValueError, "'action'.*int64"),
        (_poke("observation", float("nan")), ValueError, "'observation' .*steps: 1.*step 4"),
        (_poke("action", float("inf")), ValueError, "'action' is NaN or infinite"),
        (_poke(REF_LOG_PROB, float("-inf")), ValueError, "'ref_log_prob' is NaN or infinite"),
        (_poke(REWARD, float("nan")), ValueError, "'reward'.*NaN or infinite"),
        (_set(REWARD, torch.ones(6, 2)), ValueError, r"'reward'.*has shape \[6, 2\]"),
        (_set(IMPORTANCE_WEIGHT, torch.full((6,), torch.nan)), ValueError, "'importance_weight'"),
        (_poke(MULTIPLICITY, -1), ValueError, "'multiplicity'.*negative"),
        (
            _set(DATA_WEIGHT, torch.full((6,), torch.inf)),
            ValueError,
            "^'data_weight' is NaN, inf",
        ),
        (_set(DATA_WEIGHT, torch.zeros(6)), ValueError, "^'data_weight' is 0 everywhere"),
        (_set(TRAJ_IDS, torch.tensor([0, 0, 2, 2, 1, 1])), ValueError, "out of order at step 4"),
        (_set(TRAJ_IDS, torch.rand(6)), ValueError, "traj_ids.*integers.*float32"),
        (_set(TRAJ_IDS, torch.zeros(6, 2, dtype=torch.int64)), ValueError, "traj_ids.*shape"),
        (
            _set(MASK, torch.tensor([True, True, False, False, False, True])),
            ValueError,
            "trajectory 1",
        ),
        (_set(MASK, torch.ones(6, 3, 1, dtype=torch.bool)), ValueError, "shape"),
        (lambda b: b[:0], ValueError, "not a single step"),
        (lambda b: b.reshape(1, 2, 3), ValueError, r"\[1, 2, 3\]"),
    ],
)
def test_validate_names_the_error(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        validate(change(packed_of([2, 3, 1])))


def test_validate_reads_entries_not_groups_of_them() -> None:
    with pytest.raises(KeyError, match="next.* is missing; there are"):
        validate(packed_of([2, 3, 1]), keys=["next"])


def test_validate_names_a_row_of_the_wrong_length() -> None:
    padded = pad(packed_of([2, 3, 1]))
    padded.batch_size = [3]
    padded["action"] = torch.zeros(3, 4, 2)
    with pytest.raises(ValueError, match=r"'action' has shape \[3, 4, 2\].*\[3, 3\]"):
        validate(padded)


def test_what_is_not_a_tensordict_is_named() -> None:
    packed = from_steps({}, torch.zeros(1, dtype=torch.int64))
    check_tensordict(packed)
    with pytest.raises(TypeError, match="a TensorDict, not a list$"):
        check_tensordict([packed])
    with pytest.raises(TypeError, match="not a SimpleNamespace; pass its .trajectories"):
        check_tensordict(SimpleNamespace(trajectories=packed))


@pytest.mark.parametrize(
    ("multiplicity", "message"),
    [
        (torch.tensor([1, 2, 1, 1, 1, 3]), "changes within a trajectory, first at step 1"),
        (torch.tensor([1, 1, -1, -1, -1, 3]), "negative"),
        (torch.full((6,), 0.5), "whole numbers, it holds torch.float32"),
        (torch.ones(6, dtype=torch.bool), "whole numbers, it holds torch.bool"),
    ],
)
def test_a_multiplicity_counts_draws_of_a_trajectory(multiplicity: Tensor, message: str) -> None:
    packed = packed_of([2, 3, 1]).set(MULTIPLICITY, multiplicity)
    sizes = packed["observation"].shape[-1], packed["action"].shape[-1]
    loss = ImportanceWeightedMLE(GaussianPolicy(*sizes, hidden=(4,)), proposal="reference")
    for door in (validate, loss, lambda x: StepSampler(x, 2)):
        with pytest.raises(ValueError, match=f"'multiplicity' .*{message}"):
            door(packed)


def test_the_multiplicity_of_padding_does_not_count() -> None:
    padded = pad(packed_of([2, 3, 1]).set(MULTIPLICITY, torch.tensor([2, 2, 1, 1, 1, 3])))
    assert padded[MULTIPLICITY].tolist() == [[2, 2, 0], [1, 1, 1], [3, 0, 0]]
    validate(padded)
    padded[MULTIPLICITY][1, 2] = 2
    with pytest.raises(ValueError, match="changes within a trajectory, first at step 5"):
        validate(padded)


@pytest.mark.parametrize("value", [0, 1.5, "2", None])
def test_what_counts_is_a_whole_number_from_1_on(value: Any) -> None:
    """1.5 updates between syncs would be 2."""
    trajectories = packed_of([2, 3])
    policy = GaussianPolicy(3, 2, hidden=(4,))
    loss = ImportanceWeightedMLE(policy, proposal="lagged")
    update: dict[str, Any] = {"schedule": Schedule(1, lr=1e-3), "updater": HardSync(loss, every=1)}
    sampler = TrajectorySampler(trajectories, 2)
    doors: dict[str, Any] = {
        "every": lambda: HardSync(loss, every=value),
        "batch_size": lambda: StepSampler(trajectories, value),
        "rows": lambda: annotate_reference(policy, trajectories, rows=value),
        "log_every": lambda: fit(loss, sampler, log_every=value, **update),
        "checkpoint_every": lambda: fit(loss, sampler, checkpoint_every=value, **update),
        "episodes": lambda: evaluate(policy, "Hopper-v4", episodes=value),
    }
    for name, door in doors.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number from 1 on"):
            door()


def test_what_is_no_part_of_a_training_is_named() -> None:
    trajectories = packed_of([2, 3])
    policy = GaussianPolicy(3, 2, hidden=(4,))
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    sampler: Any = TrajectorySampler(trajectories, 2)
    schedule: Any = Schedule(1, lr=1e-3)
    data: Any = SimpleNamespace(trajectories=trajectories)
    unweighed: Any = policy
    swapped: Any = loss
    doors: dict[str, Any] = {
        "not a sampler of batches; pass StepSampler": lambda: fit(loss, trajectories, schedule),
        "a SimpleNamespace; pass its .trajectories": lambda: validate(data),
        r"schedule=100 must be a Schedule\(steps, lr\)": lambda: fit(loss, sampler, 100),
        "pass its .trajectories": lambda: StepSampler(data, 2),
        "GaussianPolicy is not a loss; pass ImportanceWeightedMLE": lambda: fit(
            unweighed, sampler, schedule
        ),
        "a TensorDict, not a ImportanceWeightedMLE": lambda: reweight(swapped, swapped),
        "SimpleNamespace; pass its .trajectories": lambda: annotate_reference(policy, data),
    }
    for message, door in doors.items():
        with pytest.raises(TypeError, match=message):
            door()
