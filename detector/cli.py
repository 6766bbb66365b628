"""The command line, and the only place that knows Hydra: `light-head COMMAND`, tools/*.py, and `detector.train`.

    main("train")        # what tools/train.py does: sys.argv -> compose -> TrainOptions.parse -> train(options)

Hydra composes the files of conf/, which hold differences from the defaults of the options, and reads values of the
command line; no working directory changes, no output folder, no sweeps. What the keys are, what their values may be and
what they mean is known from the options of the command alone.
"""

from __future__ import annotations

import ast
import errno
import importlib
import importlib.util
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_origin

from detector.errors import InputError
from detector.files import CONF
from detector.options import Options, alternatives, expected, names_in, sets_in, shown, type_of

# Name -> the module whose docstring is the help, its options, the function that takes them.
COMMANDS = {
    "train": ("detector.training.run", "TrainOptions", "train"),
    "eval": ("detector.apps.evaluate", "EvalOptions", "evaluate"),
    "predict": ("detector.apps.predict", "PredictCommandOptions", "predict"),
    "export": ("detector.apps.export", "ExportOptions", "export"),
    "serve": ("detector.apps.serve", "ServeOptions", "serve"),
    "doctor": ("detector.apps.doctor.run", "DoctorOptions", "doctor"),
    "prepare_data": ("detector.apps.prepare_data", "PrepareDataOptions", "prepare_data"),
    "compare": ("detector.apps.compare", "CompareOptions", "compare"),
    "benchmark": ("detector.lab.benchmark", "BenchmarkOptions", "benchmark"),
    "guidelines": ("detector.lab.guidelines", "GuidelinesOptions", "guidelines"),
    "ablations": ("detector.lab.ablations", "AblationsOptions", "ablations"),
    "search": ("detector.lab.search", "SearchOptions", "search"),
    "pretrain": ("detector.training.pretrain", "PretrainOptions", "pretrain"),
    "import_weights": ("detector.apps.import_weights", "ImportOptions", "import_weights"),
}
# What words without `=` are: `benchmark peers` reads better than `benchmark what=peers`.
BARE_WORDS = {"benchmark": "what={}", "guidelines": "what=[{}]", "ablations": "what=[{}]", "prepare_data": "what={}"}

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.EFBIG,
    errno.ELOOP,
}
# In --help, comments stand no further to the right than behind so many characters, where lines allow it.
NOTE_COLUMN = 30
# Seconds that rank 0 has to report an error that all ranks share.
GRACE = 5.0
QUOTED = re.compile(r"""(?P<quote>["'])(?P<text>(?:\\.|(?!(?P=quote))[^\\])*)(?P=quote)""")
LIST_ITEM = re.compile(rf"\s*((?:{QUOTED.pattern}|\[[^\[\]]*\])(?=\s*(?:,|$))|[^,]*?)\s*(?:,|$)")


class Composed(NamedTuple):
    """What a command line asks for.

    Attributes:
        run: the function of the command.
        options_class: what it takes.
        values: the differences from the defaults, for `options_class.parse`.
        choices: the file chosen in each group of conf/.
    """

    run: Callable[[Any], Any]
    options_class: type[Options]
    values: dict[str, Any]
    choices: dict[str, str]

    def options(self) -> Options:
        """What the function takes. Raises InputError for a value that does not fit."""
        return self.options_class.parse(self.values)


def main(command: str) -> None:
    """Run a command on the configuration that sys.argv asks for.

    Exit codes: 0, or what the command exits with; 1 and a traceback for an error of this package; 2 and one line for
    an error of the user (InputError, an unknown option or key, a missing value, no permission, a full disk); 130 after
    Ctrl-C.
    """
    rank, parent = int(os.environ.get("LOCAL_RANK", "0")), os.getppid()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    try:
        flags = [word for word in sys.argv[1:] if word.startswith("-")]
        refuse_unknown_flags(flags)
        composed = compose(command, [word for word in sys.argv[1:] if not word.startswith("-")])
        if flags:
            print(help_text(command, composed))
            return
        options = composed.options()
    except InputError as error:
        # Every rank has the same command line: rank 0 speaks for all.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    try:
        composed.run(options)
    except KeyboardInterrupt:
        interrupted(rank)
    except SystemExit as stop:
        # Lightning catches Ctrl-C, saves what it can, and exits.
        if isinstance(stop.__context__, KeyboardInterrupt):
            interrupted(rank)
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        report(message, rank, parent)
        sys.exit(USAGE_ERROR)


