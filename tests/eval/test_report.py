"""The report page and the README picture, from a small run folder on disk."""

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.audit import tenths
from data.errors import UserError
from data.puzzles import Puzzle, read_puzzles, read_rows, write_puzzles, write_rows
from data.variants import convert
from eval.evaluation import evaluation_of
from eval.metrics import score, wilson_interval
from eval.report.figures import (
    GRPO_CURVES,
    batch_interval,
    curve_svg,
    learning_curve_png,
    percent,
    sampled_reward,
    series,
    smooth,
)
from eval.report.html import share
from eval.report.page import headline, write_report
from eval.report.run import published_beside, read_evaluations
from eval.run_files import summary_text, write_summary
from tests.helpers.commands import run_command

pytestmark = pytest.mark.slow(1)
LABELS = ["T cell", "B cell", "NK cell", "monocyte", "fibroblast"]
SCRIPT = "<script>alert('x')</script>"


def answer(labels: list[str], reasoning: str = "markers") -> str:
    return f"<think>{reasoning}</think>\n<answer>{' | '.join(labels)}</answer>"


def swapped(labels: list[str]) -> list[str]:
    """The first two labels exchanged: all cells but two right."""
    return [labels[1], labels[0], *labels[2:]]


def write_run(folder: Path) -> Path:
    """Three test puzzles: p0 solved by SFT and GRPO, p1 by GRPO only, p2 by SFT only. Base cannot keep the format."""
    puzzles = [
        Puzzle(
            id=f"p{i}",
            context=f"The cell is from donor {i} & a <b>female</b>.",
            cells=[[f"{label[0]}{i}G{k}" for k in range(12)] for label in LABELS],
            candidates=sorted(LABELS),
            answer=LABELS[i:] + LABELS[:i],
        )
        for i in range(3)
    ]
    texts = {
        "base": ["no idea"] * 3,
        "sft": [answer(p.answer) if i != 1 else answer(swapped(p.answer)) for i, p in enumerate(puzzles)],
        "grpo": [
            answer(puzzles[0].answer),
            answer(puzzles[1].answer, SCRIPT),
            answer([SCRIPT, *swapped(puzzles[2].answer)[1:]]),
        ],
    }
    write_puzzles(folder / "puzzles/test.parquet", puzzles)
    summary = {}
    for stage, own in texts.items():
        write_answers(folder, stage, own)
        summary[stage] = {"test": score(own, puzzles, [50, 51, 52]).to_dict()}
    summary["run"] = {"config": {"lr": 1e-4, "note": "<i>"}, "seconds": {"grpo": 61.7}, "versions": {"torch": "2.13.0"}}
    summary["run"] |= {"git_commit": "c0ffee", "split": "donor"}
    (folder / "summary.json").write_text(json.dumps(summary))
    steps = [
        {
            "step": i,
            "reward": i / 40,
            "kl": i / 1e4,
            "loss": float("nan") if i == 7 else 0.01,
            "rewards/batch_accuracy": i / 50,
            "rewards/cell_accuracy": 0.5 + i / 100,
            "rewards/format_validity": 1.0,
            "completions/mean_length": 100 + i,
        }
        for i in range(1, 41)
    ]
    write_rows(folder / "grpo/metrics.jsonl", steps)
    write_rows(folder / "sft/metrics.jsonl", [{"step": i, "loss": 2 / i} for i in range(1, 11)])
    return folder


def write_answers(folder: Path, stage: str, texts: list[str], split: str = "test") -> None:
    """Predictions of p0, p1, ... in the order of the texts."""
    rows = [
        {"id": f"p{i}", "prediction": text, "response_tokens": 50 + i, "finish_reason": "stop"}
        for i, text in enumerate(texts)
    ]
    write_rows(folder / f"eval/{stage}/{split}/predictions.jsonl", rows)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


def read(page: str, section: str) -> str:
    """The HTML of a section of the page."""
    return re.search(f'<section id="{section}">.*?</section>', page, re.DOTALL)[0]


def cells_of(row: str) -> list[str]:
    """The text of a table row's cells, without the intervals."""
    cells = re.findall("<td[^>]*>(.*?)</td>", re.sub("<small>.*?</small>", "", row))
    return [html.unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in cells]


def row_of(page: str, head: str) -> str:
    """The first row with this head."""
    return next(row for row in re.findall("<tr>.*?</tr>", page, re.DOTALL) if f'scope="row">{head}' in row)


def articles(page: str) -> dict[str, str]:
    """Puzzle -> the HTML of its article among the puzzles to read."""
    found = re.findall("<article>.*?</article>", read(page, "puzzles"), re.DOTALL)
    return {re.search("Puzzle (.*?):", text)[1]: text for text in found}


