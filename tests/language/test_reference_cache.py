"""The cache of the tokens' reference: its key has everything it depends on; it is resumable."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_cases import (
    BATCHES,
    SIZES,
    Counting,
    annotate,
    dataset,
    decoder,
    files,
    policy,
)
from tensordict import TensorDict

from iwsft import checkpoint, reference
from iwsft.checkpoint import CheckpointError
from iwsft.policies import CausalLMPolicy
from iwsft.reference import cached_reference


@pytest.fixture
def part_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is stored after every batch."""
    monkeypatch.setattr("iwsft.reference._PART", 1)


def test_stored_result_is_read_and_only_the_first_batch_runs(tmp_path: Path) -> None:
    first, second = dataset(), dataset()
    for data in (first, second):
        counting = Counting(decoder())
        annotate(counting, data, cache=tmp_path / "made" / "here")
        assert len(counting._batches) == (len(BATCHES) if data is first else 1)
    assert counting._batches == [[1, 5, 7]]
    assert torch.equal(first["ref_log_prob"], second["ref_log_prob"])
    assert len(files(tmp_path / "made" / "here")) == 1


def test_other_entries_do_not_change_the_key(tmp_path: Path) -> None:
    data = dataset(multiplicity=[1] * len(SIZES))
    data["score"] = torch.rand(len(data))
    data["importance_weight"] = torch.rand(len(data))
    model = decoder()
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    other = annotate(CausalLMPolicy(model.eval()), data, cache=tmp_path)
    assert annotate(policy(), dataset(), cache=tmp_path) == other


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
    theta.model.model.norm.register_forward_hook(lambda *arguments: arguments[2] * 1.001)


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
    how["context"] = torch.autocast("cpu", torch.bfloat16)


CHANGES = [late_weight, buffer, config, attention, one_row, half, code, token, mask, ids, order]
CHANGES += [layout, padding, multiple, autocast]


@pytest.mark.parametrize("change", CHANGES)
def test_key_follows_all_it_depends_on(tmp_path: Path, change: Callable[..., None]) -> None:
    annotate(policy(), dataset(), cache=tmp_path)
    theta, data, how = policy(), dataset(), {"batches": BATCHES}
    with contextlib.ExitStack() as stack:
        change(theta, data, how)
        stack.enter_context(how.pop("context", contextlib.nullcontext()))
        annotate(theta, data, cache=tmp_path, **how)
    assert len(files(tmp_path)) == 2


@pytest.mark.usefixtures("part_a_batch")
@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupted_pass_continues(tmp_path: Path, at: int) -> None:
    whole, data = dataset(), dataset()
    annotate(policy(), whole)
    with pytest.raises(InterruptedError):
        annotate(Counting(decoder(), breaks_at=at), data, cache=tmp_path)
    # The first batch runs in any case and is not stored.
    assert len(files(tmp_path)) == at - 1
    assert "ref_log_prob" not in data.keys()  # noqa: SIM118
    again = Counting(decoder())
    annotate(again, data, cache=tmp_path)
    # The first once more, for the key, and those that were not done.
    assert again._batches == [sorted(batch) for batch in [BATCHES[0], *BATCHES[at:]]]
    assert torch.equal(data["ref_log_prob"], whole["ref_log_prob"])
    assert len(files(tmp_path)) == 1


def test_a_part_is_a_fixed_number_of_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("iwsft.reference._PART", 3)
    caplog.set_level("INFO", "iwsft")
    with pytest.raises(InterruptedError):
        annotate(
            Counting(decoder(), breaks_at=8), dataset(), [[n] for n in range(10)], cache=tmp_path
        )
    assert len(files(tmp_path)) == 2
    again = Counting(decoder())
    annotate(again, dataset(), [[n] for n in range(10)], cache=tmp_path)
    assert again._batches == [[0], [7], [8], [9]]
    rounds = [f"reference: round {number} of 10" for number in (1, 4, 7, 7)]
    assert [record.getMessage() for record in caplog.records] == rounds


def _killed(folder: Path, threads: int) -> None:
    """Annotate in a process that dies when it would store its third part."""
    torch.set_num_threads(threads)
    reference._PART = 1
    write, left = checkpoint.write, iter(range(2))

    def dying(*args: Any) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    checkpoint.write = dying
    annotate(policy(), dataset(), cache=folder)


def test_a_killed_process_leaves_parts_that_the_next_one_reads(
    forkserver: Any, tmp_path: Path
) -> None:
    process = forkserver.Process(target=_killed, args=(tmp_path, torch.get_num_threads()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(files(tmp_path)) == 2
    data, whole = dataset(), dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iwsft.reference._PART", 1)
        annotate(policy(), data, cache=tmp_path)
    # Its parts were read, under the same key in another process, and removed.
    assert len(files(tmp_path)) == 1
    annotate(policy(), whole)
    assert torch.equal(data["ref_log_prob"], whole["ref_log_prob"])


@pytest.mark.usefixtures("part_a_batch")
@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign"])
@pytest.mark.parametrize("part", [False, True])
def test_corrupt_and_foreign_files_are_named(tmp_path: Path, harm: str, part: bool) -> None:
    other = tmp_path / "other"
    for theta, cache in ((decoder(1), other), (decoder(), tmp_path / "stored")):
        counting = Counting(theta, breaks_at=3 if part else None)
        try:
            annotate(counting, dataset(), cache=cache)
        except InterruptedError:
            assert part
    path = files(tmp_path / "stored")[-1]
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
    with pytest.raises(CheckpointError, match="is (corrupt|the copy of).*delete the file") as e:
        annotate(again, data, cache=tmp_path / "stored")
    assert str(path) in str(e.value) and len(again._batches) == 1
    assert "ref_log_prob" not in data.keys()  # noqa: SIM118
    path.unlink()
    annotate(again, data, cache=tmp_path / "stored")
    whole = dataset()
    annotate(policy(), whole)
    assert torch.equal(data["ref_log_prob"], whole["ref_log_prob"])


def test_a_resumed_run_reads_the_reference_that_its_model_can_no_longer_give(
    tmp_path: Path,
) -> None:
    data, resumed = dataset(), dataset()
    annotate(policy(), data, cache=tmp_path)
    key = annotate(policy(), dataset(), cache=tmp_path)
    cached_reference(resumed, key, cache=tmp_path)
    assert torch.equal(resumed["ref_log_prob"], data["ref_log_prob"])
    with pytest.raises(ValueError, match=f"reference {key} .*belongs to other trajectories"):
        cached_reference(dataset(seed=1), key, cache=tmp_path)
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is corrupt .*put a copy of the file back"):
        cached_reference(resumed, key, cache=tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is gone; .*or start afresh"):
        cached_reference(resumed, key, cache=tmp_path)
