"""Start a training command again under accelerate: one process per GPU, or 2 on the CPU.

``choose`` reads a packaged config (``benchmarks/llm/configs``) or the user's, and ``start`` starts
the processes. ``assert_engine`` checks that a process got the engine that was asked for, because
accelerate and transformers fall back to others silently.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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

from benchmarks.options import check_known
from benchmarks.places import cores
from iwsft.extras import require

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# The variable that tells a process what it was started as.
VARIABLE = "IWSFT_LAUNCH"
# The share of a GPU's memory that weights, gradients and optimizer may take; activations need some.
_STATES = 0.5
Engine = Literal["single", "deepspeed", "fsdp2"]
# accelerate's names.
_ENGINES: dict[str, Engine] = {"NO": "single", "DEEPSPEED": "deepspeed", "FSDP": "fsdp2"}
_NODES = "set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each node"
# Prints the bytes of the smallest GPU.
_LOOK_AT_GPUS = """from torch import cuda
gpus = range(cuda.device_count())
print(min(cuda.get_device_properties(gpu).total_memory for gpu in gpus))"""


@dataclass(frozen=True)
class Hardware:
    """GPUs, cores and memory in bytes of this node, and its place among the nodes.

    Every node has as many GPUs. ``address`` and ``port`` are those of node 0, as the others reach
    it.
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
            if rank not in range(nodes):
                raise ValueError(f"NODE_RANK={rank} of NNODES={nodes}")
            address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"missing or wrong: {error}; {_NODES}, as benchmarks/llm/slurm/job.sh does"
            ) from error
        return replace(node, nodes=nodes, node_rank=rank, address=address, port=port)


@dataclass(frozen=True)
class States:
    """Bytes of a model's weights, of its gradients, and of its optimizer with a moving average.

    ``offloaded`` are those that ``zero3_offload`` keeps in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    offloaded: int

    @classmethod
    def of(cls, parameters: int, trained: int, *, half: bool, lagged: bool) -> States:
        """Those of AdamW; DeepSpeed's moments and second copy of the weights are float32."""
        width = 2 if half else 4
        gradients, optimizer = width * trained, (16 if lagged else 12) * trained
        # On the host there are float32 gradients beside those in half precision.
        further = 4 * trained if half else 0
        return cls(width * parameters, gradients, optimizer, gradients + optimizer + further)


@dataclass(frozen=True)
class Launch:
    """What to start: ``config`` is a packaged config's name or the user's file.

    ``stage`` is ZeRO's, ``processes`` are those of all nodes, ``options`` those of accelerate.
    """

    config: str
    engine: Engine = "single"
    stage: int | None = None
    offload_optimizer: bool = False
    device: str = "cpu"  # or cuda
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

    def check_startable(self) -> None:
        """Check that :func:`start` can start the processes from this one."""
        if "LOCAL_RANK" in os.environ:
            raise ValueError(
                "LOCAL_RANK is set: this is one of several processes already, and --deepspeed "
                "would start more in each; run the command by plain python"
            )
        if self.engine == "deepspeed":
            require("deepspeed")


