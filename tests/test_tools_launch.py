"""tools/launch.py as a user meets it: exit codes, and what stands on the screen."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch

import pytest
from tool_runner import run_tool

from detector.inference.writers import WRITERS

LAUNCH = Path(launch.__file__).resolve()

TOOL = '''"""Says what it was given.

Example: python tool.py backbone=v2_2x
"""
import errno, logging, os, sys, time
from pathlib import Path
from launch import launch, plain
from detector.errors import InputError

def main(cfg):
    logging.getLogger("tool").info("started")
    match cfg.fail:
        case "input": raise InputError("photo.jpg is not a picture.")
        case "bug": raise RuntimeError("ours")
        case "permission": raise PermissionError(errno.EACCES, "Permission denied", "/locked/runs")
        case "space": raise OSError(errno.ENOSPC, "No space left on device", "runs/last.ckpt")
        case "interrupt": raise KeyboardInterrupt
        case "lightning":
            try: raise KeyboardInterrupt
            except KeyboardInterrupt: sys.exit(1)
        case "missing": print(cfg.ckpt)
        case "plain": print(plain(cfg))
        case "sleep":
            print("ready", flush=True)
            time.sleep(60)
    from hydra.core.hydra_config import HydraConfig
    print(cfg.run_dir, cfg.backbone.name, cfg.epochs, cfg.ckpt if cfg.fail == "ckpt" else "", HydraConfig.initialized())

if __name__ == "__main__":
    launch(main, config_name="train", config_dir=Path(__file__).parent / "conf")
'''

CONFIG = {
    "train": """
defaults: [_self_, {backbone: v2_1x}, {recipe: demo}]
fail: null
ckpt: ???    # to start from
epochs: 1    # of the whole
             # data set
optimizer: {lr: 0.1, momentum: 0.9}
run_dir: runs/${hydra:runtime.choices.backbone}
""",
    "backbone/v2_1x": "name: one  # section 1\nwidth: 8  # section 2\n",
    "backbone/v2_2x": "name: two\n",
    "recipe/demo": "# @package _global_\nepochs: 3  # the recipe's\nrate: 1  # fast\n",
    "recipe/paper": "# @package _global_\nepochs: 30\n",
}


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tool")
    for name, text in CONFIG.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "tool.py").write_text(TOOL)
    return folder / "tool.py"


def environment(**extra: str) -> dict[str, str]:
    without_ranks = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    return {**without_ranks, "PYTHONPATH": f"{LAUNCH.parent}{os.pathsep}{LAUNCH.parents[1]}", **extra}


def call(tool: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tool.name, *arguments]
    return subprocess.run(command, cwd=tool.parent, env=environment(**extra), capture_output=True, text=True)


def error_line(tool: Path, *arguments: str) -> str:
    """The one line that a user's mistake gives."""
    result = call(tool, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    lines = [line for line in result.stderr.splitlines() if line != "started"]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_runs_with_the_composed_configuration_and_leaves_nothing_behind(tool: Path) -> None:
    before = sorted(tool.parent.iterdir())
    result = call(tool, "backbone=v2_2x", "recipe=paper")
    assert (result.returncode, result.stderr) == (0, "started\n")
    assert result.stdout.split() == ["runs/v2_2x", "two", "30", "False"]
    assert sorted(tool.parent.iterdir()) == before


def test_accepts_the_arguments_that_lightning_adds_for_its_ranks(tool: Path) -> None:
    extra = ['hydra.run.dir="/some/where"', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    result = call(tool, "epochs=5", *extra, LOCAL_RANK="1")
    assert (result.returncode, result.stderr) == (0, "")  # the log line belongs to rank 0
    assert result.stdout.split() == ["runs/v2_1x", "one", "5", "False"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("backbone=v2_3x", ["backbone=v2_3x does not exist", "did you mean backbone=v2_", "v2_1x, v2_2x"]),
        ("recipe=papper", ["did you mean recipe=paper?", "demo, paper"]),
        ("recipe=./my/data", ["recipe=./my/data does not exist", "Options of recipe: demo, paper."]),
        ("lrr=1", ["lrr is not a key", "did you mean optimizer.lr?", "backbone, ckpt, epochs", "--help"]),
        ("optimiser.lr=1", ["did you mean optimizer.lr"]),
        ("bakbone=v2_1x", ["did you mean backbone?"]),
        ("zzzzzz=1", ["zzzzzz is not a key of this tool. Keys: "]),
        ("epochs", ["cannot read 'epochs'", "epochs=1"]),
        ("ckpt=a=b (1).ckpt", ["quote the value", "'ckpt=\"a=b (1).ckpt\"'"]),
        ("epochs=1,2", ["'epochs=[1,2]'"]),
        ("backbone=null", ["cannot read backbone=null", "--help"]),
        ("=3", ["cannot read =3"]),
        ("optimizer.lr=${nowhere}", ["'nowhere' not found"]),
        ("--epochs=3", ["without dashes: epochs=3"]),
        ("--multirun", ["--multirun is not supported", "for b in"]),
        ("fail=input", ["error: photo.jpg is not a picture."]),
        ("fail=missing", ["ckpt is missing: add ckpt=..."]),
        ("fail=plain", ["ckpt is missing: add ckpt=..."]),
        ("fail=permission", ["no permission for /locked/runs"]),
        ("fail=space", ["runs/last.ckpt: no space left on device"]),
    ],
)
def test_a_mistake_of_the_user_is_one_line_with_a_way_out(tool: Path, override: str, parts: list[str]) -> None:
    line = error_line(tool, override)
    assert [part for part in parts if part not in line] == [], line


def test_the_advice_on_quoting_works(tool: Path) -> None:
    result = call(tool, "fail=ckpt", 'ckpt="a=b (1).ckpt"')
    assert (result.returncode, "a=b (1).ckpt" in result.stdout) == (0, True)


def test_plain_values_reach_the_library(tool: Path) -> None:
    result = call(tool, "fail=plain", "ckpt=null")
    values = ast.literal_eval(result.stdout.splitlines()[0])
    assert (values["ckpt"], values["optimizer"], values["run_dir"]) == (
        None,
        {"lr": 0.1, "momentum": 0.9},
        "runs/v2_1x",
    )


def test_a_mistake_of_ours_keeps_its_traceback_without_hydra(tool: Path) -> None:
    result = call(tool, "fail=bug")
    assert result.returncode == 1
    assert "RuntimeError: ours" in result.stderr
    assert "site-packages" not in result.stderr


@pytest.mark.parametrize("how", ["interrupt", "lightning"])
def test_interrupts(tool: Path, how: str) -> None:
    result = call(tool, f"fail={how}")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "started\ninterrupted\n")


