"""The report page and the README picture, from a small run folder on disk."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.puzzles import Puzzle, write_puzzles, write_rows
from eval.figures import GRPO_CURVES, curve_svg, learning_curve_png, percent, series, smooth
from eval.metrics import score
from eval.report import choose_examples, headline, read_answers, write_report

ROOT = Path(__file__).parents[1]
LABELS = ["T cell", "B cell", "NK cell", "monocyte", "fibroblast"]
SCRIPT = "<script>alert('x')</script>"


def answer(labels: list[str], reasoning: str = "markers") -> str:
    return f"<think>{reasoning}</think>\n<answer>{' | '.join(labels)}</answer>"


def swapped(labels: list[str]) -> list[str]:
    """The first two labels exchanged: all cells but two right."""
    return [labels[1], labels[0], *labels[2:]]


@pytest.fixture
def run_dir(tmp_path) -> Path:
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
    predictions = {
        "base": ["no idea"] * 3,
        "sft": [answer(p.answer) if i != 1 else answer(swapped(p.answer)) for i, p in enumerate(puzzles)],
        "grpo": [
            answer(puzzles[0].answer),
            answer(puzzles[1].answer, SCRIPT),
            answer([SCRIPT, *swapped(puzzles[2].answer)[1:]]),
        ],
    }
    write_puzzles(tmp_path / "puzzles/test.parquet", puzzles)
    summary = {}
    for stage, texts in predictions.items():
        rows = [
            {"id": p.id, "prediction": text, "response_tokens": 50 + i, "finish_reason": "stop"}
            for i, (p, text) in enumerate(zip(puzzles, texts, strict=True))
        ]
        write_rows(tmp_path / f"eval/{stage}/test/predictions.jsonl", rows)
        summary[stage] = {"test": score(texts, puzzles, [50, 51, 52]).to_dict()}
    summary["run"] = {"config": {"lr": 1e-4, "note": "<i>"}, "seconds": {"grpo": 61.7}, "versions": {"torch": "2.13.0"}}
    summary["run"]["git_commit"] = "c0ffee"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
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
    write_rows(tmp_path / "grpo/metrics.jsonl", steps)
    write_rows(tmp_path / "sft/metrics.jsonl", [{"step": i, "loss": 2 / i} for i in range(1, 11)])
    return tmp_path


def articles(page: str) -> dict[str, str]:
    """Example title -> its HTML."""
    return {
        re.search("<h3>(.*?)</h3>", text)[1]: text for text in re.findall("<article>.*?</article>", page, re.DOTALL)
    }


def marks(article: str) -> list[str]:
    """What the last column of an example says, cell by cell."""
    return re.findall(r'aria-label="(right|wrong)">[^<]*</b></td></tr>', article)


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
    page = write_report(run_dir).read_text()
    row = re.search(r'<tr><th scope="row">after GRPO</th>(.*?)</tr>', page)[1]
    cells = [html.unescape(re.sub("<[^>]*>", " ", cell)).split() for cell in re.findall("<td>(.*?)</td>", row)]
    # cells right: 5, 5 and 3 of 5 (a script and a swap); every answer is valid with 5 distinct labels
    assert [c[0] for c in cells] == ["66.7", "86.7", "100.0", "100.0", "51", "3"]
    base = re.search(r'<tr><th scope="row">before training</th>(.*?)</tr>', page)[1]
    assert re.findall(r"<td>([\d.]+)", base) == ["0.0", "0.0", "0.0", "0.0", "51", "3"]
    assert "This run was not evaluated on unseen diseases." in page


def test_examples_show_the_right_ticks_crosses_and_genes(run_dir):
    shown = articles(write_report(run_dir).read_text())
    assert list(shown) == [
        "Every cell right after GRPO",
        "Partly wrong after GRPO",
        "Wrong after SFT, right after GRPO",
    ]
    right, partly, rescued = shown.values()
    assert "Puzzle p0." in right and marks(right) == ["right"] * 5
    assert "Puzzle p2." in partly and marks(partly) == ["wrong", "wrong", "right", "right", "right"]
    assert "3 of 5 cells right." in partly
    assert "Puzzle p1." in rescued and marks(rescued) == ["right"] * 5
    sft_column = re.findall(r'<td data-name="after SFT">(.*?)</td>', rescued)
    assert [("&#10003;" in cell) for cell in sft_column] == [False, False, True, True, True]
    assert "NK cell" in sft_column[0] and "B cell" in sft_column[1]
    assert "T0G0, T0G1, T0G2, T0G3, T0G4, T0G5, T0G6, T0G7</span>" in right


def test_an_unreadable_answer_of_sft_is_shown_with_its_reason(run_dir):
    rows = [{"id": f"p{i}", "prediction": "B cell", "response_tokens": 2} for i in range(3)]
    write_rows(run_dir / "eval/sft/test/predictions.jsonl", rows)
    rescued = articles(write_report(run_dir).read_text())["Wrong after SFT, right after GRPO"]
    sft_column = re.findall(r'<td data-name="after SFT">(.*?)</td>', rescued)
    assert "Puzzle p0." in rescued and marks(rescued) == ["right"] * 5
    assert "unreadable answer: &lt;think&gt; occurs 0 times" in sft_column[0]
    assert all("&#10007;" in cell for cell in sft_column) and "&ndash;" in sft_column[4]


def test_text_of_models_and_files_is_escaped(run_dir):
    page = write_report(run_dir).read_text()
    assert "<script" not in page.lower()
    assert page.count(html.escape(SCRIPT)) == 3  # the reasoning of p1; label and answer block of p2
    assert "donor 2 &amp; a &lt;b&gt;female&lt;/b&gt;." in page and "&lt;i&gt;" in page


def test_page_needs_no_network_and_every_figure_says_how_to_read_it(run_dir):
    page = write_report(run_dir).read_text()
    assert "http" not in page and "@import" not in page and "url(#" in page
    assert not re.search(r'(src|href)="(?!#)', page)
    figures = re.findall("<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 8  # bars, six GRPO curves, SFT loss
    for figure in figures:
        assert figure.count("<svg") == 1
        assert len(re.search("<figcaption>(.*?)</figcaption>", figure)[1]) > 60
    assert "Not recorded in grpo/metrics.jsonl: Puzzles that teach, Sampler against trainer." in page


def test_settings_versions_and_times_are_listed(run_dir):
    page = write_report(run_dir).read_text()
    rows = dict(re.findall(r'<tr><th scope="row">([^<]*)</th><td>([^<]*)</td></tr>', page))
    assert rows == {"lr": "0.0001", "note": "&lt;i&gt;", "grpo": "62 s", "torch": "2.13.0", "git commit": "c0ffee"}


def test_same_folder_same_bytes(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert not list(run_dir.glob("*.partial"))


def test_a_bare_summary_gives_an_honest_page(tmp_path):
    metrics = {"batch_accuracy": 0.25, "n_puzzles": 8}
    (tmp_path / "summary.json").write_text(json.dumps({"sft": {"unseen": metrics}}))
    page = write_report(tmp_path).read_text()
    assert "<h1>After SFT the annotator names every cell of a batch right in 25&nbsp;% of the puzzles of unseen" in page
    assert page.count("not evaluated in this run") == 2
    assert "This run was not evaluated on held-out donors." in page
    assert "This run folder has no grpo/metrics.jsonl" in page and "This run folder has no sft/metrics.jsonl" in page
    assert "This run folder has no predictions" in page and "Not recorded in summary.json." in page
    (tmp_path / "summary.json").write_text("{}")
    assert "<h1>This run has not been evaluated yet.</h1>" in write_report(tmp_path).read_text()


def test_predictions_for_other_puzzles_are_refused(run_dir):
    write_rows(run_dir / "eval/grpo/test/predictions.jsonl", [{"id": "q9", "prediction": "x"}])
    with pytest.raises(ValueError, match=r"predictions\.jsonl: puzzle q9 is not in .*test\.parquet"):
        write_report(run_dir)


def test_examples_of_a_run_without_grpo(run_dir):
    answers = {"base": [], "sft": read_answers(run_dir, "sft", "test"), "grpo": []}
    chosen = choose_examples(answers)
    assert chosen["right"].puzzle.id == "p0" and chosen["partly"].puzzle.id == "p1" and chosen["rescued"] is None


def test_headline_rounding():
    assert [percent(x) for x in (0, 0.001, 0.618, 0.999, 1)] == ["0 %", "<1 %", "62 %", ">99 %", "100 %"]
    summary = {"base": {"test": {"batch_accuracy": 0.001}}}
    assert headline(summary) == (
        "Before training the annotator names every cell of a batch right in <1 % of the puzzles of held-out donors."
    )


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
    command = [sys.executable, "launch/report.py", "--run"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, run_dir, "--png", tmp_path / "curve.png"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (run_dir / "report.html").is_file() and (tmp_path / "curve.png").is_file()
    failed = subprocess.run([*command, tmp_path / "nowhere"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "summary.json: no such file; `make demo`" in failed.stderr


def test_a_cell_split_is_not_called_donors(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["run"]["split"] = "cell"
    (run_dir / "summary.json").write_text(json.dumps(summary))
    page = write_report(run_dir).read_text()
    assert "of the puzzles of held-out cells" in page and "held-out donors" not in page.split("Words used here")[0]
