"""The examples in docstrings and in the READMEs of the rooms run, and print what they say.

Modules and READMEs with an example (`>>>`) are found by looking. Each runs in an empty folder and may write files.
"""

import doctest
import importlib

import pytest

from tests.helpers.commands import ROOT
from tests.test_house import MAY_IMPORT, MODULES

WITH_EXAMPLES = sorted(name for name, path in MODULES.items() if ">>> " in path.read_text())
READMES = sorted(
    path for room in (*MAY_IMPORT, "tests") for path in (ROOT / room).rglob("README.md") if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(module):
        runner.run(example)
    result = runner.summarize(verbose=False)
    assert result.attempted > 0, f"{name} has >>> outside its docstrings"
    assert result.failed == 0, f"{result.failed} examples of {name} fail; their output is above"


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_readmes(path, tmp_path, monkeypatch):
    """A blank line before the closing fence of a code block ends the output of its last example."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(path), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0, f"{result.failed} examples of {path.relative_to(ROOT)} fail; their output is above"


def test_the_functions_that_users_call_have_an_example():
    for module, function in (
        ("data.puzzles", "read_puzzles"),
        ("data.puzzles", "Puzzle.to_row"),
        ("data.puzzles", "Puzzle.from_row"),
        ("data.build.build", "build_puzzles"),
        ("reward", "load_reward"),
        ("reward.cellpuzzles", "parse_response"),
        ("reward.cellpuzzles", "batch_reward"),
    ):
        found = doctest.DocTestFinder().find(importlib.import_module(module))
        assert [example for example in found if example.name == f"{module}.{function}" and example.examples], function


@pytest.mark.parametrize("room", ["data", "reward", "rollout"])
def test_the_tree_in_a_readme_has_every_file(room):
    """The last code block of the README has a line for each file, and each line begins with a file."""
    tree = (ROOT / room / "README.md").read_text().rsplit("```", 2)[1]
    named = {line.split()[0] for line in tree.strip().splitlines()}
    files = {str(path.relative_to(ROOT / room)) for path in (ROOT / room).rglob("*.py")}
    assert named <= files
    assert {name for name in files if not name.endswith("__init__.py")} <= named