def marks(article: str, stage: str = "after GRPO") -> list[str]:
    """What the column of a stage says, cell by cell."""
    return re.findall(f'<td data-name="{stage}"><span[^>]*><b[^>]*aria-label="(right|wrong)"', article)


def test_headline_is_a_sentence_with_the_numbers(run_dir):
    page = write_report(run_dir).read_text()
    sentence = (
        "After GRPO the annotator names every cell of a batch right in 67&nbsp;% of the puzzles of held-out donors, "
        "against 67&nbsp;% after SFT and 0&nbsp;% before training."
    )
    assert f"<h1>{sentence}</h1>" in page
    assert (
        "On the same 3 held-out puzzles, GRPO got 1 right that SFT had wrong, and 1 wrong that SFT had right." in page
    )


def test_table_holds_the_metrics(run_dir):
    results = read(write_report(run_dir).read_text(), "results")
    # cells right: 5, 5 and 3 of 5 (a script and a swap); every answer is valid with 5 distinct labels
    grpo = ["66.7\xa0%", "86.7\xa0%", "86.7\xa0%", "100.0\xa0%", "100.0\xa0%", "51", "3"]
    assert cells_of(row_of(results, "after GRPO")) == grpo
    assert cells_of(row_of(results, "before training")) == ["0.0\xa0%"] * 5 + ["51", "3"]
    assert "This run was not evaluated on unseen diseases." in results


def test_published_numbers_are_labelled_and_the_other_task_size_is_said(run_dir):
    results = read(write_report(run_dir).read_text(), "results")
    row = row_of(results, '<span class="published">Cell-o1 <small>published</small>')
    assert cells_of(row) == ["32.9\xa0%", "\u2013", "68.5\xa0%", "98.3\xa0%", "98.2\xa0%", "1,146", "\u2013"]
    assert "Published, on other puzzles: Table 2, the paper&#x27;s test set" in results
    assert "have 5 cells each, where guessing gets 20 % of the cells right; the paper&#x27;s have 8 to 15" in results
    assert "That is another task size" in results and "arXiv:2506.02911" in results
    everything = re.search("<details><summary>All 10 published rows.*?</details>", results, re.DOTALL)[0]
    assert everything.count('class="published"') == 10 and results.count('class="published"') == 14


def test_intervals_come_from_metrics_json(run_dir):
    assert "<small>" not in row_of(read(write_report(run_dir).read_text(), "results"), "after GRPO")
    write_metrics(run_dir, "grpo")
    result = json.loads((run_dir / "eval/grpo/test/metrics.json").read_text())
    low, high = result["intervals"]["batch_accuracy"]
    results = read(write_report(run_dir).read_text(), "results")
    row = row_of(results, "after GRPO")
    assert low < 2 / 3 < high and f"66.7&nbsp;%<br> <small>{100 * low:.1f} to {100 * high:.1f}</small>" in row
    assert "Small print below a number is its 95 % interval" in results and "Wilson" in results  # SFT has none


def test_an_evaluation_made_after_the_run_is_on_the_page(run_dir):
    (run_dir / "eval/grpo/unseen").mkdir(parents=True)
    write_metrics(run_dir, "grpo")
    (run_dir / "eval/grpo/test/metrics.json").rename(run_dir / "eval/grpo/unseen/metrics.json")
    page = write_report(run_dir).read_text()
    assert "This run: unseen diseases" in page and "not evaluated on" not in page
    assert page.count("not evaluated in this run") == 2  # before training and after SFT
    # no disease is stated, so none of Table 3's
    assert "Table 3, average over four diseases that are others than ours" in read(page, "results")
    assert 'href="#where-unseen"' in page and "N, cells in a puzzle" in read(page, "where-unseen")


def write_metrics(run_dir: Path, stage: str) -> None:
    """The metrics.json that launch/evaluate.py writes beside the predictions."""
    puzzles = read_puzzles(run_dir / "puzzles/test.parquet")
    rows = read_rows(run_dir / f"eval/{stage}/test/predictions.jsonl")
    result = evaluation_of(rows, puzzles, name="m", run={}, file="test.parquet")
    (run_dir / f"eval/{stage}/test/metrics.json").write_text(json.dumps(result))


def test_where_it_is_right_without_and_with_metrics_json(run_dir):
    computed = read(write_report(run_dir).read_text(), "where")
    by_size = row_of(computed, "5")
    assert cells_of(by_size) == ["3", *["0.0\xa0%"] * 2, "86.7\xa0%", "66.7\xa0%", "86.7\xa0%", "66.7\xa0%"]
    # p2 is NK, monocyte, fibroblast, T, B: its first label is a script, and its NK cell went to the second cell
    assert cells_of(row_of(computed, "monocyte"))[-1] == "NK cell (1)"
    assert f"{html.escape(SCRIPT)} (1)" in cells_of_html(row_of(computed, "NK cell"))
    mixed = computed.split("What is mixed up most")[1]
    assert [cells_of(row) for row in re.findall('<tr><th scope="row">.*?</tr>', mixed)] == [
        [html.unescape(html.escape(SCRIPT)), "0", "1", "33.3\xa0%"],
        ["NK cell", "0", "1", "33.3\xa0%"],
    ]
    assert "Not drawn: before training no puzzle has a right cell." in computed
    assert "By tissue: the puzzles do not state it." in computed and "Figure 4A" in computed and "Figure 4B" in computed
    for stage in ("base", "sft", "grpo"):
        write_metrics(run_dir, stage)
    assert read(write_report(run_dir).read_text(), "where") == computed


