"""The command line as a user meets it: exit codes, what stands on the screen, and what reaches the options."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from tool_runner import ROOT

from detector import cli
from detector.cli import composition
from detector.cli.failures import GRACE
from detector.cli.words import as_typed
from detector.errors import InputError
from detector.inference.predictor import PredictOptions
from detector.options import sets_in, type_of, typed

JOB = '''"""Says what it was given.

Example: python tool.py backbone=v2_2x
"""
import errno, json, logging, sys, time
from typing import Literal
from detector.errors import InputError
from detector.options import Count, Flag, Options, Positive

class Backbone(Options):
    name: str = "none"
    width: Count = 4
    """Channels (section 2)."""
    limits: Count = 1

class Optimizer(Options):
    lr: Positive = 0.1
    momentum: Positive = 0.9
    scales: dict[str, Positive] | None = None

class Data(Options):
    root: str | None = None
    sizes: tuple[Count, ...] = ()

class ToolOptions(Options):
    """What the tool takes."""
    fail: str | None = None
    ckpt: str
    """to start from"""
    epochs: Count = 1
    """of the whole
    data set"""
    backbone: Backbone = Backbone()
    optimizer: Optimizer = Optimizer()
    data: Data = Data(sizes=(7,))
    source: str | list[str] = "x"
    classes: list[str | int] | None = None
    report: Data | Literal[False] = Data()
    rate: Count = 1
    recipe_name: str = ""
    backbone_name: str | None = None
    overrides: tuple[str, ...] = ()

def run(options):
    logging.getLogger("tool").info("started")
    match options.fail:
        case "input": raise InputError("photo.jpg is not a picture.")
        case "bug": raise RuntimeError("ours")
        case "permission": raise PermissionError(errno.EACCES, "Permission denied", "/locked/runs")
        case "space": raise OSError(errno.ENOSPC, "No space left on device", "runs/last.ckpt")
        case "interrupt": raise KeyboardInterrupt
        case "lightning":
            try: raise KeyboardInterrupt
            except KeyboardInterrupt: sys.exit(1)
        case "sleep":
            print("ready", flush=True)
            time.sleep(60)
    print(json.dumps(options.to_dict()))
    return options

'''

TOOL = """
from pathlib import Path
from detector import cli
from detector.cli import composition
composition.CONF = Path(__file__).parent / "conf"
cli.COMMANDS["train"] = ("job", "ToolOptions", "run")
cli.main("train")
"""

CONFIG = {
    "train": "defaults: [_self_, {backbone: v2_1x}, {recipe: demo}]\n",
    "backbone/v2_1x": "name: one\nwidth: 8\n",
    "backbone/v2_2x": "name: two\n",
    "recipe/demo": "# @package _global_\nepochs: 3\n",
    "recipe/paper": "# @package _global_\nepochs: 30\noptimizer: {scales: {head.thin: 3.0}}\n",
}


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tool")
    for name, text in CONFIG.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "job.py").write_text(JOB)
    (folder / "tool.py").write_text(TOOL)
    return folder / "tool.py"


def environment(**extra: str) -> dict[str, str]:
    without_ranks = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    return {**without_ranks, "PYTHONPATH": str(ROOT), **extra}


def process(tool: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """As a user runs it."""
    command = [sys.executable, tool.name, *arguments]
    return subprocess.run(command, cwd=tool.parent, env=environment(**extra), capture_output=True, text=True)


def call(tool: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own; what is logged is not seen."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.delenv("LOCAL_RANK", raising=False)
        patch.syspath_prepend(str(tool.parent))
        patch.setattr(composition, "CONF", tool.parent / "conf")
        patch.setitem(cli.COMMANDS, "train", ("job", "ToolOptions", "run"))
        patch.setattr(sys, "argv", [tool.name, *arguments])
        try:
            cli.main("train")
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def given(tool: Path, *arguments: str) -> dict[str, Any]:
    """The options that these arguments give."""
    result = call(tool, "ckpt=c", *arguments)
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def error_line(tool: Path, *arguments: str) -> str:
    """The one line that a user's mistake gives."""
    result = call(tool, *arguments, *([] if any(a.startswith("ckpt") for a in arguments) else ["ckpt=c"]))
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_runs_with_the_composed_options_and_leaves_nothing_behind(tool: Path) -> None:
    before = sorted(tool.parent.iterdir())
    result = process(tool, "backbone=v2_2x", "recipe=paper", "ckpt=c")
    assert (result.returncode, result.stderr) == (0, "started\n")
    values = json.loads(result.stdout)
    assert values["backbone"] == {"name": "two", "width": 4, "limits": 1}
    assert (values["epochs"], values["optimizer"]["lr"]) == (30, 0.1)
    assert (values["recipe_name"], values["backbone_name"]) == ("paper", "v2_2x")
    assert values["overrides"] == ["backbone=v2_2x", "recipe=paper", "ckpt=c"]
    assert sorted(path for path in tool.parent.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("backbone=v2_3x", ["backbone=v2_3x does not exist", "did you mean backbone=v2_", "v2_1x, v2_2x"]),
        ("recipe=papper", ["did you mean recipe=paper?", "demo, paper"]),
        ("recipe=./my/data", ["recipe=./my/data does not exist", "Options of recipe: demo, paper."]),
        ("lrr=1", ["lrr is not a key", "did you mean optimizer.lr?", "backbone, backbone_name, ckpt", "--help"]),
        ("optimiser.lr=1", ["did you mean optimizer.lr"]),
        ("backbone.widht=1", ["backbone.widht is not a key", "did you mean backbone.width?"]),
        ("bakbone=v2_1x", ["did you mean backbone"]),
        ("~lrr", ["lrr is not a key"]),
        ("backbone={width: 3, widht: 4}", ["backbone.widht is not a key"]),
        ("zzzzzz=1", ["zzzzzz is not a key of this command. Keys: "]),
        ("hydra.run.dir=x", ["hydra.run.dir is not a key"]),
        ("epochs", ["cannot read 'epochs'", "epochs=1"]),
        ("epochs=1,2", ["cannot read 'epochs=1,2': expected a whole number, 1 or more."]),
        ("data.sizes=1,2", ["cannot read 'data.sizes=1,2': a list is written 'data.sizes=[1,2]'."]),
        ("epochs=a b]", ["cannot read 'epochs=a b]': expected a whole number, 1 or more."]),
        ("data={root: it's.jpg}", ["expected data.KEY=VALUE"]),
        ("optimizer.scales={it's: 1}", ["expected {NAME: VALUE}, each a number above 0"]),
        ("epochs=0", ["epochs=0: expected a whole number, 1 or more."]),
        ("epochs=${rate}", ["epochs=${rate}: expected a whole number"]),
        ("report=true", ["report=true: expected report.KEY=VALUE, or false."]),
        ("backbone=null", ["backbone=null does not exist", "Options of backbone: v2_1x, v2_2x."]),
        ("=3", ["cannot read '=3'"]),
        ("--epochs=3", ["without dashes: epochs=3"]),
        ("--multirun", ["--multirun is not supported", "for b in"]),
        ("fail=input", ["error: photo.jpg is not a picture."]),
        ("~ckpt", ["ckpt is missing: add ckpt=..."]),
        ("fail=permission", ["no permission for /locked/runs"]),
        ("fail=space", ["runs/last.ckpt: no space left on device"]),
    ],
)
def test_a_mistake_of_the_user_is_one_line_with_a_way_out(tool: Path, override: str, parts: list[str]) -> None:
    line = error_line(tool, *([override] if override != "~ckpt" else ["ckpt=c", "~ckpt"]))
    assert [part for part in parts if part not in line] == [], line


