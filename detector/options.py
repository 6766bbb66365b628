"""What an option is: one definition beside the part that it configures.

A class of options (`Options`) has one field for each: its default is the published value, the text below it is the line
in --help, its type is the check, and `to_dict` is what a checkpoint holds. The part takes the class in its constructor:
`RPN(in_channels, stride, RPNOptions(channels=512))`.

pydantic rather than dataclasses, because it checks types and bounds; rather than OmegaConf's structured types, because
those express neither `auto | list` nor text that looks like a number.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.types import Strict

from detector.errors import InputError

# What most options are. Strict: true is no number, and "3" is none either.
Natural = Annotated[int, Strict(), Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=1)]
Threads = Annotated[int, Strict(), Field(ge=1), Field(le=4096)]  # torch ends in an overflow beyond 32 bits
Positive = Annotated[float, Strict(), Field(gt=0)]
NotNegative = Annotated[float, Strict(), Field(ge=0)]
Share = Annotated[float, Strict(), Field(ge=0), Field(le=1)]
BelowOne = Annotated[float, Strict(), Field(ge=0), Field(lt=1)]
Flag = Annotated[bool, Strict()]

# A text in a type says in a message what is expected, where the type alone does not: Annotated[list[Positive], "..."].
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


class Options(BaseModel):
    """A frozen set of options; unknown names and values that do not fit are refused.

    In Python by the constructor, with pydantic's ValidationError (a ValueError); from YAML, a command line or a
    checkpoint by `parse`, with an InputError of one line.

    Values given for a nested set change its default: what is not given keeps what the outer class says.
    """

    # A path or a name is a text, also where YAML or Python has it as a number: 2024 is "2024".
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        coerce_numbers_to_str=True,
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """From plain values, as YAML, a command line or a checkpoint has them.

        Args:
            values: may leave out any option that has a default.
            where: dotted name of the place, the beginning of every name in a message: "light_head".

        Raises:
            InputError: names the option, its value, and what is expected.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(_in_one_line(cls, error.errors(include_url=False)[0], values, where)) from None

    @classmethod
    def parse_recorded(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """As `parse`, of what an earlier version wrote down: options that no longer exist are left out.

        Raises:
            InputError: a value does not fit.
        """
        values = copy.deepcopy(dict(values))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                if detail["type"] == "extra_forbidden":
                    *outer, name = detail["loc"]
                    _inner(values, outer).pop(name, None)
        return cls.parse(values, where)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain types: what `parse` takes, and what a checkpoint holds."""
        return self.model_dump(mode="json")

    @model_validator(mode="before")
    @classmethod
    def _change_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {name: _changed(defaults.get(name), _plain(given)) for name, given in values.items()}


def _inner(values: Any, path: Sequence[int | str]) -> Any:
    """What lies there in plain values; parts of the path that are no keys are names of types that pydantic tried."""
    for part in path:
        if isinstance(part, int) if isinstance(values, list) else part in values:
            values = values[part]
    return values


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's, in lists and mappings too; numpy need not be there."""
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) is dict:
        return {_plain(key): _plain(one) for key, one in value.items()}
    return value


def _changed(default: Any, given: Any) -> Any:
    """The given value; of a set of options whose default is of the same kind, its default with what is given."""
    if not isinstance(default, Options) or not isinstance(given, Mapping):
        return given
    own = {name: getattr(default, name) for name in type(default).model_fields}
    kinds = get_args(type(default).model_fields["name"].annotation) if "name" in own else ()
    if kinds and given.get("name", kinds[0]) not in kinds:  # another backbone has options of its own
        return given
    return own | {name: _changed(own.get(name), value) for name, value in given.items()}


def type_of(options: type[Options], *names: str) -> Any:
    """The type that an option is declared with, by the names that lead to it; None where there is none."""
    kind: Any = options
    for name in names:
        found = [hints[name] for part in sets_in(kind) if name in (hints := _hints(part))]
        values = [get_args(part)[1] for part in alternatives(kind) if get_origin(part) is dict]
        if not found + values:
            return None
        kind = Union[tuple(found or values)]  # noqa: UP007 - of a tuple
    return kind


