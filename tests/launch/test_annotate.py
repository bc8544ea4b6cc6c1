"""launch/annotate.py: a file in, a labelled copy with table and page out; what is refused, and what is never asked twice."""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import anndata
import pandas as pd
import pytest
from click.testing import CliRunner

from eval.annotate.heldout import count_right, overclustered, write_held_out
from launch.annotate import main, open_model
from tests.helpers.browser import Browser, find_chromium
from tests.helpers.clusters import TYPES, MarkerServer, clustered
from tests.helpers.commands import run_command, succeed

CANDIDATES = ",".join(TYPES)
KEY = "sk-a-key-that-must-not-be-written-down"
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def server():
    found = MarkerServer()
    yield found
    found.close()


@pytest.fixture
def mine(tmp_path) -> Path:
    """A user's file: 8 clusters of 4 types; no labels but the truth under a name of its own."""
    adata = clustered(list(TYPES), parts=2)
    adata.obs = adata.obs.rename(columns={"cell_type": "truth"})
    adata.write_h5ad(tmp_path / "mine.h5ad")
    return tmp_path / "mine.h5ad"


def words_of(file: Path, url: str, *more: object) -> list[str]:
    words = [file, "--cluster-key", "leiden", "--out", file.with_name("out.h5ad"), "--model", "m", "--endpoint", url]
    return [str(word) for word in (*words, "--candidates", CANDIDATES, "--max-cells", 3, *more)]


def call(file: Path, url: str, *more: object, exit_code: int = 0):
    """The command in this process."""
    done = CliRunner().invoke(main, words_of(file, url, *more), env={"OPENAI_API_KEY": KEY})
    assert done.exit_code == exit_code, (done.output, done.exception)
    return done


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow(2)
def test_a_file_comes_back_labelled_with_a_table_and_a_page(mine, server):
    before = digest(mine)
    done = call(mine, server.url, "--truth-key", "truth")
    assert digest(mine) == before
    said = (
        r"asking: (\d+) questions to narrow .*, then at least (\d+) questions for the votes, of up to ([\d,]+) letters"
    )
    first, votes, letters = (int(n.replace(",", "")) for n in re.search(said, done.stderr).groups())
    rows = mine.with_name("out.answers").joinpath("predictions.partial.jsonl").read_text().splitlines()[1:]
    stages = Counter(json.loads(row)["id"].split("-")[0] for row in rows)
    assert first == stages["screen"] and votes == 24 and 24 <= stages["vote"] <= 48, "8 clusters, 3 at a time, 8 rounds"
    assert max(map(len, server.prompts)) <= letters
    assert "for 8 of 8 clusters the best label is what most of their cells have in truth" in done.stdout
    found = anndata.read_h5ad(mine.with_name("out.h5ad"))
    assert (found.obs["cell_type_llm"].astype(str) == found.obs["truth"].astype(str)).all()
    assert isinstance(found.obs["cell_type_llm_second"].dtype, pd.CategoricalDtype)
    assert found.obs["cell_type_llm_confidence"].dtype == float
    record = found.uns["cell_type_llm"]
    assert (
        record["model"] == "m" and record["endpoint"] == server.url and json.loads(record["candidates"]) == list(TYPES)
    )
    assert set(json.loads(record["votes"])) == set(map(str, range(8))) and not any(
        "truth" in prompt for prompt in server.prompts
    )
    rows = list(csv.DictReader(mine.with_name("out.csv").open()))
    assert len(rows) == 8 and all(row["label"] in TYPES and row["cells"] == "12" for row in rows)
    assert all(row["shared_with"] for row in rows), "two clusters of each type"
    page = mine.with_name("out.html").read_text()
    assert "8 clusters, 4 cell types, 0 uncertain" in page and "<mark>" in page and 'class="umap"' in page
    assert "default-src 'none'" in page and "<script" not in page
    written = [path for path in mine.parent.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes() or path.name.startswith(".partial")]


