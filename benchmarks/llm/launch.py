"""Start a training command again under accelerate: a process a GPU, or 2 on the CPU.

``choose`` finds a packaged config (``benchmarks/llm/configs``) or reads the user's, ``run`` starts
the processes, ``launched`` tells a process what it was started as, and ``assert_engine`` that the
engine it got is the one that was asked for: accelerate and transformers fall back to others
without a word.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from benchmarks.llm.hardware import Hardware
from benchmarks.llm.launch_config import ENGINES, VARIABLE, Launch, read
from iwsft.language.memory import DecoderSizes, Setup, training_memory

# Of a GPU's or host's memory; the rest is lost between blocks and to the system.
_USABLE = 0.9


def choose(
    config: str | None,
    hardware: Hardware,
    *,
    model: DecoderSizes | None = None,
    setup: Setup | None = None,
) -> Launch:
    """What to start on this hardware.

    Args:
        config: name of a packaged config, an accelerate YAML file, a DeepSpeed JSON file; None for
            the one that fits: ``cpu_zero3`` without a GPU, ``multi_node`` on several nodes, else
            the first of ``zero2``, ``zero3``, ``zero3_offload`` that the model fits in (``zero3``
            where model or memory are not known).
        hardware: of this node.
        model: what is to be trained.
        setup: tokens of a micro-batch, q, and what else memory hangs on; the engine is overwritten.

    Raises:
        ValueError: an unknown config or one that this hardware can't run, or no config that the
            model fits in.
        FileNotFoundError: no such file.
    """
    if config is None:
        config = _fitting(hardware, model, setup or Setup())
    found = read(config, hardware)
    if config == "multi_node" and hardware.nodes < 2:
        raise ValueError(
            "--deepspeed multi_node: only one node is known of; set NNODES, NODE_RANK, MASTER_ADDR "
            "and MASTER_PORT on each, as benchmarks/llm/slurm/job.sh does, or take zero3"
        )
    if found.device == "cpu" or hardware.gpus > 0:
        return found
    if found.engine == "fsdp2":
        raise ValueError(
            f"--deepspeed {config}: FSDP2 under accelerate needs GPUs, and torch sees none "
            "(accelerate would train without it); on the CPU use cpu_zero3"
        )
    if found.offload_optimizer:
        raise ValueError(
            f"--deepspeed {config}: there is no GPU to offload the optimizer from; on the CPU use "
            "cpu_zero3"
        )
    return replace(found, device="cpu")


def run(launch: Launch, module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m module ARGUMENTS`` in each process, wait, and return their exit status.

    The processes say themselves what went wrong; a line is added for those that were killed.

    Args:
        launch: what to start.
        module: of the command.
        arguments: of the command line.

    Raises:
        ValueError: this process is one of several already.
        ImportError: the engine's package is missing.
        KeyboardInterrupt: a signal to end arrived.
    """
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"this is one of several processes already (LOCAL_RANK is set), and {launch.config} "
            "would start more in each: run the command by plain python, or leave --deepspeed "
            "out under torchrun or accelerate launch"
        )
    if launch.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise ImportError(f"{launch.config} needs DeepSpeed: pip install deepspeed")
    with variables(launch.environment()):
        if launch.engine == "single":
            return _run_one([sys.executable, "-m", module, *arguments])
        return _run_several(launch, launch.command(module, arguments))


def _run_one(command: Sequence[str]) -> int:
    with subprocess.Popen(command) as process:
        try:
            return _status(process.wait(), "the process")
        except KeyboardInterrupt:
            # A signal to this process alone.
            process.terminate()
            process.wait()
            raise


def _run_several(launch: Launch, command: Sequence[str]) -> int:
    from accelerate.commands.launch import (  # type: ignore[import-untyped]
        launch_command,
        launch_command_parser,
    )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with _quiet_agent():
        try:
            launch_command(launch_command_parser().parse_args(command))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _status(failure.exitcode, f"process {rank} of {launch.processes}")
        except SignalException as error:
            raise KeyboardInterrupt from error
    return 0