def names_in(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all options below a type, outer ones first."""
    for part in sets_in(kind):
        for name, inner in _hints(part).items():
            yield prefix + name
            yield from names_in(inner, f"{prefix}{name}.")


def sets_in(kind: Any) -> list[type[Options]]:
    """The classes of options that a type consists of: several in a union."""
    return [part for part in alternatives(kind) if isinstance(part, type) and issubclass(part, Options)]


def alternatives(kind: Any) -> list[Any]:
    """The members of a union, with what Annotated says taken away; of another type itself."""
    if get_origin(kind) is Annotated:
        return alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [part for member in get_args(kind) for part in alternatives(member)]
    return [kind]


def _hints(options: type[Options]) -> dict[str, Any]:
    hints = get_type_hints(options, include_extras=True)
    return {name: hints[name] for name in options.model_fields}


def _in_one_line(options: type[Options], error: Any, values: Any, where: str) -> str:
    """What is wrong, as a user wrote it: key=value, then what is expected."""
    if error["type"] == "value_error":  # raised by a validator of the project: a sentence of its own
        return str(error["ctx"]["error"])
    names, value = _place(error, values)
    path = ".".join(filter(None, (where, *names)))
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return f"{path} is not an option."
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        return f"{path} is missing: add {path}=... to the command line."
    if error["type"] == "union_tag_invalid":  # what kind of backbone
        return f"{path}.name={error['ctx']['tag']}: expected one of {error['ctx']['expected_tags']}."
    return f"{path}={shown(value)}: expected {expected(type_of(options, *names), path)}."


def _place(error: Any, values: Any) -> tuple[list[str], Any]:
    """Names that lead to the option, and its value; without places in a list, and types that pydantic tried."""
    names: list[str] = []
    for name in error["loc"]:
        if isinstance(values, Mapping) and (
            name in values or (error["type"] == "missing" and name == error["loc"][-1])
        ):
            names.append(str(name))
            values = values.get(name)
    return names, values


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(_plain(value), default=str, ensure_ascii=False)


def typed(key: str, text: str) -> str:
    """What to type for key=text in a shell (POSIX), so that the option becomes just this text."""
    if re.fullmatch(r"null|(['\"]).*\1|\[.*\]", text):  # would mean more than itself
        text = '"' + text.replace('"', r"\"") + '"'
    return shlex.quote(f"{key}={text}")


def expected(kind: Any, path: str) -> str:
    """What a type takes, in words."""
    if get_origin(kind) is Annotated:
        kind, *details = get_args(kind)
        if words := [detail for detail in details if isinstance(detail, str)]:
            return words[0]
        bounds = {
            name: getattr(bound, name)
            for detail in details
            for bound in getattr(detail, "metadata", ())
            for name in ("ge", "gt", "le", "lt")
            if hasattr(bound, name)
        }
        return expected(kind, path) + _within(bounds)
    if get_origin(kind) in (Union, types.UnionType):
        return ", or ".join(expected(member, path) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(map(shown, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        inner = [part for part in get_args(kind) if part is not ...]
        return f"a list [...], each {expected(inner[0], path)}" if inner else "a list [...]"
    if sets_in(kind):
        return f"{path}.KEY=VALUE"
    if get_origin(kind) is dict:
        return f"{{NAME: VALUE}}, each {expected(get_args(kind)[1], path)}"
    return _WORDS.get(kind, "another value")


def _within(bounds: Mapping[str, float]) -> str:
    match bounds:
        case {"ge": low, "le": high}:
            return f" from {low} to {high}"
        case {"ge": low, "lt": high}:
            return f" from {low} to below {high}"
        case {"ge": low}:
            return f", {low} or more"
        case {"gt": low, "le": high}:
            return f" above {low}, {high} at most"
        case {"gt": low}:
            return f" above {low}"
    return ""
