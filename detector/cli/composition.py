"""What the files of conf/ and the words of a command line ask for, put together: differences from the defaults.

Hydra composes the files and reads values; no working directory changes, no output folder, no sweeps. What the keys are,
what their values may be and what they mean is known from the options of the command alone.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from detector.cli.failures import missing
from detector.cli.words import as_typed, did_you_mean, is_text, key_of, nearest, read_value, usage
from detector.errors import InputError
from detector.files import CONF
from detector.options import Options, names_in, sets_in, shown, type_of

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
    module, name, function = COMMANDS[command]
    try:
        groups = [word for word in words if key_of(word) in groups_of(command) and "={" not in word]
        loaded = importlib.import_module(module)
        options_class = getattr(loaded, name)
        values, choices = compose_groups(command, groups) if groups_of(command) else ({}, {})
        for word in words:
            if word not in groups:
                apply(word, command, options_class, values)
    except ModuleNotFoundError as error:
        if (message := missing(error)) is None:
            raise
        raise InputError(message) from error
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


@cache
def groups_of(command: str) -> tuple[str, ...]:
    """The groups of conf/ that the command composes, sorted: those that its file, or one that it begins with, names."""
    file = CONF / f"{command}.yaml"
    if not file.is_file():
        return ()
    import yaml

    defaults = yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]
    found: set[str] = set()
    for one in defaults:
        found |= {key.split()[-1] for key in one} if isinstance(one, dict) else {*groups_of(one)}
    return tuple(sorted(found))


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
