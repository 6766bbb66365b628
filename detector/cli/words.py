"""Single words of a command line: their values, as typed or by Hydra's grammar, and what a wrong one may have meant."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from detector.errors import InputError
from detector.options import alternatives, expected

QUOTED = re.compile(r"""(?P<quote>["'])(?P<text>(?:\\.|(?!(?P=quote))[^\\])*)(?P=quote)""")
LIST_ITEM = re.compile(rf"\s*((?:{QUOTED.pattern}|\[[^\[\]]*\])(?=\s*(?:,|$))|[^,]*?)\s*(?:,|$)")


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
    if text.isdecimal() and (int in members or Any in members) and str(int(text)) == text:  # 01 is a name
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