def light_head() -> None:
    """The console script: `light-head COMMAND ...`."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        sys.argv = [f"light-head {command}", *rest]
        return main(command)
    if command in ("-h", "--help"):
        print("Usage: light-head COMMAND [group=option ...] [key=value ...] [--help]\n")
        for name, (module, *_) in COMMANDS.items():
            print(f"  {name:{max(map(len, COMMANDS))}}  {docstring(module).partition(chr(10))[0]}")
        return None
    guesses = did_you_mean(nearest(command, list(COMMANDS)))
    sys.exit(f"error: there is no command {command!r}{guesses} Commands: {', '.join(COMMANDS)}.")


def train(recipe: str = "finetune", *, data_root: str | Path | None = None, **overrides: Any) -> Path:
    """Train a detector, as `light-head train` does, with the same recipes and defaults.

    Args:
        recipe: a file of conf/recipe/: finetune, demo or paper.
        data_root: the folder of the data set; None: that of the recipe.
        **overrides: groups (`backbone="v2_1x"`) and options, inner ones as dicts or by dotted name:
            `schedule={"epochs": 3}`, `**{"optimizer.lr": 0.001}`.

    Returns:
        The run directory, with best.ckpt, last.ckpt and metrics.json in it.

    Raises:
        InputError: an option, the data or a checkpoint is wrong, or the extra `train` is not installed.
    """
    return _call("train", {"recipe": recipe, "data.root": data_root}, overrides)


def evaluate(ckpt: str | Path, *, data_root: str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """Score a checkpoint or an export, as `light-head eval` does.

    Args:
        ckpt: best.ckpt or last.ckpt of a run, or an export.
        data_root: the folder of the data set; None: the one that the checkpoint was trained on.
        **overrides: options, as for `train`.

    Returns:
        The metrics by name, as in metrics.json.

    Raises:
        InputError: as for `train`.
    """
    return _call("eval", {"ckpt": ckpt, "data.root": data_root}, overrides)


def _call(command: str, arguments: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Run a command from Python; arguments that are None are not given."""
    given = {key: value for key, value in arguments.items() if value is not None} | dict(overrides)
    groups = [key for key, value in given.items() if key in groups_of(command) and isinstance(value, str)]
    composed = compose(command, [f"{key}={given.pop(key)}" for key in groups], given)
    return composed.run(composed.options())


def compose(command: str, words: Sequence[str], changes: Mapping[str, Any] | None = None) -> Composed:
    """What the files of conf/ and the words of a command line ask for.

    Args:
        command: a key of COMMANDS.
        words: group=option, key=value, ~key.
        changes: further values, from Python, by dotted names or in dicts.

    Raises:
        InputError: a word that names nothing, or cannot be read; a YAML file with a mistake; what the extra `train`
            brings is not installed.
    """
    bare = [word for word in words if "=" not in word and not word.startswith("~")]
    if bare and command in BARE_WORDS:
        words = [BARE_WORDS[command].format(",".join(bare)), *(word for word in words if word not in bare)]
    groups = [word for word in words if key_of(word) in groups_of(command) and "={" not in word]
    module, name, function = COMMANDS[command]
    try:
        loaded = importlib.import_module(module)
        options_class = getattr(loaded, name)
        values, choices = compose_groups(command, groups) if groups_of(command) else ({}, {})
        for word in words:
            if word not in groups:
                apply(word, command, options_class, values)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("detector", ""):
            raise
        raise InputError(
            f"{error.name} is not installed; the command needs it: pip install 'light-head-detector[train]'."
        ) from error
    leaves = dict(_leaves(command, options_class, changes or {}))
    for key, value in leaves.items():
        set_in(values, key.split("."), value)
    about = {
        "recipe_name": choices.get("recipe", choices.get(command)),
        "backbone_name": choices.get("backbone"),
        "overrides": [*words, *(f"{key}={shown(value)}" for key, value in leaves.items())],
    }
    values |= {key: value for key, value in about.items() if key in options_class.model_fields}
    return Composed(getattr(loaded, function), options_class, values, choices)


