"""The command lines: names, help, hints, and config files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import COMMANDS, program, typed
from benchmarks.d4rl.options import Options
from benchmarks.d4rl.run import Run, options_of
from benchmarks.llm.options import parse as language
from benchmarks.llm.options import to_file
from benchmarks.options import parse
from iwsft import __version__

WORDS = ["--algo", "iw-sft-q", "iql", "--seeds", "3", "4", "--target-ess", "0.4", "--video"]
WORDS += ["--baseline-steps", "7", "--variant", "ess"]
LANGUAGE = ("base", "sft", "iw-sft", "iw-sft-ema", "iw-sft-step")
CHAT = "--recipe chat --model m --data d --eval-share 0.2 --lora-rank 8 --batch-size 2"


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Call a command; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bin/iwsft", *words])
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_name_of_the_command_and_real_defaults(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: iwsft {command}" in text
    for unclear in ("None", "default: )", "recipe: )", "benchmarks.l", "benchmarks.d"):
        assert unclear not in text
    # Those that the command sets itself can't be given.
    own = [word for word in COMMANDS[command].words if word.startswith("--")]
    assert not [word for word in own if word in text]


def test_the_list_of_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ((), ("-h",)):
        assert call(monkeypatch, *words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in COMMANDS)
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"iwsft {__version__}\n"
    assert call(monkeypatch, "reprot") == 2
    assert "unknown command 'reprot'; did you mean 'report'?" in capsys.readouterr().err


WRONG = {
    "d4rl --steps abc": "--max-steps/--steps abc: it takes INT; see iwsft d4rl --help",
    "d4rl --seeds 0 a": "--seeds 0 a: it takes INT [INT ...]; see",
    "d4rl --eval-episodes 1.5": "--eval-episodes 1.5: it takes INT; see",
    "d4rl --q autoo": "invalid choice 'autoo' for argument '--q'. Expected one of ('auto'); see",
    "d4rl --seeds 0 --seeds=1": "--seeds is given twice: pass one of them",
    "d4rl --steps 5 --max-steps 4": "--steps and --max-steps are one: pass one of them",
    "d4rl --resume --no-resume": "--resume and --no-resume are one: pass one of them",
    "d4rl --dataset nowhere.hdf5": "there is no file nowhere.hdf5",
    "d4rl --dataset door-human+no.hdf5": "there is no file no.hdf5",
    "d4rl --preset foo": "invalid choice 'foo' for argument '--preset'. Expected one of ('paper'",
    "d4rl --resume yes": "Unrecognized options: yes; see iwsft d4rl --help",
    "d4rl extra": "Unrecognized options: extra; see iwsft d4rl --help",
    "d4rl a.hdf5": "Unrecognized options: a.hdf5; pass it as --dataset a.hdf5; see",
    "d4rl --episodes 3": "Unrecognized options: --episodes, 3; Perhaps you meant: --curve-episodes",
    "d4rl --algo sftq": "unknown algorithm 'sftq'; did you mean 'sft-q'?",
    "d4rl --steps 0": "--steps 0: at least 1",
    "d4rl --report-to wandbb": "unknown tracker 'wandbb'; did you mean 'wandb'?",
    "d4rl --algo topr --alpha 0.9": "--alpha 0.9 changes nothing in topr",
    "d4rl --algo topr --top 20": "--top 20.0 changes nothing in topr",
    "d4rl --algo psft --temperature 2": "--temperature 2.0 changes nothing in psft",
    "d4rl --algo minor-sft --temperature 0": "--temperature 0: minor-sft needs one above 0",
    "d4rl --algo minor-sft --q auto": "--q auto changes nothing in minor-sft",
    "d4rl --algo minor-sft --target-ess 0.5": "--target-ess 0.5 changes nothing in minor-sft",
    "d4rl loop": "Missing from iwsft d4rl loop: --start FOLDER|bc:DATASET; see iwsft d4rl loop",
    "d4rl loop --start x --algo bc": "unknown algorithm 'bc'; it is one of sft, sft-q",
    "llm --step-clip 1": "Missing value for argument '--step-clip'. Expected 2 values",
    "llm --recipe gsm8k --algo sftq": "unknown algorithm 'sftq'",
    "llm --self-normalize yes": "Unrecognized options: yes; see iwsft llm --help",
    "llm --config nowhere.yaml": "No such file or directory: nowhere.yaml",
    "llm --recipe": "Missing value for argument '--recipe'",
    "llm --step-clip 1 a": "--step-clip 1 a: it takes FLOAT FLOAT; see",
    "llm --algo nft --nft-epsilon 2": "--nft-epsilon 2.0: at most 1",
    "finetune --model m": "--data is missing",
    "finetune --model m --data nowhere.jsonl": "there is no file nowhere.jsonl",
    "finetune --lr 1 r.jsonl": "Unrecognized options: r.jsonl; pass it as --data r.jsonl; see",
    "finetune --recipe gsm8k": "this command sets --recipe itself: leave it out",
    "evaluate": "Missing from iwsft evaluate: --model ID|DIR; see iwsft evaluate --help",
    "evaluate --model m --tasks gsm8k=no.jsonl": "there is no file no.jsonl",
    "evaluate --model m --n 0": "--n 0: at least 1",
    "evaluate --model m --backend vllm": "vllm is not installed",
    "loop": "Missing from iwsft loop: --model ID|DIR, --prompts ID|FILE, --verifier NAME|MODULE:F",
    "loop --model m --prompts p --verifier json:gone": "json:gone does not load (module 'json'",
    "loop --model m --prompts p --verifier integral": "unknown verifier 'integral'; did you mean",
    "collect --out a.hdf5": "give either --policy",
    "collect --out a.hdf5 --policy no.npz --steps 5": "there is no file no.npz",
    "weights nowhere": "there is no nowhere/config.json; a run is OUT/d4rl/",
    "weights --model ./m --base b --data c": "there is no model folder ./m",
    "speed": "Missing from iwsft speed: {control,baselines,language,scaling,gpu}; see iwsft",
    "speed contrl": "invalid choice 'contrl' for argument 'Options.subject'. Expected one of (",
    "speed control --repeats 0": "--repeats 0: at least 1",
    "speed control a.hdf5": "Unrecognized options: a.hdf5; see iwsft speed --help",
    "report": "Missing from iwsft report: PATH; see iwsft report --help",
    "bandit --lr nan": "--lr nan: a finite number above 0",
}


def test_a_wrong_command_line_is_told_in_a_line_before_anything_heavy_is_imported() -> None:
    """So is the help."""
    code = f"""
