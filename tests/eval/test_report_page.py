"""The puzzles and the reasoning on the report page; the page in a real Chromium: on a screen and a phone, by keyboard, in the
dark, on paper."""

import base64
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from data.puzzles import Puzzle, read_puzzles, write_puzzles, write_rows
from eval.metrics import score_one
from eval.report.page import write_report
from eval.report.puzzles import choose_examples, examples_of
from eval.report.run import Answered
from eval.report.stages import _broken
from tests.eval.test_report import (
    LABELS,
    answer,
    articles,
    cells_of,
    marks,
    read,
    row_of,
    swapped,
    write_answers,
    write_run,
)
from tests.helpers.browser import Browser, find_chromium

needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on this machine: apt-get install --no-install-recommends chromium"
)
pytestmark = pytest.mark.slow(1)
LONG = "CD8-positive, alpha-beta memory T cell, CD45RO-positive and_a_word_that_nobody_can_break_anywhere_at_all"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


def test_puzzles_to_read_are_the_best_and_the_worst(run_dir):
    page = write_report(run_dir).read_text()
    shown = articles(page)
    assert list(shown) == ["p1", "p0", "p2"]  # p1 gained most since SFT
    assert marks(shown["p1"], "after SFT") == ["wrong", "wrong", "right", "right", "right"]
    assert marks(shown["p1"]) == marks(shown["p0"]) == ["right"] * 5
    assert marks(shown["p2"]) == ["wrong", "wrong", "right", "right", "right"]
    assert "cells right 5 of 5 after SFT, 3 of 5 after GRPO" in shown["p2"]
    assert cells_of(row_of(shown["p1"], "1"))[1:] == ["B cell", "\u2717 NK cell", "\u2713 B cell"]
    assert "<i>T0G0, T0G1, T0G2, T0G3, T0G4, T0G5, T0G6, T0G7</i>" in shown["p0"]
    assert "<summary>4 more genes of cell 1</summary><i>T0G8, T0G9, T0G10, T0G11</i>" in shown["p0"]
    assert "The best" in page and "An unchosen one: there is no such puzzle." in page
    assert "<b>Candidates:</b> B cell; NK cell; T cell; fibroblast; monocyte" in shown["p0"]
    assert "What the model wrote after SFT" in shown["p0"] and "The prompt, word for word" in shown["p0"]
    assert list(articles(write_report(run_dir, show=1).read_text())) == ["p1", "p2", "p0"]


def test_the_unchosen_puzzle_is_one_that_can_be_read():
    """The first of the file cannot be read, and others are left."""
    labels = ["a", "b"]
    some = [Puzzle(id=f"p{i}", context="", cells=[["G"]] * 2, candidates=labels, answer=labels) for i in range(6)]
    texts = ["no", answer(labels), answer(labels), answer(labels[::-1]), answer(labels[::-1]), answer(labels)]
    answered = [Answered(p, text, "stop", score_one(text, p)) for p, text in zip(some, texts, strict=True)]
    chosen = choose_examples(examples_of({"grpo": answered}), 1)
    assert [one.puzzle.id for one in chosen["first"]] == ["p2"]


def test_marker_genes_are_bold(run_dir):
    puzzles = read_puzzles(run_dir / "puzzles/test.parquet")
    cells = [["ACTB", "MS4A1", *genes] for genes in puzzles[0].cells]
    write_puzzles(run_dir / "puzzles/test.parquet", [dataclasses.replace(puzzles[0], cells=cells), *puzzles[1:]])
    shown = articles(write_report(run_dir).read_text())["p0"]
    assert "ACTB, <b>MS4A1</b>" in row_of(shown, "2") and "<b>MS4A1</b>" not in row_of(
        shown, "1"
    )  # cell 2 is the B cell


def test_an_answer_of_sft_that_cannot_be_read_is_shown_with_its_reason(run_dir):
    write_answers(run_dir, "sft", ["B cell"] * 3)
    page = write_report(run_dir).read_text()
    shown = articles(page)
    assert marks(shown["p0"], "after SFT") == ["wrong"] * 5 and marks(shown["p0"]) == ["right"] * 5
    said = "The answer after SFT cannot be read (&lt;think&gt; occurs 0 times"
    assert said in shown["p0"] and "no readable answer" in row_of(shown["p0"], "1")
    rows = [{"id": "p0", "prediction": "<think>a", "finish_reason": "length"}]
    write_rows(run_dir / "eval/grpo/test/predictions.jsonl", rows)
    page = write_report(run_dir).read_text()
    assert "The answer after GRPO hit the length limit." in articles(page)["p0"]
    assert "1 answer after GRPO cannot be read" in page and "The best: there is no such puzzle." in page