def compose_groups(command: str, words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values in the files of conf/ that the words group=option choose, and the file chosen in each group.

    Raises:
        InputError: there is no such group or file, or a YAML file has a mistake.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    for word in words:
        group, _, option = word.lstrip("+~").partition("=")
        if not word.startswith("~") and option not in (known := options_of(group)):
            guesses = did_you_mean([f"{group}={guess}" for guess in nearest(option, known)])
            raise InputError(f"{group}={option} does not exist{guesses} Options of {group}: {', '.join(known)}.")
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            config = hydra_compose(command, list(words), return_hydra_config=True)
        choices = {group: choice for group, choice in config.hydra.runtime.choices.items() if "hydra/" not in group}
        with open_dict(config):
            del config["hydra"]
        values: Any = OmegaConf.to_container(config)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        if match := re.match(r"Could not (?:override|delete\.?) '(.+?)'", str(error)):
            raise InputError(f"{match[1]} is not a key of this command. All keys: {usage()} --help") from error
        raise InputError(" ".join(str(error).split())) from error
    return values, choices


def groups_of(command: str) -> list[str]:
    """The groups of conf/, where the command composes files."""
    return [path.name for path in sorted(CONF.iterdir()) if path.is_dir() and (CONF / f"{command}.yaml").is_file()]


def options_of(group: str) -> list[str]:
    """The names of the files of a group of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def apply(word: str, command: str, options_class: type[Options], values: dict[str, Any]) -> None:
    """Change the values as one word of the command line says: key=value, or ~key for the default."""
    key, equals, text = word.lstrip("+~").partition("=")
    if not key or not (equals or word.startswith("~")):
        raise InputError(f"cannot read {word!r}: values are given as key=value, for instance {key or 'key'}=1.")
    kind, names = check_key(command, options_class, key), key.split(".")
    if not word.startswith("~"):
        value = as_typed(kind, text) if is_text(kind) else read_value(key, text, kind)
        for path, one in _leaves(command, options_class, {key: value}):
            set_in(values, path.split("."), one)
    elif all(isinstance(values := values.get(name, {}), dict) for name in names[:-1]):
        values.pop(names[-1], None)


def set_in(values: dict[str, Any], names: Sequence[str], value: Any) -> None:
    """Set an inner value; a dict changes what it names and leaves the rest."""
    *outer, last = names
    for name in outer:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    if isinstance(value, Mapping) and isinstance(values.get(last), dict):
        for name, inner in value.items():
            set_in(values[last], [name], inner)
    else:
        values[last] = value


def is_text(kind: Any) -> bool:
    """Whether an option is a path or a name, or a list of them."""
    return any(
        one in (str, Path) or (get_origin(one) in (list, tuple) and is_text(get_args(one)[0]))
        for one in alternatives(kind)
    )


def as_typed(kind: Any, text: str) -> Any:
    """A path or a name: the text as it stands, 1e3 and 2024_01_15 too; quotes around the whole may be left out.

    null is none where there may be none; [a,b] is a list where there may be one; shells leave ~/ behind `=` alone.
    """
    members = alternatives(kind)
    items = [get_args(one)[0] for one in members if get_origin(one) in (list, tuple)]
    if text == "null" and type(None) in members:
        return None
    if items and text.startswith("[") and text.endswith("]"):
        return [as_typed(items[0], match[1]) for match in LIST_ITEM.finditer(text[1:-1]) if match[1]]
    if text.isdecimal() and (int in members or Any in members):
        return int(text)
    if quoted := QUOTED.fullmatch(text):
        text = re.sub(r"\\([\"'])", r"\1", quoted["text"])
    return os.path.expanduser(text) if text.startswith("~/") else text


def read_value(key: str, text: str, kind: Any) -> Any:
    """A number, a list, a mapping ..., by Hydra's grammar.

    Raises:
        InputError: it cannot be read; says what a value of this type is.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    wrong = f"cannot read '{key}={text}':"
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        raise InputError(f"{wrong} expected {expected(kind, key)}.") from error
    if override.is_sweep_override():
        if any(get_origin(one) in (list, tuple) for one in alternatives(kind)):
            raise InputError(f"{wrong} a list is written {shlex.quote(f'{key}=[{text}]')}.")
        raise InputError(f"{wrong} expected {expected(kind, key)}.")
    return override.value()


def check_key(command: str, options_class: type[Options], key: str) -> Any:
    """The type of the option with this dotted name.

    Raises:
        InputError: there is none; says which it may have been.
    """
    kind = type_of(options_class, *key.split("."))
    if kind is None:
        known = list(dict.fromkeys([*names_in(options_class), *groups_of(command)]))
        top_level = ", ".join(sorted(name for name in known if "." not in name))
        raise InputError(
            f"{key} is not a key of this command{did_you_mean(nearest(key, known))} Keys: {top_level}. "
            f"All keys: {usage()} --help"
        )
    return kind


def refuse_unknown_flags(flags: Sequence[str]) -> None:
    """Accept -h and --help; say what to write instead of anything else."""
    for flag in flags:
        if flag in ("-m", "--multirun"):
            raise InputError(
                f"{flag} is not supported, because one process cannot start distributed runs one after another. "
                f"Use a loop: for b in v2_0.5x v2_1x; do {usage()} backbone=$b; done"
            )
        if flag not in ("-h", "--help"):
            word = flag.lstrip("-") if "=" in flag else f"{flag.lstrip('-')}=..."
            raise InputError(
                f"{flag}: values are given as key=value, without dashes: {shlex.quote(word)}. "
                f"All keys: {usage()} --help"
            )


def usage() -> str:
    """How this command was called."""
    return sys.argv[0] if sys.argv[0].startswith("light-head ") else f"python {shlex.quote(sys.argv[0])}"


def help_text(command: str, composed: Composed) -> str:
    """What the command does, the options of each group, and every option with its value under this command line."""
    width = max(map(len, composed.choices), default=0)
    groups = [
        f"  {group:{width}}  " + " ".join(f"[{name}]" if name == choice else name for name in options_of(group))
        for group, choice in sorted(composed.choices.items())
    ]
    # What must be set is a path.
    required = [name for name, field in composed.options_class.model_fields.items() if field.is_required()]
    options = composed.options_class.parse(dict.fromkeys(required, "???") | composed.values)
    lines = list(described(options))
    width = max((len(line) for line, note in lines if note and len(line) <= NOTE_COLUMN), default=0)
    return "\n".join(
        [
            docstring(COMMANDS[command][0]).strip(),
            "",
            f"Usage: {usage()} {'[group=option ...] ' if groups else ''}[key=value ...] [--help]",
            "",
            *(["Groups and their options, [chosen]:", "", *groups, ""] if groups else []),
            "Configuration that this command line gives; any value can be set as key=value, inner ones as a.b=value,",
            "and ??? must be set:",
            "",
            *(f"  {line:{width}}  # {note}" if note else f"  {line}" for line, note in lines),
        ]
    )


def described(options: Options, indent: str = "") -> Iterator[tuple[str, str]]:
    """A line for each option, as YAML has it, and what its definition says."""
    plain, fields = options.to_dict(), type(options).model_fields
    # What a class adds to those that it builds on comes first.
    names = dict.fromkeys(name for one in type(options).__mro__ for name in getattr(one, "__annotations__", ()))
    for name, field in ((name, fields[name]) for name in names if name in fields):
        value, note = getattr(options, name), " ".join((field.description or "").split())
        if isinstance(value, Options):
            yield f"{indent}{name}:", note
            yield from described(value, f"{indent}  ")
        else:
            yield f"{indent}{name}: {shown(plain[name])}", note


def docstring(module: str) -> str:
    """The docstring of a module, without importing what it needs."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def _leaves(
    command: str, options_class: type[Options], tree: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The values of single options by their dotted names."""
    for key, value in tree.items():
        kind = check_key(command, options_class, prefix + key)
        if value and isinstance(value, Mapping) and sets_in(kind):
            yield from _leaves(command, options_class, value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value) if isinstance(value, Path) else value


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def nearest(word: str, candidates: Sequence[str]) -> list[str]:
    """The candidates most like word, best first. A word without a dot is compared with the last part of dotted keys."""

    def compared(name: str) -> str:
        return name if "." in word else name.rpartition(".")[2]

    # The first part alone makes dotted keys alike.
    close = get_close_matches(word, {compared(name) for name in candidates}, cutoff=0.8 if "." in word else 0.6)
    return [name for part in close for name in candidates if compared(name) == part][:3]


def did_you_mean(guesses: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(guesses)}?" if guesses else "."


def explain(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for an error of this package."""
    if isinstance(error, InputError):
        return without_worker(str(error))
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}: choose another place, or change who may use this one."
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        reason = os.strerror(error.errno).lower()
        return f"cannot write {error.filename or 'a file'}: {reason}. Make room, or choose another place."
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported for its name
        return "the GPU's memory is full: lower train.batch_size or val.batch_size (and raise trainer.accumulate)."
    if isinstance(error, RuntimeError) and re.search(
        r"[Cc]onnection (closed|reset) by peer|remote process exited", str(error)
    ):
        return "another process of this run has ended; its own message says why."
    if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .*(killed|exited unexpectedly)", str(error)):
        return f"{str(error).splitlines()[0]} Memory, or /dev/shm, may be full: try workers=0, or data.cache=false."
    return None


def without_worker(message: str) -> str:
    """The message of an error that torch has passed on from a loader process, wrapped in that process's traceback."""
    if not re.match(r"Caught \w+ in (DataLoader worker|pin memory)", message):
        return message
    return re.split(r"^(?:\w+\.)*InputError: ", message, flags=re.MULTILINE)[-1].strip()


def report(message: str, rank: int, parent: int) -> None:
    """Print an error of the run once, though every rank may meet it.

    Another rank waits: if rank 0 met the error too, torchrun ends this process meanwhile, or its parent has gone, which
    is rank 0 where Lightning launched it. Otherwise the error is this rank's own, and nobody else will tell.
    """
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
        return
    time.sleep(GRACE)
    if os.getppid() == parent:
        print(f"error (rank {rank}): {message}", file=sys.stderr)


def interrupted(rank: int) -> NoReturn:
    if rank == 0:
        print("interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)
