"""How much one must read: the path of a GRPO step, file and function sizes, rooms, and what the README promises."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from launch.demo import DemoConfig
from launch.options import read_recipe
from trainer.config import GrpoConfig, SftConfig

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("data", "reward", "rollout", "trainer", "eval", "launch")
STEP_PATH = (
    "trainer/grpo.py", "trainer/packing.py", "trainer/policy.py", "trainer/logprobs.py", "trainer/advantages.py",
    "trainer/objective.py", "trainer/metrics.py", "rollout/__init__.py", "rollout/vllm_engine.py", "rollout/sync.py",
    "reward/__init__.py", "reward/scoring.py",
)  # fmt: skip
"""What a step that goes well runs through. Around it, and not counted: settings, run folder, world and watch, bundles, what
names a bad token; below it: the model's layers, which are transformers', and their attention (trainer/attention.py)."""
MAY_IMPORT = {
    "data": {"data"},
    "reward": {"data", "reward"},
    "rollout": {"data", "rollout"},
    "trainer": {"data", "reward", "rollout", "trainer"},
    "eval": {"data", "reward", "rollout", "eval"},
}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]


def test_a_grpo_step_is_at_most_12_files_and_2500_lines():
    assert len(STEP_PATH) <= 12
    assert sum(len((ROOT / name).read_text().splitlines()) for name in STEP_PATH) <= 2500


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_and_function_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert text.isascii()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


def test_rooms_import_only_what_they_may():
    for path in SOURCES:
        room = path.parent.name
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = {name.split(".")[0] for name in names} & set(ROOMS)
            assert ours <= MAY_IMPORT.get(room, set(ROOMS)), f"{path}: imports {ours}"


def test_recipes_parse():
    recipes = sorted((ROOT / "launch/recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        keys = yaml.safe_load(recipe.read_text())
        config = DemoConfig if "h5ad" in keys else SftConfig if recipe.stem.startswith("sft") else GrpoConfig
        assert read_recipe(config, recipe)


def test_readme_is_short_and_names_what_exists():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for name in re.findall(r"(?:launch|trainer|reward|rollout|data|eval|tests)/[\w/]+\.(?:py|yaml|tsv|png)", text):
        assert (ROOT / name).is_file(), f"README names {name}"


def test_the_objective_is_short_and_flat():
    """At most 250 lines; no branch (if, for, while, with, try) inside another inside another."""
    text = (ROOT / "trainer/objective.py").read_text()
    assert len(text.splitlines()) <= 250

    def depth(node: ast.AST, inside: int = 0) -> int:
        deeper = inside + isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try))
        return max([deeper, *(depth(child, deeper) for child in ast.iter_child_nodes(node))])

    assert depth(ast.parse(text)) <= 2
