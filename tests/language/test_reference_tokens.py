"""annotate_tokens: exact in the first epoch's batches, kept under all it depends on, resumable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_cases import BATCHES, SIZES, VOCABULARY, alone, dataset, decoder, policy
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from iwsft import ImportanceWeightedMLE
from iwsft.language.batches import EpochBatches
from iwsft.language.collator import TrajectoryDataset, collate
from iwsft.language.plan import Plan, uncounted
from iwsft.language.reference import annotate_tokens, cached_reference
from iwsft.policies import CausalLMPolicy


class Counting(CausalLMPolicy):
    """Keeps the batches it was asked for, and breaks at one of them."""

    def __init__(self, model: Any, *, breaks_at: int | None = None) -> None:
        super().__init__(model)
        self._asked: list[list[int]] = []
        self._breaks_at = breaks_at

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        if len(self._asked) == self._breaks_at:
            raise InterruptedError
        ids = trajectories["collector", "traj_ids"]
        self._asked.append(ids.unique().tolist())
        return super().log_prob(trajectories)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_is_the_log_prob_of_each_trajectory(layout: Any) -> None:
    data = dataset()
    keys = set(data.keys(True, True))
    annotate_tokens(policy(), data, BATCHES, layout=layout)
    assert set(data.keys(True, True)) == {*keys, "ref_log_prob"}
    found = data["ref_log_prob"]
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), alone(decoder(), data), rtol=1e-5, atol=1e-5)
    assert bool((found[~data["masks", "all_assistant_mask"]] == 0).all())


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_row", [True, False])
def test_first_weights_are_exactly_one(layout: Any, dtype: torch.dtype, one_row: bool) -> None:
    """In all batches of the first epoch, in training mode and with gradient."""
    model = decoder(dtype=dtype)
    theta = CausalLMPolicy(model, one_row=one_row)
    data = dataset(multiplicity=[1] * len(SIZES))
    entries = TrajectoryDataset(data)
    batches = EpochBatches(entries.sizes, batch_size=3, seed=1)
    annotate_tokens(theta, data, batches.of(0), layout=layout)
    loss = ImportanceWeightedMLE(theta, proposal="current", functional=False)
    loss.loss_mask_key = ("masks", "all_assistant_mask")
    loss.set_keys(action=("tokens", "full"))
    assert model.training
    for numbers in batches.of(0):
        batch = collate([entries[number] for number in numbers], layout=layout)
        terms = loss.terms(batch)
        assert terms.log_prob.requires_grad
        assert torch.equal(terms.log_weight, torch.zeros_like(terms.log_weight))
        assert torch.equal(terms.log_prob, batch["ref_log_prob"])


def test_drawn_several_times_the_first_batch_counts() -> None:
    """Batches are those of training, and batches with nothing new are not run."""
    data = dataset((9, 40, 5), multiplicity=[2, 1, 3])
    # Entries: 0 0 1 2 2 2.
    batches = [[0, 3], [2, 1], [4, 5], [4, 1]]
    asked = Counting(decoder())
    found = annotate_tokens(asked, data, batches)
    assert asked._asked == [[0, 2], [0, 1]]
    assert (found.batches, found.computed) == (2, 2)
    first = data.exclude("multiplicity")
    expected = asked.log_prob(collate([first[:9], first[49:]]))
    assert torch.equal(data["ref_log_prob"][:9], expected[0, :9])
    assert torch.equal(data["ref_log_prob"][49:], expected[1, :5])


def test_trajectories_in_no_batch_come_at_the_end() -> None:
    """Also those that are never drawn; their batches are no larger than the given ones."""
    data = dataset(multiplicity=[1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    asked = Counting(decoder())
    found = annotate_tokens(asked, data, [[0, 4], [1, 0]])
    assert found.batches == len(asked._asked)
    assert asked._asked[:2] == [[0, 5], [0, 1]]
    later = asked._asked[2:]
    assert sorted(sum(later, [])) == [2, 3, 4, 6, 7, 8, 9]
    assert all(sum(SIZES[t] for t in batch) <= SIZES[0] + SIZES[5] for batch in later)
    torch.testing.assert_close(
        data["ref_log_prob"].double(), alone(decoder(), data), rtol=1e-5, atol=1e-5
    )
    alone_too = dataset()
    annotate_tokens(policy(), alone_too)
    torch.testing.assert_close(alone_too["ref_log_prob"], data["ref_log_prob"])


def test_batches_of_a_plan_with_entries_that_do_not_count() -> None:
    data = dataset()
    batches = EpochBatches(TrajectoryDataset(data).sizes, batch_size=1)
    plan = Plan(batches, accumulation=1, processes=3, epochs=1).epoch(0)
    assert min(min(batch) for batch in plan) < 0
    asked = Counting(decoder())
    annotate_tokens(asked, data, plan)
    assert len(asked._asked) == len(SIZES)
    twice = dataset()
    annotate_tokens(policy(), twice, [[uncounted(5), 1, 7], *BATCHES[1:]])
    annotate_tokens(policy(), data, BATCHES)
    assert torch.equal(twice["ref_log_prob"], data["ref_log_prob"])


def test_mode_and_gradients_are_as_they_were() -> None:
    theta = policy(attention_dropout=0.5)
    theta.model.lm_head.eval()
    data = dataset()
    annotate_tokens(theta, data, BATCHES)
    assert theta.training and theta.model.training and not theta.model.lm_head.training
    assert all(p.requires_grad and p.grad is None for p in theta.parameters())
    torch.testing.assert_close(
        data["ref_log_prob"].double(), alone(decoder(), data), rtol=1e-5, atol=1e-5
    )


def test_kept_is_read_and_only_the_first_batch_runs(tmp_path: Path) -> None:
    first, second = dataset(), dataset()
    made = annotate_tokens(policy(), first, BATCHES, cache=tmp_path / "made" / "here")
    asked = Counting(decoder())
    # The class is part of the key.
    asked.__class__.__qualname__ = "CausalLMPolicy"
    found = annotate_tokens(asked, second, BATCHES, cache=tmp_path / "made" / "here")
    assert asked._asked == [[1, 5, 7]]
    assert (made.batches, made.computed, found.computed) == (4, 4, 1)
    assert found.key == made.key is not None
    assert torch.equal(first["ref_log_prob"], second["ref_log_prob"])
    assert len(files(tmp_path / "made" / "here")) == 1


def test_what_has_no_part_in_it_does_not_change_the_key(tmp_path: Path) -> None:
    first = annotate_tokens(policy(), dataset(), BATCHES, cache=tmp_path)
    data = dataset(multiplicity=[1] * len(SIZES))
    data["score"] = torch.rand(len(data))
    data["importance_weight"] = torch.rand(len(data))
    model = decoder()
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    second = annotate_tokens(
        CausalLMPolicy(model.eval()), data, BATCHES, cache=tmp_path, save_every=0
    )
    assert first.key == second.key


def late_weight(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    with torch.no_grad():
        # Of a token that is not in the first batch.
        theta.model.model.embed_tokens.weight[-1] += 1e-6


def buffer(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    theta.model.model.rotary_emb.inv_freq[-1] += 1e-9


def config(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    theta.model.config.rms_norm_eps = 1e-5


def attention(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    theta.model.set_attn_implementation("eager")


def one_row(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    theta.one_row = False


def half(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    theta.bfloat16()


def code(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    theta.model.model.norm.register_forward_hook(lambda *held: held[2] * 1.001)


def token(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    data["tokens", "full"][-1] ^= 1


def mask(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    data["masks", "all_assistant_mask"][-1] = False


def ids(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    data["collector", "traj_ids"][-1] += 1


def order(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    how["batches"] = [*BATCHES[:2], BATCHES[3], BATCHES[2]]


def layout(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    how["layout"] = "packed"


def padding(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    how["pad_token_id"] = 2


def multiple(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    how["multiple_of"] = 16


def autocast(theta: CausalLMPolicy, data: TensorDict, how: dict[str, Any]) -> None:
    how["context"] = lambda: torch.autocast("cpu", torch.bfloat16)


CHANGES = [late_weight, buffer, config, attention, one_row, half, code, token, mask, ids, order]
CHANGES += [layout, padding, multiple, autocast]


@pytest.mark.parametrize("change", CHANGES)
def test_key_follows_all_it_depends_on(tmp_path: Path, change: Callable[..., None]) -> None:
    before = annotate_tokens(policy(), dataset(), BATCHES, cache=tmp_path)
    theta, data, how = policy(), dataset(), {"batches": BATCHES}
    change(theta, data, how)
    after = annotate_tokens(theta, data, cache=tmp_path, **how)
    assert after.key != before.key
    assert after.computed == after.batches and len(files(tmp_path)) == 2


def test_context_is_that_of_every_forward() -> None:
    plain, cast, half = dataset(), dataset(), dataset()
    annotate_tokens(policy(), plain, BATCHES)
    annotate_tokens(policy(), cast, BATCHES, context=lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        annotate_tokens(policy(), half, BATCHES)
    assert torch.equal(cast["ref_log_prob"], half["ref_log_prob"])
    assert not torch.allclose(cast["ref_log_prob"], plain["ref_log_prob"], atol=1e-4)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupted_pass_goes_on_where_it_stood(tmp_path: Path, at: int) -> None:
    whole, data = dataset(), dataset()
    expected = annotate_tokens(Counting(decoder()), whole, BATCHES)
    with pytest.raises(InterruptedError):
        annotate_tokens(
            Counting(decoder(), breaks_at=at), data, BATCHES, cache=tmp_path, save_every=0
        )
    assert len(files(tmp_path)) == at
    assert "ref_log_prob" not in data.keys()  # noqa: SIM118
    again = Counting(decoder())
    found = annotate_tokens(again, data, BATCHES, cache=tmp_path, save_every=0)
    # The first once more, for the key, and what was not done.
    assert again._asked == [sorted(batch) for batch in [BATCHES[0], *BATCHES[at:]]]
    assert found.computed == 1 + len(BATCHES) - at and expected.batches == found.batches
    assert torch.equal(data["ref_log_prob"], whole["ref_log_prob"])
    assert [path.name for path in files(tmp_path)] == [f"ref_log_prob-{found.key}.npy"]


def test_savings_are_rare_where_batches_are_fast(tmp_path: Path) -> None:
    """After the first, whose time does not count much, one part holds all the rest."""
    asked = Counting(decoder(), breaks_at=len(BATCHES))
    data = dataset(multiplicity=[0, *[1] * (len(SIZES) - 1)])
    with pytest.raises(InterruptedError):
        annotate_tokens(asked, data, [[n] for n in range(len(SIZES) - 1)], cache=tmp_path)
    assert len(files(tmp_path)) == 1


def test_killed_process_leaves_what_the_next_one_reads(tmp_path: Path) -> None:
    body = (
        "import os, signal, sys; from pathlib import Path; from reference_cases import *;"
        "from iwsft.language.reference import annotate_tokens; from iwsft.files import *;"
        "import iwsft.language.reference as r; write = r.write_log_prob; left = [2]\n"
        "def killed(path, log_prob, *, label):\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1; write(path, log_prob, label=label)\n"
        "r.write_log_prob = killed; torch.set_num_threads(int(sys.argv[2]))\n"
        "annotate_tokens(policy(), dataset(), BATCHES, cache=Path(sys.argv[1]), save_every=0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", body, str(tmp_path), str(torch.get_num_threads())],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert len(files(tmp_path)) == 2
    data, whole = dataset(), dataset()
    found = annotate_tokens(policy(), data, BATCHES, cache=tmp_path)
    assert found.computed == 1 + 2 and len(files(tmp_path)) == 1
    annotate_tokens(policy(), whole, BATCHES)
    assert torch.equal(data["ref_log_prob"], whole["ref_log_prob"])


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign"])
@pytest.mark.parametrize("part", [False, True])
def test_corrupt_and_foreign_files_are_named(tmp_path: Path, harm: str, part: bool) -> None:
    other = tmp_path / "other"
    for theta, cache in ((decoder(1), other), (decoder(), tmp_path / "kept")):
        asked = Counting(theta, breaks_at=2 if part else None)
        try:
            annotate_tokens(asked, dataset(), BATCHES, cache=cache, save_every=0)
        except InterruptedError:
            assert part
    path = files(tmp_path / "kept")[-1]
    content = bytearray(path.read_bytes())
    content[140] ^= 1
    path.write_bytes(
        {
            "cut": path.read_bytes()[:-5],
            "flip": bytes(content),
            "empty": b"",
            "foreign": files(other)[-1].read_bytes(),
        }[harm]
    )
    data = dataset()
    again = Counting(decoder())
    with pytest.raises(ValueError, match="is corrupt or belongs elsewhere.*delete the file") as e:
        annotate_tokens(again, data, BATCHES, cache=tmp_path / "kept", save_every=0)
    assert str(path) in str(e.value) and len(again._asked) == 1
    assert "ref_log_prob" not in data.keys()  # noqa: SIM118
    path.unlink()
    annotate_tokens(again, data, BATCHES, cache=tmp_path / "kept")
    whole = dataset()
    annotate_tokens(policy(), whole, BATCHES)
    assert torch.equal(data["ref_log_prob"], whole["ref_log_prob"])


def test_cache_that_is_a_file_fails_before_the_first_forward(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = Counting(decoder())
    with pytest.raises(FileExistsError, match="file"):
        annotate_tokens(asked, dataset(), BATCHES, cache=tmp_path / "file")
    assert asked._asked == []


def test_not_finite_names_the_trajectory(tmp_path: Path) -> None:
    theta, data = policy(), dataset()
    theta.model.model.embed_tokens.weight.data[VOCABULARY - 1] = torch.nan
    # Trajectory 6 has 5 tokens from 67 on, the last 3 the assistant's.
    data["tokens", "full"][67] = VOCABULARY - 1
    data["collector", "traj_ids"] += 100
    with pytest.raises(ValueError, match="log-prob nan at token 2 of trajectory 106: look at"):
        annotate_tokens(theta, data, BATCHES, cache=tmp_path, save_every=0)
    assert "ref_log_prob" not in data.keys()  # noqa: SIM118
    # What was done before is kept.
    assert len(files(tmp_path)) == 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch 1 holds 10; entries run from 0 to 9"):
        annotate_tokens(policy(), dataset(), [[0], [3, 10]])
    with pytest.raises(ValueError, match="batch 0 holds 'no entry'"):
        annotate_tokens(policy(), dataset(), [[]])
    with pytest.raises(ValueError, match="layout='flat' is unknown"):
        annotate_tokens(policy(), dataset(), BATCHES, layout="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be packed.* batch size \[4, 8\]"):
        annotate_tokens(policy(), dataset((8, 8, 8, 8)).reshape(4, 8), [[0]])
    with pytest.raises(ValueError, match=r"trajectories.copy\(\)"):
        annotate_tokens(policy(), dataset().lock_(), BATCHES)
    with pytest.raises(KeyError, match="all_assistant_mask.*missing"):
        annotate_tokens(policy(), dataset().exclude(("masks", "all_assistant_mask")), BATCHES)


def test_resumed_run_reads_what_its_model_can_no_longer_give(tmp_path: Path) -> None:
    data, resumed = dataset(), dataset()
    key = annotate_tokens(policy(), data, BATCHES, cache=tmp_path).key
    assert key is not None
    cached_reference(resumed, key, cache=tmp_path)
    assert torch.equal(resumed["ref_log_prob"], data["ref_log_prob"])
    with pytest.raises(ValueError, match=f"reference {key} .*belongs to other trajectories"):
        cached_reference(dataset(seed=1), key, cache=tmp_path)
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is corrupt .*put a copy of the file back"):
        cached_reference(resumed, key, cache=tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is gone; .*or start afresh"):
        cached_reference(resumed, key, cache=tmp_path)


def lora(seed: int, *, moved: bool = False, **settings: Any) -> CausalLMPolicy:
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj", "up_proj"], **settings}
    base = decoder()
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and "lora_B" in name:
                parameter.normal_(std=0.3)
    return CausalLMPolicy(model)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapters_are_off_and_no_part_of_the_key(tmp_path: Path, saved: Any) -> None:
    base, first, second = dataset(), dataset(), dataset()
    annotate_tokens(policy(), base, BATCHES)
    theta = lora(0, modules_to_save=saved)
    flags = [p.requires_grad for p in theta.parameters()]
    key = annotate_tokens(theta, first, BATCHES, cache=tmp_path).key
    assert torch.equal(first["ref_log_prob"], base["ref_log_prob"])
    assert flags == [p.requires_grad for p in theta.parameters()]
    again = annotate_tokens(lora(1, modules_to_save=saved), second, BATCHES, cache=tmp_path)
    assert again.key == key and again.computed == 1
    # At the start theta is the reference, bit for bit.
    batch = collate([TrajectoryDataset(first)[number] for number in BATCHES[0]])
    assert torch.equal(theta.log_prob(batch), batch["ref_log_prob"])
    with torch.no_grad():
        theta.model.get_base_model().model.embed_tokens.weight[-1] += 1e-6
    assert annotate_tokens(theta, dataset(), BATCHES, cache=tmp_path).key != key


def test_adapters_that_do_something_already_are_warned_of() -> None:
    data, base = dataset(), dataset()
    with pytest.warns(UserWarning, match="adapters change the log-probs already.*merge_and_unload"):
        annotate_tokens(lora(0, moved=True), data, BATCHES)
    annotate_tokens(policy(), base, BATCHES)
    assert torch.equal(data["ref_log_prob"], base["ref_log_prob"])
