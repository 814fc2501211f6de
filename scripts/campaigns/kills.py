"""Kills of commands and of the trainer at any moment: what resumes equals an unbroken run."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks import stopping
from benchmarks.collect.__main__ import main as collect_main
from benchmarks.collect.options import Options as CollectOptions
from benchmarks.d4rl.__main__ import main as control_main
from benchmarks.d4rl.options import Options as ControlOptions
from scripts.campaigns.engine import LIMIT, Campaign, Child, Finding, differences, start

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Exit codes of a command that a signal ended: by itself, or in the way of the shell.
ENDED = {0, 130, 143, *(-how for how in SIGNALS)}
CONTROL_MODULES = (
    "benchmarks.collect.sac",
    "benchmarks.d4rl.job",
    "gymnasium.envs.mujoco",
)
LANGUAGE_MODULES = ("iwsft.language.trainer", "transformers.models.qwen2.modeling_qwen2")
COMMAND_MODULES = (*LANGUAGE_MODULES, "benchmarks.llm.job", "benchmarks.report.language")
# A job runs in the current folder, and with True it continues what is there.
Job = Callable[[bool], None]


def killed(job: Job, whole: Path, random: Random, *, command: bool) -> Iterator[Finding]:
    """Kill a job up to four times, let it end, and compare its folder with an unbroken one's.

    Args:
        job: The job.
        whole: Folder of the unbroken job, with its duration in the file ``seconds``.
        random: Source of the moments and of the signals.
        command: Whether the job is a command, which ends in one line and not in a traceback.
    """
    seconds = whole.with_name(f"{whole.name}.seconds")
    duration = float(seconds.read_text())
    log = Path("..") / f"{Path.cwd().name}.log"
    for attempt in range(random.randint(1, 4)):
        log.unlink(missing_ok=True)
        began, child = time.monotonic(), start(lambda: job(True), log)
        if child.wait(random.uniform(0, duration)) is None:
            how, sent = random.choice(SIGNALS), time.monotonic()
            child.end(how)
            yield "tried", ""
            code = child.wait(LIMIT / 2)
            if command and code == 0 and time.monotonic() - sent > 1:
                yield "silent", f"{how.name} is ignored"
            if code is None:
                yield "hang", f"{how.name} did not end it: {_stacks(child)}"
            yield from _ending(how, code, log.read_text(), command)
        elif child.code != 0:
            yield "lost", f"resumed, it ends with {child.code}: {_tail(log)}"
            return
        else:
            if attempt == 0:
                # The machine has become faster.
                seconds.write_text(str(time.monotonic() - began))
            break
    log.unlink(missing_ok=True)
    began, child = time.monotonic(), start(lambda: job(True), log)
    if child.wait(LIMIT / 2) is None:
        yield "hang", f"resumed, it does not end: {_stacks(child)}"
        return
    if child.code != 0:
        yield "lost", f"resumed, it ends with {child.code}: {_tail(log)}"
        return
    # Or slower.
    seconds.write_text(str(max(float(seconds.read_text()), time.monotonic() - began)))
    differing = differences(whole, Path.cwd())
    if differing:
        yield "different", ", ".join(differing)
    log.unlink()


def _ending(how: signal.Signals, code: int | None, said: str, command: bool) -> Iterator[Finding]:
    if how == signal.SIGKILL or code is None:
        return
    if command and ("Traceback" in said or code not in ENDED):
        yield "obscure", f"{how.name} ends in {code}: {said.strip()[-300:]}"
    if not command and how == signal.SIGINT and code == 1 and "KeyboardInterrupt" not in said:
        yield "obscure", f"{how.name} becomes another error: {said.strip()[-300:]}"


def _stacks(child: Child) -> str:
    """Kill a process that hangs, and return what its threads do."""
    child.end(signal.SIGUSR1)
    child.wait(1)
    child.end(signal.SIGKILL)
    child.wait(None)
    return child.log.read_text()


def _tail(log: Path) -> str:
    return log.read_text().strip()[-300:]


def unbroken(job: Job, folder: Path) -> None:
    """Run a job from its start to its end, and write down how long it takes in a fork of this.

    The forks of a process that ran it once need not load anything.

    Raises:
        RuntimeError: A second run differs.
    """
    folder.mkdir()
    os.chdir(folder)
    job(False)
    again = folder.with_name(f"{folder.name}.again")
    again.mkdir()
    os.chdir(again)
    began = time.monotonic()
    child = start(lambda: job(False), folder.with_name(f"{folder.name}.log"))
    child.wait(None)
    folder.with_name(f"{folder.name}.seconds").write_text(str(time.monotonic() - began))
    differing = differences(folder, again)
    if child.code or differing:
        raise RuntimeError(
            f"{folder.name} differs without a kill: {differing}, "
            f"it ends with {child.code}: {_tail(child.log)}"
        )


def campaign(
    name: str,
    make: Callable[[str, Path], Job],
    kinds: Iterable[str],
    warm: tuple[str, ...],
    *,
    command: bool = True,
    write: Callable[[Path], None] = lambda _: None,
) -> Campaign:
    """A campaign that kills one of some jobs in each case.

    Args:
        name: Name of the campaign.
        make: Function from the name of a job and the folder of the jobs' inputs to the job.
        kinds: Names of the jobs.
        warm: Modules that are loaded before.
        command: Whether the jobs are commands.
        write: Function that writes the inputs.
    """

    def prepare(shared: Path) -> None:
        write(shared)
        for kind in kinds:
            unbroken(make(kind, shared), shared / kind)

    def case(shared: Path, random: Random, folder: Path) -> Iterator[Finding]:
        kind = random.choice([*kinds])
        yield from killed(make(kind, shared), shared / kind, random, command=command)

    return Campaign(name, case, prepare, warm)


# ---- the control command

ALGORITHMS = ("bc", "iw-sft-q", "iw-sft-step", "iw-sft", "iql", "td3-bc", "cql")


def _control(algo: str, shared: Path) -> Job:
    def job(resume: bool) -> None:
        stopping.watch()
        control_main(
            ControlOptions(
                algo=(algo,),
                dataset=(str(shared / "data.hdf5"),),
                steps=12,
                reference_steps=6,
                eval_episodes=1,
                curve_episodes=1,
                jobs=1,
                # Of whole trajectories and a moving average, in half of the cases.
                estimator="trajectories" if algo == "iw-sft" else "steps",
                out=Path("runs"),
                resume=resume,
            )
        )

    return job


def write_steps(shared: Path, episodes: int = 30) -> None:
    """Write ``data.hdf5``, some episodes of Hopper with random actions."""
    random: dict[str, Any] = {"policy": ("random",), "env": "Hopper-v4", "episodes": (episodes,)}
    collect_main(CollectOptions(out=str(shared / "data.hdf5"), **random))


# ---- collect


COLLECTED: dict[str, dict[str, Any]] = {
    kind: {"out": out, "policy": ("random",), "env": "Hopper-v4", "episodes": (60,)}
    for kind, out in (("random", "out.hdf5"), ("minari", "minari:made/set-v0"))
}
COLLECTED["sac"] = {"out": "out.hdf5", "online": "sac", "env": "InvertedPendulum-v4"}
COLLECTED["sac"] |= {"steps": (120,), "random_steps": 90}


def _collect(kind: str, _: Path) -> Job:
    def job(resume: bool) -> None:
        stopping.watch()
        os.environ["MINARI_DATASETS_PATH"] = str(Path.cwd())
        collect_main(CollectOptions(part_steps=30, resume=resume, **COLLECTED[kind]))

    return job


# ---- the language command

LANGUAGE_ALGORITHMS = ("sft", "iw-sft", "iw-sft-hard", "iw-sft-ema", "iw-sft-step")


def _language(algo: str, shared: Path) -> Job:
    from benchmarks.llm.__main__ import run
    from benchmarks.llm.recipes import RECIPES

    def job(_: bool) -> None:
        torch.set_num_threads(1)
        gc.freeze()
        RECIPES["small"] = "tests.benchmarks.llm.small_job"
        files = ["--model", str(shared / "model"), "--data", str(shared / "rows.jsonl")]
        words = ["--recipe", "small", "--algo", algo, "--seeds", "0", "--jobs", "1", *files]
        # The card of the model has the command; it is the same with and without a kill.
        words += ["--max-steps", "6", "--save-every", "1", "--out", "runs", "--resume"]
        words += ["--sync-every", "4"] if algo == "iw-sft-hard" else []
        sys.argv = ["llm", *words]
        run()

    return job


def _write_language(shared: Path) -> None:
    from tests.benchmarks.llm import small_job

    small_job.write(shared)


# ---- the loop

LOOPS = {
    "last": ("--algo", "iw-sft", "--keep-rounds", "1"),
    "base": ("--algo", "iw-sft", "--start-from", "base"),
    "sft": ("--algo", "sft"),
}


def _loop(kind: str, shared: Path) -> Job:
    from benchmarks.llm.__main__ import run

    def job(_: bool) -> None:
        torch.set_num_threads(1)
        gc.freeze()
        files = {"model": "model", "prompts": "prompts.jsonl", "eval-prompts": "held-out.jsonl"}
        words = [word for name, file in files.items() for word in (f"--{name}", str(shared / file))]
        words += ["--verifier", "integer", "--rounds", "2", "--samples-per-prompt", "4"]
        words += ["--max-tokens", "40", "--sampling-batch", "8", "--batch-size", "4"]
        words += ["--epochs", "1", "--save-every", "1", "--no-stop-early", "--resume"]
        sys.argv = ["llm", "loop", *words, *LOOPS[kind]]
        run()

    return job


CONTROL_LOOPS = {
    "replay": ("--keep-rounds", "1"),
    "cloned": ("--algo", "iw-sft", "--reference-steps", "6"),
}


def _control_loop(kind: str, shared: Path) -> Job:
    from benchmarks.d4rl.__main__ import run

    def job(_: bool) -> None:
        words = ["--start", f"bc:{shared / 'data.hdf5'}", "--start-steps", "6", "--rounds", "2"]
        words += ["--episodes-per-round", "40", "--max-episode-steps", "12", "--steps", "6"]
        sys.argv = ["d4rl", "loop", *words, "--eval-episodes", "2", "--resume"]
        sys.argv += CONTROL_LOOPS[kind]
        run()

    return job


def _write_loop(shared: Path) -> None:
    from benchmarks.llm.recipes.arithmetic.task import problems

    _write_language(shared)
    prompts, held_out = problems(20, 1, "train"), problems(6, 1, "held-out")
    for name, asked in (("prompts", prompts), ("held-out", held_out)):
        rows = [{"prompt": each.prompt, "answer": str(each.answer)} for each in asked]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (shared / f"{name}.jsonl").write_text(text)


# ---- the language trainer

PROPOSALS: dict[str, dict[str, Any]] = {
    "current": {"proposal": "current"},
    "cached": {"proposal": "cached", "sync_every": 3},
    "lagged": {"proposal": "lagged", "ema_decay": 0.7},
}


def _trainer(proposal: str, _: Path) -> Job:
    from tests.language import tiny

    def job(resume: bool) -> None:
        torch.set_num_threads(1)
        # The trainer collects garbage; without what is loaded already this takes no time.
        gc.freeze()
        output = Path("..") / f"{Path.cwd().name}.trainer"
        saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
        model = tiny.model()
        run = tiny.trainer(output, model=model, max_steps=10, **saved, **PROPOSALS[proposal])
        there = any(output.glob("checkpoint-*"))
        run.train(resume_from_checkpoint=True if resume and there else None)
        rows = [row for row in run.state.log_history if "loss" in row]
        torch.save({"rows": rows, "model": model.state_dict()}, "outcome.pt")

    return job


CAMPAIGNS = (
    campaign("control killed", _control, ALGORITHMS, CONTROL_MODULES, write=write_steps),
    campaign("collect killed", _collect, COLLECTED, CONTROL_MODULES),
    campaign(
        "language killed", _language, LANGUAGE_ALGORITHMS, COMMAND_MODULES, write=_write_language
    ),
    campaign(
        "loop killed",
        _loop,
        LOOPS,
        (*COMMAND_MODULES, "benchmarks.llm.loop.job"),
        write=_write_loop,
    ),
    campaign(
        "control loop killed",
        _control_loop,
        CONTROL_LOOPS,
        (*CONTROL_MODULES, "benchmarks.d4rl.loop"),
        write=write_steps,
    ),
    campaign("trainer killed", _trainer, PROPOSALS, LANGUAGE_MODULES, command=False),
)