TEXTS = (
    "1.10", "2024_01_15", "1e3", "1_000", "true", "yes", "a=b", "a=b (1).ckpt", "it's.jpg", 'q"uo.jpg',
    "[x].jpg", "a,b.jpg",
    "{a: 1}", "größe ü.png", "${nowhere}", "C:\\new\\table.jpg", "0x10", "nan", "~user", " ", "", "runs/x.ckpt",
    "http://h/a?b=c&d=e#f", "*.jpg", "%20", "!x", "a\\'b", "-1", "[a,b]",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_is_the_text_as_typed(text: str) -> None:
    assert as_typed(str, text) == text
    assert as_typed(str | None, text) == text


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (str | None, "null", None),
        (str, "null", "null"),
        (str | None, "~/x", str(Path.home() / "x")),
        (str, '"a=b (1).ckpt"', "a=b (1).ckpt"),
        (str, "'a b'", "a b"),
        (str, r'"q\"uo"', 'q"uo'),
        (str, "'it's'", "'it's'"),
        (str | list[str], "[a,b]", ["a", "b"]),
        (str | list[str], "[]", []),
        (str | list[str], "[ 1e3 , 2024_01_15,it's.jpg]", ["1e3", "2024_01_15", "it's.jpg"]),
        (str | list[str], """["a, b.jpg",'c d',e f]""", ["a, b.jpg", "c d", "e f"]),
        (str | list[str], "[x].jpg", "[x].jpg"),
        (str | list[str | list[str]], "[a[1].jpg,[b, 'c,d']]", ["a[1].jpg", ["b", "c,d"]]),
        (str | list[Any], "[car,2]", ["car", 2]),
        (list[str | int] | None, "[car,2,03x]", ["car", 2, "03x"]),
        (list[str | int] | None, "[01,10,0]", ["01", 10, 0]),
        (list[str | int] | None, "\u0661", "\u0661"),
        (list[str | int] | None, "null", None),
        (tuple[str, ...], "[a]", ["a"]),
    ],
)
def test_texts_that_mean_more_than_themselves(kind: Any, text: str, value: Any) -> None:
    assert as_typed(kind, text) == value


