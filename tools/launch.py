"""Run a tool's main(cfg) on the configuration that the command line asks for, with errors that a user can read.

    from launch import launch, plain

    def main(cfg: DictConfig) -> None:
        train(plain(cfg))

    if __name__ == "__main__":
        launch(main, config_name="train")

Hydra composes and nothing else: no working directory changes, no output folder, no logging set-up, no sweeps. The tool
runs after Hydra has finished, so that a traceback shows the tool alone, and Lightning's subprocess launcher and
torchrun start the same command line again for every rank.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NoReturn

USAGE_ERROR = 2

try:
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf import DictConfig, OmegaConf, open_dict
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    from detector.errors import InputError
except ModuleNotFoundError as error:  # `pip install .` alone is enough for the library only
    print(
        f"error: {error.name} is not installed; the tools need it: pip install 'light-head-detector[train]'.",
        file=sys.stderr,
    )
    sys.exit(USAGE_ERROR)

CONF = Path(__file__).resolve().parents[1] / "conf"
INTERRUPTED = 130  # 128 + SIGINT, as shells count
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
# In --help, comments stand no further to the right than behind so many characters, where lines allow it.
NOTE_COLUMN = 30
# Seconds that rank 0 has to report an error that all ranks share.
GRACE = 5.0


def launch(main: Callable[[DictConfig], Any], config_name: str, config_dir: Path = CONF) -> None:
    """Compose the configuration from sys.argv and call main with it.

    Args:
        main: the tool; the docstring of its module is what `--help` shows.
        config_name: the YAML file in config_dir, without its suffix.
        config_dir: where the YAML files lie.

    Exit codes: 0, or what main exits with; 1 and a traceback for an error of ours; 2 and one line for an error of the
    user (InputError, an unknown option or key, a missing value, no permission, a full disk); 130 after Ctrl-C.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    parent = os.getppid()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    try:
        flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
        overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        refuse_unknown_flags(flags)
        cfg, choices = compose_config(config_name, overrides, config_dir)
        if flags:
            print(help_text(sys.modules[main.__module__].__doc__, cfg, choices, config_name, config_dir))
            return
        resolve(cfg)
    except InputError as error:
        # Every rank has the same command line: rank 0 speaks for all.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    try:
        main(cfg)
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


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as the library takes it: dicts, lists and values.

    Raises:
        MissingMandatoryValue: a `???` that the command line did not set; `launch` reports it.
    """
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def compose_config(
    config_name: str, overrides: Sequence[str], config_dir: Path = CONF
) -> tuple[DictConfig, dict[str, str]]:
    """The composed configuration, not yet resolved, and the option chosen in each of its groups.

    Raises:
        InputError: an override that names nothing, or cannot be read; a YAML file with a mistake.
    """
    try:
        with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            cfg = compose(config_name, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise InputError(explain_composition(error, config_name, overrides, config_dir)) from error
    HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in the YAML files
    choices = {group: choice for group, choice in cfg.hydra.runtime.choices.items() if not group.startswith("hydra/")}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def resolve(cfg: DictConfig) -> None:
    """Replace every ${...} by its value, in place; `???` stays.

    Raises:
        InputError: an interpolation that leads nowhere.
    """
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise InputError(f"configuration: {first_line(error)}") from error
    # Lightning looks here to decide whether ranks need Hydra's own arguments. They do not.
    HydraConfig.instance().cfg = None


def refuse_unknown_flags(flags: Sequence[str]) -> None:
    """Accept -h and --help; say what to write instead of anything else."""
    script = sys.argv[0]
    for flag in flags:
        if flag in ("-m", "--multirun"):
            raise InputError(
                f"{flag} is not supported, because one process cannot start distributed runs one after another. "
                f"Use a loop: for b in v2_0.5x v2_1x; do python {script} backbone=$b; done"
            )
        if flag not in ("-h", "--help"):
            key, _, value = flag.lstrip("-").partition("=")
            raise InputError(
                f"{flag}: values are given as key=value, without dashes: {key}={value or '...'}. "
                f"All keys: python {script} --help"
            )


def help_text(doc: str | None, cfg: DictConfig, choices: dict[str, str], config_name: str, config_dir: Path) -> str:
    """What the tool does, the options of each group, and the whole configuration under the given overrides."""
    width = max(map(len, choices), default=0)
    groups = [
        f"  {group:{width}}  " + " ".join(f"[{o}]" if o == choices[group] else o for o in options(config_dir, group))
        for group in sorted(choices)
    ]
    values = OmegaConf.to_container(cfg)
    assert isinstance(values, dict)
    own = read_yaml(config_dir / f"{config_name}.yaml")
    values = {key: values[key] for key in sorted(values, key=lambda key: key not in own)}  # the tool's own keys first
    return "\n".join(
        [
            (doc or "").strip(),
            "",
            f"Usage: python {sys.argv[0]} [group=option ...] [key=value ...] [--help]",
            "",
            *(["Groups and their options, [chosen]:", "", *groups, ""] if groups else []),
            "Configuration that this command line gives; any value can be set as key=value, inner ones as a.b=value,",
            "and ??? must be set:",
            "",
            *(f"  {line}" for line in annotated(OmegaConf.to_yaml(values), comments(config_name, choices, config_dir))),
        ]
    )


def annotated(text: str, notes: dict[str, str]) -> list[str]:
    """The lines of a YAML text, each with the note on its key."""
    lines = text.splitlines()
    behind = {line: notes[key] for key, line, _ in keys_of(text) if notes.get(key)}
    width = max((len(lines[line]) for line in behind if len(lines[line]) <= NOTE_COLUMN), default=0)
    return [f"{text:{width}}  # {behind[line]}" if line in behind else text for line, text in enumerate(lines)]


def comments(config_name: str, choices: dict[str, str], config_dir: Path) -> dict[str, str]:
    """Dotted key -> the comment beside it in the files that were composed, or "".

    The tool's own file says what a key is; a group's says where its value comes from, so that another group that sets
    the key takes the comment away.
    """
    found: dict[str, str] = {}
    for group, choice in reversed(choices.items()):  # Hydra names the last one first
        found |= comments_of(config_dir / group / f"{choice}.yaml", group.replace("/", "."))
    own: dict[str, str] = {}
    names = [config_name]
    for name in names:  # the tool's, and those that it builds on
        path = config_dir / f"{name}.yaml"
        names += [base for base in read_yaml(path).get("defaults", []) if isinstance(base, str) and base != "_self_"]
        own = {key: comment for key, comment in comments_of(path, "_global_").items() if comment} | own
    return found | own


def comments_of(path: Path, package: str) -> dict[str, str]:
    """Dotted key -> the comment beside it, or "". The keys are below `package`, unless the file names another."""
    text = path.read_text(encoding="utf-8")
    header = re.match(r"# @package (\S+)", text)
    package = header[1] if header else package
    prefix = "" if package == "_global_" else f"{package}."
    return {prefix + key: comment for key, _, comment in keys_of(text)}


def keys_of(text: str) -> Iterator[tuple[str, int, str]]:
    """For each key of a YAML text that begins a line: dotted key, line from 0, and the comment there, or ""."""

    def walk(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int, str]]:
        if isinstance(node, yaml.MappingNode) and not node.flow_style:
            for key, value in node.value:
                one_line = value.end_mark.line == key.end_mark.line
                yield prefix + key.value, key.start_mark.line, comment_at(text, (value if one_line else key).end_mark)
                yield from walk(value, f"{prefix}{key.value}.")

    return walk(yaml.compose(text), "")


def comment_at(text: str, mark: yaml.Mark) -> str:
    """The comment that begins behind this place; it goes on in lines of their own while # stands below #."""
    start = re.compile(r":?[ \t]+(?=#)").match(text, mark.index)
    if not start:
        return ""
    column = mark.column + start.end() - mark.index
    lines = re.compile(rf"#.*(?:\n {{{column}}}#.*)*").match(text, start.end())
    assert lines is not None
    return " ".join(line.strip(" #") for line in lines[0].splitlines())


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def options(config_dir: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir / group).glob("*.yaml"))


