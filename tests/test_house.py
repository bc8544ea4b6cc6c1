"""The house: which room may import which, no circles, how much a reader must read, and what the READMEs promise.

Nothing here is a list of files that somebody must keep up: everything is found by looking.
"""

import ast
import re
from pathlib import Path

import pytest
import yaml

from eval.ablation.settings import AblateConfig
from launch.demo import DemoConfig
from launch.options import read_recipe
from tests.helpers.commands import ROOT
from trainer.config import GrpoConfig
from trainer.ppo.settings import PpoConfig
from trainer.sft.settings import SftConfig

MAY_IMPORT = {
    "data": {"data"},
    "reward": {"data", "reward"},
    "rollout": {"data", "rollout"},
    "trainer": {"data", "reward", "rollout", "trainer"},
    "eval": {"data", "reward", "rollout", "eval"},
    "launch": {"data", "reward", "rollout", "trainer", "eval", "launch"},
}
SOURCES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
STEP_ELSEWHERE = ("rollout", "rollout.vllm_engine", "rollout.sync", "reward", "reward.scoring")
"""The files outside trainer/ that a GRPO step runs through."""


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full.values()}
    return found & set(MODULES)


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def reach(start: str) -> set[str]:
    """A module and all it imports, directly or not."""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += GRAPH[name]
    return seen


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_rooms_import_only_what_they_may():
    for name, targets in GRAPH.items():
        room = name.split(".")[0]
        assert {target.split(".")[0] for target in targets} <= MAY_IMPORT[room], f"{name} imports {targets}"


def test_no_circle_of_files():
    for name, targets in GRAPH.items():
        assert not [target for target in targets if name in reach(target)], f"{name} is imported by what it imports"


def test_a_room_has_at_most_12_files_and_every_room_a_readme():
    for room in MAY_IMPORT:
        assert (ROOT / room / "README.md").is_file()
    for folder in {path.parent for path in SOURCES}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        limit = 30 if folder.name == "launch" else 12  # launch/ has a file per command
        assert len(files) <= limit, f"{folder} has {len(files)} files"
    assert max(len(path.relative_to(ROOT).parts) for path in SOURCES) == 3, "rooms have one inner level"


def test_what_a_step_runs_through_is_short():
    """All files directly in trainer/, and the five of rollout/ and reward/; what importing them takes along is bounded too.

    What runs at the other end, in vLLM's worker, a reward's or a sampler's process, is not counted.
    """
    step = [MODULES[name] for name in MODULES if MODULES[name].parent == ROOT / "trainer"]
    step += [MODULES[name] for name in STEP_ELSEWHERE]
    assert len(step) <= 14
    assert sum(map(lines, step)) <= 3500  # of which a tenth is comments
    # a kernel computes what PyTorch's operations beside it do: nobody reads it to follow a step
    assert len([name for name in reach("trainer.grpo") if not name.startswith("trainer.kernels")]) <= 45


def test_what_a_ppo_step_runs_through_is_mostly_grpos():
    """At most 14 files as well, the settings left out: nobody reads them to follow a step."""
    names = [name for name, path in MODULES.items() if path.parent in (ROOT / "trainer", ROOT / "trainer/ppo")]
    step = [name for name in names if MODULES[name].stem not in ("__init__", "config", "settings")]
    step += STEP_ELSEWHERE
    assert len(step) <= 14, step
    assert set(step) <= reach("trainer.ppo.ppo")
    assert len([name for name in step if name in reach("trainer.grpo")]) >= 12
    assert not [name for name in reach("trainer.grpo") if name.startswith("trainer.ppo")], "GRPO needs no critic"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_not_huge(path):
    """400 lines and 60 are a reason to look (the designs say so); at these it is time to split.

    540: the run folder also holds what a critic saves, and a file more would be one more in the closure of a GRPO run.
    """
    text = path.read_text()
    assert len(text.splitlines()) <= 540
    assert text.isascii()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 110, f"{node.name} is too long"


def test_nothing_is_unpickled():
    """A pickle runs code where it is read. Also torch's object collectives, and numpy's object arrays."""
    loads = re.compile(
        r"\b(pickle|dill|joblib|shelve|marshal)\.|torch\.load\(|np\.load\(|allow_pickle|weights_only\s*=\s*False"
        r"|read_pickle|\bnumpy\.load\(|from (pickle|dill|joblib|shelve|marshal) import"
        r"|from (torch|numpy) import [^\n]*\bload\b|yaml\.(unsafe_)?load\("
        r"|(gather|broadcast|scatter|send|recv)_object|trust_remote_code\s*=\s*True"
    )
    for path in SOURCES:
        code = ast.unparse(without_texts(ast.parse(path.read_text())))
        assert not loads.search(code), f"{path}: {loads.search(code)[0]}"


def without_texts(tree: ast.AST) -> ast.AST:
    """The tree with every text emptied: what a message says is no call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return tree


def test_recipes_parse():
    recipes = sorted((ROOT / "launch/recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        keys = yaml.safe_load(recipe.read_text())
        of_name = {"sft": SftConfig, "ppo": PpoConfig}.get(recipe.stem.partition("_")[0], GrpoConfig)
        of_keys = DemoConfig if {"h5ad", "cells_h5ad"} & set(keys) else AblateConfig if "arms" in keys else of_name
        assert read_recipe(of_keys, recipe)


def test_launch_is_thin():
    commands = list((ROOT / "launch").glob("*.py"))
    assert sum(map(lines, commands)) < 87 * len(commands)
    assert max(map(lines, commands)) <= 260


def test_the_formatter_is_hardly_ever_off():
    texts = [path.read_text() for path in (*SOURCES, *(ROOT / "tests").rglob("*.py")) if path != Path(__file__)]
    assert sum(len(re.findall(r"# fmt: (?:skip|off)", text)) for text in texts) <= 60


def test_the_root_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert max(map(len, text.splitlines())) <= 100


def test_readmes_name_what_exists():
    for readme in [
        ROOT / "README.md",
        *(path for room in (*MAY_IMPORT, "tests") for path in (ROOT / room).rglob("*.md")),
    ]:
        text = readme.read_text()
        for name in re.findall(r"(?:launch|trainer|reward|rollout|data|eval|tests)/[\w/]+\.(?:py|yaml|tsv|png)", text):
            assert (ROOT / name).is_file(), f"{readme} names {name}"


def test_the_objective_is_short_and_flat():
    """At most 280 lines with its documentation; no branch (if, for, while, with, try) inside another inside another."""
    text = (ROOT / "trainer/objective.py").read_text()
    assert len(text.splitlines()) <= 280

    def depth(node: ast.AST, inside: int = 0) -> int:
        deeper = inside + isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try))
        return max([deeper, *(depth(child, deeper) for child in ast.iter_child_nodes(node))])

    assert depth(ast.parse(text)) <= 2
