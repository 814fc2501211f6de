"""annotate_reference and its cache on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import GRUModule, IndependentNormal, ProbabilisticActor

from iwsft.fingerprint import fingerprint
from iwsft.forward_pass import ForwardPass
from iwsft.objective import ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy
from iwsft.proposals import reweight
from iwsft.reference import annotate_reference
from iwsft.trajectory import MASK, TRAJ_IDS, pack, pad


def dataset(steps: int = 300) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    return TensorDict(
        {
            "observation": torch.randn(steps, 4, generator=generator),
            "action": torch.rand(steps, 2, generator=generator) * 2 - 1,
            "next": {"reward": torch.zeros(steps, 1)},
            "collector": {"traj_ids": torch.arange(steps) // 30},
        },
        [steps],
    )


def gaussian(seed: int = 0, **settings: Any) -> GaussianPolicy:
    torch.manual_seed(seed)
    return GaussianPolicy(4, 2, hidden=(16, 16), **settings)


class Counting(nn.Module):
    """log p = offset x sum of the action; counts the steps that it ran."""

    def __init__(self, offset: float = 0.5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.offset = offset
        self.squash: Any = lambda x: x
        self._steps = 0
        self._trajectories: list[int] = []

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        self._steps += trajectories.batch_size.numel()
        self._trajectories += trajectories[TRAJ_IDS].unique().tolist()
        return self.squash(self.offset * self.scale * trajectories["action"].sum(-1))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_writes_the_log_prob_of_each_step() -> None:
    data, policy = dataset(), gaussian()
    expected = policy.log_prob(data.copy()).detach()
    keys = set(data.keys(True, True))
    out = annotate_reference(policy, data, rows=70)
    assert out is data
    assert set(data.keys(True, True)) == {*keys, "ref_log_prob"}
    assert data["ref_log_prob"].dtype == torch.float32
    assert not data["ref_log_prob"].requires_grad
    assert torch.equal(data["ref_log_prob"], expected)


def test_first_log_ratio_is_zero_on_any_batch_of_the_data() -> None:
    data, policy = dataset(), gaussian()
    annotate_reference(policy, data, rows=50)
    part = data[60:150]
    assert torch.equal(policy.log_prob(part.copy()), part["ref_log_prob"])


def test_padded_is_zero_off_the_mask() -> None:
    data = dataset()
    data[TRAJ_IDS] = torch.arange(300).sqrt().long()
    padded, counting = pad(data), Counting()
    annotate_reference(counting, data.copy(), rows=30)
    # Two are compared; then chunks are neighbours in the data, which have lengths of 1 to 35.
    assert counting._trajectories == [0, 1, 1, *range(18)]
    annotate_reference(gaussian(), padded)
    annotate_reference(gaussian(), data)
    assert bool((padded["ref_log_prob"][~padded.get(MASK)] == 0).all())
    torch.testing.assert_close(pack(padded)["ref_log_prob"], data["ref_log_prob"])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_cache_returns_the_same_bits_without_a_sweep(tmp_path: Path, layout: str) -> None:
    data = dataset() if layout == "packed" else pad(dataset())
    policy = Counting()
    first = annotate_reference(policy, data.copy(), cache=tmp_path / "made" / "here")
    # Two trajectories of 30 are compared, the second of them alone, too.
    assert policy._steps == 90 + 300
    second = annotate_reference(policy, data.copy(), cache=str(tmp_path / "made" / "here"))
    # The first chunk runs again, as its log-probs are part of the key.
    assert policy._steps == 2 * (90 + 300)
    assert second["ref_log_prob"].shape == data.batch_size
    assert torch.equal(first["ref_log_prob"], second["ref_log_prob"])
    assert len(files(tmp_path / "made" / "here")) == 1


def test_annotating_again_hits_the_cache(tmp_path: Path) -> None:
    """The key ignores what annotation, curation and reweighting add to the data."""
    policy = gaussian()
    data = annotate_reference(policy, dataset(), cache=tmp_path)
    data["multiplicity"] = torch.ones(300, dtype=torch.int64)
    data["importance_weight"] = torch.ones(300)
    data["next", "reward"] += 1
    annotate_reference(policy, data, cache=tmp_path)
    assert len(files(tmp_path)) == 1


def weights(policy: GaussianPolicy, data: TensorDict) -> None:
    with torch.no_grad():
        list(policy.parameters())[-1][-1] += 1e-6


def wide(policy: GaussianPolicy, data: TensorDict) -> None:
    policy.double()
    data["observation"] = data["observation"].double()


def bounds(policy: GaussianPolicy, data: TensorDict) -> None:
    policy.module[0].module.log_std_bounds = (-4.0, 2.0)


def observation(policy: GaussianPolicy, data: TensorDict) -> None:
    data["observation"][-1, -1] += 1e-6


def action(policy: GaussianPolicy, data: TensorDict) -> None:
    data["action"][0, 0] += 1e-6


def ids(policy: GaussianPolicy, data: TensorDict) -> None:
    data[TRAJ_IDS][-1] += 1


CHANGES = [weights, wide, bounds, observation, action, ids]


@pytest.mark.parametrize("change", CHANGES)
def test_key_follows_all_it_depends_on(tmp_path: Path, change: Any) -> None:
    annotate_reference(gaussian(), dataset(), cache=tmp_path)
    policy, data = gaussian(), dataset()
    change(policy, data)
    annotate_reference(policy, data, cache=tmp_path)
    assert len(files(tmp_path)) == 2
    assert torch.equal(data["ref_log_prob"], ForwardPass(policy, data).log_prob().float())


def test_matmul_precision_and_autocast_are_part_of_the_key(tmp_path: Path) -> None:
    annotate_reference(gaussian(), dataset(), cache=tmp_path)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        annotate_reference(gaussian(), dataset(), cache=tmp_path)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        annotate_reference(gaussian(), dataset(), cache=tmp_path)
    assert len(files(tmp_path)) == 3
    # Where no log-prob of the first batch shows it.
    for number, dtype in enumerate((torch.bfloat16, torch.float16), 4):
        with torch.autocast("cpu", dtype):
            annotate_reference(Counting(), dataset(), cache=tmp_path)
        assert len(files(tmp_path)) == number


def test_a_module_without_parameters_has_a_key(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def log_prob(self, trajectories: TensorDictBase) -> Tensor:
            return trajectories["action"].sum(-1)

    data = annotate_reference(Plain(), dataset(), cache=tmp_path)
    assert torch.equal(data["ref_log_prob"], data["action"].sum(-1))
    assert len(files(tmp_path)) == 1


def test_changed_code_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotate_reference(Counting(), dataset(), cache=tmp_path)
    monkeypatch.setattr(
        Counting, "log_prob", lambda self, td: self.scale * td["action"].square().sum(-1)
    )
    data = annotate_reference(Counting(), dataset(), cache=tmp_path)
    assert torch.equal(data["ref_log_prob"], data["action"].square().sum(-1))
    assert len(files(tmp_path)) == 2


def test_full_disk_leaves_nothing_half_written(full_disk: Any, tmp_path: Path) -> None:
    annotate_reference(gaussian(1), dataset(), cache=tmp_path)
    stored = {path: path.read_bytes() for path in files(tmp_path)}
    data = dataset()
    with full_disk(500), pytest.raises(OSError, match="no space left to write"):
        annotate_reference(gaussian(), data, cache=tmp_path)
    assert {path: path.read_bytes() for path in files(tmp_path)} == stored


def test_cache_folder_that_is_a_file_fails_before_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    policy = Counting()
    with pytest.raises(FileExistsError, match="file"):
        annotate_reference(policy, dataset(), cache=tmp_path / "file")
    assert policy._steps == 0


def test_not_finite_is_named(tmp_path: Path) -> None:
    data = dataset()
    data["observation"][42, 1] = torch.nan
    with pytest.raises(ValueError, match="nan at step 12 of trajectory 1, and 1 of 300 log-probs"):
        annotate_reference(gaussian(), data, cache=tmp_path)
    assert files(tmp_path) == []
    assert "ref_log_prob" not in data.keys()  # noqa: SIM118


def test_locked_data_and_policies_that_are_not_modules(tmp_path: Path) -> None:
    stored = dataset().memmap(tmp_path / "data")
    with pytest.raises(ValueError, match=r"trajectories.copy\(\)"):
        annotate_reference(gaussian(), stored)
    annotated = annotate_reference(gaussian(), stored.copy())
    assert torch.equal(
        annotated["ref_log_prob"], annotate_reference(gaussian(), dataset())["ref_log_prob"]
    )

    class Plain:
        def log_prob(self, trajectories: TensorDictBase) -> Tensor:
            return trajectories["action"].sum(-1)

    assert torch.equal(
        annotate_reference(Plain(), dataset())["ref_log_prob"], dataset()["action"].sum(-1)
    )
    with pytest.raises(TypeError, match="Plain is not a torch.nn.Module .*; pass cache=None"):
        annotate_reference(Plain(), dataset(), cache=tmp_path)


def test_parameters_out_of_reach_are_named(tmp_path: Path) -> None:
    policy = Counting()
    # As DeepSpeed marks them.
    policy.scale.ds_tensor = SimpleNamespace(status=SimpleNamespace(name="NOT_AVAILABLE"))
    with pytest.raises(ValueError, match="keeps these parameters on NVMe.*pass cache=None"):
        annotate_reference(policy, dataset(), cache=tmp_path)


def test_training_mode_is_as_it_was(tmp_path: Path) -> None:
    policy = gaussian().train()
    annotate_reference(policy, dataset(), cache=tmp_path)
    annotate_reference(policy.eval(), dataset(), cache=tmp_path)
    assert not policy.training
    assert len(files(tmp_path)) == 1


def _annotate(folder: Path) -> None:
    annotate_reference(gaussian(), dataset(), cache=folder)


def test_key_is_the_same_in_another_process(forkserver: Any, tmp_path: Path) -> None:
    """The key contains no memory address, hash seed or order of dictionaries."""
    _annotate(tmp_path)
    process = forkserver.Process(target=_annotate, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(files(tmp_path)) == 1


def test_functions_among_the_settings_do_not_change_the_key(tmp_path: Path) -> None:
    policies = [Counting(), Counting()]
    assert repr(policies[0].squash) != repr(policies[1].squash)
    for policy in policies:
        annotate_reference(policy, dataset(), cache=tmp_path)
    assert len(files(tmp_path)) == 1


def test_fingerprint_sees_name_dtype_shape_and_value() -> None:
    base = fingerprint({"a": torch.zeros(2, 3), "b": torch.ones(())})
    assert base == fingerprint({"b": torch.ones(()), "a": torch.zeros(3, 2).T})
    others: list[dict[str, Any]] = [
        {"a": torch.zeros(3, 2), "b": torch.ones(())},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(())},
        {"a": torch.zeros(2, 3), "c": torch.ones(())},
        {"a": torch.zeros(2, 3), "b": torch.zeros(())},
        {"a": torch.zeros(2, 3).bfloat16(), "b": torch.ones(())},
        {"a": torch.zeros(2, 3), "b": 1.0},
        {"a": torch.zeros(2, 3)},
    ]
    assert len({base, *(fingerprint(other) for other in others)}) == 8


def recurrent() -> tuple[ProbabilisticActor, Any, nn.Module]:
    """A policy with a memory, its GRU, and what follows."""
    torch.manual_seed(0)
    memory = GRUModule(
        input_size=4, hidden_size=8, in_keys=["observation", "past"], out_keys=["seen", "past"]
    )
    head = nn.Sequential(nn.Linear(8, 4), NormalParamExtractor())
    policy = ProbabilisticActor(
        TensorDictSequential(memory, TensorDictModule(head, ["seen"], ["loc", "scale"])),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    return policy, memory.gru, head


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_policy_with_a_memory_reads_trajectories_as_the_loss_does(layout: str) -> None:
    """TorchRL's losses have a memory read whole rows; alone it starts afresh at each step."""
    policy, gru, head = recurrent()
    data = dataset(90)
    data["is_init"] = torch.arange(90)[:, None] % 30 == 0
    rows = pad(data)
    data = annotate_reference(policy, data if layout == "packed" else rows, rows=30)
    with torch.no_grad():
        loc, scale = head(gru(rows["observation"])[0])
        expected = torch.distributions.Normal(loc, scale).log_prob(rows["action"]).sum(-1)
    torch.testing.assert_close(data["ref_log_prob"].reshape(3, 30), expected)
    loss = ImportanceWeightedMLE(policy, proposal="cached")
    reweight(data, loss)
    loss.actor_network_params.data.mul_(1.1)
    torch.testing.assert_close(loss(data)["log_prob"], loss.log_prob(data).mean().detach())
    with torch.no_grad():
        loc, scale = head(gru(rows["observation"])[0])
        moved = torch.distributions.Normal(loc, scale).log_prob(rows["action"]).sum(-1)
    reweight(data, loss)
    weight = (moved - expected).mean(1).exp()[:, None].expand(3, 30)
    torch.testing.assert_close(data["importance_weight"].reshape(3, 30), weight)