def test_choice_of_puzzles_by_hand():
    labels = ["a", "b", "c", "d"]
    puzzles = [Puzzle(id=f"p{i}", context="", cells=[["G"]] * 4, candidates=labels, answer=labels) for i in range(7)]
    right = {"sft": [4, 0, 2, 4, 2, 4, 0], "grpo": [4, 4, 4, 0, 0, 2, None]}  # a number of cells; None: not readable

    def answered(puzzle: Puzzle, n: int | None) -> Answered:
        given = labels[: n or 0] + ["x"] * (4 - (n or 0))
        text = "?" if n is None else answer(given)
        return Answered(puzzle, text, "stop", score_one(text, puzzle))

    answers = {
        stage: [answered(*pair) for pair in zip(puzzles, numbers, strict=True)] for stage, numbers in right.items()
    }
    names = {kind: [one.puzzle.id for one in some] for kind, some in chosen_of(answers, 2).items()}
    assert names == {"best": ["p1", "p2"], "worst": ["p3", "p4"], "first": ["p0"]}
    everything = chosen_of(answers, 10)
    assert [one.puzzle.id for one in everything["best"]] == ["p1", "p2", "p0", "p5"]  # at most half
    assert [one.puzzle.id for one in everything["worst"]] == ["p3", "p4", "p6"]  # what cannot be read comes last
    assert [one.puzzle.id for one in chosen_of({"sft": answers["sft"]}, 1)["best"]] == ["p0"]
    assert chosen_of({}, 3) == {"best": [], "worst": [], "first": []}


def chosen_of(answers: dict, show: int) -> dict:
    return choose_examples(examples_of(answers), show)


def test_the_reasoning_is_read_and_drawn(run_dir):
    puzzles = read_puzzles(run_dir / "puzzles/test.parquet")
    mind = [
        "Cell 2: G1 is high, so this is NK cell.",
        "Cell 1: G2 is high, so this is fibroblast.",
        "Cell 1: Wait, G3 is higher, so this is T cell.",
        *(f"Cell {i}: G, so this is {LABELS[i - 1]}." for i in (3, 4, 5)),
    ]
    wrong = [f"Cell {i}: G, so this is {label}." for i, label in enumerate(swapped(puzzles[1].answer), start=1)]
    texts = [answer(LABELS, "\n".join(mind)), answer(swapped(puzzles[1].answer), "\n".join(wrong))]
    write_answers(run_dir, "grpo", [*texts, answer(puzzles[2].answer, "nothing")])
    reasoning = read(write_report(run_dir).read_text(), "reasoning")
    assert "No answer before training or after SFT gives a cell a label in its reasoning." in reasoning
    assert cells_of(row_of(reasoning, "Answers that change their mind"))[0] == "33.3\xa0%"
    assert cells_of(row_of(reasoning, "Changes that correct an error"))[0] == "100.0\xa0%"
    assert cells_of(row_of(reasoning, "Answers that contradict their reasoning"))[0] == "33.3\xa0%"
    titles = re.findall("<h4>(.*?)</h4>", reasoning)
    assert titles == [
        "It changes its mind: puzzle p0, 5 of 5 cells right, 1 change of mind",
        "It goes wrong: puzzle p1, 3 of 5 cells right, 0 changes of mind",
    ]
    first, second = re.findall('<table class="lanes">.*?</table>', reasoning, re.DOTALL)
    rows = re.findall('<tr><th scope="row">\\d+</th>(.*?)</tr>', first)
    lanes = [[bool(mark) for mark in re.findall('<td class="lane[^>]*>(<b.*?</b>)?</td>', row)] for row in rows]
    assert [row.index(True) + 1 for row in lanes] == [2, 1, 1, 3, 4, 5] and all(sum(row) == 1 for row in lanes)
    assert 'class="lane down"' in rows[1] and 'class="lane up"' in rows[2] and "changes its mind" in rows[2]
    assert "Cell 2: " in rows[0] and "truth: B cell" in rows[0]
    assert "It gives cell 2 another label than the reasoning did: B cell." in first
    assert "The answer has 3 of 5 cells right." in second


