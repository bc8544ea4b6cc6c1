"""--help: every option of every command is listed, once, under the heading of its section."""

import dataclasses
import importlib
import re

import click
import pytest
from click.testing import CliRunner

from data.errors import RunError
from data.options import flag_of
from launch.options import OTHER, argument, command, option
from tests.helpers.commands import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if "__main__" in path.read_text())
HAVE_SECTIONS = ("demo", "distill", "evaluate", "selfdistill")


def help_of(main: click.Command) -> str:
    done = CliRunner().invoke(main, ["--help"], terminal_width=100)
    assert done.exit_code == 0, done.output
    return done.stdout


def sections(text: str) -> dict[str, list[str]]:
    """{heading: flags listed under it} of a --help text."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"(\S.*):", line):
            found[heading[1]] = []
        elif (named := re.match(r"  (--[a-z0-9-]+)", line)) and found:
            found[list(found)[-1]].append(named[1])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_once(name):
    main = importlib.import_module(f"launch.{name}").main
    listed = [one for flags in sections(help_of(main)).values() for one in flags]
    options = [parameter for parameter in main.params if isinstance(parameter, click.Option)]
    assert sorted(listed) == sorted(["--help", *(parameter.opts[0] for parameter in options)])


@pytest.mark.parametrize("name", HAVE_SECTIONS)
def test_long_help_has_sections_and_no_option_is_left_without(name):
    found = sections(help_of(importlib.import_module(f"launch.{name}").main))
    assert len(found) >= 4 and list(found)[-1] == OTHER
    assert found[OTHER] == ["--recipe", "--help"]


def test_an_option_stands_under_its_section_and_own_fields_come_first():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Base:
        dtype: str = option("float32", "Weights.", ("float32", "bfloat16"), section="Precision")
        steps: int = option(1, "Steps.", section="Run")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Base):
        bundle: str = argument("A folder.")
        out: str = option(dataclasses.MISSING, "A folder.", section="Run")
        resume: bool = option(False, "Go on.")

    @command(Config)
    def main(config) -> None:
        """Do it."""

    found = sections(help_of(main))
    assert found == {
        "Run": ["--out", "--steps"],
        "Precision": ["--dtype"],
        OTHER: ["--recipe", "--resume", "--help"],
    }


def test_without_sections_the_heading_is_the_usual_one():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        out_folder: str = option("x", "A folder.")

    @command(Config)
    def main(config) -> None:
        """Do it."""

    assert sections(help_of(main)) == {"Options": ["--recipe", flag_of("out_folder"), "--help"]}


def test_a_run_that_failed_says_why_in_this_process_too():
    """Commands end at once after a RunError; in a test the process is pytest, so conftest.py has it raise SystemExit."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        steps: int = option(1, "Steps.")

    @command(Config)
    def main(config) -> None:
        """Do it."""
        raise RunError("rank 1 died")

    done = CliRunner().invoke(main, [])
    assert done.exit_code == 1 and done.output == "Error: rank 1 died\n"