def test_control_c(tool: Path) -> None:
    command = [sys.executable, tool.name, "fail=sleep"]
    with subprocess.Popen(
        command, cwd=tool.parent, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "started\ninterrupted\n")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_purpose_options_and_configuration(tool: Path, flag: str) -> None:
    result = call(tool, "recipe=paper", flag)
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("Says what it was given.", "Example:", "[v2_1x] v2_2x", "demo [paper]", "epochs: 30", "ckpt: ???"):
        assert part in result.stdout


def test_help_explains_each_key_behind_its_line(tool: Path) -> None:
    lines = call(tool, "--help").stdout.splitlines()
    assert [line for line in lines if " # " in line] == [
        "  ckpt: ???    # to start from",
        "  epochs: 3    # of the whole data set",  # what the key is, before where its value comes from
        "    name: one  # section 1",
        "    width: 8   # section 2",
        "  rate: 1      # fast",
    ]


def test_a_group_takes_away_what_another_says_of_its_value(tmp_path: Path) -> None:
    files = {
        "tool": "defaults: [base, {size: s}, {recipe: r}, _self_]\nout: a  # the tool's\n",
        "base": "seed: 0  # of all\nout: b  # the base's\n",
        "size/s": "# @package net\nwide: 8  # table 1\ndeep: 9  # table 2\n",
        "recipe/r": "# @package _global_\nrate: 1  # ours\n",
        "recipe/block": "# @package _global_\nnet:\n  wide: 4\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    _, choices = launch.compose_config("tool", ["recipe=block"], tmp_path)
    notes = launch.comments("tool", choices, tmp_path)
    assert {key: note for key, note in notes.items() if note} == {
        "seed": "of all",
        "out": "the tool's",
        "net.deep": "table 2",
    }


def test_comments_are_found_as_yaml_means_them() -> None:
    text = """\
# of the file
a: 1   # one
b: {c: 2, d: "# no comment"}  # two,
                              # and more
                            # of nobody
e:     # three
  f: "x # y"
  g:
    - h: 4  # of a list
  i: 'long
    text'  # of many lines
j: z#z
"""
    keys = list(launch.keys_of(text))
    assert keys == [
        ("a", 1, "one"), ("b", 2, "two, and more"), ("e", 5, "three"), ("e.f", 6, ""), ("e.g", 7, ""),
        ("e.i", 9, ""), ("j", 11, ""),
    ]  # fmt: skip
    assert launch.annotated("a: 1\ne:\n  f: 0", {"a": "one", "e.f": "six", "e": ""}) == [
        "a: 1    # one",
        "e:",
        "  f: 0  # six",
    ]


def test_help_of_a_tool_says_what_its_keys_are(tmp_path: Path) -> None:
    shown = run_tool("predict", "--help", cwd=tmp_path).ok().out
    [tile] = [line for line in shown.splitlines() if line.startswith("  tile: null ")]
    assert "  # [width,height,overlap] in pixels" in tile
    [save] = [line for line in shown.splitlines() if line.startswith("  save:")]
    assert [name for name in WRITERS if name not in save.partition("#")[2]] == []


def test_a_tool_puts_its_own_keys_before_those_it_takes_over(tmp_path: Path) -> None:
    shown = run_tool("doctor", "--help", cwd=tmp_path).ok().out
    assert shown.index("  out: doctor") < shown.index("  run_dir:") < shown.index("  backbone:")


EXTRA = ("hydra", "omegaconf", "lightning", "rich", "tqdm", "albumentations")


@pytest.mark.parametrize("tool", sorted(path.name for path in LAUNCH.parent.glob("*.py") if path.name != "demo.py"))
def test_without_the_extra_a_tool_says_what_to_install(tool: str) -> None:
    """The first import that fails is that of the launcher, which knows the remedy."""
    blocked = f"import runpy, sys; sys.modules |= dict.fromkeys({EXTRA})"
    code = f"{blocked}; runpy.run_path({str(LAUNCH.parent / tool)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert "hydra is not installed" in result.stderr
    assert result.stderr.endswith("pip install 'light-head-detector[train]'.\n")
    assert result.stderr.count("\n") == 1


def test_other_ranks_leave_shared_mistakes_to_rank_0(tool: Path) -> None:
    result = call(tool, "lrr=1", LOCAL_RANK="1")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_an_error_of_one_rank_alone_is_told_after_a_grace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    launch.report("picture 7 is broken.", rank=3, parent=os.getppid())
    assert capsys.readouterr().err == "error (rank 3): picture 7 is broken.\n"
    launch.report("the data set is missing.", rank=3, parent=-1)  # the launcher has gone: it has said so
    assert capsys.readouterr().err == ""
    assert waited == [launch.GRACE, launch.GRACE]