import sys
from benchmarks.__main__ import main
for words in {[*WRONG, *(f"{command} --help" for command in COMMANDS)]}:
    sys.argv = ["iwsft", *words.split()]
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
print({{"torch", "numpy", "scipy", "matplotlib", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr
    lines = done.stderr.splitlines()
    for (words, message), line in zip(WRONG.items(), lines, strict=True):
        assert line.startswith(f"error: {message}"), words


@pytest.mark.parametrize("option", ["--dataset", "--pretrain-dataset"])
def test_an_unknown_dataset_is_told_before_a_job_is_imported(option: str) -> None:
    code = f"""
import sys
from benchmarks.__main__ import main
sys.argv = ["iwsft", "d4rl", "{option}", "door-human+hoper-replay"]
try:
    main()
except SystemExit as end:
    print(end.code)
print({{"torchrl", "matplotlib", "scipy", "gymnasium"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("error: unknown dataset 'hoper-replay'; did you mean 'hopper-")
    assert done.stdout.endswith("set()\n"), done.stderr


def test_a_folder_that_is_taken_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """The base of a job is taken as it is, and ``--resume`` continues what is there."""
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "mine.hdf5").touch()
    asked = f"--model {tmp_path} --out {tmp_path}/out"
    control = f"d4rl --seeds 0 1 --out {tmp_path}/out --dataset {tmp_path}/mine.hdf5"
    rows = f"--data {tmp_path}/rows.jsonl"
    loop = f"--out {tmp_path}/out --model {tmp_path} --prompts {tmp_path}/rows.jsonl"
    pretrained = "d4rl/lab-x-v0--to--mine/iw-sft-q/seed-0"
    commands = {
        f"finetune {rows} {asked} --algo sft dft --seeds 0 1": "llm/chat/dft/seed-1",
        f"evaluate --tasks gsm8k={tmp_path}/rows.jsonl {asked}": f"{tmp_path.name}/gsm8k",
        f"loop --verifier math {loop}": "",
        f"d4rl loop --start bc:hopper-replay-mini --out {tmp_path}/out": "",
        control: "d4rl/mine/iw-sft-q/seed-1",
        f"{control} --variant k0 --pretrain-dataset lab/x-v0": f"k0/{pretrained}",
    }
    code = f"""
import sys
from benchmarks.__main__ import main
for words in {[*commands]}:
    sys.argv = ["iwsft", *words.split()]
    try:
        main()
    except SystemExit as end:
        print(end.code, file=sys.stderr)
print({{"torch", "numpy", "transformers"}} & set(sys.modules))
"""
    for folder in ("llm/chat/base/seed-0", *commands.values()):
        (taken := tmp_path / "out" / folder).mkdir(parents=True, exist_ok=True)
        (taken / "config.json").touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    for folder, line in zip(commands.values(), done.stderr.splitlines(), strict=True):
        kind = "run" if folder else "loop"
        assert line.startswith(f"error: {tmp_path / 'out' / folder}: a {kind} is there already")


@pytest.mark.parametrize("columns", ["60", "300"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_missing_options_are_told_without_their_help(columns: str, encoding: str) -> None:
    """Whatever the terminal, which tyro writes for."""
    env = os.environ | {"COLUMNS": columns, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "benchmarks", "loop", "--model", "m", "--rond", "2"]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    prog = "iwsft loop"
    needed = "--prompts ID|FILE, --verifier NAME|MODULE:FUNCTION"
    wrong = f"Missing from {prog}: {needed}; Unrecognized options: --rond 2; see {prog} --help"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {wrong}\n")


def test_a_file_without_an_option_is_told_where_other_options_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "loop", "rows.jsonl") == 2
    assert "pass it as --prompts rows.jsonl; see iwsft loop --help" in capsys.readouterr().err


def test_a_wrong_value_in_a_config_file_is_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, "learning-rate: fast")
    with pytest.raises(SystemExit):
        language(["--config", path])
    error = capsys.readouterr().err
    assert "--lr/--learning-rate fast: it takes FLOAT" in error
    assert f"(with the options of {path})" in error


@pytest.mark.parametrize(("word", "value"), [("", True), ("no-", False)])
def test_switches_of_a_recipe_are_flags(word: str, value: bool) -> None:
    settings = language(["--algo", "iw-sft", f"--{word}length-normalize"]).settings
    assert settings.length_normalize is value


def test_fine_tuning_refuses_the_config_of_another_recipe(tmp_path: Path) -> None:
    path = config(tmp_path, "recipe: gsm8k")
    with pytest.raises(ValueError, match="run.yaml has --recipe gsm8k; `iwsft llm` takes it"):
        language(["--recipe", "chat", "--config", path], command="llm --recipe chat")


def config(folder: Path, text: str, name: str = "run.yaml") -> str:
    """Write a config file; its path."""
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_command_line_overrides_a_config_file(tmp_path: Path) -> None:
    text = "algo: [sft-q, iw-sft-q]\nseeds: [1, 2]\nsteps: 5\nalpha: 1e-1\nresume: yes\ntop: null\n"
    path = config(tmp_path, text)
    read = parse(Options, "d4rl", None, ["--config", path])
    own = Options(algo=("sft-q", "iw-sft-q"), seeds=(1, 2), steps=5, alpha=0.1, resume=True)
    assert read == own
    words = ["--seeds", "0", f"--config={path}", "--no-resume", "--eval-episodes", "9"]
    changed = parse(Options, "d4rl", None, words)
    assert changed == replace(own, seeds=(0,), resume=False, eval_episodes=9)


def test_a_config_file_takes_all_names_of_an_option(tmp_path: Path) -> None:
    path = config(tmp_path, "max-steps: 5\n")
    assert parse(Options, "d4rl", None, ["--config", path]).steps == 5
    path = config(tmp_path, "lr: 0.5\nsteps: 7\n")
    read = language(["--config", path]).settings
    assert (read.learning_rate, read.max_steps) == (0.5, 7)


@pytest.mark.parametrize("algo", ["iw-sft-q", "iql"])
def test_a_run_takes_back_its_own_config(algo: str, tmp_path: Path) -> None:
    """Without the options of the other algorithm, which a command line of one run may not have."""
    options = parse(Options, "d4rl", None, WORDS)
    run = Run("hopper", algo, 4, options, source="/data/hopper.hdf5")
    content = {"benchmark": "d4rl", "algo": algo, "options": options_of(run)}
    path = config(tmp_path, json.dumps(content), "config.json")
    again = parse(Options, "d4rl", None, ["--config", path])
    alone = {"algo": (algo,), "dataset": ("/data/hopper.hdf5",), "seeds": (4,)}
    unused = {"target_ess": None} if algo == "iql" else {"baseline_steps": None}
    assert again == replace(options, **alone, **unused)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "algo", "alone"),
    [
        ("--temperature 0.5 --ema-decay 0.5", "iw-sft", "--temperature 0.5"),
        (
            "--epochs 2 --batch-size 4 --log-every 3",
            "sft",
            "--epochs 2 --batch-size 4 --log-every 3",
        ),
        ("--epochs 2 --log-every 3 --device cpu", "base", "--device cpu"),
        ("--recipe s1k --preset paper_llm", "iw-sft", "--recipe s1k --preset paper_llm"),
        (
            "--recipe s1k --max-length None --deepspeed",
            "sft",
            "--recipe s1k --max-length None --deepspeed",
        ),
        (CHAT, "iw-sft-step", CHAT),
    ],
)
def test_a_run_of_language_takes_back_its_own_config(
    words: str, algo: str, alone: str, tmp_path: Path
) -> None:
    """Without what its algorithm does not use."""
    given = [*words.split(), "--algo", *LANGUAGE, "--seeds", "1", "2"]
    content = {"benchmark": "llm", "options": to_file(language(given), algo, 2)}
    path = config(tmp_path, json.dumps(content), "config.json")
    expected = language([*alone.split(), "--algo", algo, "--seeds", "2"])
    assert language(["--config", path]) == expected
    if words == CHAT:
        fixed = ["--recipe", "chat"]
        assert language([*fixed, "--config", path], "llm --recipe chat") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "stepps: 3", "unknown option 'stepps'; did you mean 'steps'?"),
        ("run.yaml", "eval-episode: 3", "unknown option 'eval-episode'; did you mean"),
        ("run.yaml", "xyz: 3", "unknown option 'xyz'; --help lists the options"),
        ("run.yaml", "steps: {a: 1}", "'steps' is {'a': 1}; it takes a value or a list of values"),
        ("run.yaml", "- 3", "holds no options; it reads NAME: VALUE"),
        ("run.yaml", "steps: [", "can't be read as .yaml"),
        ("run.yaml", "steps: 3\nseeds: [0]\nsteps: 4", "steps is there twice; leave one out"),
        ("run.json", '{"steps": 3, "seeds": [0], "steps": 4}', "steps is there twice; leave one"),
        ("run.yaml", "max-steps: 3\nsteps: 4", "'max-steps' and 'steps' are one; leave one out"),
        ("run.yaml", "eval-episodes: 3\neval_episodes: 4", "are one; leave one out"),
        ("config.json", "{", "can't be read as .json"),
        (
            "config.json",
            '{"benchmark": "llm"}',
            "is of a run of llm; `iwsft llm --config` takes it",
        ),
        ("config.json", '{"benchmark": "d4rl"}', "holds no options: an earlier release"),
        ("missing.yaml", None, "No such file"),
    ],
)
def test_a_wrong_config_file_ends_in_one_line(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        config(tmp_path, text, name)
    with pytest.raises(SystemExit) as error:
        parse(Options, "d4rl", None, ["--config", str(tmp_path / name)])
    line: Any = error.value.code
    assert line.startswith("error: ") and message in line and "\n" not in line


@pytest.mark.parametrize("flag", ["--steps", "--max-steps"])
def test_the_number_of_updates_has_the_names_of_both_commands(flag: str) -> None:
    assert parse(Options, "d4rl", None, [flag, "5"]).steps == 5
    assert language(["--algo", "sft", flag, "5"]).settings.max_steps == 5


def test_commands_are_called_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, called in (
        ("d4rl loop", "iwsft d4rl loop"),
        ("llm", "iwsft llm"),
        ("llm evaluate", "iwsft evaluate"),
        ("llm --recipe chat", "iwsft finetune"),
        ("peer", "python -m benchmarks.peer"),
    ):
        assert program(command) == called
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/d4rl/__main__.py", "loop", "--start", "a b"])
    assert typed("d4rl") == "iwsft d4rl loop --start 'a b'"


@pytest.mark.parametrize("words", [["--help"], ["evaluate", "--help"]], ids=" ".join)
def test_a_reader_that_stops_reading_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "benchmarks", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr in ("", "error: Broken pipe\n")


def test_the_shell_sees_one_line_and_status_1() -> None:
    command = [sys.executable, "-m", "benchmarks.d4rl", "--algo", "iw-sftq"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: unknown algorithm") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["d4rl --algo bc", "bandit"])
def test_a_folder_to_write_that_is_a_file_is_named_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "runs").write_text("mine")
    words = ["iwsft", *command.split(), "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    message = str(end.value)
    assert message.startswith("error: ") and message.endswith("choose another path)")
    assert str(tmp_path / "runs") in message and "\n" not in message
    assert (tmp_path / "runs").read_text() == "mine"


def test_the_installed_command_finds_a_policy_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "policies_here.py").write_text("def none(): return 3\n")
    # A file there does not take the place of a package.
    (tmp_path / "gymnasium.py").write_text("raise RuntimeError\n")
    # A script's path has its own folder in front, where `python -m` has the current one.
    script = tmp_path / "bin" / "iwsft"
    script.parent.mkdir()
    script.write_text("from benchmarks.__main__ import main\nmain()\n")
    words = "collect --policy policies_here:none --env Hopper-v4 --episodes 1 --out x.hdf5"
    done = subprocess.run(
        [sys.executable, str(script), *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert "policies_here:none gave int" in done.stderr
