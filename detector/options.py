"""What an option is: one definition beside the part that it configures.

A class of options (`Options`) has one field for each: its default is the published value, the text below it is the line
in --help, its type is the check, and `to_dict` is what a checkpoint holds. The part takes the class in its constructor:
`RPN(in_channels, stride, RPNOptions(channels=512))`.

pydantic rather than dataclasses, because it checks types and bounds; rather than OmegaConf's structured types, because
those express neither `auto | list` nor text that looks like a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.types import Strict

from detector.errors import InputError

# What most options are. Strict: true is no number, and "3" is none either.
Natural = Annotated[int, Strict(), Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=1)]
Positive = Annotated[float, Strict(), Field(gt=0)]
NotNegative = Annotated[float, Strict(), Field(ge=0)]
Share = Annotated[float, Strict(), Field(ge=0), Field(le=1)]
BelowOne = Annotated[float, Strict(), Field(ge=0), Field(lt=1)]
Flag = Annotated[bool, Strict()]


class Options(BaseModel):
    """A frozen set of options; unknown names and values that do not fit are refused.

    In Python by the constructor, with pydantic's ValidationError (a ValueError); from YAML, a command line or a
    checkpoint by `parse`, with an InputError of one line.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
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
            raise InputError(_in_one_line(error, values, where)) from None

    def to_dict(self) -> dict[str, Any]:
        """All options as plain types: what `parse` takes, and what a checkpoint holds."""
        return self.model_dump(mode="json")


def _in_one_line(error: ValidationError, values: Any, where: str) -> str:
    """The first thing that is wrong, as a user wrote it: key=value, then what is expected."""
    found = error.errors(include_url=False)
    first, path = found[0], _path(found[0], values, where)
    if first["type"] == "value_error":  # raised by a validator of the project: a sentence of its own
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return f"{path} is not an option."
    if first["type"] == "missing":
        return f"{path} is missing: add {path}=... to the command line."
    # Of a type with alternatives, `auto | list`, each says what it would take.
    expected = [_expectation(other) for other in found if _path(other, values, where) == path]
    shown = first["input"] if isinstance(first["input"], str) else json.dumps(first["input"], default=str)
    return f"{path}={shown}: expected {', or '.join(dict.fromkeys(expected))}."


def _expectation(error: Any) -> str:
    message: str = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return message[0].lower() + message[1:]


def _path(error: Any, values: Any, where: str) -> str:
    """Dotted name of the option; without the names of the types that pydantic tried, which are no keys."""
    parts, node = [where] if where else [], values
    for place, part in enumerate(error["loc"]):
        if isinstance(node, Mapping) and (
            part in node or (error["type"] == "missing" and place == len(error["loc"]) - 1)
        ):
            parts.append(str(part))
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part]
    return ".".join(parts)