@pytest.mark.slow(3)
def test_an_endpoint_that_fails_half_way_is_paid_once(mine, server):
    server.good = 9
    # in a process of its own, because a run that cannot go on ends its process at once
    done = run_command("annotate", *words_of(mine, server.url, "--concurrency", 1), env={"OPENAI_API_KEY": KEY})
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert (
        "--resume" in done.stderr
        and len(done.stderr.strip().splitlines()) <= 4  # what is averaged, the candidates, how much, and the error
        and not mine.with_name("out.h5ad").exists()
    )
    assert not mine.with_name("out.csv").exists() and not mine.with_name("out.html").exists()
    server.good = None
    refused = call(mine, server.url, exit_code=2)
    assert "holds answers of an earlier run" in refused.stderr
    call(mine, server.url, "--resume")
    n = len(server.prompts)
    rows = mine.with_name("out.answers").joinpath("predictions.partial.jsonl").read_text().splitlines()
    assert len(rows) - 1 == n, "a row for every answer that was bought, and no answer bought twice"
    call(mine, server.url, "--resume", "--min-confidence", 0.99)
    assert len(server.prompts) == n, "another limit needs no new answer"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--cluster-key", "luvain"), "no obs column 'luvain'"),
        (("--truth-key", "nothing"), "no obs column 'nothing'"),
        (("--candidates", "T cell"), "no such file, and no list of labels"),
        (("--top-genes", 0), "--top-genes 0"),
        (("--endpoint", "http://user:pass@127.0.0.1/v1"), "--endpoint: write it as https://HOST/v1"),
        (("--endpoint", "http://[::1/v1"), "--endpoint: write it as https://HOST/v1"),
        (("--key-env", "sk-secret"), "--key-env: give the NAME of an environment variable"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_asked(mine, server, more, said):
    done = call(mine, server.url, *more, exit_code=2)
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not server.prompts and sorted(path.name for path in mine.parent.iterdir()) == ["mine.h5ad"]


@pytest.mark.parametrize("name", ["out.html", "out.h5ad"])
def test_a_file_of_the_user_is_not_replaced(mine, server, name):
    own = mine.with_name(name)
    own.write_text("<p>my own report</p>")
    done = call(mine, server.url, exit_code=2)
    assert f"{name}: " in done.stderr and "would be replaced; name another --out" in done.stderr
    assert own.read_text() == "<p>my own report</p>" and not server.prompts


def test_output_that_cannot_be_written_leaves_nothing_half(mine, server):
    mine.with_name("out.html").mkdir()
    done = call(mine, server.url, exit_code=2)
    assert "out.html: is a folder" in done.stderr and not server.prompts
    assert sorted(path.name for path in mine.parent.iterdir()) == ["mine.h5ad", "out.html"]


def test_what_could_not_be_written_in_the_end_is_refused_before_anything_is_asked(mine, server):
    adata = anndata.read_h5ad(mine)
    adata.write_zarr(mine.with_name("mine.zarr"))
    assert "is a zarr store" in call(mine.with_name("mine.zarr"), server.url, exit_code=2).stderr
    odd = os.fsencode(mine.with_name("f")) + b"\xfcr.h5ad"
    os.link(mine, odd)
    assert "is not UTF-8; rename it" in call(Path(os.fsdecode(odd)), server.url, exit_code=2).stderr
    table = mine.with_name("out.csv")
    table.write_text("\n".join(TYPES))
    for more in ((), ("--candidates", table)):
        assert "out.csv" in call(mine, server.url, *more, exit_code=2).stderr
    assert table.read_text() == "\n".join(TYPES)
    assert not server.prompts and not mine.with_name("out.answers").exists()


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
@pytest.mark.slow(6)
def test_the_page_shows_names_of_the_file_as_text_and_fits_a_phone(tmp_path, server):
    adata = clustered(list(TYPES), parts=1)
    names = {"0": ATTACK, "1": "x" * 90, "2": "=1+1", "3": "CD4+/CD8+ (old)"}
    adata.obs["leiden"] = adata.obs["leiden"].astype(str).map(names).astype("category")
    adata.write_h5ad(tmp_path / "mine.h5ad")
    call(tmp_path / "mine.h5ad", server.url, "--truth-key", "cell_type")
    assert "'=1+1" in (tmp_path / "out.csv").read_text()
    with Browser(tmp_path / "profile", tmp_path / "got") as browser:
        for width in (1280, 400):
            browser.open(tmp_path / "out.html", width=width)
            assert browser.js("document.documentElement.scrollWidth") <= width
        assert ATTACK in browser.text("#cluster-0 h3") and browser.js("document.images.length") == 0
        assert browser.js("document.querySelectorAll('article').length") == 4
        assert browser.problems() == []


def test_held_out_cells_are_blind_and_cut_finer_than_their_types(tmp_path):
    adata = clustered(list(TYPES), parts=1, n_cells=13)
    blind, types = overclustered(adata, ["d1"], seed=0)
    assert "cell_type" not in blind.obs and sorted(types.values()) == sorted(list(TYPES) * 2)
    counts = blind.obs["cluster"].value_counts()
    assert sorted(counts) == [6] * 4 + [7] * 4
    truth = adata.obs["cell_type"].astype(str)[blind.obs_names]
    assert (blind.obs["cluster"].astype(str).map(types) == truth).all()
    adata.write_h5ad(tmp_path / "atlas.h5ad")
    (tmp_path / "report.json").write_text(json.dumps({"splits": {"test": {"donors": {"d1": 3}}}}))
    assert write_held_out(tmp_path / "atlas.h5ad", tmp_path / "report.json", tmp_path / "blind.h5ad", seed=0) == types
    assert json.loads((tmp_path / "blind.types.json").read_text()) == types
    best = dict(types) | {"0": "no such type"}
    rows = "".join(f"{cluster},{label.upper()}\n" for cluster, label in best.items())
    (tmp_path / "found.csv").write_text("cluster,best_label\n" + rows)
    assert count_right(tmp_path / "found.csv", tmp_path / "blind.types.json") == (7, 8)


@pytest.mark.vllm
@pytest.mark.slow(25)
def test_a_checkpoint_in_vllm_annotates_with_the_labels_it_was_trained_on(pipeline, tmp_path):
    """The pipeline's random policy writes no valid answer, which ends in one sentence; its candidates are asked."""
    write_held_out(pipeline / "atlas.h5ad", pipeline / "puzzles/report.json", tmp_path / "blind.h5ad", seed=0)
    given = ("--cluster-key", "cluster", "--out", tmp_path / "out.h5ad", "--model", pipeline / "base")
    given += ("--max-cells", 4, "--top-genes", 10, "--max-response-tokens", 16, "--samples", 2, "--screens", 1)
    labels = json.loads((pipeline / "puzzles/labels.json").read_text())["labels"]
    some = ",".join(list(labels)[:5])
    if any("," in label for label in list(labels)[:5]):
        (tmp_path / "labels.txt").write_text("\n".join(list(labels)[:5]))
        some = tmp_path / "labels.txt"
    done = run_command("annotate", tmp_path / "blind.h5ad", *given, "--candidates", some)
    assert done.returncode == 1 and "answers can be used" in done.stderr, (done.stdout, done.stderr)
    rows = (tmp_path / "out.answers/predictions.partial.jsonl").read_text().splitlines()
    assert len(rows) > 3 and not (tmp_path / "out.h5ad").exists()
    assert len(open_model(pipeline / "base").hashes["model"]) == 64
    assert "--cluster-key" in succeed("annotate", "--help")
