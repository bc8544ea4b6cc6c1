"""launch/evaluate.py: saved predictions, baselines, vLLM, an endpoint; comparing, resuming, and what it says."""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from data.distill.distill import Request
from data.errors import RunError, UserError
from data.puzzles import Puzzle, read_puzzles, read_rows, write_puzzles, write_rows
from data.variants import convert
from eval.breakdowns import notes_on_reuse
from eval.evaluation import average_of, evaluation_of, puzzles_digest
from eval.metrics import METRICS, answer_of, score, wilson_interval
from eval.predict import Answer, Partial, answer_all, ask_engine, ask_teacher, refused_for_good, row_of
from eval.published import DISEASES, comparable, evaluation_markdown
from eval.settings import EvaluateConfig, settings_of
from launch.evaluate import fingerprint_of, main
from rollout import Sampling
from rollout.torch_engine import TorchEngine
from tests.helpers.commands import ROOT, run_command, succeed
from trainer.model.loading import load_tokenizer
from trainer.model.opening import base_under, files_fingerprint, served_settings

NAMES = ["T cell", "B cell", "NK cell", "monocyte"]
KEY = "sk-a-key-that-must-not-be-written-down"


def make_puzzles(n: int, disease: str = "melanoma") -> list[Puzzle]:
    """Puzzles of 3 cells; the answer to each begins with another label."""
    found = []
    for i in range(n):
        labels = [NAMES[(i + j) % 4] for j in range(3)]
        found.append(
            Puzzle(
                id=f"p{i}",
                context="The cell is from a male.",
                cells=[[f"G{i}", f"H{j}"] for j in range(3)],
                candidates=sorted(labels),
                answer=labels,
                meta={"donor": f"d{i % 2}", "disease": disease, "tissue": "skin of body"},
            )
        )
    return found


