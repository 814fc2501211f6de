"""Start a training command again under accelerate: one process per GPU, or 2 on the CPU.

``choose`` reads a packaged config (``benchmarks/llm/configs``) or the user's, ``start`` starts the
processes, and ``launched`` tells a process what it was started as. ``assert_engine`` checks that a
process got the engine that was asked for, because accelerate and transformers fall back to others
silently.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
import torch
from accelerate.commands.config.config_args import (  # type: ignore[import-untyped]
    load_config_from_file,
)
from accelerate.commands.launch import (  # type: ignore[import-untyped]
    launch_command,
    launch_command_parser,
)
from accelerate.utils import patch_environment  # type: ignore[import-untyped]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from yaml import YAMLError  # type: ignore[import-untyped]

from benchmarks.llm.memory import ENGINES, DecoderSizes, Setup, training_memory
from benchmarks.places import cores

CONFIGS = Path(__file__).parent / "configs"
# The variable that tells a process what it was started as.
VARIABLE = "IWSFT_LAUNCH"
# The share of a GPU's or host's memory that training may take; allocators and the system lose some.
_USABLE = 0.9
Engine = Literal["single", "deepspeed", "fsdp2"]
# accelerate's names.
_ENGINES: dict[str, Engine] = {"NO": "single", "DEEPSPEED": "deepspeed", "FSDP": "fsdp2"}
# Prints the bytes of the smallest GPU.
_LOOK_AT_GPUS = """
import torch
gpus = range(torch.cuda.device_count())
print(min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus))
"""


@dataclass(frozen=True)
class Hardware:
    """GPUs, cores and memory of this node, and its place among the nodes that take part.

    Every node has as many GPUs. Memory is in bytes, that of the smallest GPU, and None where it is
    not known. ``address`` and ``port`` are those of node 0, as the others reach it.
    """

    gpus: int
    cores: int
    gpu_memory: int | None = None
    host_memory: int | None = None
    nodes: int = 1
    node_rank: int = 0
    address: str | None = None
    port: int | None = None

    @classmethod
    def here(cls, environ: Mapping[str, str] = os.environ) -> Hardware:
        """Look at this node; torchrun's environment variables tell of the others."""
        gpus, gpu_memory = torch.cuda.device_count(), None
        if gpus:
            # A look takes half a GB of the GPU as long as the process lives.
            command = [sys.executable, "-c", _LOOK_AT_GPUS]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            # A driver may print before the number.
            words = done.stdout.split()
            gpu_memory = int(words[-1]) if done.returncode == 0 and words else None
        node = cls(gpus, cores(), gpu_memory, psutil.virtual_memory().total)
        if environ.get("NNODES", "1") == "1":
            return node
        try:
            nodes, rank = int(environ["NNODES"]), int(environ["NODE_RANK"])
            address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"NNODES={environ['NNODES']}: every node needs NNODES, NODE_RANK, MASTER_ADDR and "
                "MASTER_PORT in its environment, as in benchmarks/llm/slurm/job.sh; missing or "
                f"wrong: {error}"
            ) from error
        if not 0 <= rank < nodes:
            raise ValueError(f"NODE_RANK={rank} must be in [0, NNODES={nodes})")
        return replace(node, nodes=nodes, node_rank=rank, address=address, port=port)


@dataclass(frozen=True)
class Launch:
    """What to start: ``config`` is a packaged config's name or the user's file.

    ``stage`` is DeepSpeed's ZeRO stage, None for other engines. ``processes`` are those of all
    nodes together, ``threads`` those of a process on the CPU, and ``options`` those of ``accelerate
    launch``.
    """

    config: str
    engine: Engine = "single"
    stage: int | None = None
    offload_optimizer: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    processes: int = 1
    threads: int = 1
    options: tuple[str, ...] = ()

    @property
    def engine_name(self) -> str:
        """The engine in a word or two: ``single``, ``deepspeed zero3 offload``, ``fsdp2``."""
        if self.stage is None:
            return self.engine
        return f"{self.engine} zero{self.stage}{' offload' if self.offload_optimizer else ''}"

    def environment(self) -> dict[str, str]:
        """Environment variables that the processes get in addition to those of this one."""
        variables = {VARIABLE: json.dumps(asdict(self)), "OMP_NUM_THREADS": str(self.threads)}
        if self.device == "cpu":
            # DeepSpeed and torch would find the GPUs of a machine that has some.
            variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return variables


