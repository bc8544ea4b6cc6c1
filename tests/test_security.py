"""What strangers' files, pages, ports and links can do: nothing that the user did not ask for.

A reward that the user names is the only code that is imported from a path (reward/README.md).
"""

import json
import os
import pickle
import re
import shutil
import stat
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner

from data.build.staging import Staging
from data.distill.meter import Meter
from data.distill.responses import RawFile
from data.errors import UserError
from data.files import (
    append_rows,
    lock_folder,
    remove_folder,
    replacing_folder,
    unlock_folder,
    weight_files,
    write_whole,
)
from data.folder import staged
from data.formats.stores import open_store
from data.puzzles import Puzzle, write_puzzles
from eval.report.html import TEMPLATE as REPORT
from eval.report.html import page, with_policy
from eval.report.stepview import COLUMNS, step_page
from eval.report.stepview import TEMPLATE as STEP
from eval.review.page import TEMPLATE as REVIEW
from eval.similarity import LabelEncoder
from launch.options import read_recipe
from rollout.link import open_store as open_meeting
from rollout.teachers.openai import read_key
from tests.helpers.browser import Browser, find_chromium
from tests.helpers.commands import ROOT, run_command
from trainer.config import GrpoConfig
from trainer.model.loading import load_weights
from trainer.model.opening import read_adapter
from trainer.record.runfolder import Checkpoint, list_checkpoints, save_checkpoint, save_tensors

ATTACK = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