def explain_composition(error: Exception, config_name: str, overrides: Sequence[str], config_dir: Path) -> str:
    """Hydra's complaint about the command line, as one line with a way out."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        # An option that is a path has slashes of its own: the command line knows where the group ends.
        given = {o.replace("=", "/", 1): key_of(o) for o in overrides}
        group = given.get(error.missing_cfg_file, error.missing_cfg_file.rpartition("/")[0])
        option = error.missing_cfg_file.removeprefix(f"{group}/")
        known = options(config_dir, group)
        guesses = [f"{group}={guess}" for guess in nearest(option, known)]
        return f"{group}={option} does not exist{did_you_mean(guesses)} Options of {group}: {', '.join(known)}."
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"cannot read {key!r}: values are given as key=value, for instance {key}=1."
        # A file name with a space, a bracket, '=' or an accent is no word of Hydra's grammar.
        return f"cannot read {error.override!r}: quote the value, twice for the shell: '{key}=\"{value}\"'."
    if match := re.match(r"Could not (?:override|delete from config\.) '(.+?)'", str(error)):
        # OmegaConf's own error names the inner key of an override that gives several, a={b: 1, c: 2}.
        inner = str(getattr(error.__cause__, "full_key", ""))
        key = inner if inner.startswith(f"{match[1]}.") else match[1]
        known = known_keys(config_name, [o for o in overrides if key_of(o) != match[1]], config_dir)
        top_level = ", ".join(sorted(name for name in known if "." not in name))
        help_hint = f"All keys: python {sys.argv[0]} --help"
        return f"{key} is not a key of this tool{did_you_mean(nearest(key, known))} Keys: {top_level}. {help_hint}"
    if match := re.match(r"Ambiguous value for argument '(.+?)=(.*)'", str(error)):
        key, value = match.groups()
        return f"cannot read '{key}={value}': a list is written '{key}=[{value}]', a text '{key}=\"{value}\"'."
    if isinstance(error, ValueError) and (bad := [o for o in overrides if key_of(o) in ("", *groups_of(config_dir))]):
        return f"cannot read {' '.join(bad)}: a group takes the name of one of its options; see --help."
    return first_line(error) if isinstance(error, HydraException) else " ".join(str(error).split())


def known_keys(config_name: str, overrides: Sequence[str], config_dir: Path) -> list[str]:
    """Every dotted key and every group that the tool knows; under the overrides if they compose."""
    for attempt in (overrides, ()):
        try:
            with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
                cfg = compose(config_name, list(attempt))
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
        return sorted({*dotted_keys(OmegaConf.to_container(cfg)), *groups_of(config_dir)})
    return []


def groups_of(config_dir: Path) -> set[str]:
    folders = {path.parent.relative_to(config_dir).as_posix() for path in config_dir.rglob("*.yaml")}
    return folders - {"."}


def dotted_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from dotted_keys(value, f"{prefix}{key}.")


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def nearest(word: str, candidates: Sequence[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """The candidates most like word, best first. A word without a dot is compared with the last part of dotted keys."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, word, candidate).ratio()
        last = SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole if "." in word else 0.0, last), whole

    ranked = sorted(candidates, key=likeness, reverse=True)[:count]
    enough = max(cutoff, likeness(ranked[0])[0] - 0.15) if ranked else cutoff
    return [candidate for candidate in ranked if likeness(candidate)[0] >= enough]


