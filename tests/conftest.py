"""Fixtures that several test packages need."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.context import BaseContext

import pytest

# Loaded once by the server that distributed tests fork their processes from.
PRELOADED = [
    "deepspeed",
    "iwsft.language.trainer",
    "peft",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
]


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections, which each training runs in full."""
    gc.collect()
    gc.freeze()


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
def on_two_processes(forkserver: BaseContext) -> Callable[..., None]:
    """``on_two_processes(work, *args)`` runs ``work(rank, *args)`` on two fresh processes."""
    import torch.multiprocessing

    def run(work: Callable[..., None], *args: object) -> None:
        method = forkserver.get_start_method()
        torch.multiprocessing.start_processes(work, args, nprocs=2, start_method=method)

    return run


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