def save(path, puzzles: list[Puzzle], right: int) -> None:
    """Predictions, the first `right` all right, the others rotated."""
    rows = [
        {
            "id": p.id,
            "prediction": answer_of(p.answer if i < right else p.answer[1:] + p.answer[:1]),
            "response_tokens": 7,
        }
        for i, p in enumerate(puzzles)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(*arguments: object) -> Result:
    """The command in this process; it starts faster."""
    return CliRunner().invoke(main, [str(word) for word in arguments])


def evaluated(*arguments: object) -> str:
    """evaluate that must exit 0; returns its standard output."""
    done = evaluate(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def melanoma(tmp_path):
    puzzles = make_puzzles(8)
    write_puzzles(tmp_path / "melanoma.jsonl", puzzles)
    save(tmp_path / "half.jsonl", puzzles, 4)
    save(tmp_path / "most.jsonl", puzzles, 7)
    return tmp_path, puzzles


def test_saved_predictions_with_everything_beside_them(melanoma):
    folder, puzzles = melanoma
    out = succeed(
        "evaluate",
        "--puzzles",
        folder / "melanoma.jsonl",
        "--predictions",
        folder / "half.jsonl",
        "--out",
        folder / "o",
    )
    found, rows = metrics_of(folder / "o"), read_rows(folder / "o/predictions.jsonl")
    assert [row["id"] for row in rows] == [puzzle.id for puzzle in puzzles]
    expected = score([row["prediction"] for row in rows], puzzles, [7] * 8).to_dict()
    assert {name: found[name] for name in expected} == expected  # today's keys, at the top
    assert list(found)[: len(expected)] == list(expected) and found["batch_accuracy"] == 0.5
    assert json.loads(out.splitlines()[0].removeprefix("melanoma ")) == expected
    assert list(found["intervals"]) == list(METRICS) and found["response_length_unit"] == "tokens"
    low, high = found["intervals"]["batch_accuracy"]
    assert low < 0.5 < high and found["interval"]["batches"] == 8
    assert found["breakdowns"]["disease"][0]["value"] == "melanoma" and "k_sample" not in found
    assert {(row["table"], row["setting"]) for row in found["published"]["rows"]} == {
        ("Table 2", "test"),
        ("Table 3", "melanoma"),
    }
    page = (folder / "o/evaluation.md").read_text()
    assert "names every cell right in 50.0 % of 8 batches (95 % interval " in page
    assert "| Cell-o1, melanoma, Table 3 (published) |  | 54.0 % |  | 85.9 % |  |" in page
    assert "| cells right by chance |" in page and "| 3 | 8 | 50.0 % (" in page and "| 33.3 % |" in page
    again = folder / "again"
    evaluated("--puzzles", folder / "melanoma.jsonl", "--predictions", folder / "o", "--out", again)
    assert (again / "evaluation.md").read_text() == page  # the same predictions, the same page


def test_comparing_with_another_model(melanoma):
    folder, puzzles = melanoma
    asked = ("--puzzles", folder / "melanoma.jsonl", "--predictions", folder / "most.jsonl")
    evaluated(*asked, "--out", folder / "o", "--compare", folder / "half.jsonl")
    found = metrics_of(folder / "o")["compare"]["metrics"]["batch_accuracy"]
    assert (found["ours"], found["theirs"], found["difference"]) == (7 / 8, 0.5, 3 / 8)
    assert found["interval"][0] <= 3 / 8 <= found["interval"][1] and 0 < found["p"] < 0.2
    assert "| batches all right | 87.5 % | 50.0 % | +37.5 (" in (folder / "o/evaluation.md").read_text()
    other = make_puzzles(8, disease="influenza")
    other[0].cells[0][0] = "X"  # the same ids, another puzzle
    write_puzzles(folder / "other.jsonl", other)
    succeed(
        "evaluate",
        "--puzzles",
        folder / "other.jsonl",
        "--predictions",
        folder / "half.jsonl",
        "--out",
        folder / "other",
    )
    save(folder / "more.jsonl", make_puzzles(9), 9)
    for wrong in ("other", "more.jsonl"):
        done = evaluate(*asked, "--out", folder / "no", "--compare", folder / wrong)
        assert done.exit_code == 2 and "answers other puzzles than --puzzles" in done.stderr
        assert isinstance(done.exception, SystemExit) and not (folder / "no").exists()


def test_several_files_and_their_unweighted_average(melanoma):
    folder, puzzles = melanoma
    few = make_puzzles(2, disease="breast carcinoma")
    write_puzzles(folder / "breast_cancer.jsonl", few)
    files = ("--puzzles", folder / "melanoma.jsonl", "--puzzles", folder / "breast_cancer.jsonl")
    for name, right in (("melanoma", 4), ("breast_cancer", 2)):
        (folder / "saved" / name).mkdir(parents=True)
        save(folder / "saved" / name / "predictions.jsonl", puzzles if name == "melanoma" else few, right)
    evaluated(*files, "--predictions", folder / "saved", "--out", folder / "o")
    found = json.loads((folder / "o/average.json").read_text())
    assert found["average"]["batch_accuracy"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["average"]["over"] == ["melanoma", "breast_cancer"]
    assert metrics_of(folder / "o/breast_cancer")["batch_accuracy"] == 1.0
    page = (folder / "o/evaluation.md").read_text()
    assert "Cell-o1, breast cancer, Table 3 (published)" in page and "Unweighted average over the files" in page
    assert not (folder / "o/metrics.json").exists()  # each file has its own


def test_cell_level_and_open_ended_files(melanoma, tmp_path):
    folder, puzzles = melanoma
    for variant in ("cell", "open"):
        made = convert(puzzles, variant)
        write_puzzles(folder / f"{variant}.jsonl", made)
        save(folder / f"{variant}_answers.jsonl", made, len(made) - 1)
        evaluated(
            "--puzzles",
            folder / f"{variant}.jsonl",
            "--predictions",
            folder / f"{variant}_answers.jsonl",
            "--out",
            folder / variant,
        )
    cells = metrics_of(folder / "cell")
    # rotating a single label changes nothing: all 24 cells are right, and so are their 8 batches
    assert cells["n_puzzles"] == 24 and cells["interval"]["batches"] == 8
    assert cells["decomposition"]["spoiled"]["batch_accuracy"] == 1.0
    assert {row["table"] for row in cells["published"]["rows"]} == {"Table 11"}
    page, together = (folder / "cell/evaluation.md").read_text().split("## Cells put together into batches (Table 11)")
    assert "24 single cells of 8 batches" in page and "Table 11 (published)" not in page
    assert (
        "| Cell-o1, cell-level, reasoning, Table 11 (published) | 1.1 % | 50.2 % |  | 84.3 % | 66.1 % | 718.5 |"
        in together
    ), "its values are no shares of 991 cells"
    assert "batches all right" not in page and "| cells right |" in page, "a single cell is no batch"
    assert "Cells right in single batches" not in together and "Cells right in single batches" not in page
    assert "average" in {row["setting"] for row in comparable("batch", [*DISEASES, "normal"])["rows"]}
    assert "average" not in {row["setting"] for row in comparable("batch", [*DISEASES, "influenza"])["rows"]}
    assert "not beside exact matches" in (folder / "open/evaluation.md").read_text()
    assert "Table 12 (published)" not in (folder / "open/evaluation.md").read_text()
    assert metrics_of(folder / "open")["batch_accuracy"] == pytest.approx(7 / 8)
    assert {row["table"] for row in metrics_of(folder / "open")["published"]["rows"]} == {"Table 12"}


def test_a_limit_on_single_cells_keeps_whole_batches(melanoma):
    folder, puzzles = melanoma
    cells = convert(puzzles, "cell")
    write_puzzles(folder / "cell.jsonl", cells)
    asked = ("--puzzles", folder / "cell.jsonl", "--baseline", "random", "--out", folder / "o", "--limit")
    evaluated(*asked, 8)
    assert metrics_of(folder / "o")["n_puzzles"] == 6 and metrics_of(folder / "o")["interval"]["batches"] == 2
    done = evaluate(*asked, 2)
    assert done.exit_code == 2 and "hold no whole batch, the first of which has 3 cells: raise --limit" in done.stderr
    write_puzzles(folder / "torn.jsonl", cells[:-1])  # known before anything is asked
    done = evaluate("--puzzles", folder / "torn.jsonl", "--baseline", "random", "--out", folder / "no")
    assert (
        done.exit_code == 2 and "torn.jsonl: batch p7: 1 of its 3 cells" in done.stderr and not (folder / "no").exists()
    )


def test_samples_in_saved_predictions_are_k_answers(melanoma):
    folder, puzzles = melanoma
    rows = [{"id": p.id, "samples": [answer_of(p.answer), "?", answer_of(p.answer)]} for p in puzzles]
    (folder / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    succeed(
        "evaluate", "--puzzles", folder / "melanoma.jsonl", "--predictions", folder / "k.jsonl", "--out", folder / "o"
    )
    found = metrics_of(folder / "o")
    assert found["batch_accuracy"] == 1.0  # of the first answers
    assert found["k_sample"]["mean"]["batch_accuracy"] == pytest.approx(2 / 3)
    assert found["k_sample"]["pass_at_k"]["1"]["value"] == pytest.approx(2 / 3)
    assert (
        found["k_sample"]["pass_at_k"]["2"]["value"] == 1.0
        and found["k_sample"]["majority_vote"]["batch_accuracy"] == 1.0
    )
    assert "## 3 answers per batch" in (folder / "o/evaluation.md").read_text()


def test_consensus_says_how_far_the_vote_can_be_trusted(melanoma):
    """Eight puzzles of three cells: three answers each, two right and one with the first two labels exchanged."""
    folder, puzzles = melanoma
    right, wrong = ([answer_of(p.answer) for p in puzzles] for _ in range(2))
    wrong = [answer_of([p.answer[1], p.answer[0], p.answer[2]]) for p in puzzles]
    rows = [{"id": p.id, "samples": [w, r, r], "greedy": w} for p, r, w in zip(puzzles, right, wrong, strict=True)]
    (folder / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--puzzles", folder / "melanoma.jsonl", "--predictions", folder / "k.jsonl", "--out", folder / "o")
    evaluated(*asked, "--compare", folder / "half.jsonl", "--consensus", "--consensus-threshold", 0.7)
    found, text = metrics_of(folder / "o"), (folder / "o/evaluation.md").read_text()
    vote = found["k_sample"]["consensus"]
    assert found["k_sample"]["cell_vote"]["batch_accuracy"] == 1.0, "the vote labels every cell, whatever the threshold"
    assert (vote["cells_confident"], vote["cell_accuracy"]) == (pytest.approx(1 / 3), 1.0)  # the third cell: 3 of 3
    assert (vote["batches_confident"], vote["batch_accuracy"], vote["threshold"]) == (0.0, None, 0.7)
    assert found["k_sample"]["greedy"]["batch_accuracy"] == 0.0
    against = found["compare"]["consensus"]["batch_accuracy"]
    assert (against["ours"], against["theirs"]) == (1.0, found["compare"]["metrics"]["batch_accuracy"]["theirs"])
    assert "33.3 % (33.3 to 33.3) of the cells have a label that at least 70.0 % of the valid answers give them" in text
    assert "one answer, greedy" in text and "this, by the one-to-one vote" in text
    evaluated(*asked, "--consensus")  # the default: half of the answers
    vote = metrics_of(folder / "o")["k_sample"]["consensus"]
    assert (vote["threshold"], vote["cells_confident"], vote["batch_accuracy"]) == (0.5, 1.0, 1.0)
    evaluated(*asked)
    assert "consensus" not in metrics_of(folder / "o")["k_sample"], "nothing new unless asked for"


def test_tokens_of_saved_predictions_are_counted_with_a_tokenizer(pipeline, melanoma):
    folder, puzzles = melanoma
    (folder / "bare.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "prediction": answer_of(p.answer)}) + "\n" for p in puzzles)
    )
    asked = ("--puzzles", folder / "melanoma.jsonl", "--predictions", folder / "bare.jsonl", "--out", folder / "o")
    evaluated(*asked)
    assert metrics_of(folder / "o")["response_length_unit"] == "words"
    evaluated(*asked, "--tokenizer", pipeline / "base")
    found, rows = metrics_of(folder / "o"), read_rows(folder / "o/predictions.jsonl")
    tokenizer = load_tokenizer(str(pipeline / "base"))
    expected = [len(tokenizer(row["prediction"], add_special_tokens=False)["input_ids"]) for row in rows]
    assert [row["response_tokens"] for row in rows] == expected and found["response_length_unit"] == "tokens"
    assert found["response_length"] == pytest.approx(sum(expected) / 8)


def test_baselines_by_command(pipeline, tmp_path):
    found = {}
    for name in ("random", "markers", "nearest-assigned"):
        arguments = ["--puzzles", pipeline / "puzzles/test.parquet", "--baseline", name, "--out", tmp_path / name]
        if name != "random":
            arguments += ["--train", pipeline / "puzzles/train.parquet"]
        evaluated(*arguments)
        found[name] = metrics_of(tmp_path / name)
        assert found[name]["format_validity"] == found[name]["uniqueness"] == 1.0
    assert found["random"]["cell_accuracy"] < 0.6 < found["markers"]["cell_accuracy"]
    assert found["random"]["cell_accuracy"] < found["nearest-assigned"]["cell_accuracy"]
    assert found["markers"]["name"] == "baseline markers"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give either --model, --predictions or --baseline"),
        (("--baseline", "random", "--consensus"), "a baseline gives one: leave it out"),
        (("--model", "m", "--consensus"), "--consensus needs several answers to a puzzle: give --samples 8"),
        (("--model", "m", "--consensus-threshold", 0.5), "--consensus-threshold goes with --consensus"),
        (("--model", "m", "--samples", 2, "--consensus", "--consensus-threshold", 2), "at least 0 and at most 1"),
        (
            ("--predictions", "FOLDER/half.jsonl", "--consensus"),
            "have one answer to each puzzle; give some with several",
        ),
        (("--baseline", "random", "--model", "m"), "give either --model, --predictions or --baseline"),
        (("--baseline", "nearest"), "learns from training puzzles; name their file with --train"),
        (("--model", "m", "--train", "t"), "--train goes with --baseline"),
        (("--baseline", "random", "--endpoint", "http://x"), "--endpoint goes with --model"),
        (("--model", "m", "--samples", "4", "--temperature", "0"), "gives the same answer again: raise --temperature"),
        (("--model", "m", "--samples", "0"), "--samples 0: must be at least 1"),
        (("--baseline", "random", "--resume"), "--samples and --resume are for a --model"),
        (("--model", "m", "--endpoint", "https://far.example/v1"), "environment variable NO_SUCH_KEY holds no key"),
        (("--model", "m", "--endpoint", "https://user:word@far.example/v1"), "--endpoint: write it as https://HOST/v1"),
        *(
            (("--model", "m", "--endpoint", url), "--endpoint: write it as")
            for url in ("localhost:8000/v1", "http://h:x/v1")
        ),
        (("--model", "m", "--key-env", "sk-secret"), "--key-env: give the NAME of an environment variable"),
        (("--predictions", "none.jsonl"), "--predictions none.jsonl: no such file"),
        (("--baseline", "random", "--medcpt", "."), "--medcpt .: no config.json there"),
        (("--predictions", "FOLDER/odd.jsonl"), "prediction row 0: its id is \"['p0']\"; write the puzzle's id"),
        (("--predictions", "FOLDER/half.jsonl", "--compare", "FOLDER/odd.jsonl"), "row 0: its id is \"['p0']\""),
    ],
)
def test_mistakes_are_told_in_a_sentence(melanoma, arguments, words):
    folder, _ = melanoma
    (folder / "odd.jsonl").write_text('{"id": ["p0"], "prediction": "x"}\n' * 8)
    always = ("--puzzles", folder / "melanoma.jsonl", "--out", folder / "o", "--key-env", "NO_SUCH_KEY")
    done = evaluate(*always, *(str(word).replace("FOLDER", str(folder)) for word in arguments))
    assert done.exit_code == 2 and words in done.stderr and isinstance(done.exception, SystemExit)
    assert not (folder / "o").exists()


def test_answers_that_were_cut_inside_a_character_and_odd_numbers_beside_them(melanoma):
    folder, puzzles = melanoma
    cut = "no <think> \ud83d"
    rows = [{"id": p.id, "samples": [cut, cut], "samples_finish_reasons": 3} for p in puzzles]
    rows = [row | {"greedy": cut, "greedy_tokens": float("nan")} for row in rows]
    (folder / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--puzzles", folder / "melanoma.jsonl", "--predictions", folder / "k.jsonl", "--consensus")
    evaluated(*asked, "--out", folder / "o")
    assert [row["samples"][0] for row in read_rows(folder / "o/predictions.jsonl")] == [cut] * 8
    assert metrics_of(folder / "o")["batch_accuracy"] == 0


def test_a_compared_file_has_its_own_name_whatever_lies_beside_it(melanoma):
    folder, _ = melanoma
    answers = folder / "answers"
    answers.mkdir()
    for name in ("half", "most"):
        shutil.copy(folder / f"{name}.jsonl", answers)
    evaluated("--puzzles", folder / "melanoma.jsonl", "--predictions", answers / "half.jsonl", "--out", answers)
    asked = ("--puzzles", folder / "melanoma.jsonl", "--predictions", answers / "half.jsonl")
    evaluated(*asked, "--out", folder / "o", "--compare", answers / "most.jsonl")
    assert metrics_of(folder / "o")["compare"]["other"] == str(answers / "most.jsonl")


def test_a_damaged_metrics_json_is_named(melanoma):
    folder, _ = melanoma
    asked = ("--puzzles", folder / "melanoma.jsonl", "--out", folder / "again")
    evaluated("--puzzles", folder / "melanoma.jsonl", "--predictions", folder / "half.jsonl", "--out", folder / "o")
    (folder / "o/metrics.json").write_text('{"name": ')
    for arguments in (
        ("--predictions", folder / "o"),
        ("--predictions", folder / "half.jsonl", "--compare", folder / "o"),
    ):
        done = evaluate(*asked, *arguments)
        assert (
            done.exit_code == 2 and "o/metrics.json: not JSON" in done.stderr and isinstance(done.exception, SystemExit)
        )
    with pytest.raises(ValueError, match=r"metrics\.json: not JSON"):
        Partial(folder / "o", {}, resume=True)


def test_tokens_that_are_no_numbers_are_said(melanoma):
    folder, puzzles = melanoma
    rows = [json.loads(line) for line in (folder / "half.jsonl").read_text().splitlines()]
    rows[1]["response_tokens"], rows[2]["response_tokens"] = float("nan"), "7"
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = evaluate(
        "--puzzles", folder / "melanoma.jsonl", "--predictions", folder / "some.jsonl", "--out", folder / "o"
    )
    assert (
        done.exit_code == 0
        and "2 of 8 predictions state no number of tokens, so all lengths are in words" in done.stderr
    )
    assert metrics_of(folder / "o")["response_length_unit"] == "words"
    assert metrics_of(folder / "o")["notes"][0].startswith("2 of 8 predictions")
    assert "Mind: 2 of 8 predictions state no number of tokens" in (folder / "o/evaluation.md").read_text()


def test_a_table_of_predictions_says_which_formats_are_read(melanoma):
    folder, _ = melanoma
    (folder / "answers.csv").write_text("id,prediction\np0,x\n")
    asked = ("--puzzles", folder / "melanoma.jsonl", "--out", folder / "o")
    for flag, more in (("--predictions", ()), ("--compare", ("--baseline", "random"))):
        done = evaluate(*asked, flag, folder / "answers.csv", *more)
        assert done.exit_code == 2 and "predictions are read from .jsonl, .json or .parquet" in done.stderr


def test_the_average_of_two_evaluations_is_named_after_neither(melanoma):
    folder, puzzles = melanoma
    write_puzzles(folder / "other.jsonl", puzzles)
    for name in ("melanoma", "other"):
        evaluated(
            "--puzzles",
            folder / f"{name}.jsonl",
            "--predictions",
            folder / ("half.jsonl" if name == "other" else "most.jsonl"),
            "--out",
            folder / "saved" / name,
        )
    files = ("--puzzles", folder / "melanoma.jsonl", "--puzzles", folder / "other.jsonl")
    evaluated(*files, "--predictions", folder / "saved", "--out", folder / "o")
    assert (folder / "o/evaluation.md").read_text().startswith(f"# {folder / 'saved'} on 2 files")


def test_a_baseline_that_learns_from_its_own_test_is_said(melanoma):
    folder, puzzles = melanoma
    asked = ("--puzzles", folder / "melanoma.jsonl", "--baseline", "nearest", "--train", folder / "melanoma.jsonl")
    done = evaluate(*asked, "--out", folder / "o")
    assert (
        done.exit_code == 0
        and "melanoma: the training puzzles leak into these, so expect too good numbers" in done.stderr
    )
    note, few = metrics_of(folder / "o")["notes"]
    assert few == "the puzzles are of 2 donors only: the intervals do not cover how donors differ"
    assert (
        "a donor that --train has too: 2 donors" in note
        and f"Mind: {note}." in (folder / "o/evaluation.md").read_text()
    )


def test_puzzles_of_two_kinds_are_not_mixed(melanoma):
    folder, puzzles = melanoma
    write_puzzles(folder / "mixed.jsonl", [*puzzles, *convert(puzzles[:1], "open")])
    done = evaluate("--puzzles", folder / "mixed.jsonl", "--baseline", "random", "--out", folder / "o")
    assert done.exit_code == 2 and "holds batch and open puzzles; evaluate each kind by itself" in done.stderr


# ---- resuming


def test_answers_of_a_model_are_not_replaced_without_a_word(tmp_path, monkeypatch):
    """They took hours, or cost money."""
    puzzles, settings = make_puzzles(3), {"model": "m", "model_files": "2 files, ab", "seed": 1}
    ids = {puzzle.id for puzzle in puzzles}

    def refused(why: str, resume: bool = False, wanted: set[str] | None = ids, **changed: object) -> bool:
        with pytest.raises(UserError, match=why):
            Partial(tmp_path, settings | changed, resume, wanted=wanted)
        return True

    partial = Partial(tmp_path, settings, resume=False)
    rows = answer_all(puzzles, asker(Counter()), partial, chunk=4, whole_chunks=False, name="test")
    assert refused("--out: .*partial.jsonl holds 3 answers of an unfinished run: --resume goes on with it")
    (tmp_path / "predictions.partial.jsonl").write_text("{}\n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert refused("predictions.partial.jsonl, line 1: is damaged")
    partial.remove()
    write_rows(tmp_path / "predictions.jsonl", rows)
    (tmp_path / "metrics.json").write_text(json.dumps({"run": settings}))
    before = (tmp_path / "predictions.jsonl").read_bytes()
    assert refused("was made with seed 1, and this run has 2: name another folder, or remove .*metrics.json", seed=2)
    assert refused("was made with other files of the model: name another folder", model_files="2 files, cd")
    for resume in (False, True):
        assert refused("goes with answers to 1 puzzles that this run does not ask, p2", resume, ids - {"p2"})
    Partial(tmp_path, settings, resume=False, wanted=ids)  # the same answers again
    paid = settings | {"endpoint": "https://h/v1"}
    (tmp_path / "metrics.json").write_text(json.dumps({"run": paid}))
    assert refused("holds 3 answers that may have cost money: --resume keeps them; or name another", **paid)
    assert len(Partial(tmp_path, paid, resume=True, wanted=ids).rows) == 3
    (tmp_path / "metrics.json").write_text(json.dumps({"run": settings}))
    Partial(tmp_path, settings | {"model": "m, moved"}, resume=False, wanted=ids | {"p9"})
    again = {"predictions": str(tmp_path)}  # scored anew
    Partial(tmp_path, again, resume=False, wanted=ids)
    assert refused("goes with answers to 1 puzzles", wanted=ids - {"p2"}, **again)
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    (tmp_path / "predictions.jsonl").write_bytes(before[5:])
    assert refused("predictions.jsonl, line 1: not JSON .*; put a copy of the file back, or name another --out")
    (tmp_path / "predictions.jsonl").write_bytes(before)
    (tmp_path / "metrics.json").write_text(json.dumps({"run": again}))  # still the only copy of the answers
    assert refused("was made with .*: name another folder")
    Partial(tmp_path, again, resume=False, wanted=ids)
    # ---- a path of another working directory
    (tmp_path / "metrics.json").write_text(json.dumps({"run": {"predictions": "predictions.jsonl"}}))
    assert refused("was made with .*: name another folder")
    # ---- a file of that name in today's is another one, whose answers replace none
    (tmp_path / "today").mkdir()
    monkeypatch.chdir(tmp_path / "today")
    write_rows("predictions.jsonl", rows)
    with pytest.raises(UserError, match="goes with answers to 2 puzzles"):
        Partial(tmp_path, {"predictions": "predictions.jsonl"}, resume=False, wanted={"p0"})
    (tmp_path / "metrics.json").write_text(json.dumps({"run": settings}))
    for name in ("predictions.jsonl", "./predictions.jsonl", "."):
        with pytest.raises(UserError, match="was made with .*: name another folder"):
            Partial(tmp_path, {"predictions": name}, resume=False, wanted=ids)
    # ---- answers of another program, which has written no metrics.json
    (tmp_path / "metrics.json").unlink()
    assert refused("predictions.jsonl holds 3 answers, and no metrics.json says whose they are: name another folder")
    with pytest.raises(UserError, match="holds 3 answers, and no metrics.json"):
        Partial(tmp_path, {"baseline": "random"}, resume=False, wanted=ids)
    with pytest.raises(UserError, match="goes with answers to 1 puzzles"):
        Partial(tmp_path, again, resume=False, wanted=ids - {"p2"})
    Partial(tmp_path, again, resume=False, wanted=ids)
    # ---- of another place, though above this one
    (tmp_path / "metrics.json").write_text(json.dumps({"run": settings}))
    with pytest.raises(UserError, match="was made with .*: name another folder"):
        Partial(tmp_path, {"predictions": str(tmp_path.parent)}, resume=False, wanted=ids)
    # ---- predictions of another place that are there no more: these are the only copy
    (tmp_path / "metrics.json").write_text(json.dumps({"run": {"predictions": str(tmp_path / "gone.jsonl")}}))
    assert refused("was made with .*: name another folder")
    Path("answers.jsonl").touch()
    for made_again in ({"baseline": "random"}, {"predictions": str(Path("answers.jsonl").resolve())}):
        (tmp_path / "metrics.json").write_text(json.dumps({"run": made_again}))
        Partial(tmp_path, settings, resume=False, wanted=set())


def asker(asked: Counter, fail_after: int | None = None):
    """A model that answers right, one puzzle at a time, and counts what it was asked."""

    def ask(puzzles, first):
        for puzzle in puzzles:
            if fail_after is not None and asked.total() == fail_after:
                raise RuntimeError("killed")
            asked[puzzle.id] += 1
            yield [(puzzle, [Answer(text=answer_of(puzzle.answer), tokens=3, finish_reason="stop")])]

    return ask


def test_answers_of_a_puzzle_that_lacks_others_are_not_paid_for_twice(tmp_path):
    puzzles, asked = make_puzzles(2), []

    def sample(requests: list[Request]) -> Iterator[SimpleNamespace]:
        for request in requests:
            asked.append((request.puzzle.id, request.attempt))
            fails = asked[-1] == ("p0", 3) and asked.count(("p0", 3)) == 1
            error = "status 500: down" if fails else ""
            text = f"answer {request.attempt}"
            yield SimpleNamespace(
                **{"puzzle_id": request.puzzle.id, "attempt": request.attempt, "trace": text, "completion_tokens": 2},
                **{"finish_reason": "stop", "error": error},
            )

    ask = ask_teacher(SimpleNamespace(sample=sample, ended=""), 4)
    for resume in (False, True):
        partial = Partial(tmp_path, {"model": "m"}, resume)
        with pytest.raises(RunError, match="1 of 2 puzzles got no answer") if not resume else nullcontext():
            rows = answer_all(
                puzzles, functools.partial(ask, kept=partial), partial, chunk=2, whole_chunks=False, name="test"
            )
    assert len(asked) == 9 and asked[-1] == ("p0", 3)
    assert [row["samples"] for row in rows] == [[f"answer {i}" for i in range(4)]] * 2
    assert rows[0]["samples_tokens"] == [2] * 4
    assert [row["id"] for row in Partial(tmp_path, {"model": "m"}, True).rows.values()] == ["p1", "p0"]


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path):
    puzzles, asked = make_puzzles(10), Counter()
    puzzles.append(puzzles[2])  # the same puzzle twice is asked once
    settings, options = {"model": "m"}, {"chunk": 4, "whole_chunks": False, "name": "test"}
    with pytest.raises(RuntimeError, match="killed"):
        answer_all(puzzles, asker(asked, fail_after=6), Partial(tmp_path, settings, resume=False), **options)
    path = tmp_path / "predictions.partial.jsonl"
    assert len(path.read_text().splitlines()) == 7  # settings and six answers
    with open(path, "a") as handle:
        handle.write('{"id": "p6", "predic')  # a torn last line
    partial = Partial(tmp_path, settings, resume=True)
    rows = answer_all(puzzles, asker(asked), partial, **options)
    assert set(asked.values()) == {1} and asked.total() == 10
    assert [row["id"] for row in rows] == [puzzle.id for puzzle in puzzles]
    assert len(read_rows(path)) == 11  # nothing torn is left
    partial.remove()
    assert not path.exists()
    odd = '{"id": "p", "prediction": "a", "attempt": [1], "response_tokens": 1, "finish_reason": "stop"}'
    for head in (
        odd,
        '{"id": "p", "prediction": "a", "attempt": 1}',
        '{"settings": null}',
        '{"id": "p", "prediction": 3}',
        '{"id": ["p"], "prediction": "a"}',
    ):
        path.write_text(f"{head}\n" + '{"id": "p", "prediction": "a"}\n')
        with pytest.raises(UserError, match=r"predictions.partial.jsonl, line 1: is damaged"):
            Partial(tmp_path, settings, resume=True)
    path.unlink()
    assert Partial(tmp_path, settings, resume=True).rows == {}  # neither partial nor finished: a fresh start


def test_a_chunk_that_lacks_an_answer_is_asked_whole_where_answers_hang_together(tmp_path):
    puzzles, asked, places = make_puzzles(10), Counter(), []
    partial = Partial(tmp_path, {}, resume=False)
    partial.add([row_of(p, [Answer(text="x", tokens=None, finish_reason="stop")]) for p in puzzles[:6]])

    def ask(chunk, first):
        places.append(first)
        return asker(asked)(chunk, first)

    answer_all(puzzles, ask, Partial(tmp_path, {}, resume=True), chunk=4, whole_chunks=True, name="test")
    assert places == [4, 8] and sorted(asked) == ["p4", "p5", "p6", "p7", "p8", "p9"]


def test_other_settings_or_a_damaged_file_are_not_resumed(tmp_path):
    Partial(tmp_path, {"model": "m", "seed": 1}, resume=False).add([{"id": "p0", "prediction": "x"}])
    with pytest.raises(
        ValueError, match="was made with seed 1, and this run has 2: give the same, or name another --out"
    ):
        Partial(tmp_path, {"model": "m", "seed": 2}, resume=True)
    path = tmp_path / "predictions.partial.jsonl"
    path.write_text('{"settings": {}}\n{"id": \n{"id": "p1", "prediction": "x"}\n')
    with pytest.raises(ValueError, match="predictions.partial.jsonl, line 2: is damaged"):
        Partial(tmp_path, {}, resume=True)
    path.write_bytes(b'{"settings": {}}\n{"id": "p1", "prediction": "x"}\n{"id": "p2", "prediction": "\xc3')
    assert list(Partial(tmp_path, {}, resume=True).rows) == ["p1"]


HOLDER = """
import sys, time
from eval.predict import Partial
partial = Partial(sys.argv[1], {"model": "m"}, resume=False)
partial.add([{"id": "p0", "prediction": "x"}])
print("holds it", flush=True)
time.sleep(1000)
"""


@pytest.mark.slow(2)
def test_two_evaluations_do_not_answer_into_one_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "out"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == b"holds it\n"
        with pytest.raises(ValueError, match=f"out: another run is writing there .process {holder.pid} on"):
            Partial(tmp_path / "out", {"model": "m"}, resume=True)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert list(Partial(tmp_path / "out", {"model": "m"}, resume=True).rows) == ["p0"]


def test_an_id_of_two_different_puzzles_is_refused(tmp_path):
    one, other = make_puzzles(2)
    twins = [one, Puzzle(id=one.id, context="c", cells=other.cells, candidates=other.candidates, answer=other.answer)]
    with pytest.raises(ValueError, match="puzzle p0 occurs twice with different cells"):
        answer_all(twins, asker(Counter()), Partial(tmp_path, {}, resume=False), chunk=4, whole_chunks=False, name="t")
    assert puzzles_digest([one, other]) != puzzles_digest([other, one])


# ---- an endpoint


class Server:
    """An OpenAI-compatible endpoint that knows the answers, on a port of this machine."""

    def __init__(self, puzzles: list[Puzzle]) -> None:
        answers = {puzzle.user_message: puzzle.answer for puzzle in puzzles}
        self.bodies: list[dict] = []
        self.headers: list[str] = []
        self.fail_after: int | None = None
        self.refused = ""
        """A puzzle whose text holds this is refused for good."""
        self.reasoning, self.finish_reason = "markers", "stop"
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    failing = outer.fail_after is not None and len(outer.bodies) >= outer.fail_after
                    if not failing:
                        outer.bodies.append(body)
                        outer.headers.append(self.headers["Authorization"])
                labels = answers[body["messages"][1]["content"]]
                refusing = bool(outer.refused) and outer.refused in body["messages"][1]["content"]
                text = f"<answer>{' | '.join(labels)}</answer>"
                choice = {
                    "message": {"role": "assistant", "content": text, "reasoning_content": outer.reasoning},
                    "finish_reason": outer.finish_reason,
                }
                said = {"choices": [choice], "model": "big", "usage": {"prompt_tokens": 50, "completion_tokens": 21}}
                payload = json.dumps({"error": {"message": f"no {KEY}"}} if failing or refusing else said).encode()
                self.send_response(401 if failing else 400 if refusing else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"


def test_an_endpoint_is_asked_resumed_and_its_key_kept(melanoma):
    folder, puzzles = melanoma
    server = Server(puzzles)
    arguments = (
        "--puzzles",
        folder / "melanoma.jsonl",
        "--model",
        "big",
        "--endpoint",
        server.url,
        "--key-env",
        "MY_KEY",
        "--samples",
        2,
        "--concurrency",
        1,
        "--out",
        folder / "o",
    )
    server.fail_after = 7  # three puzzles of two answers each, and one answer of the fourth
    done = run_command("evaluate", *arguments, env={"MY_KEY": KEY})
    assert done.returncode == 1 and "--endpoint" in done.stderr and "does not accept the key" in done.stderr
    assert "Traceback" not in done.stderr and not (folder / "o/metrics.json").exists()
    left = read_rows(folder / "o/predictions.partial.jsonl")[1:]
    held = [row["id"] for row in left if "attempt" not in row]
    assert held == ["p0", "p1", "p2"]
    server.fail_after = None
    kept = (folder / "o/predictions.partial.jsonl").read_text()
    assert KEY not in kept
    said = succeed("evaluate", *arguments, "--resume", env={"MY_KEY": KEY})
    assert len(server.bodies) == 8 * 2, "nothing is asked twice, not even one answer of two"
    assert set(server.headers) == {f"Bearer {KEY}"}
    assert "melanoma: 8 of 8 puzzles answered" in said
    found, rows = metrics_of(folder / "o"), read_rows(folder / "o/predictions.jsonl")
    assert found["batch_accuracy"] == found["k_sample"]["mean"]["batch_accuracy"] == 1.0
    assert found["response_length"] == 21.0 and found["response_length_unit"] == "tokens"
    assert rows[0]["prediction"].startswith("<think>markers</think>") and rows[0]["samples_tokens"] == [21, 21]
    assert {body["temperature"] for body in server.bodies} == {1.0} and {body["model"] for body in server.bodies} == {
        "big"
    }
    assert len({body["seed"] for body in server.bodies[:6]}) == 6  # samples of their own
    written = "".join(path.read_text() for path in (folder / "o").iterdir()) + done.stdout + done.stderr + said
    assert KEY not in written
    assert not (folder / "o/predictions.partial.jsonl").exists()
    asked_before = len(server.bodies)
    succeed("evaluate", *arguments, "--resume", env={"MY_KEY": KEY})  # finished: scored again, nothing is asked
    assert len(server.bodies) == asked_before


def test_prompts_that_an_endpoint_refuses_for_good_end_it_or_count_as_invalid(melanoma):
    folder, _ = melanoma
    puzzles = make_puzzles(30)
    write_puzzles(folder / "many.jsonl", puzzles)
    server = Server(puzzles)
    server.refused = "G2"  # p2, p20 to p29: more than the eight that at first would say that the settings are wrong
    arguments = (
        "--puzzles",
        folder / "many.jsonl",
        "--model",
        "big",
        "--endpoint",
        server.url,
        "--samples",
        2,
        "--concurrency",
        1,
        "--out",
        folder / "o",
    )
    done = run_command("evaluate", *arguments)
    assert (
        done.returncode == 1
        and "with --refused invalid the 11 refused for good count as invalid answers" in done.stderr
    )
    assert not (folder / "o/metrics.json").exists()
    done = evaluate(*arguments, "--resume", "--refused", "invalid")
    assert done.exit_code == 0 and "of 60 requests the endpoint refused 22 for good" in done.stderr
    found, row = metrics_of(folder / "o"), read_rows(folder / "o/predictions.jsonl")[2]
    assert found["refused"] == 22 and found["format_validity"] == found["batch_accuracy"] == pytest.approx(19 / 30)
    assert found["response_length_unit"] == "tokens" and row["samples"] == ["", ""]
    assert row["samples_finish_reasons"] == ["refused"] * 2
    assert "Mind: of 60 requests the endpoint refused 22" in (folder / "o/evaluation.md").read_text()


@pytest.mark.parametrize(("status", "for_good"), [(400, True), (422, True), (401, False), (429, False), (500, False)])
def test_which_refusals_are_for_good(status, for_good):
    assert refused_for_good(f"status {status}: no (1 try)") == for_good
    assert not refused_for_good("") and not refused_for_good(f"the endpoint does not allow it (status {status}: no)")


# ---- a checkpoint


def test_a_model_that_was_replaced_is_not_resumed(melanoma):
    folder, puzzles = melanoma
    for name in ("base", "adapter"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"1")
    (folder / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder / "base")}))
    for model, changed in (("base", "base"), ("adapter", "adapter"), ("adapter", "base")):
        out = folder / f"{model}, {changed}"
        asked = ("--puzzles", folder / "melanoma.jsonl", "--out", out, "--resume")
        config = EvaluateConfig(puzzles=("p",), model=str(folder / model), out=str(out), temperature=0.0)
        held = settings_of(config, puzzles, fingerprint_of(config))
        Partial(out, held, resume=False).add([{"id": "p0", "prediction": "x"}])
        assert settings_of(config, puzzles, fingerprint_of(config)) == held
        (folder / changed / "model.safetensors").write_bytes(
            (folder / changed / "model.safetensors").read_bytes() + b"2"
        )
        done = evaluate(*asked, "--model", folder / model)
        assert done.exit_code == 2 and "was made with other files of the model" in done.stderr, done.output
    (folder / "base/model.safetensors").unlink()
    assert fingerprint_of(config) != held["model_files"]


@pytest.mark.parametrize("named", [{}, {"base_model_name_or_path": None}, {"base_model_name_or_path": ""}], ids=str)
def test_an_adapter_that_names_no_base(tmp_path, named):
    """Its own files count, each once, and a base that is given counts too."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(named))
    assert files_fingerprint(tmp_path / "adapter").startswith("2 files, ")
    assert files_fingerprint(tmp_path / "adapter", str(tmp_path / "base")).startswith("3 files, ")


def test_an_adapter_whose_checkpoint_is_not_there_is_named_with_the_remedy(melanoma):
    """A relative path in adapter_config.json, read from another working directory, or a run folder that was moved."""
    folder, _ = melanoma
    plain = {"base_model_name_or_path": "runs/sft/model", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    save_file({"q_proj.lora_A.weight": torch.ones(1, 2)}, folder / "adapter_model.safetensors")
    asked = ("--puzzles", folder / "melanoma.jsonl", "--model", folder, "--out", folder / "o")
    for given, named in (((), "runs/sft/model"), (("--base", folder / "elsewhere"), folder / "elsewhere")):
        done = evaluate(*asked, *given)
        assert done.exit_code == 2
        said = f"{folder}: an adapter on {named}, where no checkpoint is; name its checkpoint with --base"
        assert said in done.stderr


def test_the_checkpoint_under_an_adapter_is_found_from_where_the_run_was_started(tmp_path):
    """Not only from the working directory: `cd elsewhere` must not lose it."""
    adapter, base = tmp_path / "runs/grpo/checkpoints/step-000010", tmp_path / "runs/sft/model"
    for folder in (adapter, base):
        folder.mkdir(parents=True)
    assert base_under(adapter, {"base_model_name_or_path": "runs/sft/model"}) == base
    assert base_under(adapter, {"base_model_name_or_path": "runs/none"}) == Path("runs/none")
    assert base_under(adapter, {"base_model_name_or_path": "runs/sft/model"}, "given") == Path("given")
    assert base_under(adapter, {}) == adapter


@pytest.mark.parametrize(
    "unserved",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_an_adapter_that_would_be_served_wrongly_is_refused(melanoma, unserved):
    folder, _ = melanoma
    plain = {
        "base_model_name_or_path": "b",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "use_rslora": False,
        "rank_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "init_lora_weights": True,
    }
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(plain))
    assert served_settings(folder) == plain
    file.write_text(json.dumps(plain | unserved))
    done = evaluate("--puzzles", folder / "melanoma.jsonl", "--model", folder, "--out", folder / "o")
    assert done.exit_code == 2 and f"adapter_config.json: has {next(iter(unserved))} " in done.stderr
    assert "merge it into its base" in done.stderr and not (folder / "o").exists()


def test_an_engine_is_asked_greedily_with_seeds_by_place():
    """The plain-torch engine on a toy model that always says one of two tokens, by the parity of the prompt's last one."""

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            logits = torch.zeros(len(input_ids), 1, 6)
            logits[torch.arange(len(input_ids)), 0, 2 + input_ids[:, -1] % 2] = 1.0  # greedy: 2 after even, 3 after odd
            return type("Output", (), {"logits": logits, "past_key_values": None})()

    class Words:
        def prompt_ids(self, turns):
            return [1, 4 + [puzzle.chat() for puzzle in puzzles].index(turns)]

        def response_text(self, ids):
            return " ".join(map(str, ids))

    puzzles = make_puzzles(3)
    engine = TorchEngine(Toy(), nullcontext)
    greedy = Sampling(n=1, max_tokens=3, temperature=0.0, top_p=1.0, seed=0, stop_ids=(5,))
    (pairs,) = ask_engine(engine, Words(), greedy)(puzzles, 0)
    assert [(puzzle.id, answer.text, answer.tokens, answer.finish_reason) for puzzle, (answer,) in pairs] == [
        ("p0", "2 2 2", 3, "length"),
        ("p1", "3 3 3", 3, "length"),
        ("p2", "2 2 2", 3, "length"),
    ]
    drawn = Sampling(n=4, max_tokens=8, temperature=1.0, top_p=1.0, seed=0, stop_ids=(5,))
    ask = ask_engine(engine, Words(), drawn)
    first, again, elsewhere = (next(iter(ask(puzzles[:1], place))) for place in (0, 0, 4))
    assert first == again != elsewhere and len(first[0][1]) == 4
    # under --consensus a greedy answer comes after the same samples
    ((_, answers),) = next(iter(ask_engine(engine, Words(), drawn, greedy=True)(puzzles[:1], 0)))
    assert answers[:4] == first[0][1] and answers[4].text.split() == ["2"] * 8 and answers[4].greedy
    row = row_of(puzzles[0], answers)
    assert row["samples"] == [answer.text for answer in answers[:4]] and row["greedy"] == answers[4].text
    assert (row["greedy_tokens"], row["greedy_finish_reason"], row["prediction"]) == (8, "length", answers[0].text)


@pytest.mark.vllm
@pytest.mark.slow(8)
def test_a_checkpoint_in_vllm_sampled_and_resumed(pipeline, tmp_path):
    asked = (
        "--puzzles",
        pipeline / "puzzles/test.parquet",
        "--model",
        pipeline / "base",
        "--max-response-tokens",
        24,
        "--limit",
        10,
        "--chunk",
        4,
        "--samples",
        3,
        "--temperature",
        0.9,
        "--consensus",
        "--out",
        tmp_path,
    )
    puzzles = read_puzzles(pipeline / "puzzles/test.parquet")[:10]
    said = succeed("evaluate", *asked)
    rows, found = read_rows(tmp_path / "predictions.jsonl"), metrics_of(tmp_path)
    assert [row["id"] for row in rows] == [
        puzzle.id for puzzle in puzzles
    ] and "test: 10 of 10 puzzles answered" in said
    assert all(row["prediction"] == row["samples"][0] and len(set(row["samples"])) == 3 for row in rows)
    assert all(1 <= n <= 24 for row in rows for n in row["samples_tokens"])
    assert list(found["k_sample"]["pass_at_k"]) == ["1", "2", "3"] and found["run"]["temperature"] == 0.9
    assert all(row["greedy"] and 1 <= row["greedy_tokens"] <= 24 for row in rows) and found["run"]["greedy"] is True
    assert found["k_sample"]["greedy"]["n_puzzles"] == 10 and found["k_sample"]["consensus"]["threshold"] == 0.5
    reason = found["invalid_reasons"][0]  # an untrained model goes on until the limit
    assert reason["reason"] == "the response was cut at the length limit" and reason["count"] > 15
    assert found["label_problems"]["answers"] == 30 and " of 30 answers have an invalid format: " in said
    # as if killed in the third chunk: the second run samples what the first had
    settings = json.dumps({"settings": found["run"]})
    lines = [settings, *(json.dumps(row) for row in rows[:8]), json.dumps(rows[8])[:40]]
    (tmp_path / "predictions.partial.jsonl").write_text("\n".join(lines))
    (tmp_path / "predictions.jsonl").unlink()
    succeed("evaluate", *asked, "--resume")
    assert read_rows(tmp_path / "predictions.jsonl") == rows and metrics_of(tmp_path) == found


def test_an_average_over_tokens_and_words_is_in_words():
    puzzles = make_puzzles(2)
    text = answer_of(puzzles[0].answer)
    of_file = {"a": [{"id": p.id, "prediction": text, "response_tokens": 500} for p in puzzles]}
    of_file["b"] = [{"id": p.id, "prediction": text} for p in puzzles]
    results = {}
    for name, rows in of_file.items():
        shown = evaluation_of(rows, puzzles, name=name, run={}, file=name, seed=0)
        results[name] = shown
    found = average_of({name: (rows, puzzles) for name, rows in of_file.items()}, results, 0)
    assert results["a"]["response_length"] == 500
    assert found["average"]["response_length"] == len(text.split()) == results["b"]["response_length"]
    assert found["response_length_unit"] == "tokens or words, of the average in words"


def test_one_batch_has_no_p_value(tmp_path):
    """Every resample of one batch is that batch."""
    (one,) = puzzles = make_puzzles(1)
    write_puzzles(tmp_path / "one.jsonl", puzzles)
    for name, text in (("right", answer_of(one.answer)), ("wrong", answer_of(one.answer[::-1]))):
        write_rows(tmp_path / f"{name}.jsonl", [{"id": one.id, "prediction": text}])
    given = ("--puzzles", tmp_path / "one.jsonl", "--predictions", tmp_path / "right.jsonl", "--out", tmp_path / "out")
    done = evaluate(*given, "--compare", tmp_path / "wrong.jsonl")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out/evaluation.md").read_text()
    assert "+100.0 | - |" in page and "0.001" not in page


@pytest.mark.slow(2)
def test_a_terminal_of_another_encoding_ends_no_evaluation(tmp_path):
    puzzles = make_puzzles(1)
    write_puzzles(tmp_path / "\u7ec6.jsonl", puzzles)
    given = ("--puzzles", tmp_path / "\u7ec6.jsonl", "--baseline", "random", "--out", tmp_path / "out")
    words = [sys.executable, ROOT / "launch/evaluate.py", *given]
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0 and "tables: " in done.stdout, done.stderr


def test_a_place_that_cannot_be_written_is_told_before_an_answer_is_paid_for(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/x"):
        with pytest.raises(UserError, match="file is no folder in which you may write"):
            Partial(folder, {"model": "m"}, resume=False)


# ---- what a reader takes for granted


def of_sizes(sizes: list[int], **meta) -> list[Puzzle]:
    """Puzzles of these numbers of cells, each of a donor of its own."""
    labels = ["a", "b", "c", "d", "e"]
    return [
        Puzzle(
            id=f"p{i}",
            context="",
            cells=[["G"]] * n,
            candidates=labels[:n],
            answer=labels[:n],
            meta={"donor": f"d{i}", **meta},
        )
        for i, n in enumerate(sizes)
    ]


def test_the_first_puzzles_of_a_file_in_order_of_size_are_said_to_be_unlike_all(tmp_path):
    write_puzzles(tmp_path / "p.jsonl", of_sizes([3] * 8 + [5] * 8))
    done = evaluate("--puzzles", tmp_path / "p.jsonl", "--baseline", "random", "--limit", 8, "--out", tmp_path / "o")
    assert (
        "only the first 8 of 16 puzzles of the file were asked (--limit), and they have 3 cells, all have 3 to 5"
        in done.stderr
    )
    mixed = [*of_sizes([3, 5] * 4, dataset="a"), *of_sizes([3, 5] * 4, dataset="b")]
    write_puzzles(tmp_path / "m.jsonl", [replace(one, id=str(i)) for i, one in enumerate(mixed)])
    done = evaluate("--puzzles", tmp_path / "m.jsonl", "--baseline", "random", "--limit", 8, "--out", tmp_path / "m")
    assert "and they are of 1 of its 2 data sets" in done.stderr and "cells, all have" not in done.stderr
    done = evaluate("--puzzles", tmp_path / "m.jsonl", "--baseline", "random", "--out", tmp_path / "w")
    assert "only the first" not in done.stderr


def test_cells_that_are_asked_again_and_again_are_counted_once():
    """Two cells of type a, each in 20 puzzles: one always right, one always wrong."""
    some = of_sizes([3] * 40)
    some = [
        replace(one, meta=one.meta | {"source": "f", "cell_ids": [f"a{i % 2}", f"b{i}", f"c{i}"]})
        for i, one in enumerate(some)
    ]
    right, wrong = answer_of(["a", "b", "c"]), answer_of(["b", "a", "c"])
    rows = [{"prediction": wrong if i % 2 else right} for i in range(40)]
    result = evaluation_of(rows, some, name="m", run={})
    of_type = {one["cell_type"]: one for one in result["breakdowns"]["cell_type"]}
    assert (of_type["a"]["cells"], of_type["a"]["distinct_cells"], of_type["a"]["accuracy"]) == (40, 2, 0.5)
    assert of_type["a"]["interval"] == pytest.approx(list(wilson_interval(0.5, 2)))
    assert (of_type["b"]["distinct_cells"], of_type["b"]["interval"]) == (40, list(wilson_interval(0.5, 40)))
    assert "82 distinct cells fill the 120 places" in result["notes"][0]


def test_reused_cells_and_few_donors_are_said():
    some = [
        replace(one, meta={"donor": f"d{i % 3}", "source": "f", "cell_ids": ["a", f"b{i}", "c"]})
        for i, one in enumerate(of_sizes([3] * 10))
    ]
    reuse, donors = notes_on_reuse(some)
    assert reuse.startswith("12 distinct cells fill the 30 places of these puzzles") and "of 3 donors only" in donors
    assert notes_on_reuse(of_sizes([3] * 10)) == [], "whose cells are is not known, and of 10 donors"
    assert notes_on_reuse([replace(one, meta={}) for one in some]) == []


def test_one_batch_has_no_interval_anywhere(tmp_path):
    (one,) = of_sizes([5])
    puzzles = convert([one], "cell")
    rows = [{"samples": [answer_of([p.answer[0] if i < 3 else "x"])] * 2} for i, p in enumerate(puzzles)]
    result = evaluation_of(rows, puzzles, name="m", run={}, confident_from=0.5)
    text = evaluation_markdown("t", result)
    assert result["interval"]["batches"] == 1 and "60.0 %" in text and "60.0 to 60.0" not in text


def test_means_of_samples_are_not_called_the_model_and_the_first_answers_are():
    """Of two sampled answers the first are all right and the second all wrong."""
    puzzles = make_puzzles(10)
    rows = [
        {"samples": [answer_of(p.answer), answer_of(p.answer[1:] + p.answer[:1])], "greedy": answer_of(p.answer)}
        for p in puzzles
    ]
    other = [
        {"prediction": answer_of(p.answer if i < 8 else p.answer[1:] + p.answer[:1])} for i, p in enumerate(puzzles)
    ]
    result = evaluation_of(rows, puzzles, name="m", run={}, other=("before", other))
    text = evaluation_markdown("t", result)
    assert result["compare"]["answers"] == {"ours": 2, "theirs": 1}
    assert (
        "names every cell right in 100.0 % of 10 batches" in text
        and "(the first of 2 answers to each, sampled;" in text
    )
    assert (
        "| this, mean of 2 answers | before, one answer |" in text and "| batches all right | 50.0 % | 80.0 % |" in text
    )
    alone = evaluation_of(
        [{"prediction": answer_of(p.answer)} for p in puzzles], puzzles, name="m", run={}, other=("b", other)
    )
    assert "answers" not in alone["compare"] and "| this | b |" in evaluation_markdown("t", alone)