def cells_of_html(row: str) -> str:
    """The cells of a row as they stand in the file."""
    return " ".join(re.findall("<td[^>]*>(.*?)</td>", row))


def test_groups_by_tissue_and_one_disease(run_dir):
    puzzles = [
        dataclasses.replace(p, meta={"tissue": tissue, "disease": "melanoma"})
        for p, tissue in zip(read_puzzles(run_dir / "puzzles/test.parquet"), ("lung", "blood", "lung"), strict=True)
    ]
    write_puzzles(run_dir / "puzzles/test.parquet", puzzles)
    where = read(write_report(run_dir).read_text(), "where")
    assert cells_of(row_of(where, "lung"))[-2:] == ["80.0\xa0%", "50.0\xa0%"]
    assert cells_of(row_of(where, "blood")) == ["1", *["0.0\xa0%"] * 2, "60.0\xa0%", "0.0\xa0%", *["100.0\xa0%"] * 2]
    assert "<small>" in row_of(where, "lung") and "<small>" not in row_of(where, "blood")  # one puzzle has no interval
    assert "By disease: all 3 puzzles are of one disease, melanoma." in where
    beside = {"grpo": read_evaluations(run_dir)["test"]["grpo"]}
    assert published_beside("unseen", beside)[0] == "Table 3, melanoma"
    assert {row["setting"] for row in published_beside("unseen", beside)[1]} == {"melanoma"}


def test_text_of_models_and_files_is_escaped(run_dir):
    page = write_report(run_dir).read_text()
    assert "<script" not in page.lower()
    assert page.count(html.escape(SCRIPT)) >= 4  # reasoning of p1; label and answer of p2; confusions
    assert "donor 2 &amp; a &lt;b&gt;female&lt;/b&gt;." in page and "&lt;i&gt;" in page
    assert "{{body}}" not in page and "{{title}}" not in page