def config_names() -> list[str]:
    """Names of the packaged configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def choose(
    config: str | None,
    hardware: Hardware,
    *,
    model: DecoderSizes | None = None,
    setup: Setup | None = None,
) -> Launch:
    """Choose what to start on this hardware.

    ``config`` is the name of a packaged config, an accelerate YAML file, or a DeepSpeed JSON file.
    A YAML file of the user that gives a number of processes keeps it; otherwise there is one
    process per GPU, or 2 on the CPU. None takes the config that fits: ``cpu_zero3`` without a GPU,
    ``multi_node`` on several nodes, else the first of ``zero2``, ``zero3`` and ``zero3_offload``
    that the model fits in (``zero3`` where its sizes are not known). The engine and the processes
    of ``setup`` are overwritten.
    """
    if config is None:
        config = _fitting_config(hardware, model, setup or Setup())
    path, deepspeed_file = _files(config)
    settings = _read_accelerate_config(path)
    engine = _ENGINES[_distributed_type(settings)]
    stage, offload = None, False
    if engine == "deepspeed":
        zero = settings.deepspeed_config
        if deepspeed_file is None and "deepspeed_config_file" in zero:
            # In packaged files the path starts at the root of the checkout.
            root = CONFIGS.parents[2] if path.parent == CONFIGS else Path()
            deepspeed_file = Path(root, zero["deepspeed_config_file"]).resolve()
        if deepspeed_file is None:
            stage = int(zero.get("zero_stage", 2))
            offload = str(zero.get("offload_optimizer_device", "none")) != "none"
        else:
            stage, offload = _read_deepspeed_config(deepspeed_file)
    on_cpu = settings.use_cpu or hardware.gpus == 0
    for refused, problem in (
        (
            config == "multi_node" and hardware.nodes < 2,
            "the environment names only one node; set NNODES, NODE_RANK, MASTER_ADDR and "
            "MASTER_PORT on each, as benchmarks/llm/slurm/job.sh does, or take zero3",
        ),
        (
            on_cpu and engine == "fsdp2",
            "FSDP2 under accelerate needs GPUs, and torch sees none (accelerate would train "
            "without it); on the CPU use cpu_zero3",
        ),
        (
            hardware.gpus == 0 and offload and not settings.use_cpu,
            "there is no GPU to offload the optimizer from; on the CPU use cpu_zero3",
        ),
    ):
        if refused:
            raise ValueError(f"--deepspeed {config}: {problem}")
    if path.parent == CONFIGS or settings.num_processes < 1:
        single = engine == "single"
        settings.num_machines = 1 if single else hardware.nodes
        local = 1 if single else 2 if on_cpu else hardware.gpus
        settings.num_processes = local * settings.num_machines
        settings.machine_rank = hardware.node_rank
        settings.main_process_ip, settings.main_process_port = hardware.address, hardware.port
    nodes = settings.num_machines
    threads = threads_of(hardware.cores, settings.num_processes // nodes)
    options: dict[str, Any] = {
        "--config_file": path,
        "--num_processes": settings.num_processes,
        "--num_machines": nodes,
        "--machine_rank": settings.machine_rank,
        # Port 0 is any that is free.
        "--main_process_port": settings.main_process_port or 0,
        "--num_cpu_threads_per_process": threads,
    }
    if deepspeed_file is not None:
        options["--deepspeed_config_file"] = deepspeed_file
    if nodes > 1:
        options["--main_process_ip"] = settings.main_process_ip
    words = [str(word) for option in options.items() for word in option]
    return Launch(
        config=config,
        engine=engine,
        stage=stage,
        offload_optimizer=offload,
        device="cpu" if on_cpu else "cuda",
        processes=settings.num_processes,
        threads=threads,
        options=(*words, *(["--same_network"] if nodes > 1 else [])),
    )


def threads_of(cores: int, processes: int) -> int:
    """Compute the threads of each process: OMP_NUM_THREADS, or a fair share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, cores // processes)