def through_bash(line: str) -> list[str]:
    """The words of a command line, as a shell hands them over."""
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    return shown.split("\0")[:-1]


SPECIAL = (
    "null",
    '"a"',
    "'a'",
    '"',
    "'",
    "[a,b]",
    "[x",
    "$HOME",
    "`id`",
    "a b  c",
    "a\\",
    '"\\',
    "a;b|c&d>e",
    "~",
    "{a,b}",
)


@pytest.mark.parametrize("kind", [str | None, str | list[str] | None])
def test_what_is_printed_for_the_command_line_works_in_a_shell(kind: Any) -> None:
    values = [*TEXTS, *SPECIAL]
    words = through_bash(" ".join(typed("data.root", value) for value in values))
    keys, _, texts = zip(*(word.partition("=") for word in words), strict=True)
    assert {*keys} == {"data.root"}
    assert [as_typed(kind, text) for text in texts] == values


@pytest.mark.parametrize(
    "word", ["--ckpt=it's.ckpt", '--ckpt=q"uo $x.ckpt', "--ckpt=~/x", "--epochs=3", "data.sizes=1,2"]
)
def test_advice_can_be_pasted(tool: Path, word: str) -> None:
    line = error_line(tool, word)
    advice = re.search(r"without dashes: (.*)\. All keys:|is written (.*)\.$", line)
    assert advice is not None
    expected = [word.lstrip("-")] if word[0] == "-" else ["data.sizes=[1,2]"]
    assert through_bash(advice[1] or advice[2]) == expected


def test_only_texts_are_taken_as_typed(tool: Path) -> None:
    values = given(tool, "data.root=1.10", "source=[1e3,true]", "classes=[car,2]", "epochs=5", "fail=none")
    assert (values["data"]["root"], values["source"], values["classes"]) == ("1.10", ["1e3", "true"], ["car", 2])
    assert (values["epochs"], values["fail"]) == (5, "none")