def launched() -> Launch | None:
    """What this process was started as by :func:`run`; None for one started otherwise."""
    text = os.environ.get(VARIABLE)
    return None if text is None else Launch(**json.loads(text))


def assert_engine(trainer_or_accelerator: Any, launch: Launch) -> None:
    """See that the engine is the one that was asked for; call it when the trainer is made.

    Args:
        trainer_or_accelerator: a transformers ``Trainer``, or accelerate's ``Accelerator``.
        launch: what was asked for.

    Raises:
        ValueError: another engine, stage, offloading, device or number of processes.
    """
    accelerator = getattr(trainer_or_accelerator, "accelerator", trainer_or_accelerator)
    state = accelerator.state
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    found: dict[str, Any] = {
        "engine": ENGINES.get(kind, kind),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    if launch.engine == "deepspeed" and found["engine"] == "deepspeed":
        plugin = state.deepspeed_plugin
        found["stage"] = int(plugin.zero_stage)
        offload = plugin.get_value("zero_optimization.offload_optimizer.device") or "none"
        found["offload_optimizer"] = str(offload) != "none"
    if found["engine"] == "fsdp2" and state.fsdp_plugin.fsdp_version != 2:
        found["engine"] = "fsdp1"
    differ = {name: value for name, value in found.items() if value != getattr(launch, name)}
    if differ:
        asked = ", ".join(f"{name} {getattr(launch, name)}" for name in differ)
        got = ", ".join(f"{name} {value}" for name, value in differ.items())
        raise ValueError(
            f"{launch.config} was asked for with {asked}, but training would run with {got}: "
            "TrainingArguments need use_cpu=True on the CPU and no deepspeed or fsdp of their own, "
            "and ACCELERATE_ variables of the shell must not be set"
        )


def _fitting(hardware: Hardware, model: DecoderSizes | None, setup: Setup) -> str:
    if hardware.gpus == 0:
        return "cpu_zero3"
    if model is None or hardware.gpu_memory is None:
        return "multi_node" if hardware.nodes > 1 else "zero3"
    processes = hardware.gpus * hardware.nodes
    choices: dict[str, Any] = {"zero2": {"engine": "zero2"}, "zero3": {"engine": "zero3"}}
    if hardware.nodes > 1:
        choices = {"multi_node": {"engine": "zero3"}}
    choices["zero3_offload"] = {"engine": "zero3", "offload_optimizer": True}
    needs = []
    for name, settings in choices.items():
        asked = replace(setup, processes=processes, nodes=hardware.nodes, **settings)
        memory = training_memory(model, asked)
        fits_host = memory.host <= _USABLE * (hardware.host_memory or float("inf"))
        if memory.gpu <= _USABLE * hardware.gpu_memory and fits_host:
            return name
        needs.append(f"{name} {_gb(memory.gpu)} a GPU and {_gb(memory.host)} of host memory")
    raise ValueError(
        f"the model does not fit: {'; '.join(needs)}; there are {processes} GPUs of "
        f"{_gb(hardware.gpu_memory)} and {_gb(hardware.host_memory or 0)} of host memory a node. "
        "Take more GPUs or nodes (multi_node), shorter sequences or adapters (docs/scaling.md), or "
        "name a config to try it all the same"
    )


def _gb(number: float) -> str:
    return f"{number / 1e9:.0f} GB"


def _status(code: int, who: str) -> int:
    """The exit status of a shell; a line about processes that could not say anything."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; most often memory ran out, see docs/scaling.md" if -code == signal.SIGKILL else ""
    print(f"error: {who} was ended by {name}{hint}", file=sys.stderr)
    return 128 - code


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Within, the environment has these variables; after, what it had before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Without torchrun's page about a failed process: it has told the error itself."""
    prefix = "torch.distributed.elastic"
    loggers = [logging.getLogger(n) for n in list(logging.root.manager.loggerDict) if prefix in n]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
