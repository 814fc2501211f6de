"""Fixtures that several test packages need."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import hypothesis
import pytest
import torch
import torch.multiprocessing
from tensordict import TensorDictBase

# Loaded once by the server that distributed tests fork their processes from.
PRELOADED = [
    "deepspeed",
    "iwsft.language.trainer",
    "peft",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
]

# No example fails because a machine is slow.
hypothesis.settings.register_profile(
    "any_speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any_speed")


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections, which each training runs in full."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


@pytest.fixture(scope="session")
def forkserver() -> BaseContext:
    """Starts fresh processes that have loaded :data:`PRELOADED`."""
    with pytest.MonkeyPatch.context() as environment:
        # DeepSpeed reads it when it is imported, the tests' processes inherit it.
        environment.setenv("DS_ACCELERATOR", "cpu")
        multiprocessing.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


@pytest.fixture
def on_processes(forkserver: BaseContext) -> Callable[..., None]:
    """``on_processes(n, work, *args)`` runs ``work(rank, *args)`` on n fresh processes."""

    def run(n: int, work: Callable[..., None], *args: object) -> None:
        method = forkserver.get_start_method()
        torch.multiprocessing.start_processes(work, args, nprocs=n, start_method=method)

    return run


@pytest.fixture
def on_two_processes(on_processes: Callable[..., None]) -> Callable[..., None]:
    """``on_two_processes(work, *args)`` runs ``work(rank, *args)`` on two fresh processes."""
    return partial(on_processes, 2)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """``with full_disk(n):`` no file can grow over n bytes, as on a disk that is nearly full."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture(scope="session")
def gradients() -> Callable[[Any, TensorDictBase], dict[str, torch.Tensor]]:
    """``gradients(loss, batch)``: of the sum of all losses, by parameter name."""

    def compute(loss: Any, batch: TensorDictBase) -> dict[str, torch.Tensor]:
        names, parameters = zip(*loss.named_parameters(), strict=True)
        total = sum(v.sum() for k, v in loss(batch).items() if k.startswith("loss"))
        return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))

    return compute


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """``assert_near(a, b, tolerance=2e-6)``: the same entries, NaN where NaN."""

    def check(a: TensorDictBase, b: TensorDictBase, tolerance: float = 2e-6) -> None:
        assert set(a.keys(True, True)) == set(b.keys(True, True))
        for key in a.keys(True, True):
            torch.testing.assert_close(
                a.get(key), b.get(key), rtol=tolerance, atol=tolerance, equal_nan=True
            )

    return check


@pytest.fixture(scope="session")
def assert_same(assert_near: Callable[..., None]) -> Callable[..., None]:
    """``assert_same(a, b)``: the same entries, bit for bit."""
    return lambda a, b: assert_near(a, b, tolerance=0)