def test_a_memory_that_would_leak_into_a_trajectory_is_refused() -> None:
    """As where a collector's rows are cut in an episode and packed: nothing resets the memory."""
    policy, gru, head = recurrent()
    rows = dataset(90).exclude(TRAJ_IDS).reshape(3, 30)
    rows["is_init"] = torch.zeros(3, 30, 1, dtype=torch.bool)
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    with torch.no_grad():
        loc, scale = head(gru(rows["observation"])[0])
        expected = torch.distributions.Normal(loc, scale).log_prob(rows["action"]).sum(-1)
    torch.testing.assert_close(annotate_reference(policy, rows)["ref_log_prob"], expected)
    torch.testing.assert_close(loss(rows)["log_prob"], expected.mean())
    packed = pack(rows)
    two = rows.reshape(1, 90).set(("next", "done"), torch.arange(90).reshape(1, 90, 1) == 29)
    for data in (packed, two):
        for read in (lambda x: annotate_reference(policy, x), loss):
            with pytest.raises(ValueError, match="begins at step 30 .*has no 'is_init' there"):
                read(data)
    packed["is_init"][30::30] = True
    torch.testing.assert_close(loss(packed)["log_prob"], expected.mean())
    # Of a policy without a memory the mark says nothing.
    packed["is_init"][30] = False
    annotate_reference(gaussian(), packed)


@pytest.mark.parametrize("proposal", ["current", "cached"])
@pytest.mark.parametrize("key", [None, "mine"])
def test_steps_that_the_mask_has_kept_without_a_reference_are_not_weighed(
    proposal: Any, key: str | None
) -> None:
    """A log pi_ref of 0 off the mask would be a probability of 1."""
    data = dataset()
    data[MASK] = torch.arange(len(data)) % 3 > 0
    data["mine"] = torch.ones(len(data), dtype=torch.bool)
    loss = ImportanceWeightedMLE(gaussian(), proposal=proposal)
    loss.loss_mask_key = key
    annotate_reference(gaussian(), data)
    with pytest.raises(ValueError, match="counts steps that .* leaves out, which have no log pi_r"):
        reweight(data, loss) if proposal == "cached" else loss(data)
    whole = annotate_reference(gaussian(), data.exclude(MASK))
    data["ref_log_prob"] = whole["ref_log_prob"]
    assert bool((reweight(data, loss).abs() < 1e-6).all())