def choose(config: str | None, hardware: Hardware, states: States | None = None) -> Launch:
    """Choose what to start on this hardware, for a model of these ``states``.

    ``config`` is the name of a packaged config, an accelerate YAML file, or a DeepSpeed JSON file.
    A YAML file of the user that gives a number of processes keeps it; otherwise there is one
    process per GPU, or 2 on the CPU. None takes the config that fits, see docs/scaling.md.
    """
    config = config or _fitting_config(hardware, states)
    path, deepspeed_file = _files(config)
    settings = _read_accelerate_config(path)
    engine, zero = _ENGINES[_distributed_type(settings)], settings.deepspeed_config
    packaged, on_cpu = path.parent == CONFIGS, settings.use_cpu or hardware.gpus == 0
    stage, offload = None, False
    if engine == "deepspeed" and deepspeed_file is None and "deepspeed_config_file" in zero:
        # In packaged files the path starts at the root of the checkout.
        root = CONFIGS.parents[2] if packaged else Path()
        deepspeed_file = Path(root, zero["deepspeed_config_file"]).resolve()
    if deepspeed_file is not None:
        stage, offload = _read_deepspeed_config(deepspeed_file)
    elif engine == "deepspeed":
        stage = int(zero.get("zero_stage", 2))
        offload = zero.get("offload_optimizer_device", "none") != "none"
    if config == "multi_node" and hardware.nodes < 2:
        raise ValueError(f"{config}: there is only one node; {_NODES}, or take zero3")
    if on_cpu and (engine == "fsdp2" or (offload and not settings.use_cpu)):
        raise ValueError(f"{config} needs GPUs, and torch sees none; on the CPU use cpu_zero3")
    if packaged or settings.num_processes < 1:
        single = engine == "single"
        settings.num_machines = 1 if single else hardware.nodes
        local = 1 if single else 2 if on_cpu else hardware.gpus
        settings.num_processes = local * settings.num_machines
        settings.machine_rank = hardware.node_rank
        settings.main_process_ip, settings.main_process_port = hardware.address, hardware.port
    threads = threads_of(hardware.cores, settings.num_processes // settings.num_machines)
    return Launch(
        config=config,
        engine=engine,
        stage=stage,
        offload_optimizer=offload,
        device="cpu" if on_cpu else "cuda",
        processes=settings.num_processes,
        threads=threads,
        options=_options(path, deepspeed_file, settings),
    )


def _options(path: Path, deepspeed_file: Path | None, settings: Any) -> tuple[str, ...]:
    """The options of ``accelerate launch``, which reads all others from its file."""
    options = {
        "--config_file": path,
        "--num_processes": settings.num_processes,
        "--num_machines": settings.num_machines,
        "--machine_rank": settings.machine_rank,
        # Port 0 is any that is free.
        "--main_process_port": settings.main_process_port or 0,
        "--deepspeed_config_file": deepspeed_file,
        "--main_process_ip": settings.main_process_ip,
    }
    given = [(name, str(value)) for name, value in options.items() if value is not None]
    several = settings.num_machines > 1
    return (*itertools.chain(*given), *["--same_network"] * several)


def threads_of(cores: int, processes: int) -> int:
    """Compute the threads of each process: OMP_NUM_THREADS, or a fair share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, cores // processes)


def start(launch: Launch, module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m module ARGUMENTS`` in each process, wait, and return the exit status."""
    words = [module, *arguments]
    with patch_environment(**launch.environment()):
        if launch.engine == "single":
            done = subprocess.run([sys.executable, "-m", *words], check=False)
            return _exit_status(done.returncode, "the process")
        # Without torchrun's page about a failed process, which has printed its error itself.
        logging.disable(logging.CRITICAL)
        try:
            launch_command(
                launch_command_parser().parse_args([*launch.options, "--module", *words])
            )
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _exit_status(failure.exitcode, f"process {rank} of {launch.processes}")
        except SignalException as error:
            raise KeyboardInterrupt(int(error.sigval)) from error
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
    if launch.engine == actual["engine"] == "deepspeed":
        plugin = state.deepspeed_plugin
        actual["stage"] = int(plugin.zero_stage)
        offload = plugin.get_value("zero_optimization.offload_optimizer.device") or "none"
        actual["offload_optimizer"] = str(offload) != "none"
    if kind == "FSDP" and state.fsdp_plugin.fsdp_version != 2:
        actual["engine"] = "fsdp1"
    differ = [name for name, value in actual.items() if value != getattr(launch, name)]
    if differ:
        wanted = ", ".join(f"{name} {getattr(launch, name)}" for name in differ)
        got = ", ".join(f"{name} {actual[name]}" for name in differ)
        raise ValueError(
            f"{launch.config} asks for {wanted}, but training would run with {got}: unset the "
            "ACCELERATE_ variables of the shell"
        )


def _files(config: str) -> tuple[Path, Path | None]:
    """accelerate's file of a config, and the DeepSpeed file where the user names one."""
    if config in NAMES:
        return CONFIGS / f"{config}.yaml", None
    path = Path(config).resolve()
    if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
        raise ValueError(
            f"--deepspeed {config}: there is no such file; it is one of "
            f"{', '.join(NAMES)}, or a .yaml file of accelerate, or a .json of DeepSpeed"
        )
    return (CONFIGS / "zero3.yaml", path) if path.suffix == ".json" else (path, None)


def _read_accelerate_config(path: Path) -> Any:
    try:
        config: Any = load_config_from_file(str(path))
    except (AttributeError, TypeError, YAMLError) as error:
        raise ValueError(f"{path} is not a config of accelerate ({error})") from error
    kind = _distributed_type(config)
    check_known("distributed_type", kind, list(_ENGINES))
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
        problem = "is not a DeepSpeed config with a zero_optimization stage"
        raise ValueError(f"{path} {problem} ({error!r})") from error


def _fitting_config(hardware: Hardware, states: States | None) -> str:
    """The first config whose states leave room; without any, the first that they fit in at all."""
    if hardware.gpus == 0:
        return "cpu_zero3"
    sharded = "multi_node" if hardware.nodes > 1 else "zero3"
    if states is None or hardware.gpu_memory is None:
        return sharded
    gpus, room = hardware.gpus * hardware.nodes, hardware.gpu_memory
    trained = states.gradients + states.optimizer
    each, host = (states.weights + trained) / gpus, states.offloaded / hardware.nodes
    if hardware.nodes == 1 and states.weights + trained / gpus <= _STATES * room:
        return "zero2"
    if each <= _STATES * room:
        return sharded
    if states.weights / gpus <= room and host <= (hardware.host_memory or math.inf):
        return "zero3_offload"
    if each <= room:
        return sharded
    raise ValueError(
        f"the model does not fit: its weights, gradients and optimizer take {each / 1e9:.0f} GB on "
        f"each of {gpus} GPUs of {room / 1e9:.0f} GB, or {states.weights / gpus / 1e9:.0f} GB and "
        f"{host / 1e9:.0f} GB of each node's host memory with zero3_offload. Take more GPUs or "
        "--lora-rank, or name a config to try it anyway"
    )


def _exit_status(code: int, process: str) -> int:
    """The exit status of a shell, after a line about a process that a signal ended."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; most often memory ran out, see docs/scaling.md" if -code == signal.SIGKILL else ""
    print(f"error: {process} was ended by {name}{hint}", file=sys.stderr)
    return 128 - code