class RunsCode:
    """Its pickle makes a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


# ---- pickles


def test_the_pickle_of_these_tests_runs_code_where_it_is_read(tmp_path):
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    "codecs",
    [
        {"dtype": "<f4", "compressor": None, "filters": [{"id": "pickle", "protocol": 5}]},
        {"dtype": "<f4", "compressor": {"id": "pickle", "protocol": 5}, "filters": None},
        {"dtype": "|O", "compressor": {"id": "pickle", "protocol": 5}, "filters": [{"id": "vlen-utf8"}]},
        {"dtype": "|O", "compressor": None, "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}]},
    ],
)
def test_a_store_whose_chunks_are_pickles_is_refused_and_runs_nothing(tmp_path, codecs, monkeypatch):
    pickles = pytest.importorskip("numcodecs.pickles")
    monkeypatch.setattr(pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)  # as older versions of numcodecs
    store = tmp_path / "cells.zarr"
    (store / "x").mkdir(parents=True)
    (store / ".zgroup").write_text('{"zarr_format": 2}')
    array = {"zarr_format": 2, "shape": [1], "chunks": [1], "fill_value": None, "order": "C", **codecs}
    (store / "x/.zarray").write_text(json.dumps(array))
    (store / "x/0").write_bytes(pickle.dumps(np.array([RunsCode(tmp_path / "ran")], dtype=object)))
    with open_store(store, "") as opened, pytest.raises((KeyError, OSError)):
        opened["x"][...]
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_pickles_are_refused_and_run_nothing(pipeline, tmp_path):
    bad = RunsCode(tmp_path / "ran")
    shutil.copytree(pipeline / "base", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    torch.save({"a": bad}, tmp_path / "model/pytorch_model.bin")
    for read in (weight_files, lambda folder: load_weights(str(folder))):
        with pytest.raises(UserError, match="its weights are in .bin files"):
            read(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    torch.save({"a": bad}, tmp_path / "adapter/adapter_model.bin")
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        read_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"--medcpt {tmp_path / 'model'}: transformers cannot load an encoder"):
        LabelEncoder(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_a_recipe_runs_nothing_and_is_bounded(tmp_path):
    def refused(text: str) -> str:
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(Exception, match="--recipe") as caught:
            read_recipe(GrpoConfig, tmp_path / "r.yaml")
        assert type(caught.value).__name__ == "UsageError" and len(str(caught.value)) < 1000
        return str(caught.value)

    assert "not valid YAML" in refused(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']")
    assert not (tmp_path / "ran").exists()
    # each alias doubles: as text 2 ** 40 letters
    bomb = "".join(f", &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))
    assert "needs one value" in refused(f"model: [&a0 [x, x]{bomb}]")
    for text in ("model: 2024-99-99", "lr: !!float abc", "lr: !!timestamp x", "[" * 5000, "steps: " + "9" * 5000):
        assert "not valid YAML" in refused(text)
    for text in ("steps: .inf", "steps: 1e400", "steps: " + "9" * 500):
        assert "is not an int" in refused(text)
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(Exception, match="not valid YAML"):
        read_recipe(GrpoConfig, tmp_path / "r.yaml")


# ---- pages


def step_page_with(text: str) -> str:
    tokens = [dict.fromkeys(COLUMNS, 0) | {"mask": True, "token": text, "row": 0}]
    responses = [{"puzzle_id": text, "response": 1, "reward": 1, "status": text}]
    return step_page(1, {"reward": text}, responses, tokens, {0: text}, formula=text)


@pytest.mark.parametrize("template", [REPORT, STEP, REVIEW], ids=lambda path: path.stem)
def test_a_page_loads_nothing_and_runs_only_its_own_scripts(template):
    text = with_policy(template.read_text())
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', text)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in rules["script-src"] and text.index(policy) < text.index("<title>")
    assert rules["script-src"].count("'sha256-") == len(re.findall("<script>", text))
    assert not re.search(r"""\son\w+\s*=\s*["']|javascript:|(?:src|href)\s*=\s*["']https?:""", text)


def test_every_html_template_has_the_policy():
    templates = [path for room in ("eval", "trainer", "launch", "data") for path in (ROOT / room).rglob("*.html")]
    assert len(templates) == 3 and all('content="{{policy}}"' in path.read_text() for path in templates)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
@pytest.mark.slow(6)
def test_what_files_and_models_say_is_shown_and_never_run(tmp_path):
    (tmp_path / "step.html").write_text(step_page_with(ATTACK))
    unescaped = page("t", [f"<p id=there>{ATTACK}</p>"])  # as if somebody forgot to escape
    (tmp_path / "report.html").write_text(unescaped)
    leaky = step_page_with("x").replace("</h1>", f"</h1>{ATTACK}")
    (tmp_path / "leaky.html").write_text(leaky)
    with Browser(tmp_path / "profile", tmp_path / "got") as browser:
        browser.open(tmp_path / "step.html", width=1000)
        assert (
            browser.js("document.title") != "owned"
            and ATTACK in browser.text("body")
            and browser.js("document.images.length") == 0
        )
        assert browser.problems() == []  # of this page, whose own script has run
        for name in ("report", "leaky"):
            browser.open(tmp_path / f"{name}.html", width=1000)
            assert browser.js("document.title") != "owned", name
        assert "Content Security Policy" in str(browser.problems())


# ---- keys


@pytest.mark.parametrize(("value", "key"), [("sk-abc\n", "sk-abc"), (" sk-abc\r\n", "sk-abc"), ("", "")])
def test_a_key_comes_without_the_line_end_of_its_file(monkeypatch, value, key):
    monkeypatch.setenv("SOME_KEY", value)
    assert read_key("SOME_KEY") == key


@pytest.mark.parametrize("value", ["sk-s\xe9cret", "sk secret", "sk-\rsecret", "sk-secret\x01"])
def test_a_malformed_key_is_refused_without_being_shown(monkeypatch, tmp_path, value):
    monkeypatch.setenv("SOME_KEY", value)
    puzzle = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["a", "b"], answer=["a", "b"])
    write_puzzles(tmp_path / "p.jsonl", [puzzle])
    from launch.distill import main as distill
    from launch.evaluate import main as evaluate

    url = "http://127.0.0.1:9/v1"
    for command, words in (
        (evaluate, ["--out", "o", "--endpoint", url]),
        (distill, ["--out", "o/t.jsonl", "--teacher", "openai", "--base-url", url]),
    ):
        words = [*words, "--puzzles", str(tmp_path / "p.jsonl"), "--model", "m", "--key-env", "SOME_KEY"]
        done = CliRunner().invoke(command, words)
        assert done.exit_code == 2 and "--key-env SOME_KEY: its value holds a space or" in done.stderr
        assert "cret" not in done.output


# ---- ports

LISTENS = """
import json, os, sys
import psutil, torch
from trainer.ranks.world import join_world
os.environ.pop("GLOO_SOCKET_IFNAME", None)
world = join_world()
assert world.gather([1]) == [1] and world.size == 1 and os.environ["GLOO_SOCKET_IFNAME"] == "lo"
print(json.dumps([c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]))
"""


