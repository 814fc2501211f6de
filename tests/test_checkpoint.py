"""State on disk: exact, whole, and only for the settings it was made with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iwsft import checkpoint
from iwsft.checkpoint import CheckpointError, differences

SETTINGS = {"lr": 0.1, "cuts": (90.0, 95.0), "tuning": {"steps": 7, "k": None}}


def state() -> dict[str, Any]:
    parameters = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    adam = torch.optim.Adam([parameters])
    parameters.square().sum().backward()
    adam.step()
    generator = torch.Generator().manual_seed(3)
    return {
        "parameters": parameters.detach().clone(),
        "optimizer": adam.state_dict(),
        "generator": generator.get_state(),
        "step": 7,
    }


def test_a_saved_state_is_loaded(tmp_path: Path) -> None:
    held = state()
    checkpoint.save(tmp_path / "checkpoint", held, SETTINGS)
    found = checkpoint.load(tmp_path / "checkpoint", SETTINGS)
    assert found is not None
    assert found["step"] == 7
    assert torch.equal(found["parameters"], held["parameters"])
    assert torch.equal(found["generator"], held["generator"])
    moments = held["optimizer"]["state"][0]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(found["optimizer"]["state"][0][name], moments[name])


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, SETTINGS) is None


@pytest.mark.parametrize("settings", [{"a": torch.ones(1)}, {1: 2, "b": 3}, {"a": Path("x")}])
def test_settings_that_can_not_be_written_are_refused_at_the_start(
    tmp_path: Path, settings: dict[Any, Any]
) -> None:
    with pytest.raises(TypeError, match="settings=.* must be plain values"):
        checkpoint.load(tmp_path / "new", settings)


def test_settings_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(), SETTINGS)
    other = {"lr": 0.2, "cuts": [90.0, 95.0], "tuning": {"steps": 9, "k": None}, "new": "x"}
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(tmp_path, other)
    message = str(raised.value)
    assert str(tmp_path) in message
    assert "lr=0.1 (now 0.2), new=None (now 'x'), tuning.steps=7 (now 9);" in message
    assert "cuts" not in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), JSON))
def test_settings_equal_themselves(tree: dict[str, Any]) -> None:
    assert differences(tree, tree) == ""


@given(st.dictionaries(st.text("abc"), st.integers(0, 2)), st.text("abc"), st.integers(3, 5))
def test_one_changed_value_is_found(tree: dict[str, int], name: str, value: int) -> None:
    assert differences({"in": tree}, {"in": tree | {name: value}}).startswith(f"in.{name}=")


def test_long_values_are_shown_where_they_differ() -> None:
    before, after = f"{'a' * 40}k=2.0{'b' * 40}", f"{'a' * 40}k=3.0{'b' * 40}"
    shown = differences({"loss": before}, {"loss": after})
    assert "k=2.0" in shown and "k=3.0" in shown and len(shown) < 100


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("good")
    checkpoint.save(folder, state(), {})
    return (folder / checkpoint.FILE).read_bytes()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_is_read_as_another_state(
    tmp_path: Path, good: bytes, data: st.DataObject
) -> None:
    """A cut, a flipped bit or a foreign block: an error that names the file, or the true state."""
    broken = bytearray(good)
    at = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "block"]))
    if kind == "cut":
        del broken[at:]
    elif kind == "flip":
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        block = data.draw(st.binary(min_size=1, max_size=64))
        broken[at : at + len(block)] = block
    path = tmp_path / checkpoint.FILE
    path.write_bytes(broken)
    try:
        found = checkpoint.load(tmp_path, {})
    except CheckpointError as error:
        assert f"{path} is corrupt" in str(error) and "start afresh" in str(error)
        return
    assert found is not None
    assert found["step"] == 7
    assert torch.equal(found["parameters"], state()["parameters"])


def test_no_bit_of_the_directory_is_read_as_another(tmp_path: Path, good: bytes) -> None:
    """Such as one that makes a folder of an entry, of which torch reads nothing in silence."""
    path, outcomes = tmp_path / checkpoint.FILE, set()
    # The last entry, without its name.
    begin = good.rindex(b"PK\x01\x02")
    for at in range(8 * begin, 8 * (begin + 46)):
        broken = bytearray(good)
        broken[at // 8] ^= 1 << at % 8
        path.write_bytes(broken)
        try:
            found = checkpoint.load(tmp_path, {})
        except CheckpointError:
            outcomes.add("refused")
            continue
        outcomes.add("read")
        assert found is not None and torch.equal(found["parameters"], state()["parameters"])
    assert outcomes == {"refused", "read"}


def test_a_file_of_other_content_is_corrupt(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, tmp_path / checkpoint.FILE)
    with pytest.raises(CheckpointError, match="corrupt"):
        checkpoint.load(tmp_path, {})


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    checkpoint.save(tmp_path, state(), {})
    large = state() | {"parameters": torch.zeros(100_000), "step": 8}
    with full_disk(20_000), pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path, large, {})
    found = checkpoint.load(tmp_path, {})
    assert found is not None and found["step"] == 7
