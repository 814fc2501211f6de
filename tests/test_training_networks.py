"""The fit loop with several networks against a plain loop, and a loss's noise across a kill."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import GRUModule, IndependentNormal, ProbabilisticActor
from torchrl.objectives.common import LossModule

from baselines.windows import WindowSampler
from iwsft import EMA, GaussianPolicy, HardSync, ImportanceWeightedMLE, ImportanceWeights, curate
from iwsft.checkpoint import CheckpointError
from iwsft.samplers import StepSampler, TrajectorySampler, TransitionSampler
from iwsft.training import Probe, Row, Schedule, fit
from iwsft.trajectory import REF_LOG_PROB, from_steps

STEPS = 12


class TwoNetworks(LossModule):
    """An actor and a critic, a loss each, with noise from torch's own generator."""

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(self, *, actor_every: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        for name, key in (("actor_network", "a"), ("qvalue_network", "q")):
            network = TensorDictModule(nn.Linear(3, 1), ["observation"], [key])
            self.convert_to_functional(network, name, create_target_params=False)
        self.actor_every, self.scale, self.calls = actor_every, scale, 0

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        pass

    def _out(self, name: str, batch: TensorDictBase) -> Tensor:
        network = getattr(self, name)
        with getattr(self, f"{name}_params").to_module(network):
            return network(batch.copy())[network.out_keys[0]]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        noise = torch.randn(len(tensordict), 1)
        reward = tensordict["next", "reward"]
        q = self._out("qvalue_network", tensordict)
        out = {
            "loss_qvalue": self.scale * (q - reward - noise).square().mean(),
            "pred_value": q.detach(),
        }
        self.calls += 1
        if self.calls % self.actor_every == 0:
            a = self._out("actor_network", tensordict)
            out["loss_actor"] = (a - noise).square().mean()
        return TensorDict(out, [])


def data() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    steps: dict[Any, Tensor] = {
        key: torch.randn(40, size, generator=generator)
        for key, size in {
            "observation": 3,
            "action": 2,
            ("next", "observation"): 3,
            ("next", "reward"): 1,
        }.items()
    }
    for key in ("done", "terminated"):
        steps["next", key] = torch.zeros(40, 1, dtype=torch.bool)
    return from_steps(steps, torch.arange(4).repeat_interleave(10))


SCHEDULES = {
    "actor_network": Schedule(STEPS, lr=0.05, warmup=3, decay="cosine", clip_norm=0.1),
    "qvalue_network": Schedule(STEPS, lr=0.02, decay="constant", weight_decay=0.3),
}


def sampler() -> TransitionSampler:
    return TransitionSampler(data(), 16, seed=1)


def values(loss: TwoNetworks) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in loss.parameters()]


def plain_loop(actor_every: int) -> list[Tensor]:
    """The same run, an optimizer a network, clipped and scheduled by hand."""
    loss, batches = TwoNetworks(actor_every=actor_every), sampler()
    named = dict(loss.named_parameters())
    groups = {n: [p for k, p in named.items() if k.startswith(n)] for n in SCHEDULES}
    actor = torch.optim.Adam(groups["actor_network"], lr=1.0)
    critic = torch.optim.AdamW(groups["qvalue_network"], lr=0.02, weight_decay=0.3)
    torch.manual_seed(7)
    for step in range(STEPS):
        out = loss(batches.sample())
        actor.zero_grad()
        critic.zero_grad()
        out["loss_qvalue"].backward()
        critic.step()
        if "loss_actor" in out:
            out["loss_actor"].backward()
            norm = torch.cat([p.grad.flatten() for p in groups["actor_network"]]).norm()
            for parameter in groups["actor_network"]:
                parameter.grad *= min(1.0, 0.1 / float(norm))
            done = (step - 3) / (STEPS - 3)
            share = step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * done))
            actor.param_groups[0]["lr"] = 0.05 * share
            actor.step()
    return values(loss)


