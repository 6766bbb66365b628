"""What a definition of options gives: defaults, checks, messages, and the names and types of what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from detector.errors import InputError
from detector.options import BelowOne, Count, Flag, Natural, Options, Positive, Share, names_in, type_of


class Square(Options):
    name: Literal["square"] = "square"
    side: Count = 1


class Circle(Options):
    name: Literal["circle"] = "circle"
    radius: Positive = 1.0
    """In pixels."""


class Split(Options):
    file: str = "all.json"
    limit: Count | None = None
    inner: Square = Square(side=2)


class Whole(Options):
    source: str | Path
    shape: Annotated[Square | Circle, Field(discriminator="name")] = Circle(radius=2.0)
    val: Split = Split(file="val.json", inner=Square(side=7))
    devices: Literal["auto"] | Count | list[Natural] = "auto"
    scale: Annotated[tuple[Positive, Positive], "two numbers above 0"] = (1.0, 1.0)
    share: Share = 0.5
    decay: BelowOne | None = None
    report: Split | Literal[False] = Split()
    lr_scales: dict[str, Positive] | None = None
    flag: Flag = False

    @model_validator(mode="after")
    def _check(self) -> Whole:
        if self.flag and self.decay:
            raise InputError("flag=true has no decay: leave one out.")
        return self


def parse(**values: object) -> Whole:
    return Whole.parse({"source": "a.jpg"} | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flag": 1}, "flag=1: expected true or false."),
        ({"share": 2}, "share=2: expected a number from 0 to 1."),
        ({"share": "x"}, "share=x: expected a number from 0 to 1."),
        ({"share": True}, "share=true: expected a number from 0 to 1."),
        ({"share": float("nan")}, "share=NaN: expected a number from 0 to 1."),
        ({"decay": 1.0}, "decay=1.0: expected a number from 0 to below 1, or null."),
        ({"val": {"limit": 0}}, "val.limit=0: expected a whole number, 1 or more, or null."),
        ({"val": {"limit": 1.5}}, "val.limit=1.5: expected a whole number, 1 or more, or null."),
        ({"val": {"inner": {"side": None}}}, "val.inner.side=null: expected a whole number, 1 or more."),
        ({"shape": {"radius": 0}}, "shape.radius=0: expected a number above 0."),
        ({"shape": {"name": "oval"}}, "shape.name=oval: expected one of 'square', 'circle'."),
        ({"shape": {"side": 3}}, "shape.side is not an option."),
        ({"devices": "two"}, "devices=two: expected auto, or a whole number, 1 or more, or a list [...], each a whole "
                             "number, 0 or more."),
        ({"devices": [-1]}, "devices=[-1]: expected auto"),
        ({"scale": [1]}, "scale=[1]: expected two numbers above 0."),
        ({"report": True}, "report=true: expected report.KEY=VALUE, or false."),
        ({"report": {"limit": "x"}}, "report.limit=x: expected a whole number, 1 or more, or null."),
        ({"lr_scales": {"a.b": -1}}, "lr_scales.a.b=-1: expected a number above 0."),
        ({"nothing": 3}, "nothing is not an option."),
        ({"source": True}, "source=true: expected a text"),
        ({"flag": True, "decay": 0.5}, "flag=true has no decay: leave one out."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_expected(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(**values)
    assert str(caught.value).startswith(message)


def test_what_is_missing_is_named_with_its_place() -> None:
    with pytest.raises(InputError, match=r"part\.source is missing: add part\.source=\.\.\. to the command line\."):
        Whole.parse({}, where="part")


def test_values_of_a_nested_set_change_its_default_and_keep_the_rest() -> None:
    options = parse(val={"limit": 3, "inner": {}}, shape={"radius": 5})
    assert (options.val.file, options.val.limit, options.val.inner.side) == ("val.json", 3, 7)
    assert options.shape == Circle(radius=5.0)
    assert parse(shape={"name": "square"}).shape == Square()  # of another kind: nothing of the circle's
    assert parse(report={"limit": 2}).report == Split(limit=2)
    assert parse(report=False).report is False


def test_a_name_that_the_default_could_have_too_keeps_the_rest() -> None:
    class Optimizer(Options):
        name: Literal["sgd", "adamw"] = "sgd"
        lr: Positive = 0.1

    class Outer(Options):
        optimizer: Optimizer = Optimizer(lr=0.5)

    assert Outer.parse({"optimizer": {"name": "adamw"}}).optimizer == Optimizer(name="adamw", lr=0.5)


def test_a_dict_of_values_is_one_value() -> None:
    class Rates(Options):
        lr_scales: dict[str, Positive] = Field({"head": 3.0})

    assert Rates.parse({"lr_scales": {"backbone": 0.1}}).lr_scales == {"backbone": 0.1}


def test_options_survive_their_plain_form() -> None:
    options = parse(val={"limit": 3}, shape={"name": "square"}, lr_scales={"backbone": 0.1})
    assert Whole.parse(options.to_dict()) == options


def test_in_python_a_wrong_value_is_pydantics_error() -> None:
    with pytest.raises(ValidationError):
        Square(side=0)


def test_every_option_is_found_by_its_dotted_name() -> None:
    assert [name for name in names_in(Whole) if type_of(Whole, *name.split(".")) is None] == []
    assert {"val.inner.side", "shape.side", "shape.radius", "report.file"} <= set(names_in(Whole))
    assert type_of(Whole, "shape", "side") is not None
    assert type_of(Whole, "lr_scales", "backbone") is not None
    assert [type_of(Whole, *names) for names in (["nothing"], ["val", "nothing"], ["share", "x"])] == [None] * 3