def test_page_needs_no_network_and_every_figure_says_how_to_read_it(run_dir):
    page = write_report(run_dir).read_text()
    assert "http" not in page.replace("http-equiv", "") and "@import" not in page and "url(#" in page
    assert not re.search(r'(src|href)="(?!#)', page) and "default-src 'none'" in page
    assert set(re.findall(r'<a href="#([\w-]+)"', page)) == set(re.findall(r'<section id="([\w-]+)"', page))
    figures = re.findall("<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 11  # bars; by N, spread, cell types; six GRPO curves, SFT loss
    for figure in figures:
        assert figure.count("<svg") == 1 and re.search('<svg role="img" aria-label="[^"]{4,}"', figure)
        assert len(re.search("<figcaption>(.*?)</figcaption>", figure)[1]) > 60
    assert "Not recorded in grpo/metrics.jsonl: Puzzles that teach, Sampler against trainer." in page


def test_settings_versions_and_times_are_listed(run_dir):
    page = write_report(run_dir).read_text()
    rows = dict(re.findall(r'<tr><th scope="row">([^<]*)</th><td data-name="value">([^<]*)</td></tr>', page))
    assert rows == {"lr": "0.0001", "note": "&lt;i&gt;", "grpo": "62 s", "torch": "2.13.0", "git commit": "c0ffee"}


def test_same_folder_same_bytes(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert not list(run_dir.glob("*partial*"))


def test_a_bare_summary_gives_an_honest_page(tmp_path):
    metrics = {"batch_accuracy": 0.25, "n_puzzles": 8}
    (tmp_path / "summary.json").write_text(json.dumps({"sft": {"unseen": metrics}}))
    page = write_report(tmp_path).read_text()
    assert "<h1>After SFT the annotator names every cell of a batch right in 25&nbsp;% of the puzzles of unseen" in page
    assert page.count("not evaluated in this run") == 2
    assert "This run was not evaluated on held-out puzzles." in page
    assert "No published numbers are shown beside unseen diseases" in page and 'class="published"' not in page
    assert "so accuracy by size, tissue, disease and cell type cannot be shown." in page
    assert "so no reasoning can be read." in page and "so there is no puzzle to show." in page
    assert "This run folder has no grpo/metrics.jsonl" in page and "This run folder has no sft/metrics.jsonl" in page
    assert "Not recorded in summary.json." in page
    (tmp_path / "summary.json").write_text("{}")
    assert "<h1>This run has not been evaluated yet.</h1>" in write_report(tmp_path).read_text()


def test_an_evaluation_made_again_wins_over_the_summary(run_dir):
    write_answers(run_dir, "grpo", ["no idea"] * 3)
    write_metrics(run_dir, "grpo")
    file = run_dir / "eval/grpo/test/metrics.json"
    result = json.loads(file.read_text())
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["grpo"]["test"]["intervals"] = {"batch_accuracy": [0.1, 0.9]}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    page = write_report(run_dir).read_text()
    assert "in 0&nbsp;% of the puzzles of held-out donors, against 67&nbsp;% after SFT" in page
    assert "GRPO got 0 right that SFT had wrong, and 2 wrong that SFT had right" in page
    row = row_of(read(page, "results"), "after GRPO")
    assert cells_of(row)[:2] == ["0.0\xa0%", "0.0\xa0%"] and "<small>0.0 to 0.0</small>" in row and "90.0" not in row
    file.write_text(json.dumps({key: value for key, value in result.items() if key != "intervals"}))
    assert "<small>" not in row_of(read(write_report(run_dir).read_text(), "results"), "after GRPO")
    assert learning_curve_png(run_dir, run_dir / "a.png").read_bytes() != b""


def test_a_run_without_a_summary_is_shown_from_what_is_there(run_dir):
    expected = read(write_report(run_dir).read_text(), "results")
    (run_dir / "summary.json").unlink()
    page = write_report(run_dir).read_text()
    # nothing says how the puzzles were held out
    expected = expected.replace("puzzles of held-out donors", "held-out puzzles").replace(
        "held-out donors", "held-out puzzles"
    )
    assert read(page, "results") == expected  # scored from the predictions, as summary.json was
    assert "<h1>After GRPO the annotator names every cell of a batch right in 67&nbsp;%" in page
    write_metrics(run_dir, "sft")
    (run_dir / "eval/sft/test").rename(run_dir / "eval/only")
    shutil.rmtree(run_dir / "eval/sft")
    (run_dir / "eval/only").rename(run_dir / "eval/sft")  # launch/evaluate.py --out eval/sft, with one file of puzzles
    (run_dir / "puzzles/report.json").write_text(json.dumps({"options": {"split": "cell"}}))
    page = write_report(run_dir).read_text()
    assert "of held-out cells, against 67&nbsp;% after SFT and 0&nbsp;% before training" in page
    assert learning_curve_png(run_dir, run_dir / "a.png").is_file()
    for name in ("eval", "puzzles"):
        shutil.rmtree(run_dir / name)
    assert "This run has not been evaluated yet." in write_report(run_dir).read_text()  # but its curves are drawn
    for name in ("sft", "grpo"):
        shutil.rmtree(run_dir / name)
    with pytest.raises(ValueError, match="nothing to show, neither eval/STAGE/SPLIT/metrics.json"):
        write_report(run_dir)


def test_predictions_that_lack_or_repeat_puzzles_are_said(run_dir):
    file = run_dir / "eval/grpo/test/predictions.jsonl"
    rows = read_rows(file)
    write_rows(file, [*rows[:2], rows[0] | {"prediction": "no idea"}])
    page = write_report(run_dir).read_text()
    assert "On the same 2 held-out puzzles" in page
    assert "grpo/test/predictions.jsonl answers 1 puzzle again: the first answer to each is shown." in page
    assert (
        "grpo/test/predictions.jsonl is not the file that summary.json was made from, whose numbers the table shows"
        in page
    )
    summary = (run_dir / "summary.json").read_text()
    (run_dir / "summary.json").unlink()
    left_out = "grpo/test/predictions.jsonl answers 2 of 3 puzzles: the others are left out."
    assert left_out in write_report(run_dir).read_text()
    (run_dir / "summary.json").write_text(summary)
    write_rows(file, rows)
    write_metrics(run_dir, "grpo")
    assert "predictions.jsonl" not in read(write_report(run_dir).read_text(), "results")
    write_rows(file, rows[:2])
    assert "is not the file that the metrics.json beside it was made from" in write_report(run_dir).read_text()
    result = json.loads((run_dir / "eval/grpo/test/metrics.json").read_text())
    (run_dir / "eval/grpo/test/metrics.json").write_text(json.dumps(result | {"notes": ["<b>mind</b>"]}))
    assert "held-out donors, after GRPO: &lt;b&gt;mind&lt;/b&gt;." in write_report(run_dir).read_text()


def test_metrics_without_puzzles_still_tell_where_it_is_right(run_dir):
    write_metrics(run_dir, "grpo")
    (run_dir / "puzzles/test.parquet").unlink()
    page = write_report(run_dir).read_text()
    assert "Not shown, because eval/ holds nothing of it: before training, after SFT." in read(page, "where")
    assert 'class="published"' in page and "have 5 cells each" in page
    assert "so no reasoning can be read." in page and "so there is no puzzle to show." in page


def test_evaluations_that_do_not_fit_are_refused(run_dir):
    file = run_dir / "eval/grpo/test/predictions.jsonl"
    for rows, sentence in [
        ([{"id": "q9", "prediction": "x"}], r"predictions\.jsonl: puzzle q9 is not in .*test\.parquet"),
        ([{"id": "p0", "prediction": 3}], r"predictions\.jsonl, line 1: has no text 'prediction'"),
        ([{"prediction": "x"}] * 4, r"predictions\.jsonl: 4 predictions without an id for the 3 puzzles"),
    ]:
        write_rows(file, rows)
        with pytest.raises(ValueError, match=sentence):
            write_report(run_dir)
    file.unlink()
    for text, sentence in (("{", "not JSON"), ("[1]", "holds no metrics")):
        (run_dir / "eval/grpo/test/metrics.json").write_text(text)
        with pytest.raises(ValueError, match=rf"metrics\.json: {sentence}"):
            write_report(run_dir)


def test_answers_without_ids_and_with_samples(run_dir):
    puzzles = read_puzzles(run_dir / "puzzles/test.parquet")
    rows = [{"samples": [answer(p.answer), "other"]} for p in puzzles[:2]]
    write_rows(run_dir / "eval/grpo/test/predictions.jsonl", rows)
    found = read_evaluations(run_dir)["test"]["grpo"].answers
    assert [(one.puzzle.id, one.score.batch_right) for one in found] == [("p0", True), ("p1", True)]


def test_several_answers_to_a_puzzle_have_a_table_of_their_own(run_dir):
    """The vote of three answers is right where two of them are; greedy answers stand beside it."""
    puzzles = read_puzzles(run_dir / "puzzles/test.parquet")
    rows = [
        {"id": p.id, "samples": [answer(swapped(p.answer)), answer(p.answer), answer(p.answer)], "greedy": "no idea"}
        for p in puzzles
    ]
    result = evaluation_of(rows, puzzles, name="m", run={}, confident_from=0.9)
    assert "Several answers" not in write_report(run_dir).read_text()
    (run_dir / "eval/grpo/test/metrics.json").write_text(json.dumps(result))
    (run_dir / "eval/grpo/test/predictions.jsonl").unlink()
    results = read(write_report(run_dir).read_text(), "results")
    assert "<h3>Several answers to a puzzle: held-out donors</h3>" in results
    assert cells_of(row_of(results, "one answer, greedy")) == ["0.0\u00a0%"] * 3
    assert cells_of(row_of(results, "one-to-one vote (consensus)")) == ["100.0\u00a0%"] * 3
    assert cells_of(row_of(results, "one answer, sampled (mean)"))[0] == "66.7\u00a0%"
    assert cells_of(row_of(results, "pass@3: some answer is right"))[0] == "100.0\u00a0%"
    assert "after GRPO: 60.0 % (60.0 to 60.0) of the cells have a label that at least 90.0 %" in results


def test_puzzles_of_a_run_without_grpo(run_dir):
    for path in (run_dir / "eval/grpo/test").iterdir():
        path.unlink()
    page = write_report(run_dir).read_text()
    shown = articles(page)
    assert list(shown) == ["p0", "p2", "p1"] and marks(shown["p1"]) == []  # best p0 and p2, worst p1
    assert marks(shown["p1"], "after SFT") == ["wrong", "wrong", "right", "right", "right"]
    assert "on the same" not in page.lower()


def test_open_ended_and_cell_level_puzzles(run_dir):
    puzzles = read_puzzles(run_dir / "puzzles/test.parquet")
    (run_dir / "summary.json").unlink()
    pages = []
    for variant in ("open", "cell"):
        own = convert(puzzles, variant)
        write_puzzles(run_dir / "puzzles/test.parquet", own)
        for stage in ("base", "sft", "grpo"):
            rows = [{"id": p.id, "prediction": answer(p.answer)} for p in own]
            write_rows(run_dir / f"eval/{stage}/test/predictions.jsonl", rows)
        pages.append(write_report(run_dir).read_text())
    opened, alone = pages
    assert "By similarity of labels: held-out puzzles (Table 12)" in opened and "none were given" in opened
    assert "No metrics.json holds similarities of labels" in opened and "guessing" not in opened
    assert "(Table 11)" in alone and "No metrics.json says how the single cells do as batches" in alone
    assert "After GRPO the annotator names the single cell right in 100&nbsp;%" in alone and "guessing" in read(
        alone, "where"
    )
    assert all("are others than the paper&#x27;s: a difference to its numbers" in page for page in pages)


def test_published_numbers_of_cells_stand_beside_cells_put_together(run_dir):
    puzzles = convert(read_puzzles(run_dir / "puzzles/test.parquet"), "cell")
    write_puzzles(run_dir / "puzzles/test.parquet", puzzles)
    shutil.rmtree(run_dir / "eval")
    rows = [{"id": p.id, "prediction": answer(p.answer if i else ["?"])} for i, p in enumerate(puzzles)]
    write_rows(run_dir / "eval/grpo/test/predictions.jsonl", rows)
    write_metrics(run_dir, "grpo")
    results = read(write_report(run_dir).read_text(), "results")
    single, together = results.split("Single cells put together into batches: held-out donors (Table 11)")
    assert (
        cells_of(row_of(single, "after GRPO"))[:2] == ["93.3\xa0%", "93.3\xa0%"] and 'class="published"' not in single
    )
    assert cells_of(row_of(together, "after GRPO, an invalid cell spoils its batch"))[:2] == ["66.7\xa0%", "93.3\xa0%"]
    head = '<span class="published">Cell-o1, cell-level, reasoning <small>published</small>'
    assert cells_of(row_of(together, head)) == ["1.1\xa0%", "50.2\xa0%", "\u2013", "84.3\xa0%", "66.1\xa0%", "718"]
    assert "not beside the metrics of single cells" in together and "All 14 published rows" in together


def test_published_accuracies_of_open_ended_answers_stand_beside_similarities(run_dir):
    puzzles = convert(read_puzzles(run_dir / "puzzles/test.parquet"), "open")
    write_puzzles(run_dir / "puzzles/test.parquet", puzzles)
    shutil.rmtree(run_dir / "eval")
    rows = [{"id": p.id, "prediction": answer(p.answer)} for p in puzzles]
    write_rows(run_dir / "eval/sft/test/predictions.jsonl", rows)
    write_metrics(run_dir, "sft")
    file = run_dir / "eval/sft/test/metrics.json"
    near = {
        "threshold": 0.8,
        "batch_accuracy": 0.5,
        "cell_accuracy": 0.75,
        "cell_accuracy_micro": 0.7,
        "mean_similarity": 0.9,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | {"similarity": near}))
    exact, by_similarity = read(write_report(run_dir).read_text(), "results").split("By similarity of labels")
    assert cells_of(row_of(by_similarity, "after SFT"))[:4] == ["50.0\xa0%", "75.0\xa0%", "70.0\xa0%", "0.900"]
    head = '<span class="published">Cell-o1 <small>published</small>'
    assert cells_of(row_of(by_similarity, head)) == ["0.0\xa0%", "\u2013", "33.7\xa0%", "0.723", "92.2\xa0%", "697"]
    assert 'class="published"' not in exact and "MedCPT similarity to the gold label is above 0.8" in by_similarity


def test_headline_rounding():
    assert [percent(x) for x in (0, 0.001, 0.618, 0.999, 1)] == ["0 %", "<1 %", "62 %", ">99 %", "100 %"]
    assert [percent(x) for x in (1 / 200, 1 - 1 / 200)] == ["<1 %", ">99 %"]  # "0" to the nearest even number
    shares = (0, 1 / 4500, 0.0005, 0.618, 4498 / 4500, 1)
    assert [tenths(x) for x in shares] == ["0.0", "<0.1", "0.1", "61.8", ">99.9", "100.0"]
    assert share(4498 / 4500, (0.9991, 1.0)) == "&gt;99.9&nbsp;%<br> <small>99.9 to 100.0</small>"
    summary = {"base": {"test": {"batch_accuracy": 0.001}}}
    assert headline(summary) == (
        "Before training the annotator names every cell of a batch right in <1 % of the held-out puzzles."
    )


def test_interval_of_the_bars():
    assert batch_interval({"batch_accuracy": 0.5, "n_puzzles": 8}) == wilson_interval(0.5, 8)
    assert batch_interval({"batch_accuracy": 0.5, "n_puzzles": 8, "intervals": {"batch_accuracy": [0.2, 0.8]}}) == (
        0.2,
        0.8,
    )
    assert batch_interval({"batch_accuracy": 0.5}) is None


def test_smoothing_averages_full_windows_only():
    step = np.arange(1.0, 41.0)
    shown, mean = smooth(step, np.where(step == 20, 5.0, 0.0))  # 40 steps: window 5
    assert (shown[0], shown[-1], len(mean)) == (3.0, 38.0, 36)
    assert mean[shown.tolist().index(17) : shown.tolist().index(24)] == pytest.approx([0, 1, 1, 1, 1, 1, 0])
    few = np.array([1.0, 5.0, 2.0])  # too few steps: left alone
    assert np.array_equal(smooth(few, few), [few, few])


def test_curves_skip_what_is_missing_or_not_finite():
    steps = [{"step": 1, "kl": 0.5}, {"step": 2, "kl": float("nan")}, {"step": 3}, {"step": 4, "kl": None}]
    step, value = series(steps, "kl")
    assert step.tolist() == [1.0] and value.tolist() == [0.5]
    assert curve_svg(GRPO_CURVES[0], steps) is None


def test_held_out_accuracy_is_drawn_where_a_run_has_validated(run_dir):
    assert "validation" not in write_report(run_dir).read_text().partition('id="grpo"')[2].partition("</section>")[0]
    file = run_dir / "grpo/metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[4::5]:
        row |= {"validation/batch_accuracy": 0.25, "validation/cell_accuracy": 0.75}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run_dir).read_text()
    assert '<svg role="img" aria-label="Accuracy on held-out puzzles (validation)"' in page