@pytest.mark.parametrize("actor_every", [1, 2])
def test_each_network_follows_its_own_loss_and_schedule(actor_every: int) -> None:
    loss = TwoNetworks(actor_every=actor_every)
    torch.manual_seed(7)
    rows: list[Row] = []
    fit(loss, sampler(), SCHEDULES, log_every=1, report=rows.append)
    for ours, plain in zip(values(loss), plain_loop(actor_every), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_qvalue"] + row.get("loss_actor", 0.0))
        assert math.isfinite(row["pred_value"])
        assert row["lr_qvalue_network"] == 0.02
    assert [row["lr_actor_network"] for row in rows[:4]] == pytest.approx(
        [0, 0.05 / 3, 0.1 / 3, 0.05]
    )
    assert sum("loss_actor" in row for row in rows) == STEPS // actor_every


@pytest.mark.parametrize("killed_at", [1, 5, 11])
def test_noise_of_the_loss_continues_where_it_stopped(tmp_path: Path, killed_at: int) -> None:
    torch.manual_seed(7)
    whole = TwoNetworks()
    fit(whole, sampler(), SCHEDULES, folder=tmp_path / "whole", checkpoint_every=1)

    def kill(row: Row) -> None:
        if row["step"] == killed_at + 1:
            raise KeyboardInterrupt

    torch.manual_seed(7)
    options: dict[str, Any] = {"folder": tmp_path / "cut", "checkpoint_every": 1, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(TwoNetworks(), sampler(), SCHEDULES, **options, report=kill)
    resumed = TwoNetworks()
    torch.manual_seed(99)
    fit(resumed, sampler(), SCHEDULES, **options)
    for ours, other in zip(values(resumed), values(whole), strict=True):
        assert torch.equal(ours, other)


def test_an_output_past_its_limit_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    loss = TwoNetworks(scale=1.0)
    wild = {**SCHEDULES, "qvalue_network": Schedule(STEPS, lr=50.0, decay="constant")}
    with pytest.raises(FloatingPointError, match=r"pred_value is -?\d.*beyond.*\(5\) at update"):
        fit(
            loss,
            sampler(),
            wild,
            limits={"pred_value": 5.0},
            folder=tmp_path,
            checkpoint_every=1,
            log_every=100,
        )
    state = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)["state"]
    # The batch of an update is judged by the networks before it: one update is past the limit.
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and abs(rows[0]["pred_value"]) < 5
    assert state["step"] >= 1


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({"actor_network": Schedule(3, 0.1)}, "'qvalue_network_params.*has no schedule"),
        ({**SCHEDULES, "value_network": Schedule(STEPS, 0.1)}, "no parameters under value_network"),
        ({**SCHEDULES, "actor_network": Schedule(3, 0.1)}, "same number of steps"),
    ],
)
def test_schedules_that_do_not_fit_are_named(schedules: dict[str, Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(TwoNetworks(), sampler(), schedules)


@pytest.mark.parametrize("wrong", [{"weight_decay": -1.0}, {"clip_norm": 0.0}])
def test_a_schedule_out_of_range_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        Schedule(3, 0.1, **wrong)


@pytest.mark.parametrize("whose", ["loss", "q"])
def test_an_interruption_within_a_swap_of_parameters_stays_one(whose: str) -> None:
    """tensordict makes an error of its own of it where it puts parameters back."""
    policy, trajectories = GaussianPolicy(3, 2, hidden=(8,)), data()
    trajectories[REF_LOG_PROB] = torch.zeros(40)
    loss = ImportanceWeightedMLE(policy, proposal="cached")
    updater = HardSync(loss, every=2, trajectories=trajectories)

    def interrupted(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # q is computed without gradients.
        if torch.is_grad_enabled() == (whose == "loss"):
            try:
                raise KeyboardInterrupt
            finally:
                bool(TensorDict())

    next(m for m in policy.modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(
        interrupted
    )
    with pytest.raises(KeyboardInterrupt):
        fit(loss, StepSampler(trajectories, 4), Schedule(STEPS, lr=0.1), updater=updater)


@pytest.mark.parametrize(("reduce", "length"), [("mean", 1), ("mean", 3), ("sum", 3), (None, 3)])
@pytest.mark.parametrize("proposal", ["current", "lagged"])
def test_single_steps_are_no_trajectories_to_weigh(proposal: Any, reduce: Any, length: int) -> None:
    """Each would have a weight of its own, which is the variant with ``reduce=None``."""
    steps = {"observation": torch.zeros(9, 3), "action": torch.zeros(9, 2)}
    ids = torch.arange(9) // length
    trajectories = from_steps({**steps, REF_LOG_PROB: torch.zeros(9)}, ids)
    chain = ImportanceWeights(reduce=reduce)
    loss = ImportanceWeightedMLE(GaussianPolicy(3, 2), importance_weights=chain, proposal=proposal)
    updater = EMA(loss, decay=0.5) if proposal == "lagged" else None
    fit(loss, TrajectorySampler(trajectories, 4), Schedule(1, 0.01), updater=updater)
    error = pytest.raises(ValueError, match="weighs whole trajectories, and StepSampler draws")
    with error if reduce and length > 1 else nullcontext():
        fit(loss, StepSampler(trajectories, 4), Schedule(1, 0.01), updater=updater)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_a_lagged_q_that_nothing_moves_is_refused(functional: bool, built: bool) -> None:
    """Its weights would stay 1 to the end: SFT, without a word."""
    trajectories = data()
    trajectories[REF_LOG_PROB] = torch.zeros(40)
    loss = ImportanceWeightedMLE(GaussianPolicy(3, 2, hidden=(4,)), functional=functional)
    # An updater that is made and not passed moves nothing either.
    updater = EMA(loss, decay=0.5) if built else None
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(ValueError, match=r"q would stay where it is.* updater=EMA"):
        fit(loss, TrajectorySampler(trajectories, 4), Schedule(2, 0.1))
    torch.testing.assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)
    updater = EMA(loss, decay=0.5) if updater is None else updater
    fit(loss, TrajectorySampler(trajectories, 4), Schedule(2, 0.1), updater=updater)


def test_an_updater_of_another_loss_is_refused() -> None:
    trajectories = data()
    trajectories[REF_LOG_PROB] = torch.zeros(40)
    losses = [ImportanceWeightedMLE(GaussianPolicy(3, 2, hidden=(4,))) for _ in range(2)]
    updaters = [EMA(loss, decay=0.5) for loss in losses]
    with pytest.raises(ValueError, match="targets of another loss"):
        fit(losses[0], TrajectorySampler(trajectories, 4), Schedule(2, 0.1), updater=updaters[1])


def test_weights_of_other_trajectories_than_are_drawn_are_refused() -> None:
    """Curated data that have been weighed before keep their first weights: a copy."""
    trajectories = data()
    trajectories[REF_LOG_PROB] = torch.zeros(40)
    loss = ImportanceWeightedMLE(GaussianPolicy(3, 2, hidden=(4,)), proposal="cached")
    updater = HardSync(loss, every=2, trajectories=trajectories)
    for drawn in (curate(trajectories), trajectories.exclude("importance_weight")):
        with pytest.raises(ValueError, match="other trajectories than the sampler draws from"):
            fit(loss, StepSampler(drawn, 4), Schedule(2, 0.1), updater=updater)
    part = HardSync(loss, every=2, trajectories=trajectories[:20])
    with pytest.raises(ValueError, match="other trajectories than the sampler draws from"):
        fit(loss, StepSampler(trajectories, 4), Schedule(2, 0.1), updater=part)
    # A shallow copy has the same entries.
    before = trajectories["importance_weight"].clone()
    fit(loss, StepSampler(trajectories.copy(), 4), Schedule(3, 0.1), updater=updater)
    assert not torch.equal(trajectories["importance_weight"], before)


@pytest.mark.parametrize("length", [1, 2])
def test_sums_along_trajectories_are_not_those_of_single_steps(length: int) -> None:
    """Single steps give the length-normalised loss, whatever the loss says."""
    steps = {"observation": torch.zeros(8, 3), "action": torch.zeros(8, 2)}
    trajectories = from_steps(steps, torch.arange(8) // length)
    policy = GaussianPolicy(3, 2, hidden=(4,))
    loss = ImportanceWeightedMLE(policy, proposal="reference", length_normalize=False)
    error = pytest.raises(ValueError, match="length_normalize=False adds up whole trajectories")
    with error if length > 1 else nullcontext():
        fit(loss, StepSampler(trajectories, 4), Schedule(2, 0.1))
    fit(loss, TrajectorySampler(trajectories, 4), Schedule(2, 0.1))


def test_a_memory_reads_whole_trajectories() -> None:
    """In single steps a policy with a memory would take one step for the past of another."""
    sizes = {"input_size": 3, "hidden_size": 4, "in_keys": ["observation", "past"]}
    memory = GRUModule(**sizes, out_keys=["seen", ("next", "past")], default_recurrent_mode=True)
    head = nn.Sequential(nn.Linear(4, 4), NormalParamExtractor())
    policy = ProbabilisticActor(
        TensorDictSequential(memory, TensorDictModule(head, ["seen"], ["loc", "scale"])),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    steps = {"observation": torch.randn(12, 3), "action": torch.randn(12, 2)}
    first = torch.arange(12)[:, None] % 4 == 0
    trajectories = from_steps({**steps, "is_init": first}, torch.arange(12) // 4)
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    with pytest.raises(ValueError, match="depends on the other steps .* take TrajectorySampler"):
        fit(loss, StepSampler(trajectories, 6), Schedule(2, 0.1))
    fit(loss, TrajectorySampler(trajectories, 6), Schedule(2, 0.1))


def test_a_run_of_another_loss_or_other_data_is_refused_without_settings(tmp_path: Path) -> None:
    def train(
        k: float = 1.0,
        squash: bool = False,
        every: int = 2,
        shift: float = 0.0,
        frozen: bool = False,
    ) -> None:
        torch.manual_seed(0)
        steps = {"observation": torch.randn(9, 3), "action": torch.rand(9, 2) + shift}
        trajectories = from_steps({**steps, REF_LOG_PROB: torch.zeros(9)}, torch.arange(9))
        chain = ImportanceWeights.paper_control(k)
        policy = GaussianPolicy(3, 2, hidden=(4,), squash=squash)
        loss = ImportanceWeightedMLE(policy, importance_weights=chain)
        next(loss.parameters()).requires_grad_(not frozen)
        updater = HardSync(loss, every=every)
        sampler = StepSampler(trajectories, 4)
        fit(loss, sampler, Schedule(3, 0.01), updater=updater, folder=tmp_path)
        # In the same process, counters are where the first call left them.
        fit(loss, sampler, Schedule(3, 0.01), updater=updater, folder=tmp_path)

    train()
    train()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"k": 9.0}, "loss.importance_weights="),
        ({"squash": True}, r"squash='False' \(now 'True'\)"),
        ({"frozen": True}, "loss.frozen="),
        ({"every": 3}, r"updater.every='2' \(now '3'\)"),
        ({"shift": -0.5}, "this state is of a sampler with data="),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            train(**change)


def test_a_run_whose_syncs_write_the_reference_is_resumed(tmp_path: Path) -> None:
    """Also from another first policy: the reference is what the last sync wrote."""

    def train(folder: Path, seed: int = 0, stop_at: int = STEPS) -> Tensor:
        def interrupt(row: Row) -> None:
            if row["step"] > stop_at:
                raise KeyboardInterrupt

        trajectories = data()
        torch.manual_seed(seed)
        policy = GaussianPolicy(3, 2, hidden=(4,))
        chain = ImportanceWeights.psft()
        loss = ImportanceWeightedMLE(policy, importance_weights=chain, proposal="current")
        updater = HardSync(loss, every=3, trajectories=trajectories)
        schedule, every = Schedule(STEPS, 0.1), {"checkpoint_every": 5, "log_every": 1}
        arguments: dict[str, Any] = {"updater": updater, "folder": folder, **every}
        fit(loss, StepSampler(trajectories, 4), schedule, report=interrupt, **arguments)
        return torch.cat([parameter.detach().flatten() for parameter in loss.parameters()])

    expected = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=7)
    assert torch.equal(train(tmp_path / "cut", seed=1), expected)


@pytest.mark.parametrize("sampler", [StepSampler, WindowSampler])
def test_another_seed_does_not_take_over_the_run_of_the_first(tmp_path: Path, sampler: Any) -> None:
    """Without settings, and with the folder as text."""

    def train(seed: int) -> None:
        loss = ImportanceWeightedMLE(GaussianPolicy(3, 2, hidden=(4,)), proposal="reference")
        fit(loss, sampler(data(), 4, seed=seed), Schedule(2, 0.1), folder=str(tmp_path))

    train(1)
    train(1)
    with pytest.raises(CheckpointError, match=r"seed='1' \(now '2'\); choose another folder"):
        train(2)


def tiny() -> float:
    """A product below the smallest normal number of float32; 0 where such numbers are flushed."""
    small = torch.tensor(1e-20, dtype=torch.float32)
    return float(small * small)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="a processor that can't flush")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flushed", [False, True])
def test_denormals_are_flushed_during_a_fit_and_then_as_before(
    flushed: bool, dtype: torch.dtype
) -> None:
    seen: list[float] = []
    probe = Probe(1, lambda batch: seen.append(tiny()) or {})
    steps = {"observation": torch.zeros(9, 3), "action": torch.zeros(9, 2)}
    trajectories = from_steps(steps, torch.arange(9) // 3)
    loss = ImportanceWeightedMLE(GaussianPolicy(3, 2, hidden=(4,)), proposal="reference")
    torch.set_flush_denormal(flushed)
    torch.set_default_dtype(dtype)
    try:
        fit(loss, StepSampler(trajectories, 4), Schedule(2, 0.1), probes=[probe])
        assert seen == [0, 0]
        assert (tiny() == 0) is flushed
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)