def start(launch: Launch, module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m module ARGUMENTS`` in each process, wait, and return the exit status.

    The processes print their own errors; this prints a line about one that was killed.
    """
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"this is one of several processes already (LOCAL_RANK is set), and {launch.config} "
            "would start more in each: run the command by plain python, or leave --deepspeed "
            "out under torchrun or accelerate launch"
        )
    if launch.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise ImportError(f"{launch.config} needs DeepSpeed: pip install deepspeed")
    with patch_environment(**launch.environment()):
        if launch.engine == "single":
            command = [sys.executable, "-m", module, *arguments]
            return _exit_status(subprocess.run(command, check=False).returncode, "the process")
        # Without torchrun's page about a failed process, which has printed its error itself.
        logging.disable(logging.CRITICAL)
        words = [*launch.options, "--module", module, *arguments]
        try:
            launch_command(launch_command_parser().parse_args(words))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _exit_status(failure.exitcode, f"process {rank} of {launch.processes}")
        except SignalException as error:
            raise KeyboardInterrupt from error
        finally:
            logging.disable(logging.NOTSET)
    return 0


def launched() -> Launch | None:
    """What :func:`start` started this process as; None for a process that was started otherwise."""
    text = os.environ.get(VARIABLE)
    return None if text is None else Launch(**json.loads(text))


def assert_engine(accelerator: Any, launch: Launch) -> None:
    """Check that accelerate's engine is the one asked for; call it when the trainer is made."""
    state = accelerator.state
    kind = _distributed_type(state)
    actual: dict[str, Any] = {
        "engine": _ENGINES.get(kind, kind),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    if launch.engine == "deepspeed" and actual["engine"] == "deepspeed":
        plugin = state.deepspeed_plugin
        actual["stage"] = int(plugin.zero_stage)
        offload = plugin.get_value("zero_optimization.offload_optimizer.device") or "none"
        actual["offload_optimizer"] = str(offload) != "none"
    if actual["engine"] == "fsdp2" and state.fsdp_plugin.fsdp_version != 2:
        actual["engine"] = "fsdp1"
    differ = {name: value for name, value in actual.items() if value != getattr(launch, name)}
    if differ:
        wanted = ", ".join(f"{name} {getattr(launch, name)}" for name in differ)
        got = ", ".join(f"{name} {value}" for name, value in differ.items())
        raise ValueError(
            f"{launch.config} asks for {wanted}, but training would run with {got}: "
            "TrainingArguments need use_cpu=True on the CPU and no deepspeed or fsdp of their own, "
            "and ACCELERATE_ variables of the shell must not be set"
        )


def _files(config: str) -> tuple[Path, Path | None]:
    """accelerate's file of a config, and the DeepSpeed file where the user names one."""
    if config in config_names():
        return CONFIGS / f"{config}.yaml", None
    if not config.endswith((".yaml", ".yml", ".json")):
        raise ValueError(
            f"--deepspeed {config}: unknown config; it is one of {', '.join(config_names())}, or a "
            ".yaml file of accelerate, or a .json file of DeepSpeed"
        )
    path = Path(config).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"--deepspeed {config}: there is no such file")
    return (CONFIGS / "zero3.yaml", path) if path.suffix == ".json" else (path, None)


def _read_accelerate_config(path: Path) -> Any:
    try:
        config: Any = load_config_from_file(str(path))
    except (AttributeError, TypeError, YAMLError) as error:
        raise ValueError(f"{path} is not a config of accelerate ({error})") from error
    kind = _distributed_type(config)
    if kind not in _ENGINES:
        raise ValueError(
            f"{path}: distributed_type {kind} is none of {', '.join(_ENGINES)}; for plain data "
            "parallelism take zero2"
        )
    if kind == "FSDP" and int(config.fsdp_config.get("fsdp_version", 1)) != 2:
        raise ValueError(f"{path}: fsdp_version must be 2; FSDP1 is not supported")
    return config


def _distributed_type(config_or_state: Any) -> str:
    kind = config_or_state.distributed_type
    return str(getattr(kind, "value", kind))


def _read_deepspeed_config(path: Path) -> tuple[int, bool]:
    """The ZeRO stage, and whether the optimizer is offloaded."""
    try:
        zero = json.loads(path.read_text())["zero_optimization"]
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        return int(zero["stage"]), offload
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a DeepSpeed config with a zero_optimization stage ({error!r})"
        ) from error


def _fitting_config(hardware: Hardware, model: DecoderSizes | None, setup: Setup) -> str:
    if hardware.gpus == 0:
        return "cpu_zero3"
    if model is None or hardware.gpu_memory is None:
        return "multi_node" if hardware.nodes > 1 else "zero3"
    processes = hardware.gpus * hardware.nodes
    names = ["multi_node"] if hardware.nodes > 1 else ["zero2", "zero3"]
    needs = []
    for name in (*names, "zero3_offload"):
        memory = training_memory(
            model, replace(setup, processes=processes, nodes=hardware.nodes, **ENGINES[name])
        )
        fits_host = memory.host <= _USABLE * (hardware.host_memory or float("inf"))
        if memory.gpu <= _USABLE * hardware.gpu_memory and fits_host:
            return name
        needs.append(f"{name} {_gb(memory.gpu)} per GPU and {_gb(memory.host)} of host memory")
    raise ValueError(
        f"the model does not fit: {'; '.join(needs)}; there are {processes} GPUs of "
        f"{_gb(hardware.gpu_memory)} and {_gb(hardware.host_memory or 0)} of host memory per node. "
        "Take more GPUs or nodes (multi_node), shorter sequences or adapters (docs/scaling.md), or "
        "name a config to try it anyway"
    )


def _gb(number: float) -> str:
    return f"{number / 1e9:.0f} GB"


def _exit_status(code: int, process: str) -> int:
    """The exit status of a shell, after a line about a process that a signal ended."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; most often memory ran out, see docs/scaling.md" if -code == signal.SIGKILL else ""
    print(f"error: {process} was ended by {name}{hint}", file=sys.stderr)
    return 128 - code