def test_readme_picture(run_dir, tmp_path):
    first = learning_curve_png(run_dir, tmp_path / "a.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(first[16:20], "big") == 1200
    assert learning_curve_png(run_dir, tmp_path / "b.png").read_bytes() == first
    with pytest.raises(ValueError, match=r"ends in \.png"):
        learning_curve_png(run_dir, tmp_path / "a.jpg")
    (run_dir / "grpo/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no GRPO step"):
        learning_curve_png(run_dir, tmp_path / "a.png")


def test_command(run_dir, tmp_path):
    done = run_command("report", "--run", run_dir, "--png", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    assert (run_dir / "report.html").is_file() and (tmp_path / "curve.png").is_file()
    wrong = run_command("report", "--run", run_dir, "--show", "-1")
    assert wrong.returncode == 2 and "--show -1: give 0 or more" in wrong.stderr and "Traceback" not in wrong.stderr
    failed = run_command("report", "--run", tmp_path / "nowhere")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "nowhere: nothing to show" in failed.stderr and "name a run folder" in failed.stderr


def test_a_cell_split_is_not_called_donors(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["run"]["split"] = "cell"
    (run_dir / "summary.json").write_text(json.dumps(summary))
    page = write_report(run_dir).read_text()
    assert "of the puzzles of held-out cells" in page and "held-out donors" not in page.split("Words used here")[0]


def test_a_split_without_puzzles_is_no_error(run_dir):
    """The builder writes unseen.parquet without a row when no disease is held out."""
    write_rows(run_dir / "puzzles/unseen.parquet", [])
    assert "This run was not evaluated on unseen diseases." in read(write_report(run_dir).read_text(), "results")


def test_held_out_cells_of_a_second_file_are_a_split_of_their_own(run_dir):
    assert "held-out real cells" not in write_report(run_dir).read_text()  # few runs have a second file
    write_metrics(run_dir, "grpo")
    shutil.copytree(run_dir / "eval/grpo/test", run_dir / "eval/grpo/cells")
    shutil.copy(run_dir / "puzzles/test.parquet", run_dir / "puzzles/cells.parquet")
    page = write_report(run_dir).read_text()
    assert "This run: held-out real cells" in read(page, "results") and 'href="#where-cells"' in page
    assert page.count("Published, on other puzzles: Table 2") == 2 and "other puzzles: Table 3" not in page


def test_what_a_baseline_warns_of_is_on_the_page(run_dir):
    result = json.loads((run_dir / "summary.json").read_text())["sft"]["test"] | {
        "notes": ["the training puzzles leak"]
    }
    (run_dir / "eval/baseline-nearest/test").mkdir(parents=True)
    (run_dir / "eval/baseline-nearest/test/metrics.json").write_text(json.dumps(result))
    write_summary(run_dir, json.loads((run_dir / "summary.json").read_text())["run"])
    page = write_report(run_dir).read_text()
    assert "held-out donors, nearest training profile: the training puzzles leak." in html.unescape(
        read(page, "results")
    )


def test_a_summary_that_says_little_has_a_page_all_the_same(run_dir):
    for run in (None, {}, {"split": "of another version"}):
        summary = json.loads((run_dir / "summary.json").read_text()) | {"run": run}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        title = re.search("<h1>(.*?)</h1>", write_report(run_dir).read_text())[1]
        assert "held-out puzzles" in title and "donors" not in title, "how they were held out is not recorded"


def test_a_split_file_that_is_no_parquet_is_named(run_dir):
    (run_dir / "puzzles").mkdir(exist_ok=True)
    (run_dir / "puzzles/test.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="puzzles/test.parquet: cannot be read as Parquet"):
        write_report(run_dir)


def test_the_sentence_on_lines_holds_for_what_is_measured_seldom_too(run_dir):
    rows = [{"step": step, "loss": 1.0, **({"eval_loss": 1.0} if step % 100 == 0 else {})} for step in range(1, 301)]
    (run_dir / "sft").mkdir(exist_ok=True)
    (run_dir / "sft/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = html.unescape(read(write_report(run_dir).read_text(), "sft"))
    assert "the line is the running mean over 31 steps. Of what was measured in fewer steps" in text


def test_baselines_stand_beside_the_stages(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    numbers = {**summary["sft"]["test"], "batch_accuracy": 0.123}
    del numbers["response_length"]  # as launch/demo.py writes it
    numbers["response_length_unit"] = "words"
    summary["baselines"] = {"markers": {"test": numbers}, "random": {"unseen": numbers}}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    results = read(write_report(run_dir).read_text(), "results")
    row = cells_of(row_of(results, "marker table, one to one"))
    assert row[0].startswith("12.3") and "labels at random" not in results and "words" not in "".join(row)
    printed = summary_text(run_dir).splitlines()
    assert printed[-2].split()[:3] == ["markers", "test", "0.123"] and printed[-2].split()[-1] == "-"
    assert printed[-1].split()[:2] == ["random", "unseen"]


def test_stages_that_answered_other_puzzles_are_not_set_against_each_other(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    for stage, digest in (("sft", "aa"), ("grpo", "bb")):
        result = summary[stage]["test"] | {"puzzles": {"digest": digest, "variant": "batch"}}
        (run_dir / f"eval/{stage}/test/metrics.json").write_text(json.dumps(result))
    page = html.unescape(write_report(run_dir).read_text())
    title = re.search("<h1>(.*?)</h1>", page)[1]
    assert "After GRPO" in title and "after SFT" not in title and "before training" in title
    assert "after SFT: answered other puzzles (3 of them) than the last stage, so its numbers do not compare" in page


@pytest.mark.parametrize(("digest", "said"), [("bb", True), ("aa", False)])
def test_baselines_are_on_the_same_puzzles_only_where_they_are(run_dir, digest, said):
    result = json.loads((run_dir / "summary.json").read_text())["grpo"]["test"]
    for folder, own in (("grpo", "bb"), ("baseline-random", digest)):
        (run_dir / f"eval/{folder}/test").mkdir(parents=True, exist_ok=True)
        one = result | {"puzzles": {"digest": own, "variant": "batch"}}
        (run_dir / f"eval/{folder}/test/metrics.json").write_text(json.dumps(one))
    write_summary(run_dir, {})
    page = write_report(run_dir).read_text()
    assert "Without a language model" in page and ("Without a language model, on the same puzzles" in page) == said


def test_a_kl_that_was_not_computed_is_not_drawn_as_no_change(run_dir):
    curve = next(curve for curve in GRPO_CURVES if "kl" in curve.lines)
    rows = [{"step": step, "kl": 0.0, "loss": 1.0} for step in range(1, 31)]
    assert curve_svg(curve, rows) is None and curve_svg(curve, rows[:-1] + [rows[-1] | {"kl": 1e-9}])
    write_rows(run_dir / "grpo/metrics.jsonl", rows)
    text = html.unescape(read(write_report(run_dir).read_text(), "grpo"))
    assert "Distance from the SFT model (KL)" in text.split("<figure")[0], "among what is not recorded"
    learning_curve_png(run_dir, run_dir / "curve.png")


def test_the_reward_of_all_answers_is_drawn_under_oversample(run_dir):
    rows = [{"step": step, "reward": 0.5, "dynamic_sampling/reward": 0.8} for step in range(1, 31)]
    assert sampled_reward(rows) == "dynamic_sampling/reward" and sampled_reward([{"reward": 1.0}]) == "reward"
    reward = next(curve for curve in GRPO_CURVES if "reward" in curve.lines)
    assert "of all answers" in curve_svg(reward, rows) and "of all answers" not in curve_svg(
        reward, [{"step": 1, "reward": 1}]
    )


def test_a_note_of_several_stages_is_said_once(run_dir):
    for stage in ("base", "sft", "grpo"):
        result = json.loads((run_dir / "summary.json").read_text())[stage]["test"]
        notes = ["cells are few", *(["alone"] if stage == "sft" else [])]
        (run_dir / f"eval/{stage}/test/metrics.json").write_text(json.dumps(result | {"notes": notes}))
    text = html.unescape(read(write_report(run_dir).read_text(), "results"))
    assert text.count("cells are few") == 1 and "held-out donors, after SFT: alone." in text


def test_a_single_batch_has_no_interval_on_the_page(run_dir):
    result = json.loads((run_dir / "summary.json").read_text())["grpo"]["test"]
    result |= {"batch_accuracy": 0.625, "intervals": {"batch_accuracy": [0.625, 0.625]}, "interval": {"batches": 1}}
    (run_dir / "eval/grpo/test/metrics.json").write_text(json.dumps(result))
    shutil.rmtree(run_dir / "puzzles")
    page = write_report(run_dir).read_text()
    assert "62.5" in read(page, "results") and "62.5 to 62.5" not in html.unescape(page)