@pytest.mark.slow(6)
def test_a_run_of_one_process_listens_on_no_interface_of_the_network(tmp_path):
    (tmp_path / "listens.py").write_text(LISTENS)
    done = run_command(tmp_path / "listens.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) <= {"127.0.0.1", "::1"}


def test_the_store_of_a_split_run_listens_where_it_is_asked_to():
    store, address = open_meeting("lo", 0)
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [place.ip for place in listening if place.port == address.port] == ["127.0.0.1"]
    assert address.token not in repr(address)
    del store


# ---- files: modes and links


def test_files_have_the_users_umask(tmp_path):
    before = os.umask(0o007)
    try:
        write_whole(tmp_path / "a/whole.json", "{}")
        append_rows(tmp_path / "rows.jsonl", [{"a": 1}])
        puzzle = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["a", "b"], answer=["a", "b"])
        for ending in ("parquet", "jsonl"):
            write_puzzles(tmp_path / f"p.{ending}", [puzzle])
        with replacing_folder(tmp_path / "folder") as partial:
            save_tensors({"a": torch.ones(1)}, partial / "a.safetensors")
        with RawFile(tmp_path / "t.raw.jsonl", {}, Meter(), resume=False, replace=False, sync=False):
            pass
        lock_folder(tmp_path / "locked")
        with staged(tmp_path / "puzzles", resume=False) as staging:
            (tmp_path / "x.h5ad").touch()
            staging.save(tmp_path / "x.h5ad", "f", {}, {})
        with h5py.File(tmp_path / "h.h5ad", "w"):
            pass
    finally:
        os.umask(before)
    try:
        for path in tmp_path.rglob("*"):
            wanted = 0o770 if path.is_dir() else 0o660
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    finally:
        unlock_folder(tmp_path / "locked")


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder of somebody else, to which links lead."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.jsonl").write_text("years of work")
    (tmp_path / "precious/lock").write_text("mine")
    yield tmp_path / "precious"
    assert (tmp_path / "precious/thesis.jsonl").read_text() == "years of work"
    assert (tmp_path / "precious/lock").read_text() == "mine"


def test_what_is_removed_is_the_link_and_not_what_it_points_to(tmp_path, precious):
    link = tmp_path / "link"
    link.symlink_to(precious)
    remove_folder(link)
    assert not link.is_symlink()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/link").symlink_to(precious)
    remove_folder(tmp_path / "inside", must=True)
    assert not (tmp_path / "inside").exists()
    (tmp_path / "made.partial").symlink_to(precious)
    (tmp_path / ".made.replaced").symlink_to(precious)
    (tmp_path / "made").symlink_to(precious)
    for text in ("first", "second"):
        with replacing_folder(tmp_path / "made") as partial:
            (partial / "file").write_text(text)
        assert (tmp_path / "made/file").read_text() == text and not (tmp_path / "made").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "made"}


def test_a_checkpoint_that_is_a_link_is_unlinked_when_its_turn_comes(tmp_path, precious):
    (precious / "state.json").write_text("{}")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-000001").symlink_to(precious)
    empty = Checkpoint(step=2, adapter={"a": torch.ones(1)}, adapter_config={}, moments={})
    save_checkpoint(tmp_path / "run", empty, newest_kept=1)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000002"]
    assert (precious / "state.json").is_file()


def test_a_build_refuses_a_linked_folder_of_finished_files(tmp_path, precious):
    (tmp_path / ".puzzles.building").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.puzzles\.building is a symbolic link"), staged(tmp_path / "puzzles", False):
        pass
    Staging(tmp_path / ".puzzles.building").remove()
    assert not (tmp_path / ".puzzles.building").is_symlink()


def test_a_lock_that_is_a_link_empties_no_other_file(tmp_path, precious):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(precious / "lock")
    with pytest.raises(UserError, match="cannot be written"):
        lock_folder(tmp_path / "run")
    (tmp_path / ".puzzles.building").mkdir()
    (tmp_path / ".puzzles.building/lock").symlink_to(precious / "lock")
    with pytest.raises(OSError), staged(tmp_path / "puzzles", False):
        pass
