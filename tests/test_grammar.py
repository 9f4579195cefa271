"""Options typed behind another part of a chained command than their own."""

from __future__ import annotations

import ast
from typing import Any

import click
import pytest
from in_process import Finished, invoke

from patchcore.cli.grammar import ChainedCommand

Typed = dict[str, dict[str, Any]]


@click.group("cook", cls=ChainedCommand, required_steps=("boil",), once=("--name",))
@click.argument("dish")
@click.option("--time", type=int, default=0)
@click.option("--name")
@click.option("--quiet", is_flag=True)
def cook(**options: Any) -> None:
    """Stands for any chained command."""


@cook.result_callback()
def _show(steps: list[tuple[str, Typed]], **own: Any) -> None:
    click.echo(repr({"cook": own, **dict(steps)}))


@cook.command("boil")
@click.argument("what")
@click.option("--heat", type=int, default=0)
@click.option("--lid", is_flag=True)
@click.option("--salt", is_flag=True)
@click.option("--spice", multiple=True)
def _boil(**typed: Any) -> tuple[str, Typed]:
    return "boil", typed


@cook.command("fry")
@click.argument("what")
@click.option("--heat", type=int, default=0)
@click.option("-p", "--pan", type=float, default=0.0)
@click.option("-pa", "--parts", type=int, default=0)
@click.option("--salt", type=int, default=0)
def _fry(**typed: Any) -> tuple[str, Typed]:
    return "fry", typed


@cook.command("serve")
@click.argument("what")
@click.option("--heat", type=int, default=0)
@click.option("-pl", "--plate")
def _serve(**typed: Any) -> tuple[str, Typed]:
    return "serve", typed


def typed(line: str) -> Typed:
    """Return what reaches each part of `cook`, or fail with the error."""
    finished = invoke(cook, *line.split())
    assert finished.code == 0, finished.err
    values = ast.literal_eval(finished.out)
    assert isinstance(values, dict)
    return values


SAME_LINES = [
    "soup --time 3 --quiet boil --spice a --spice b --lid rice fry -p 0.5 -pa 2 egg",
    "soup boil rice fry egg --time 3 --quiet --spice a --spice b --lid -p 0.5 -pa 2",
    "soup boil rice fry egg --time=3 --spice=a --quiet --spice=b --lid -p0.5 --parts=2",
    "--pan 0.5 soup -pa 2 boil --time 3 rice fry --spice a --lid --quiet egg --spice b",
    "--spice a --spice b soup fry --lid egg boil rice --pan=0.5 --quiet -pa=2 --time 3",
]


@pytest.mark.parametrize("line", SAME_LINES)
def test_an_option_reaches_its_part_from_anywhere(line: str) -> None:
    assert typed(line) == typed(SAME_LINES[0])


def test_the_present_part_wins() -> None:
    values = typed("soup boil --heat 1 rice fry egg --heat 2 serve all --heat 3")
    assert [values[part]["heat"] for part in ("boil", "fry", "serve")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "time"),
    [
        ("soup --time 1 boil rice --time 2", 2),
        ("soup --time 1 boil --time 2 rice --time 3", 3),
        ("--time 1 soup --time 2 boil rice", 2),
        ("soup boil rice --time=2 --time 1", 1),
    ],
)
def test_the_later_value_counts(line: str, time: int) -> None:
    assert typed(line)["cook"]["time"] == time


def test_an_option_of_one_value_may_be_repeated_with_it_anywhere() -> None:
    assert typed("soup --name a boil rice --name=a fry egg --name a")["cook"]["name"] == "a"


def test_an_option_typed_before_its_part_does_not_beat_the_parts_own() -> None:
    assert typed("soup --pan 1 boil rice --pan 2 fry --pan 3 egg")["fry"]["pan"] == 3
    assert typed("soup fry --spice a egg boil --spice b rice --spice c")["boil"]["spice"] == ("b", "c")


def test_a_repeatable_option_typed_behind_a_later_part_replaces_what_was_typed_before() -> None:
    assert typed("soup boil --spice a rice --spice b fry egg --spice=c --spice d")["boil"]["spice"] == ("c", "d")
    assert typed("--spice a soup boil rice fry --spice b egg")["boil"]["spice"] == ("b",)


def test_a_value_may_look_like_a_step_or_an_option() -> None:
    values = typed("soup boil rice serve boil --name fry --plate -x")
    assert values["cook"]["name"] == "fry" and values["serve"] == {"what": "boil", "heat": 0, "plate": "-x"}
    assert "fry" not in values


def test_a_flag_of_another_part_takes_no_argument_for_its_value() -> None:
    values = typed("soup boil rice fry --quiet egg")
    assert values["cook"]["quiet"] and values["fry"]["what"] == "egg"


def test_of_two_homes_the_typed_one_is_meant() -> None:
    assert typed("soup --heat 4 boil rice")["boil"]["heat"] == 4
    assert typed("soup boil rice --pan 1 fry egg")["fry"]["pan"] == 1


def test_a_spelled_out_option_elsewhere_comes_before_a_value_attached_here() -> None:
    values = typed("soup boil rice fry -pl blue egg serve all")
    assert (values["serve"]["plate"], values["fry"]["pan"]) == ("blue", 0.0)


REFUSED = {
    "unknown everywhere": ("soup boil rice --spize a", "boil has no option '--spize': did you mean --spice"),
    "of a step that is not typed": ("soup boil rice --plate a", "boil has no option '--plate': it belongs to serve"),
    "attached, not typed": ("soup boil rice -p0.5", "it belongs to fry"),
    "of two typed steps": (
        "soup --heat 1 boil rice fry egg",
        "cook has no option '--heat': it belongs to boil and",
    ),
    "flag in one, value in the other": ("soup --salt boil rice", "it belongs to boil and fry"),
    "two values of an option that has one": (
        "soup --name a boil rice --name=b",
        "--name is 'a' and then 'b': type it once",
    ),
    "value missing": ("soup boil rice --time", "'--time' of cook needs a value"),
    "value for a flag": ("soup boil rice --quiet=1", "--quiet"),
    "not a number": ("soup boil rice --time big", "'big'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_clear_home_is_one_line(case: str) -> None:
    line, expected = REFUSED[case]
    finished: Finished = invoke(cook, *line.split())
    assert finished.code == 2 and expected in finished.err
    assert len(finished.error_lines) == 1 and finished.out == ""


def test_help_says_the_rule() -> None:
    shown = " ".join(invoke(cook, "--help").out.split())
    assert "goes to the step that has it" in shown and "it replaces what was typed of it before" in shown
