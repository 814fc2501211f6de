"""Configs of accelerate and DeepSpeed, packaged and users', as one description of what to start."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError  # type: ignore[import-untyped]

from benchmarks.llm.hardware import Hardware

CONFIGS = Path(__file__).parent / "configs"
CPU_PROCESSES = 2
# The variable that tells a process what it was started as.
VARIABLE = "IWSFT_LAUNCH"
Device = Literal["cpu", "cuda"]
Engine = Literal["single", "deepspeed", "fsdp2"]
# accelerate's names.
ENGINES: dict[str, Engine] = {"NO": "single", "DEEPSPEED": "deepspeed", "FSDP": "fsdp2"}


@dataclass(frozen=True)
class Launch:
    """What to start.

    Attributes:
        config: name of a packaged config, or the user's file.
        file: accelerate's YAML file.
        deepspeed_file: DeepSpeed's JSON file.
        engine: what trains.
        stage: of ZeRO.
        offload_optimizer: whether the optimizer is in host memory.
        device: that processes compute on.
        processes: of all nodes.
        nodes: that hold as many processes each.
        node_rank: of this one.
        address: of node 0.
        port: on it.
        threads: of a process on the CPU.
    """

    config: str
    file: str
    deepspeed_file: str | None
    engine: Engine
    stage: int | None
    offload_optimizer: bool
    device: Device
    processes: int
    nodes: int = 1
    node_rank: int = 0
    address: str | None = None
    port: int | None = None
    threads: int = 1

    def command(self, module: str, arguments: Sequence[str]) -> list[str]:
        """Arguments of ``accelerate launch`` that start ``python -m module ARGUMENTS``."""
        options = {
            "--config_file": self.file,
            "--num_processes": self.processes,
            "--num_machines": self.nodes,
            "--machine_rank": self.node_rank,
            # 0: any that is free.
            "--main_process_port": self.port or 0,
            "--num_cpu_threads_per_process": self.threads,
        }
        flags = []
        if self.deepspeed_file is not None:
            options["--deepspeed_config_file"] = self.deepspeed_file
        if self.nodes > 1:
            options["--main_process_ip"] = str(self.address)
            flags = ["--same_network"]
        words = [str(word) for pair in options.items() for word in pair]
        return [*words, *flags, "--module", module, *arguments]

    def environment(self) -> dict[str, str]:
        """Variables of the processes, beside those of this one."""
        found = {VARIABLE: json.dumps(asdict(self)), "OMP_NUM_THREADS": str(self.threads)}
        if self.device == "cpu":
            # DeepSpeed and torch would find the GPUs of a machine that has some.
            found |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return found


def names() -> list[str]:
    """The packaged configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read(config: str, hardware: Hardware) -> Launch:
    """What a config means on this hardware.

    Args:
        config: name of a packaged config, an accelerate YAML file or a DeepSpeed JSON file. A YAML
            file of the user that says how many processes there are keeps its own number; otherwise
            there is one a GPU, or 2 on the CPU.
        hardware: of this node.

    Raises:
        ValueError: an unknown config, or one that can't be used.
        FileNotFoundError: no such file.
    """
    path = CONFIGS / f"{config}.yaml"
    if config in names():
        found = replace(_accelerate(path), config=config)
        return _placed(found, hardware)
    if not config.endswith((".yaml", ".yml", ".json")):
        raise ValueError(
            f"--deepspeed {config}: unknown config; it is one of {', '.join(names())}, or a .yaml "
            "file of accelerate, or a .json file of DeepSpeed"
        )
    path = Path(config).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"--deepspeed {config}: there is no such file")
    if path.suffix == ".json":
        found = _with_deepspeed(_accelerate(CONFIGS / "zero3.yaml"), path)
        return _placed(replace(found, config=config), hardware)
    found = replace(_accelerate(path), config=config)
    if found.processes < 1:
        return _placed(found, hardware)
    return replace(found, threads=_threads(hardware, found.processes // found.nodes))


def _placed(found: Launch, hardware: Hardware) -> Launch:
    """A process a GPU of every node, or a few on the CPU."""
    on_cpu = found.device == "cpu" or hardware.gpus == 0
    local = CPU_PROCESSES if on_cpu else hardware.gpus
    threads = _threads(hardware, local)
    if found.engine == "single":
        threads = _threads(hardware, 1)
        return replace(found, processes=1, device="cpu" if on_cpu else "cuda", threads=threads)
    return replace(
        found,
        processes=local * hardware.nodes,
        nodes=hardware.nodes,
        node_rank=hardware.node_rank,
        address=hardware.address,
        port=hardware.port,
        threads=threads,
    )


def _threads(hardware: Hardware, processes: int) -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else max(1, hardware.cores // processes)


def _accelerate(path: Path) -> Launch:
    """An accelerate config as it stands."""
    from accelerate.commands.config.config_args import (  # type: ignore[import-untyped]
        load_config_from_file,
    )

    try:
        config: Any = load_config_from_file(str(path))
    except (AttributeError, TypeError, YAMLError) as error:
        raise ValueError(f"{path} is no config of accelerate ({error})") from error
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    if kind not in ENGINES:
        raise ValueError(
            f"{path}: distributed_type {kind} is none of {', '.join(ENGINES)}; for plain data "
            "parallelism take zero2"
        )
    if kind == "FSDP" and int(config.fsdp_config.get("fsdp_version", 1)) != 2:
        raise ValueError(f"{path}: fsdp_version must be 2; FSDP1 is not supported")
    found = Launch(
        config=str(path),
        file=str(path),
        deepspeed_file=None,
        engine=ENGINES[kind],
        stage=None,
        offload_optimizer=False,
        device="cpu" if config.use_cpu else "cuda",
        processes=config.num_processes,
        nodes=config.num_machines,
        node_rank=config.machine_rank,
        address=config.main_process_ip,
        port=config.main_process_port,
    )
    if kind != "DEEPSPEED":
        return found
    plugin = config.deepspeed_config
    file = plugin.get("deepspeed_config_file")
    if file is not None:
        # In the packaged ones the path is that of who stands in the root of the checkout.
        return _with_deepspeed(found, CONFIGS / Path(file).name if path.parent == CONFIGS else file)
    offload = str(plugin.get("offload_optimizer_device", "none")) != "none"
    return replace(found, stage=int(plugin.get("zero_stage", 2)), offload_optimizer=offload)


def _with_deepspeed(found: Launch, file: str | Path) -> Launch:
    path = Path(file).resolve()
    try:
        zero = json.loads(path.read_text())["zero_optimization"]
        stage = int(zero["stage"])
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no DeepSpeed config with a zero_optimization stage ({error!r})"
        ) from error
    return replace(found, deepspeed_file=str(path), stage=stage, offload_optimizer=offload)