def did_you_mean(guesses: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(guesses)}?" if guesses else "."


def explain(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for one that is ours."""
    if isinstance(error, InputError):
        return without_worker(str(error))
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: add {error.full_key}=... to the command line."
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}: choose another place, or change who may use this one."
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"cannot write {error.filename or 'a file'}: {os.strerror(error.errno).lower()}. Choose another place."
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported for its name
        return "the GPU's memory is full: lower train.batch_size or val.batch_size (and raise trainer.accumulate)."
    if isinstance(error, RuntimeError) and re.search(
        r"[Cc]onnection (closed|reset) by peer|remote process exited", str(error)
    ):
        return "another process of this run has ended; its own message says why."
    if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .*(killed|exited unexpectedly)", str(error)):
        return f"{first_line(error)} Memory, or /dev/shm, may be full: try workers=0, or data.cache=false."
    return None


def without_worker(message: str) -> str:
    """The message of an error that torch has passed on from a loader process, wrapped in that process's traceback."""
    if not re.match(r"Caught \w+ in (DataLoader worker|pin memory)", message):
        return message
    return re.split(r"^(?:\w+\.)*InputError: ", message, flags=re.MULTILINE)[-1].strip()


def report(message: str, rank: int, parent: int) -> None:
    """Print an error of the run once, though every rank may meet it.

    Another rank waits: if rank 0 met the error too, torchrun ends this process meanwhile, or Lightning's launcher,
    which is rank 0 and our parent, has gone. Otherwise the error is this rank's own, and nobody else will tell.
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


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