@pytest.fixture
def page(tmp_path) -> Path:
    """A run whose reasoning has steps, a change of mind and a very long word."""
    write_run(tmp_path)
    steps = "\n".join(f"Cell {i}: {LONG}, so this is {label}." for i, label in enumerate(swapped(LABELS), start=1))
    mended = "\n".join(f"Cell {i}: wait, so this is {label}." for i, label in enumerate(LABELS[:2], start=1))
    rest = [answer(LABELS), answer([LONG, *LABELS[1:]], steps)]
    write_answers(tmp_path, "grpo", [answer(LABELS, f"{steps}\n{mended}"), *rest])
    return write_report(tmp_path)


def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path / "profile", tmp_path / "got")


@needs_chromium
def test_no_error_no_request_and_no_sideways_scroll(page, tmp_path):
    with browser(tmp_path) as b:
        for width, dark in ((1280, False), (768, False), (400, True)):
            b.open(page, width, dark=dark)
            ground = b.js("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(20, 23, 26)" if dark else "rgb(246, 247, 248)")
            for opened in ("false", "true"):
                b.js(f"document.querySelectorAll('details').forEach((e) => {{ e.open = {opened}; }})")
                assert b.js("document.documentElement.scrollWidth") <= width
                assert b.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
            right = (
                "Math.max(...[...document.querySelectorAll('svg, pre')].map((e) => e.getBoundingClientRect().right))"
            )
            assert 0 < b.js(right) <= width
        assert b.problems() == []


@needs_chromium
def test_a_label_that_cannot_be_broken_leaves_the_counts_in_view(page, tmp_path):
    edges = "[...document.querySelectorAll('.counts th, .counts td')].map((e) => e.getBoundingClientRect().right)"
    with browser(tmp_path) as b:
        for width in (1280, 400):
            b.open(page, width)
            assert max(b.js(edges)) <= b.js("document.querySelector('.narrow').getBoundingClientRect().right")


@needs_chromium
def test_everything_is_reached_and_opened_from_the_keyboard(page, tmp_path):
    with browser(tmp_path) as b:
        b.open(page)
        summaries = b.js("document.querySelectorAll('summary').length")
        reached, toggled = set(), 0
        for _ in range(summaries + b.js("document.querySelectorAll('a').length") + 5):
            b.press("Tab")
            place = b.js("[...document.querySelectorAll('summary')].indexOf(document.activeElement)")
            if place >= 0 and place not in reached:
                assert b.js("document.activeElement.matches(':focus-visible')")
                before = b.js("document.activeElement.parentElement.open")
                b.press("Enter")
                toggled += b.js("document.activeElement.parentElement.open") != before
                reached.add(place)
        assert len(reached) == toggled == summaries > 30


@needs_chromium
def test_a_phone_shows_cards_and_steps(page, tmp_path):
    shown = "(s) => [...document.querySelectorAll(s)].filter((e) => e.checkVisibility()).length"
    with browser(tmp_path) as b:
        b.open(page, 1280)
        assert (
            b.js(f"({shown})('thead')") > 5 and b.js(f"({shown})('.lane')") > 30 and b.js(f"({shown})('.phone')") == 0
        )
        b.open(page, 400)
        assert b.js(f"({shown})('thead, .lane')") == 0 and b.js(f"({shown})('.phone')") > 5
        label = "getComputedStyle(document.querySelector('.results td'), '::before').content"
        assert b.js(label) == '"whole puzzles right"'
        taps = "[...document.querySelectorAll('summary')].map((e) => e.offsetHeight).filter((h) => h)"
        assert min(b.js(taps)) >= 40
        b.send(
            "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
        )
        assert b.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert b.js(f"({shown})('nav')") == 0 and b.js(f"({shown})('thead')") > 5


@needs_chromium
def test_prints_on_a_few_pages(page, tmp_path):
    with browser(tmp_path) as b:
        b.open(page)
        pdf = base64.b64decode(b.send("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert pdf[:5] == b"%PDF-" and 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 20
    (tmp_path / "page.pdf").write_bytes(pdf)
    try:
        text = subprocess.run(
            ["pdftotext", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        return  # the number of pages is all that can be looked at here
    assert "After GRPO the annotator names every cell" in text and "Step by step" in text


def test_a_long_label_keeps_its_number():
    long = "central memory CD4-positive, alpha-beta T cell of the blood of a donor and some more words\u00a0(33)"
    assert _broken(long).endswith("...\u00a0(33)") and _broken(long).count("\n") == 2
    assert _broken("type 1\u00a0(9)") == "type 1\u00a0(9)"