def test_values_of_every_form(tool: Path) -> None:
    values = given(
        tool, "recipe=paper", "++epochs=7", "+rate=2", "optimizer.scales={backbone: 0.1}", "optimizer.lr=1e-3",
        "report=false", "data={root: d}", "data.sizes=[1,2]",
    )  # fmt: skip
    assert (values["epochs"], values["rate"], values["report"]) == (7, 2, False)
    assert values["optimizer"] == {"lr": 0.001, "momentum": 0.9, "scales": {"head.thin": 3.0, "backbone": 0.1}}
    assert values["data"] == {"root": "d", "sizes": [1, 2]}
    assert given(tool, "recipe=paper", "optimizer.scales=null")["optimizer"]["scales"] is None
    assert given(tool, "~epochs", "~optimizer.lr", "~backbone")["backbone"]["name"] == "none"
    assert given(tool, "~epochs")["epochs"] == 1
    assert given(tool, "report=false", "report.root=a")["report"] == {"root": "a", "sizes": []}
    assert given(tool, "data.root=a")["data"]["sizes"] == [7]  # the outer default stays


def test_a_mistake_of_ours_keeps_its_traceback_without_hydra(tool: Path) -> None:
    result = process(tool, "fail=bug", "ckpt=c")
    assert result.returncode == 1
    assert "RuntimeError: ours" in result.stderr
    assert "site-packages" not in result.stderr


@pytest.mark.parametrize("how", ["interrupt", "lightning"])
def test_interrupts(tool: Path, how: str) -> None:
    result = process(tool, f"fail={how}", "ckpt=c")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "started\ninterrupted\n")


def test_control_c(tool: Path) -> None:
    command = [sys.executable, tool.name, "fail=sleep", "ckpt=c"]
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
        "  ckpt: ???   # to start from",
        "  epochs: 3   # of the whole data set",
        "    width: 8  # Channels (section 2).",
    ]


def test_from_python(tool: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tool.parent))
    monkeypatch.setattr(composition, "CONF", tool.parent / "conf")
    monkeypatch.setitem(cli.COMMANDS, "train", ("job", "ToolOptions", "run"))
    options: Any = cli.train(
        "paper", data_root=tmp_path, ckpt="1e3", backbone="v2_2x", optimizer={"lr": 2, "scales": {"a.b": 1}}, rate=5
    )
    assert (options.data.root, options.ckpt, options.epochs, options.rate) == (str(tmp_path), "1e3", 30, 5)
    assert (options.backbone.name, options.backbone_name, options.recipe_name) == ("two", "v2_2x", "paper")
    assert options.optimizer.lr == 2
    assert options.optimizer.scales == {"head.thin": 3.0, "a.b": 1.0}
    assert options.overrides[:2] == ("recipe=paper", "backbone=v2_2x")
    assert "optimizer.lr=2" in options.overrides
    options = cli.train("demo", **{"ckpt": "c", "backbone": {"width": 5}, "optimizer.lr": 1.5})
    assert (options.backbone.name, options.backbone.width, options.optimizer.lr) == ("one", 5, 1.5)
    with pytest.raises(InputError, match=r"epoch is not a key .*did you mean epochs\?"):
        cli.train("demo", epoch=3)
    with pytest.raises(InputError, match=r"optimizer.lrr is not a key"):
        cli.train("demo", optimizer={"lrr": 3})
    with pytest.raises(InputError, match="recipe=finetune does not exist"):
        cli.train()


EXTRA = ("hydra", "omegaconf", "lightning", "rich", "tqdm", "albumentations", "hotcoco", "matplotlib", "yaml")


