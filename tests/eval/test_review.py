"""Blind review: the page and its key, the page in a real Chromium, and what the reviewers' files say together."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from data.puzzles import Puzzle, write_rows
from eval.review.page import ERROR_TYPES, SIDES, WHOLE, WORDING, key_id, make_review, read_key, stratified
from eval.review.summary import cohen_kappa, merge_reviews, summary_markdown
from tests.helpers.browser import (
    NAMES,
    Browser,
    asked,
    call,
    find_chromium,
    made,
    page_data,
    refused,
    review,
    write_answers,
)
from tests.helpers.commands import succeed

needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on this machine: apt-get install --no-install-recommends chromium"
)


@pytest.fixture
def files(tmp_path) -> Path:
    return write_answers(tmp_path)


def test_the_page_does_not_tell_who_is_who(files):
    page, key = made(files)
    text = page.read_text()
    assert key["models"] == list(NAMES)  # where the two paths differ
    for word in ("quokka", "wombat", "predictions", "parquet", "90210", "tokens", "finish", str(files), *NAMES):
        assert word not in text.casefold()
    assert key["answers"] not in text and key["page"] in text
    data = page_data(page)
    assert set(data["cases"][0]) == {"context", "candidates", "cells", "truth", "answers"}
    assert set(data["cases"][0]["answers"][0]) == {"labels", "reasoning", "problem", "right"}
    assert len({case["context"] for case in data["cases"]}) == len(key["cases"]) == 5
    for place, case in enumerate(key["cases"]):
        assert {case["left"], case["right"]} == set(NAMES) and case["case"] == place + 1
        sides = dict(zip((case["left"], case["right"]), data["cases"][place]["answers"], strict=True))
        assert f"donor {case['puzzle'][1:]} " in data["cases"][place]["context"]
        assert all(sides["Quokka-7B"]["right"]) and case["wrong"]["Quokka-7B"] == []
        if case["puzzle"] == "p5":
            assert sides["wombat"]["problem"] and case["wrong"]["wombat"] == [1, 2, 3]
            assert case["readable"] == {"Quokka-7B": True, "wombat": False}
        else:
            assert sides["wombat"]["right"][:3] == [False, False, True] and case["wrong"]["wombat"] == [1, 2]


def test_sides_and_order_are_random_and_come_from_the_seed(files):
    labels = ["x", "y"]
    some = [Puzzle(id=f"p{i}", context="", cells=[["A"]] * 2, candidates=labels, answer=labels) for i in range(200)]
    answers = {name: {puzzle.id: f"{name} {puzzle.id}" for puzzle in some} for name in NAMES}
    first, again, other = (make_review(some, answers, 200, seed, True).key["cases"] for seed in (0, 0, 1))
    assert first == again != other and [case["puzzle"] for case in first] != [puzzle.id for puzzle in some]
    assert 70 < sum(case["left"] == "wombat" for case in first) < 130
    page, _ = made(files)
    before = page.read_bytes()
    assert made(files)[0].read_bytes() == before and not list(files.glob("*partial*"))
    assert "is the key of another page" in refused(*asked(files), "--out", page, "--seed", 1)
    assert page.read_bytes() == before  # reviews of it may be under way


def test_page_is_one_file_without_network_and_runs_no_text_of_answers(files):
    text = made(files)[0].read_text()
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text and "url(" not in text
    assert not re.search(r'(src|href)="', text)
    assert text.count("<script") == text.count("</script>") == 2 and "<script>document" not in text
    assert "default-src 'none'" in text


def test_without_truth_the_page_does_not_hold_it(files):
    for case in page_data(made(files, "--no-show-truth")[0])["cases"]:
        assert set(case) == {"context", "candidates", "cells", "answers"}
        assert all(set(own) == {"labels", "reasoning", "problem"} for own in case["answers"])


def test_cases_keep_the_share_of_each_number_of_cells(files):
    sizes = [3] * 10 + [5] * 60 + [8] * 30
    some = [Puzzle(id=f"p{i}", context="", cells=[["A"]] * n, candidates=[], answer=[]) for i, n in enumerate(sizes)]
    for wanted, found in ((10, [3] + [5] * 6 + [8] * 3), (11, [3] + [5] * 7 + [8] * 3), (500, sizes)):
        chosen = stratified(some, wanted, random.Random(0))
        assert sorted(len(puzzle.cells) for puzzle in chosen) == found and len({p.id for p in chosen}) == len(found)
    page, key = made(files, "--cases", 2)
    assert len(page_data(page)["cases"]) == len(key["cases"]) == 2


def test_what_was_left_out_and_names_inside_answers_are_said(files):
    rows = [json.loads(line) for line in (files / "wombat/predictions.jsonl").read_text().splitlines()]
    rows[0]["prediction"] = rows[0]["prediction"].replace("at a glance", "as a WOMBAT I think")
    write_rows(files / "wombat/predictions.jsonl", rows[:5])
    text = succeed("review", *asked(files), "--out", files / "a/review.html")
    assert "4 cases of 5 puzzles answered by both; 1 left out (same text)" in text
    (case,) = [c for c in read_key(files / "a/review.key.json")["cases"] if c["puzzle"] == "p0"]
    assert f"a model's name occurs in answers of 1 cases ({case['case']})" in text


def test_the_summary_says_how_many_answers_were_alike():
    labels = ["x", "y"]
    some = [Puzzle(id=f"p{i}", context="", cells=[["A"]] * 2, candidates=labels, answer=labels) for i in range(5)]
    answers = {name: {puzzle.id: f"{name} {puzzle.id}" for puzzle in some} for name in NAMES}
    answers[NAMES[1]]["p3"] = answers[NAMES[0]]["p3"]
    key = make_review(some, answers, 5, 0, True).key
    assert key["answered"] == {"both": 5, "alike": 1}
    entry = {"verdict": "tie", "comment": "", "errors": {side: {} for side in SIDES}}
    reviews = [{"reviewer": "A", "file": "a.json", "answers": {"1": entry}}]
    for told, said in ((key, True), ({k: v for k, v in key.items() if k != "answered"}, False)):
        text = summary_markdown(merge_reviews(reviews, told), told["error_types"])
        assert ("To 1 of 5 puzzles both models gave the same answer" in text) == said


def test_mistakes_in_making_a_page(files):
    for change, sentence in [
        (["--predictions", files / "wombat/predictions.jsonl"], "two --predictions, not 3"),
        (["--name", "A"], "--name A: give two different names"),
        (["--name", "A", "--name", "a"], "give two different names"),
        (["--cases", 0], "--cases 0: must be at least 1"),
        (["--out", files / "review.txt"], "name a file that ends in .html"),
        (["--collect", files / "r.json"], "give either --puzzles and two --predictions, or --collect"),
    ]:
        assert sentence in refused(*asked(files), "--out", files / "r.html", *change)


def test_predictions_that_do_not_fit_are_refused(files):
    one = [*asked(files)[:4], "--out", files / "r.html"]
    rows = [{"id": "p0", "prediction": "x"}, {"id": "q", "prediction": "x"}]
    for number, (bad, sentence) in enumerate(
        [
            (rows, "row 1: puzzle q is not in the --puzzles file"),
            (rows[:1] * 2, "row 1: puzzle p0 is answered a second time"),
            ([{"id": "p0"}], "row 0: needs the text column 'prediction'"),
            ([{"prediction": "x"}], "1 predictions for 6 puzzles"),
        ]
    ):
        write_rows(files / f"{number}.jsonl", bad)
        assert f"{files / str(number)}.jsonl" in refused(*one, "--predictions", files / f"{number}.jsonl")
        assert sentence in refused(*one, "--predictions", files / f"{number}.jsonl")
    (files / "copy.jsonl").write_bytes((files / "Quokka-7B/predictions.jsonl").read_bytes())
    assert "of 6 puzzles answered in both" in refused(*one, "--predictions", files / "copy.jsonl")
    assert "given twice" in refused(*one, "--predictions", files / "wombat/../Quokka-7B/predictions.jsonl")


def test_kappa_by_hand():
    """Ten cases, 0 loss, 1 tie, 2 win; eight the same, one a step apart, one two. Shares .4 .2 .4 against .4 .3 .3."""
    first, second = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2, 0]
    chance = 0.4 * 0.4 + 0.2 * 0.3 + 0.4 * 0.3
    assert cohen_kappa(first, second) == pytest.approx((0.8 - chance) / (1 - chance)) == pytest.approx(0.697, abs=1e-3)
    expected = (0.4 * 0.3 + 0.2 * 0.4 + 0.2 * 0.3 + 0.4 * 0.3) / 2 + 0.4 * 0.3 + 0.4 * 0.4
    assert cohen_kappa(first, second, linear=True) == pytest.approx(1 - (0.1 / 2 + 0.1) / expected)


def test_kappa_against_scikit_learn_and_at_its_ends():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    for _ in range(50):
        pair = rng.integers(3, size=(2, 30)).tolist()
        assert cohen_kappa(*pair) == pytest.approx(cohen_kappa_score(*pair))
        theirs = cohen_kappa_score(*pair, weights="linear", labels=[0, 1, 2])
        assert cohen_kappa(*pair, linear=True) == pytest.approx(theirs)
    assert cohen_kappa([0, 1, 2], [0, 1, 2]) == cohen_kappa([0, 1, 2], [0, 1, 2], linear=True) == 1.0
    assert cohen_kappa([0, 2], [2, 0]) == -1.0
    assert cohen_kappa([2, 2], [2, 2]) is None and cohen_kappa([], []) is None


def test_merging_by_hand(files):
    key = made(files)[1]
    cases = {case["puzzle"]: case["case"] for case in key["cases"]}
    a, b, c, d = (cases[p] for p in ("p0", "p1", "p2", "p5"))
    marks = {
        a: {"wombat": {"1": ["wrong_conclusion", "plausible_but_incorrect"], "2": ["wrong_conclusion"]}},
        d: {"wombat": {WHOLE: ["wrong_conclusion"]}},
        c: {"Quokka-7B": {"3": ["incorrect_reasoning"]}},
    }
    ana = review(key, "Ana", {a: "first", b: "first", c: "tie", d: "second"}, marks, "left is | odd\nhere")
    ben = review(key, "Ben", {a: "first", b: "tie", d: "second"})
    summary = merge_reviews([ana, ben], key)
    quokka, wombat = (summary["results"][name] for name in NAMES)
    assert [quokka[k]["count"] for k in ("wins", "ties", "losses")] == [3, 2, 2]
    assert [wombat[k]["count"] for k in ("wins", "ties", "losses")] == [2, 2, 3]
    assert quokka["win_rate"]["share"] == pytest.approx(4 / 7) and wombat["win_rate"]["share"] == pytest.approx(3 / 7)
    low, high = quokka["win_rate"]["interval"]
    assert 0 <= low < 4 / 7 < high <= 1
    assert wombat["win_rate"]["interval"] == pytest.approx([1 - high, 1 - low], abs=0.02)
    assert (summary["cases_judged"], summary["judgements"], summary["cases"]) == (4, 7, 5)
    errors = summary["errors"]["wombat"]
    assert errors["types"] == {
        kind.id: {"plausible_but_incorrect": 1, "wrong_conclusion": 3}.get(kind.id, 0) for kind in ERROR_TYPES
    }
    # Ana had p0, p1, p2 (two wrong cells each) and the unreadable p5 before her, Ben p0, p1 and p5
    assert errors["wrong_places"] == 7 + 5 and errors["marked_though_right"] == 0
    assert summary["errors"]["Quokka-7B"]["marked_though_right"] == 1
    assert [(r["name"], r["judged"]) for r in summary["reviewers"]] == [("Ana", 4), ("Ben", 3)]
    (pair,) = summary["agreement"]
    # shared: win win loss against win tie loss; chance 1/3 * 2/3 + 1/3 * 1/3 = 1/3
    assert (pair["shared"], pair["same"]) == (3, 2) and pair["kappa"] == pytest.approx((2 / 3 - 1 / 3) / (2 / 3))
    (row,) = summary["disagreements"]
    assert (row["case"], row["verdicts"]) == (b, {"Ana": "Quokka-7B", "Ben": "tie"})


def test_the_error_types_are_the_papers(files):
    """Names and definitions of appendix E, as they are."""
    assert {kind.name: kind.meaning for kind in ERROR_TYPES} == {
        "Incorrect Reasoning": "The explanation invokes wrong markers or faulty logic.",
        "No Reasoning": "A label is predicted with virtually no justification.",
        "Plausible but Incorrect": "The reasoning sounds biologically sensible but ignores key evidence, resulting in an "
        "incorrect label.",
        "Forced Assignment Error": "The reasoning is correct, but to exhaust remaining labels, the model attaches the "
        "correct label to the wrong cell.",
        "Correct Reasoning, Wrong Conclusion": "The explanation cites the right evidence, yet the model outputs a "
        "contradictory label.",
    }
    assert not {kind.key for kind in ERROR_TYPES} & set("123ujke?"), "keys that the page uses"
    page, key = made(files)
    assert page_data(page)["wording"] == WORDING and 'id="wording"' in page.read_text()
    summary = merge_reviews([review(key, "Ana", {1: "first"})], key)
    assert "(appendix E), in its words" in WORDING and WORDING in summary_markdown(summary, key["error_types"])


def test_a_page_with_earlier_error_types_is_still_collected(files):
    """The key names the types of its own page."""
    key = made(files)[1]
    old = {name: key[name] for name in key} | {"error_types": {"marker_misread": "Marker misread", "slip": "Slip"}}
    old["page"] = key_id(old)
    case = next(case for case in old["cases"] if case["puzzle"] == "p0")["case"]
    summary = merge_reviews([review(old, "Ana", {case: "first"}, {case: {"wombat": {"1": ["slip"]}}})], old)
    assert summary["errors"]["wombat"]["types"] == {"marker_misread": 0, "slip": 1}
    text = summary_markdown(summary, old["error_types"])
    assert "| Slip |" in text and WORDING not in text and "made with other names" in text


def test_the_interval_is_over_cases_not_judgements(files):
    """Many reviewers who agree say no more about the cases than one does."""
    key = made(files)[1]
    said = {1: "first", 2: "first", 3: "second", 4: "first", 5: "tie"}
    one = merge_reviews([review(key, "r0", said)], key)["results"][NAMES[0]]
    many = merge_reviews([review(key, f"r{i}", said) for i in range(9)], key)["results"][NAMES[0]]
    assert one["win_rate"] == many["win_rate"] and many["wins"]["count"] == 9 * one["wins"]["count"] == 27
    # five cases worth 1 1 0 1 .5: the mean of five draws is 0.2 or less in 0.7 % of resamples, so the low end is above it
    assert 0.2 < one["win_rate"]["interval"][0] < 0.5 and one["win_rate"]["interval"][1] == 1.0


def test_collect_writes_a_summary_to_read_and_one_to_compute_with(files):
    page, key = made(files)
    for name, said in (("Ana", {1: "first", 2: "second"}), ("Ben", {1: "first", 2: "tie"})):
        (files / f"{name}.json").write_text(json.dumps(review(key, name, said, comment="odd | here\nand there")))
    words = ["--collect", files / "Ana.json", "--collect", files / "Ben.json", "--key", files / "review.key.json"]
    text = succeed("review", *words, "--out", files / "out/summary")
    assert "# Blind review: Quokka-7B against wombat" in text and "wrote" in text
    summary = json.loads((files / "out/summary.json").read_text())
    assert summary["results"]["Quokka-7B"]["wins"]["count"] == 2
    written = (files / "out/summary.md").read_text()
    assert "10.1177/001316446002000104" in written and "10.1037/h0026256" in written
    row = next(line for line in written.splitlines() if line.startswith("| Quokka-7B"))
    assert row.startswith("| Quokka-7B | 2 = 50.0 % (") and "| 62.5 % (" in row
    for line in (
        "Ana | 2 of 5 |",
        "| Correct Reasoning, Wrong Conclusion | 0 | 0 |",
        "| Ana | Ben | 2 | 1 |",
        "odd \\| here and",
    ):
        assert line in written


def test_files_of_another_page_twins_and_damage_are_refused(files):
    page, key = made(files)
    n = next(case["case"] for case in key["cases"] if case["puzzle"] == "p0")
    good = review(key, "Ana", {n: "first"})
    entry, none = good["answers"][str(n)], {"left": {}, "right": {}}

    def damaged(**change) -> dict:
        return good | {"answers": {str(n): entry | change}}

    bad = [
        ("not JSON", b'{"kind": '),
        ("holds no JSON object", b"[]"),
        ("not JSON (", b"\xff\xfe"),
        ("not a review", {"kind": "x"}),
        ("a review of another page (id 77", good | {"page": "77"}),
        ("names no reviewer", good | {"reviewer": "  "}),
        ("no 'answers'", good | {"answers": []}),
        ("case 6 is not on the page", good | {"answers": {"6": entry}}),
        (f"case {n} has no comment", damaged(comment=None)),
        (f"case {n} has the verdict 'best'", damaged(verdict="best")),
        ("has no errors of a left", damaged(errors={})),
        ("marks cell '9' of the left", damaged(errors=none | {"left": {"9": []}})),
        ("marks cell 'all' of the left", damaged(errors=none | {"left": {WHOLE: ["wrong_conclusion"]}})),
        ("marks cell 'errors' of the left", damaged(errors=none | {"left": []})),
        ('marks cell 1 of the right answer with ["x"]', damaged(errors=none | {"right": {"1": ["x"]}})),
    ]
    (files / "ana.json").write_text(json.dumps(good))
    (files / "twin.json").write_text(json.dumps(good | {"reviewer": " ANA "}))
    words = ["--key", files / "review.key.json", "--out", files / "summary"]
    for sentence, content in bad:
        (files / "bad.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        said = refused(*words, "--collect", files / "ana.json", "--collect", files / "bad.json")
        assert f"{files / 'bad.json'}: " in said and sentence in said
    said = refused(*words, "--collect", files / "ana.json", "--collect", files / "twin.json")
    assert "twin.json: a second review by ANA, after ana.json" in said and not list(files.glob("summary.*"))


def test_a_key_must_be_a_key_unchanged(files):
    page, key = made(files)
    (files / "ana.json").write_text(json.dumps(review(key, "Ana", {1: "first"})))
    (files / "nobody.json").write_text(json.dumps(review(key, "Nobody", {})))
    swap = json.loads(json.dumps(key))
    swap["cases"][0]["left"], swap["cases"][0]["right"] = swap["cases"][0]["right"], swap["cases"][0]["left"]
    (files / "swap.json").write_text(json.dumps(swap))
    for collected, keyed, out, sentence in [
        ("ana.json", "swap.json", "s", "the key was changed"),
        ("ana.json", "ana.json", "s", "not the key of a review page"),
        ("ana.json", "none.json", "s", "no such file"),
        ("ana.json", "review.key.json", "ana", "would write over"),
        ("nobody.json", "review.key.json", "s", "no case is judged in nobody.json"),
    ]:
        assert sentence in refused("--collect", files / collected, "--key", files / keyed, "--out", files / out)
    assert key_id(key) == key["page"]
    assert "--collect needs --key" in refused("--collect", files / "ana.json", "--out", files / "s")


def sideways(browser: Browser, width: int) -> int:
    """How far the page can be scrolled sideways, with everything unfolded."""
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    return browser.js(f"document.documentElement.scrollWidth - Math.min({width}, document.documentElement.clientWidth)")


@needs_chromium
@pytest.mark.slow(2)
@pytest.mark.parametrize("width", [1280, 400])
def test_an_expert_clicks_through_reloads_exports_and_imports(files, width):
    page, key = made(files)
    data = page_data(page)["cases"]
    wrong = {
        n: [
            (side, str(i + 1))
            for i in range(len(case["cells"]))
            for side, own in zip(SIDES, case["answers"], strict=True)
            if not own["right"][i] and not own["problem"]
        ]
        for n, case in enumerate(data, start=1)
    }
    with Browser(files / "profile", files / "got") as browser:
        browser.open(page, width)
        assert browser.js("[document.title, innerWidth]") == ["Blind review of cell type answers", width]
        assert browser.text("#done") == "0 of 5 judged" and browser.js("document.getElementById('howto').open")
        browser.click("#export")
        assert browser.text("#status").startswith("Write your name") and not list(files.glob("got/*"))
        browser.type("Dr. Ana M\u00fcller")
        n = 1
        while not wrong[n]:
            browser.click("#next")
            n += 1
        browser.click("[data-verdict=left]")
        browser.click(".errors > summary")
        browser.click(".errors[open] button", 3)
        browser.click(".errors[open] button", 1)
        browser.click("#comment")
        browser.type("GZMB is missed </script>")
        assert browser.text(".errors > summary") == "No Reasoning, Forced Assignment Error"
        assert browser.text("#done") == "1 of 5 judged" and "since the last export" in browser.text("#kept")
        browser.reload()
        assert browser.text("#title") == f"Case {n} of 5" and not browser.js("document.getElementById('howto').open")
        assert browser.js("document.querySelector('[data-verdict=left]').ariaPressed") == "true"
        assert browser.text(".errors > summary") == "No Reasoning, Forced Assignment Error"
        browser.click("#next" if n < 5 else "#previous")
        other = n + 1 if n < 5 else n - 1
        browser.click("[data-verdict=right]")
        browser.click("[data-verdict=tie]")
        browser.reload()  # what it shows now has been stored
        assert browser.text("#done") == "2 of 5 judged"
    with Browser(files / "profile", files / "got") as browser:  # the browser was closed in between
        browser.open(page, width)
        assert browser.text("#done") == "2 of 5 judged" and browser.text("#title") == f"Case {other} of 5"
        browser.click("#export")
        file = files / f"got/review-{key['page'][:8]}-Dr-Ana-Muller.json"
        browser.wait(lambda: file.is_file() and not list(files.glob("got/*.crdownload")), "the download")
        assert "since the last export" not in browser.text("#kept") and browser.problems() == []
    side, place = wrong[n][0]
    exported = json.loads(file.read_text())
    marks = {"left": {}, "right": {}} | {side: {place: ["no_reasoning", "forced_assignment"]}}
    assert exported["answers"] == {
        str(n): {"verdict": "left", "errors": marks, "comment": "GZMB is missed </script>"},
        str(other): {"verdict": "tie", "errors": {"left": {}, "right": {}}, "comment": ""},
    }
    (files / "alien.json").write_text(json.dumps(exported | {"page": "feedface" * 4}))
    (files / "broken.json").write_text(json.dumps(exported | {"answers": {"9": {}}}))
    with Browser(files / "elsewhere", files / "got") as browser:
        browser.open(page, width)
        for name, sentence in (("alien", "another page (feedface; this is"), ("broken", "a case '9', which is not on")):
            browser.choose_file("#file", files / f"{name}.json")
            browser.wait(lambda name=name: name in browser.text("#status"), "the refusal")
            assert sentence in browser.text("#status") and browser.text("#done") == "0 of 5 judged"
        browser.press("2")
        browser.accept_dialogs = False
        browser.choose_file("#file", file)
        browser.wait(lambda: browser.text("#status") == "Nothing was imported.", "the question to be answered no")
        browser.accept_dialogs = True
        browser.choose_file("#file", file)
        browser.wait(lambda: browser.text("#status").startswith("Imported 2 cases by Dr. Ana"), "the import")
        assert browser.text("#done") == "2 of 5 judged" and browser.problems() == []
    text = call("--collect", file, "--key", files / "review.key.json", "--out", files / "summary")
    assert "2 judgements of 2 of 5 cases" in text


@pytest.mark.slow(1)
@needs_chromium
def test_the_keys(files):
    page, key = made(files)
    assert not {kind.key for kind in ERROR_TYPES} & set("jkue?123")
    with Browser(files / "profile", files / "got") as browser:
        browser.open(page)
        for step in ("j2", "ArrowRight3", "k2", "ArrowLeft1", "k1", "21", "u2", "12", "u3"):  # a key, the case after it
            browser.press(step[:-1])
            assert browser.text("#title") == f"Case {step[-1]} of 5"
        for press, verdict in (("3", "right"), ("1", "left"), ("2", "tie"), ("2", None)):
            browser.press(press)
            assert browser.js("document.querySelector('[data-verdict][aria-pressed=true]')?.dataset.verdict") == verdict
        browser.press("i")
        assert browser.text("#status").startswith("First choose a cell")
        place = "(() => { const d = document.activeElement.closest('.errors')?.dataset; return d ? d.side + d.place : null; })()"
        browser.press("e")
        first = browser.js(place)
        browser.press("Tab")
        assert browser.js("document.activeElement.matches(':focus-visible')") and browser.js(place) != first
        browser.js("document.activeElement.blur()")
        browser.press("e")
        for letter in "iwpw":
            browser.press(letter)
        assert (
            browser.js(place) == first
            and browser.text(".errors > summary") == "Incorrect Reasoning, Plausible but Incorrect"
        )
        browser.click("#comment")
        browser.type("1 i ?")
        browser.press("j")
        assert browser.text("#title") == "Case 3 of 5" and browser.js("document.activeElement.value") == "1 i ?j"
        for press in ("Escape", "?"):
            browser.press(press)
        assert browser.js("document.getElementById('help').open")
        for press in ("j", "Escape"):
            browser.press(press)
        assert not browser.js("document.getElementById('help').open") and browser.text("#title") == "Case 3 of 5"
        browser.press("j")
        assert browser.text("#title") == "Case 4 of 5" and browser.problems() == []


@pytest.mark.slow(2)
@needs_chromium
@pytest.mark.parametrize("truth", ["--show-truth", "--no-show-truth"])
def test_layout_on_a_screen_and_a_phone(files, truth):
    page, _ = made(files, truth)
    with Browser(files / "profile", files / "got") as browser:
        for width, dark in ((1280, False), (400, True)):
            browser.open(page, width, dark=dark)
            ground = browser.js("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(20, 23, 26)" if dark else "rgb(246, 247, 248)")
            for _ in range(5):
                assert sideways(browser, width) == 0
                browser.press("j")
            tops = browser.js("[...document.querySelectorAll('.reasoning')].map((e) => e.getBoundingClientRect().top)")
            assert (tops[0] == tops[1]) == (width == 1280)
            assert (browser.js("document.querySelectorAll('.cross, .tick').length") > 0) == (truth == "--show-truth")
            taps = (
                "[...document.querySelectorAll('button, select, .errors > summary')].map((e) => e.offsetHeight || 99)"
            )
            assert min(browser.js(taps)) >= (44 if width == 400 else 30)
        assert browser.problems() == []


@needs_chromium
def test_it_is_said_when_the_browser_keeps_nothing(files):
    page, _ = made(files)
    with Browser(files / "profile", files / "got") as browser:
        off = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
        browser.send("Page.addScriptToEvaluateOnNewDocument", source=off)
        browser.open(page, 400)
        assert "does not keep changes" in browser.text("#kept")
        assert browser.js("document.getElementById('kept').className") == "alarm"
        browser.press("1")
        assert browser.text("#done") == "1 of 5 judged" and "since the last export" in browser.text("#kept")


def test_a_page_without_its_key_is_not_replaced(files):
    (files / "review.html").write_text("my thesis")
    assert "is there without its key" in refused(*asked(files), "--out", files / "review.html")
    assert (files / "review.html").read_text() == "my thesis"
