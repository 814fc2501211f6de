"""The choice of a config for the hardware, the started commands, and refused settings."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env

from benchmarks.llm.launch import (
    CONFIGS,
    NAMES,
    Hardware,
    Launch,
    States,
    assert_engine,
    choose,
)

CPU = Hardware(gpus=0, cores=4)
NODE = Hardware(gpus=8, cores=64, gpu_memory=85 * 10**9, host_memory=10**12)
SECOND = Hardware(gpus=8, cores=64, nodes=2, node_rank=1, address="first", port=29_511)


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def started(launch: Launch) -> Any:
    """What accelerate makes of the command."""
    words = [*launch.options, "--module", "some.module", "--algo", "sft"]
    parsed = launch_command_parser().parse_args(words)
    return _validate_launch_command(parsed)[0]


def test_the_packaged_configs() -> None:
    assert (
        sorted(["single", "cpu_zero3", "zero2", "zero3", "zero3_offload", "fsdp2", "multi_node"])
        == NAMES
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_deepspeed_configs_leave_settings_of_training_to_the_arguments(name: str) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[key] == "auto"
    assert config["bf16"] == {"enabled": "auto"} and "optimizer" not in config
    zero = config["zero_optimization"]
    if zero["stage"] == 3:
        # Above 0 a moving average of the weights would go stale.
        assert zero["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize(
    ("config", "hardware", "expected"),
    [
        (None, CPU, ("cpu_zero3", "deepspeed", 3, "cpu", 2, 2)),
        (None, Hardware(gpus=4, cores=8), ("zero3", "deepspeed", 3, "cuda", 4, 2)),
        (None, SECOND, ("multi_node", "deepspeed", 3, "cuda", 16, 8)),
        ("zero2", CPU, ("zero2", "deepspeed", 2, "cpu", 2, 2)),
        ("zero2", Hardware(gpus=1, cores=8), ("zero2", "deepspeed", 2, "cuda", 1, 8)),
        ("fsdp2", NODE, ("fsdp2", "fsdp2", None, "cuda", 8, 8)),
        ("single", NODE, ("single", "single", None, "cuda", 1, 64)),
        ("single", CPU, ("single", "single", None, "cpu", 1, 4)),
        ("cpu_zero3", NODE, ("cpu_zero3", "deepspeed", 3, "cpu", 2, 32)),
    ],
)
def test_the_started_command(config: str | None, hardware: Hardware, expected: Any) -> None:
    launch = choose(config, hardware)
    found = (launch.config, launch.engine, launch.stage, launch.device, launch.processes)
    assert (*found, launch.threads) == expected
    parsed = started(launch)
    assert parsed.num_processes == launch.processes
    assert bool(parsed.use_deepspeed) == (launch.engine == "deepspeed")
    assert bool(parsed.use_fsdp) == (launch.engine == "fsdp2")
    assert parsed.module and parsed.training_script == "some.module"
    assert parsed.training_script_args == ["--algo", "sft"]
    if launch.engine == "deepspeed":
        file = json.loads(Path(parsed.deepspeed_config_file).read_text())
        assert file["zero_optimization"]["stage"] == launch.stage
    if launch.engine == "fsdp2":
        assert int(parsed.fsdp_version) == 2
    hidden = launch.environment().get("CUDA_VISIBLE_DEVICES")
    assert hidden == ("" if launch.device == "cpu" else None)


def test_fsdp2_is_what_accelerate_reads_from_its_config() -> None:
    parsed = started(choose("fsdp2", NODE))
    with patch_environment(**prepare_multi_gpu_env(parsed)):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is not None
    assert "SHARDED" in str(plugin.state_dict_type)


def test_a_node_of_several_gets_its_rank() -> None:
    parsed = started(choose("multi_node", SECOND))
    assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, 1)
    assert (parsed.main_process_ip, parsed.main_process_port) == ("first", 29_511)
    assert parsed.deepspeed_multinode_launcher == "standard"
    assert parsed.same_network and parsed.rdzv_backend == "static"


@pytest.mark.parametrize(
    ("parameters", "own", "expected"),
    [
        (5e8, {}, "zero2"),
        (7.6e9, {}, "zero2"),
        (14e9, {}, "zero3"),
        # The paper's run.
        (32.8e9, {}, "zero3_offload"),
        (32.8e9, {"gpu_memory": 141 * 10**9}, "zero3"),
        (32.8e9, {"nodes": 2}, "multi_node"),
        # The host cannot hold the optimizer, and the GPUs just can.
        (32.8e9, {"host_memory": 256 * 10**9}, "zero3"),
        # It takes 18 bytes a parameter, float32 gradients included.
        (32.8e9, {"host_memory": 580 * 10**9}, "zero3"),
        (32.8e9, {"host_memory": 600 * 10**9}, "zero3_offload"),
    ],
)
def test_the_first_config_that_the_model_fits_in(
    parameters: float, own: dict[str, int], expected: str
) -> None:
    states = States.of(int(parameters), int(parameters), half=True, lagged=False)
    assert choose(None, replace(NODE, **own), states).config == expected


def test_adapters_and_the_moving_average_count() -> None:
    adapters = States.of(10, 0, half=True, lagged=True)
    assert (adapters.weights, adapters.gradients, adapters.optimizer) == (20, 0, 0)
    average = States.of(10, 10, half=False, lagged=True)
    assert (average.weights, average.gradients, average.optimizer) == (40, 40, 160)


def test_a_model_that_fits_nowhere_is_refused_with_figures() -> None:
    states = States.of(32 * 10**9, 32 * 10**9, half=True, lagged=False)
    small = Hardware(gpus=8, cores=64, gpu_memory=24 * 10**9, host_memory=256 * 10**9)
    said = "take 64 GB on each of 8 GPUs of 24 GB, or 8 GB and 576 GB of each node's host memory"
    with pytest.raises(ValueError, match=said):
        choose(None, small, states)
    # Asked for by name, it is tried.
    assert choose("zero3", small, states).config == "zero3"


def test_own_files(tmp_path: Path) -> None:
    deepspeed = tmp_path / "mine.json"
    deepspeed.write_text('{"zero_optimization": {"stage": 1}}')
    launch = choose(str(deepspeed), NODE)
    assert (launch.stage, launch.processes, launch.config) == (1, 8, str(deepspeed))
    assert started(launch).deepspeed_config_file == str(deepspeed)

    accelerate = tmp_path / "mine.yaml"
    accelerate.write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 3\nnum_machines: 1\n"
        f"deepspeed_config: {{deepspeed_config_file: {deepspeed}}}\n"
    )
    launch = choose(str(accelerate), NODE)
    assert (launch.stage, launch.processes, launch.threads) == (1, 3, 21)
    accelerate.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n")
    launch = choose(str(accelerate), NODE)
    assert (launch.stage, launch.processes) == (3, 8)
    assert started(launch).zero_stage == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("distributed_type: MULTI_GPU\nnum_processes: 2\n", "unknown distributed_type"),
        ("distributed_type: DEEPSPEED\nno_such_key: 1\n", "no_such_key"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n", "FSDP1 is not supported"),
        ("[", "not a config of accelerate"),
        ("", "not a config of accelerate"),
    ],
)
def test_own_files_that_cannot_be_used(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        choose(str(path), NODE)


@pytest.mark.parametrize("content", ["{", "{}", '{"zero_optimization": 3}', "[]"])
def test_a_deepspeed_file_without_a_stage(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a DeepSpeed config with a zero_optimization stage"):
        choose(str(path), NODE)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("zero4", "one of cpu_zero3, fsdp2, multi_node, single, zero2"),
        ("no/such.yaml", "no such file"),
        ("fsdp2", "needs GPUs.*use cpu_zero3"),
        ("zero3_offload", "needs GPUs.*use cpu_zero3"),
        ("multi_node", "only one node.*NNODES, NODE_RANK, MASTER_ADDR"),
    ],
)
def test_configs_that_the_hardware_cannot_run(config: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose(config, CPU)


def test_hardware_reads_its_place_from_the_environment() -> None:
    assert Hardware.here({}).nodes == 1
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29511"}
    found = Hardware.here(place)
    assert (found.nodes, found.node_rank, found.address, found.port) == (2, 1, "first", 29_511)
    assert found.cores >= 1
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(ValueError, match=f"missing or wrong: '{name}'"):
            Hardware.here({key: value for key, value in place.items() if key != name})
    for wrong in ({"NNODES": "two"}, {"NNODES": "0"}, {**place, "NODE_RANK": "2"}):
        with pytest.raises(ValueError, match="missing or wrong"):
            Hardware.here(wrong)


def accelerator(kind: str, processes: int, **state: Any) -> Any:
    """What accelerate tells of itself."""
    return SimpleNamespace(
        state=SimpleNamespace(distributed_type=SimpleNamespace(value=kind), **state),
        num_processes=processes,
        device=SimpleNamespace(type="cpu"),
    )


def test_a_silent_fallback_is_an_error() -> None:
    launch = choose("cpu_zero3", CPU)
    # As accelerate does with ACCELERATE_USE_CPU, and without use_cpu.
    with pytest.raises(
        ValueError, match="asks for engine deepspeed, but .* engine MULTI_CPU.*ACCELERATE_"
    ):
        assert_engine(accelerator("MULTI_CPU", 2), launch)
    with pytest.raises(ValueError, match="processes 2, but .* processes 1"):
        assert_engine(accelerator("NO", 1), launch)
    fsdp = choose("fsdp2", Hardware(gpus=2, cores=2))
    plugin = SimpleNamespace(fsdp_version=1)
    with pytest.raises(ValueError, match="engine fsdp1, device cpu"):
        assert_engine(accelerator("FSDP", 2, fsdp_plugin=plugin), fsdp)


def test_the_slurm_script_is_sound_and_names_what_exists() -> None:
    script = CONFIGS.parent / "slurm" / "job.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        assert re.search(rf"\b{name}=", text)
    (config,) = re.findall(r"--deepspeed (\w+)", text)
    assert config in NAMES