@pytest.mark.parametrize(
    "command",
    ["predict", "train", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eval", "doctor", "benchmark"))],
)
def test_without_the_extra_a_command_says_what_to_install(command: str, tmp_path: Path) -> None:
    blocked = f"import runpy, sys; sys.modules |= dict.fromkeys({EXTRA}); sys.argv = ['x.py', 'ckpt=a', 'workers=0']"
    code = f"{blocked}; runpy.run_path({str(ROOT / 'tools' / f'{command}.py')!r}, run_name='__main__')"
    if command == "predict":  # needs the extra for values that are no texts
        code = code.replace("'workers=0'", "'source=b', 'every=2'")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith(
        " is not installed; the command needs it: pip install 'light-head-detector[train]'.\n"
    )
    assert result.stderr.count("\n") == 1


def test_a_package_that_is_missed_on_the_way_is_named_too() -> None:
    message = "lightning is not installed; the command needs it: pip install 'light-head-detector[train]'."
    assert cli.explain(ModuleNotFoundError(name="lightning")) == message
    assert cli.explain(ModuleNotFoundError(name="detector.nothing")) is None


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_tool_and_says_what_its_keys_are(command: str) -> None:
    module, options_class, _ = cli.COMMANDS[command]
    assert f'main("{command}")' in (ROOT / "tools" / f"{command}.py").read_text()
    assert cli.docstring(module).partition("\n")[0].endswith((".", ":"))
    options = getattr(importlib.import_module(module), options_class)
    undocumented = [
        name
        for name, field in options.model_fields.items()
        if not (field.description or sets_in(type_of(options, name)))
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    ("command", "key", "needed"),
    [
        ("train", "run_dir", {}),
        ("predict", "out", {"ckpt": "a.ckpt", "source": "a.jpg"}),
        ("predict", "source", {}),
        ("serve", "ckpt", {}),
        ("doctor", "out", {}),
        ("eval", "results", {}),
        ("benchmark", "ckpt", {}),
        ("guidelines", "out", {}),
        ("pretrain", "weights", {}),
        ("import_weights", "source", {"out": "a.pth"}),
    ],
)
def test_a_path_or_a_name_may_be_a_number_in_yaml_and_python(command: str, key: str, needed: dict[str, str]) -> None:
    module, options_class, _ = cli.COMMANDS[command]
    options = getattr(importlib.import_module(module), options_class)
    for number, text in ((2024, "2024"), (1.5, "1.5")):
        assert getattr(options.parse(needed | {key: number}), key) == text
    with pytest.raises(InputError, match=f"^{key}=true: expected a text"):
        options.parse(needed | {key: True})


def test_a_class_by_its_number_stays_a_number() -> None:
    assert PredictOptions.parse({"classes": 3}).classes == 3


def test_the_console_script_names_its_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["light-head"])
    cli.light_head()
    shown = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"\n  {name} " not in shown] == []
    monkeypatch.setattr(sys, "argv", ["light-head", "trian"])
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.light_head()
    assert "there is no command 'trian'; did you mean train" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["light-head", "predict", "--help"])
    cli.light_head()
    shown = capsys.readouterr().out
    assert "Usage: light-head predict [key=value ...] [--help]" in shown
    assert "  source: ???  " in shown


def test_other_ranks_leave_shared_mistakes_to_rank_0(tool: Path) -> None:
    result = process(tool, "lrr=1", "ckpt=c", LOCAL_RANK="1")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_an_error_of_one_rank_alone_is_told_after_a_grace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    cli.report("picture 7 is broken.", rank=3, parent=os.getppid())
    assert capsys.readouterr().err == "error (rank 3): picture 7 is broken.\n"
    cli.report("the data set is missing.", rank=3, parent=-1)  # the launcher has gone: it has said so
    assert capsys.readouterr().err == ""
    assert waited == [GRACE, GRACE]


def test_a_command_offers_only_the_groups_that_it_composes() -> None:
    """`pretrain` is a folder of conf/, and no group of training."""
    with pytest.raises(InputError, match=r"pretrian is not a key of this command.*Keys: ") as error:
        cli.compose("train", ["pretrian=crops"])
    assert "pretrain" not in str(error.value).partition("Keys: ")[2]
    assert "Did you mean pretrain" not in str(error.value)
    with pytest.raises(InputError, match="neck is not a key of this command"):
        cli.compose("pretrain", ["neck=cem"])
