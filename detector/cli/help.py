"""--help: what a command does, and every option with its value and its own words."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from detector.cli.composition import COMMANDS, Composed, options_of
from detector.cli.words import usage
from detector.options import Options, shown

# In --help, comments stand no further to the right than behind so many characters, where lines allow it.
NOTE_COLUMN = 30


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
