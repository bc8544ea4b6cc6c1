"""Why answers score nothing: reasons, strange labels and repeats, on the console, in the files and on the report page."""

import html
import json
import re
from pathlib import Path

import pytest

from data.errors import UserError
from data.puzzles import Puzzle, read_rows, write_puzzles, write_rows
from data.variants import convert
from eval.evaluation import evaluation_of
from eval.metrics import answer_of, match_rows, scores_of
from eval.reasons import contained_candidate, faults_of, finish_reasons, scored_answers, shortened, verdict
from eval.report.faults import fault_sentences
from eval.report.page import write_report
from tests.eval.test_evaluate import Server, evaluate, evaluated, metrics_of
from tests.eval.test_report import SCRIPT, cells_of, read
from tests.eval.test_report_page import browser, needs_chromium
from tests.helpers.commands import succeed

TYPES = ["T cell", "B cell", "CD4-positive, alpha-beta T cell", "monocyte"]
OPENING = "put the opening `<think>` back in front of each response: the chat template or the server leaves it out"


def make_puzzles(n: int = 6) -> list[Puzzle]:
    """Puzzles of 4 cells; the answer to each begins with another label."""
    return [
        Puzzle(
            id=f"q{i}",
            context="The cell is from a male.",
            cells=[[f"G{i}", f"H{j}"] for j in range(4)],
            candidates=sorted(TYPES),
            answer=[TYPES[(i + j) % 4] for j in range(4)],
        )
        for i in range(n)
    ]


def lacks_opening(puzzle: Puzzle) -> str:
    return answer_of(puzzle.answer, "x").removeprefix("<think>")


def numbered(puzzle: Puzzle) -> str:
    return answer_of([f"Cell {i}: {label}" for i, label in enumerate(puzzle.answer, start=1)])


def faults(rows: list[dict], puzzles: list[Puzzle]) -> dict:
    texts, samples, _ = scores_of(rows, puzzles)
    return faults_of(scored_answers(rows, puzzles, texts, samples))


def reasons(texts: list[str], finish_reason: str | None = None) -> list[tuple[str, int, str]]:
    """[(reason, count, example_id)] of answers to as many puzzles."""
    rows = [{"prediction": text, "finish_reason": finish_reason} for text in texts]
    return [
        (one["reason"], one["count"], one["example_id"])
        for one in faults(rows, make_puzzles(len(rows)))["invalid_reasons"]
    ]


def asked(folder: Path, puzzles: list[Puzzle], texts: list[str]) -> tuple:
    """The options that score these texts, in a file each."""
    write_puzzles(folder / "q.parquet", puzzles)
    rows = [{"id": puzzle.id, "prediction": text} for puzzle, text in zip(puzzles, texts, strict=True)]
    write_rows(folder / "answers.jsonl", rows)
    return ("--puzzles", folder / "q.parquet", "--predictions", folder / "answers.jsonl", "--out", folder / "o")


def test_a_missing_opening_tag_is_said_in_all_places(tmp_path):
    puzzles = make_puzzles()
    said = evaluated(*asked(tmp_path, puzzles, [lacks_opening(puzzle) for puzzle in puzzles]))
    sentence = "6 of 6 answers have an invalid format: `<think>` occurs 0 times, not once"
    first, second, third, *_, last = said.splitlines()
    assert json.loads(first.removeprefix("q "))["format_validity"] == 0.0
    assert second == f"q: {sentence}"
    begins = "x</think> <answer>T cell | B cell | CD4-positive, alpha-beta T cell | monocyte</..."
    assert third == f'       6  `<think>` occurs 0 times, not once; q0 begins "{begins}"'
    assert last == (
        "q: all 6 answers have an invalid format, so every accuracy is 0: `<think>` occurs 0 times, not once. "
        f"Remedy: {OPENING}"
    )
    found = metrics_of(tmp_path / "o")
    assert found["invalid_reasons"] == [
        {
            "reason": "`<think>` occurs 0 times, not once",
            "count": 6,
            "example_id": "q0",
            "example": begins,
            "remedy": OPENING,
        }
    ]
    assert found["label_problems"]["answers"] == 6 and found["label_problems"]["labels"] == 0
    page = (tmp_path / "o/evaluation.md").read_text()
    assert page.index("# ") < page.index(f"{sentence}.") < page.index("## The metrics")
    assert (
        f"- 6: `<think>` occurs 0 times, not once. For example `q0`, which begins `{begins}`. Remedy: {OPENING}."
        in page
    )


def test_reasons_are_counted_the_commonest_first():
    puzzle = make_puzzles(1)[0]
    right, labels = answer_of(puzzle.answer), puzzle.answer
    texts = [
        answer_of(labels[:1]),  # 1 label for 4 cells
        "T cell",
        answer_of(labels[:3]),
        answer_of(labels + labels),
        answer_of(labels[:2]),
        answer_of(labels, "<think> <think>"),  # 3 times
        answer_of(labels, "<think>"),  # twice
        f"Sure! {right}",
        answer_of([*labels[:3], " "]),
        right,
    ]
    assert reasons(texts) == [
        ("the answer has 1 to 8 labels for 4 cells", 4, "q0"),
        ("`<think>` occurs 2 or 3 times, not once", 2, "q5"),
        ("`<think>` occurs 0 times, not once", 1, "q1"),
        ("the text is not `<think>...</think>` then `<answer>...</answer>` with nothing else around them", 1, "q7"),
        ("label 4 of the answer is empty", 1, "q8"),
    ]
    assert reasons([right] * 3) == []


def test_each_reason_has_an_example_of_its_remedy():
    puzzle = make_puzzles(1)[0]
    labels = " | ".join(puzzle.answer)
    texts = [
        "",
        f"x</think><answer>{labels}</answer>",
        "  ",
        labels,
        "<think>and then",
        "<think>x</think><answer>T cell | B",
    ]
    texts += [
        f"<think>x<answer>{labels}</answer>",
        f"<think>x</think><answer>{labels.replace(' | ', chr(10))}</answer>",
    ]
    rows = [{"prediction": text} for text in texts]
    found = faults(rows, make_puzzles(len(rows)))["invalid_reasons"]
    assert [(one["reason"], one["count"], one["example_id"], one["remedy"].split(":")[0]) for one in found] == [
        ("the response is empty", 2, "q0", "the response is empty"),
        ("`<think>` occurs 0 times, not once", 1, "q1", OPENING.split(":")[0]),
        (
            "`<think>` occurs 0 times, not once",
            1,
            "q3",
            "each response must be `<think>reasoning</think><answer>label | label</answer>`",
        ),
        ("the response ends within its `<think>` block", 1, "q4", "the last block has no end"),
        ("the response ends within its `<answer>` block", 1, "q5", "the last block has no end"),
        ("`</think>` occurs 0 times, not once", 1, "q6", "end the reasoning with `</think>` in front of `<answer>`"),
        (
            "the answer has 1 labels for 4 cells",
            1,
            "q7",
            "write ` | ` between two labels, not a comma, a semicolon or a new line",
        ),
    ]


def test_every_reason_has_its_remedy():
    puzzle = make_puzzles(1)[0]
    labels = " | ".join(puzzle.answer)
    for text, remedy in {
        "": "the response is empty",
        labels: "each response must be `<think>reasoning</think><answer>label | label</answer>`",
        f"x</think><answer>{labels}</answer>": "put the opening `<think>` back in front",
        "<think>and then": "the last block has no end: if the responses were cut, allow longer responses",
        "<think>x</think><answer>T cell": "the last block has no end: if the responses were cut",
        f"<think>x</think>{labels}": "put the labels into one `<answer>...</answer>` block after the reasoning",
        f"<think><answer></think><answer>{labels}</answer>": "write each of the four tags once",
        f"<think>x</think>So: <answer>{labels}</answer>": "write nothing before, between or after the two blocks",
        f"<think>x<answer>{labels}</answer>": "end the reasoning with `</think>` in front of `<answer>`",
        "<think>x</think><answer>T cell\nB cell\nmonocyte\nB cell</answer>": "write ` | ` between two labels, not a comma",
        "<think>x</think><answer>T cell, B cell</answer>": "write one label per cell, in the order of the cells, with ` | `",
    }.items():
        (one,) = faults([{"prediction": text}], [puzzle])["invalid_reasons"]
        assert one["remedy"].startswith(remedy), text


def test_a_single_cell_has_one_label_and_no_separator():
    cell = convert(make_puzzles(1), "cell")[0]
    for labels in ("", "T cell|B cell"):
        (one,) = faults([{"prediction": f"<think>x</think><answer>{labels}</answer>"}], [cell])["invalid_reasons"]
        assert one["remedy"] == "write exactly one label, that of the cell", labels


def test_a_response_that_was_cut_or_refused_is_its_own_reason():
    right = answer_of(make_puzzles(1)[0].answer)
    cut = [("the response was cut at the length limit", 2, "q0")]
    assert reasons(["<think>a", "<think>b</think>", right], "length") == cut  # q2 is whole, whatever was cut
    assert reasons(["<think>a", "<think>b</think>"], "max_tokens") == reasons(["a", "b"], "MAX_TOKENS") == cut
    assert reasons([""], "refused") == [("the endpoint refused the prompt", 1, "q0")]
    assert reasons(["<think>a"], "stop") == [("the response ends within its `<think>` block", 1, "q0")]
    (one,) = faults([{"prediction": "<think>", "finish_reason": "length"}], make_puzzles(1))["invalid_reasons"]
    assert one["remedy"] == "allow longer responses (--max-response-tokens)"


def test_all_samples_count_with_their_finish_reasons(tmp_path):
    puzzles = make_puzzles(2)
    rows = [
        {
            "id": puzzle.id,
            "samples": [answer_of(puzzle.answer), "<think>", numbered(puzzle), "?"],
            "samples_finish_reasons": ["stop", "length", "stop", "stop"],
        }
        for puzzle in puzzles
    ]
    write_puzzles(tmp_path / "q.jsonl", puzzles)
    write_rows(tmp_path / "k.jsonl", rows)
    said = evaluated("--puzzles", tmp_path / "q.jsonl", "--predictions", tmp_path / "k.jsonl", "--out", tmp_path / "o")
    sentence = (
        "4 of 8 answers have an invalid format: the response was cut at the length limit (2); `<think>` occurs 0 "
        "times, not once (2)"
    )
    assert f"q: {sentence}\n" in said and f"{sentence}." in (tmp_path / "o/evaluation.md").read_text()
    assert "q: labels that are no candidate: 8 of 16 labels; 8 of them contain one: write the label alone\n" in said
    assert said.splitlines()[-1].startswith("tables: ")  # some answers are right, so nothing is all 0
    found = metrics_of(tmp_path / "o")
    assert [one["count"] for one in found["invalid_reasons"]] == [2, 2] and found["batch_accuracy"] == 1.0
    assert finish_reasons({"finish_reason": "length"}, 3) == ["length", None, None]
    assert finish_reasons({"samples_finish_reasons": "stop", "finish_reason": 3}, 1) == [3]
    again = evaluated("--puzzles", tmp_path / "q.jsonl", "--predictions", tmp_path / "o", "--out", tmp_path / "again")
    assert f"q: {sentence}\n" in again


def test_labels_that_are_no_candidate_are_counted_and_shown(tmp_path):
    puzzles = make_puzzles()
    texts = [answer_of(["Cell 1: T cell", "B  CELL", "neuron", puzzle.answer[3]]) for puzzle in puzzles]
    texts[5] = answer_of(["Cell 1: T cell", "CD4-positive, alpha-beta T cells.", "neuron", "Neuron"])
    said = evaluated(*asked(tmp_path, puzzles, texts))
    sentence = "labels that are no candidate: 14 of 24 labels; 7 of them contain one: write the label alone"
    lines = said.splitlines()
    place = lines.index(f"q: {sentence}")
    assert lines[place + 1 : place + 4] == [
        '       7  "neuron", for example in q0',
        '       6  "Cell 1: T cell", for example in q0; it contains the candidate "T cell": write the label alone',
        '       1  "CD4-positive, alpha-beta T cells.", for example in q5; it contains the candidate '
        '"CD4-positive, alpha-beta T cell": write the label alone',
    ]
    found = metrics_of(tmp_path / "o")["label_problems"]
    assert (found["labels"], found["not_candidate"], found["contain_candidate"]) == (24, 14, 7)
    assert found["different_not_candidate"] == 3
    assert found["not_candidate_labels"][:2] == [
        {"label": "neuron", "count": 7, "example_id": "q0", "candidate": None},
        {"label": "Cell 1: T cell", "count": 6, "example_id": "q0", "candidate": "T cell"},
    ]
    page = (tmp_path / "o/evaluation.md").read_text()
    assert (
        f"L{sentence[1:]}.\n\n- 7: `neuron`, for example in `q0`.\n- 6: `Cell 1: T cell`, for example in `q0`" in page
    )
    assert "which contains the candidate `T cell`: write the label alone." in page
    assert metrics_of(tmp_path / "o")["invalid_reasons"] == []


def test_labels_that_repeat_are_counted():
    puzzles = make_puzzles(3)
    rows = [{"prediction": answer_of(["T cell", "t  cell", "T cell", "monocyte"])}, {"prediction": "?"}]
    rows += [{"prediction": answer_of(puzzles[2].answer)}]
    found = faults(rows, puzzles)["label_problems"]
    assert (found["repeated"], found["repeated_in_answers"], found["valid_answers"]) == (2, 1, 2)
    assert found["repeated_labels"] == [{"label": "t cell", "count": 2, "example_id": "q0", "candidate": None}]
    assert found["not_candidate"] == 0
    twice = Puzzle(id="a", context="", cells=[["G"]] * 2, candidates=["T cell"] * 2, answer=["T cell"] * 2)
    assert faults([{"prediction": answer_of(["T cell"] * 2)}], [twice])["label_problems"]["repeated"] == 0


def test_the_longest_candidate_in_whole_words_is_named():
    of = ["T cell", "CD4-positive, alpha-beta T cell", "classical monocyte", "NK cell (CD56+)"]
    assert contained_candidate("3. CD4-positive, alpha-beta T  Cell", of) == "CD4-positive, alpha-beta T cell"
    assert contained_candidate("**T cells**", of) == "T cell"
    assert contained_candidate("non-classical monocyte", of) is None
    assert contained_candidate("fat celly", of) is None
    assert contained_candidate("Cell 4 = NK cell (CD56+)", of) == "NK cell (CD56+)"


def test_when_no_label_is_a_candidate_the_last_line_says_it(tmp_path):
    puzzles = make_puzzles()
    said = evaluated(*asked(tmp_path, puzzles, [numbered(puzzle) for puzzle in puzzles]))
    assert said.splitlines()[-1] == (
        "q: none of 24 labels is a candidate, so every accuracy is 0: the commonest is "
        '"Cell 1: T cell", which contains the candidate "T cell". Remedy: write the label alone'
    )
    said = evaluated(*asked(tmp_path, puzzles, [answer_of(["neuron", "a", "b", "c"])] * 6))
    assert said.splitlines()[-1].endswith(
        'the commonest is "neuron". Remedy: write the labels as the puzzle lists them'
    )


def test_open_ended_puzzles_have_no_candidates_but_numbers_in_front_are_said(tmp_path):
    puzzles = convert(make_puzzles(2), "open")
    said = evaluated(*asked(tmp_path, puzzles, [numbered(puzzles[0]), answer_of(["neuron", "neuron", "x", "y"])]))
    assert "q: labels that begin with the number of their cell: 4 of 8 labels\n" in said
    assert 'Cell 1: T cell", for example in q0' in said and "write the label alone" in said
    assert "q: labels that repeat another label of their answer: 1 of 8 labels, in 1 of 2 valid answers\n" in said
    assert "no candidate" not in said and metrics_of(tmp_path / "o")["label_problems"]["not_candidate"] is None


def test_nothing_is_said_when_nothing_is_wrong(tmp_path):
    puzzles = make_puzzles()
    said = evaluated(*asked(tmp_path, puzzles, [answer_of(puzzle.answer) for puzzle in puzzles]))
    assert len(said.splitlines()) == 2 and "What is wrong" not in (tmp_path / "o/evaluation.md").read_text()
    assert metrics_of(tmp_path / "o")["invalid_reasons"] == []
    assert verdict({}) == ""  # of a metrics.json that has no such keys


def test_text_of_a_model_cannot_steer_the_terminal_or_the_page(tmp_path):
    puzzles = make_puzzles(2)
    texts = [answer_of(["\x1b[31m T cell", "`<b>`\u202e", "x" * 500, SCRIPT]), "\x1b[2J\nno"]
    said = evaluated(*asked(tmp_path, puzzles, texts))
    page = (tmp_path / "o/evaluation.md").read_text().split("## The metrics")[0]
    assert "\x1b" not in said + page and "\u202e" not in said + page
    assert '"?[31m T cell", for example in q0; it contains the candidate "T cell"' in said
    assert f"- 1: `{SCRIPT}`, for example in `q0`." in page and "- 1: `'<b>'?`, for" in page
    assert 'q1 begins "?[2J no"' in said and f'"{"x" * 80}..."' in said
    assert shortened("\ud800") == "?" and shortened("a " * 1000, 3) == "a a..."


@pytest.mark.slow(2)
def test_a_terminal_that_lacks_a_letter_gets_the_rest(tmp_path):
    puzzles = make_puzzles(2)
    texts = [answer_of(["a na\u00efve T cell", *TYPES[1:]]), "?"]
    said = succeed("evaluate", *asked(tmp_path, puzzles, texts), env={"PYTHONIOENCODING": "ascii"}, fresh=True)
    assert '"a na?ve T cell", for example in q0; it contains the candidate "T cell": write the label alone' in said
    assert "`a na\u00efve T cell`" in (tmp_path / "o/evaluation.md").read_text(encoding="utf-8")


def test_several_files_and_another_model_say_it_too(tmp_path):
    puzzles = make_puzzles()
    for name in ("one", "two"):
        write_puzzles(tmp_path / f"{name}.jsonl", puzzles)
        text = lacks_opening if name == "one" else (lambda puzzle: answer_of(puzzle.answer))
        rows = [{"id": puzzle.id, "prediction": text(puzzle)} for puzzle in puzzles]
        (tmp_path / "saved" / name).mkdir(parents=True)
        write_rows(tmp_path / "saved" / name / "predictions.jsonl", rows)
    files = ("--puzzles", tmp_path / "one.jsonl", "--puzzles", tmp_path / "two.jsonl")
    said = evaluated(*files, "--predictions", tmp_path / "saved", "--out", tmp_path / "o")
    assert said.splitlines()[-1].startswith("one: all 6 answers have an invalid format") and "two: all" not in said
    sentence = "6 of 6 answers have an invalid format: `<think>` occurs 0 times, not once."
    assert f"- one: {sentence}\n" in (tmp_path / "o/evaluation.md").read_text()
    other = ("--compare", tmp_path / "o/one")
    two = ("--puzzles", tmp_path / "two.jsonl", "--predictions", tmp_path / "o/two")
    evaluated(*two, *other, "--out", tmp_path / "c")
    found = metrics_of(tmp_path / "c")
    assert found["invalid_reasons"] == [] and found["compare"]["invalid_reasons"][0]["count"] == 6
    assert f"Of the other model, {sentence}" in (tmp_path / "c/evaluation.md").read_text()


def test_a_baseline_that_repeats_labels_is_told(tmp_path):
    puzzles = make_puzzles()
    write_puzzles(tmp_path / "q.jsonl", puzzles)
    nearest = ("--baseline", "nearest", "--train", tmp_path / "q.jsonl")
    said = evaluated("--puzzles", tmp_path / "q.jsonl", *nearest, "--out", tmp_path / "o")
    found = metrics_of(tmp_path / "o")["label_problems"]
    assert found["repeated"] > 0 and found["repeated"] == sum(
        4 - len(set(re.findall(r"<answer>(.*)</answer>", row["prediction"])[0].split(" | ")))
        for row in read_rows(tmp_path / "o/predictions.jsonl")
    )
    assert f"q: labels that repeat another label of their answer: {found['repeated']} of 24 labels, in " in said


def test_an_endpoint_without_reasoning_is_told(tmp_path):
    puzzles = make_puzzles(3)
    write_puzzles(tmp_path / "q.jsonl", puzzles)
    server = Server(puzzles)
    server.refused = "G2"
    server.reasoning, server.finish_reason = "", "length"
    options = ("--model", "m", "--endpoint", server.url, "--refused", "invalid", "--samples", 2)
    done = evaluate("--puzzles", tmp_path / "q.jsonl", *options, "--out", tmp_path / "o")
    assert done.exit_code == 0, done.output
    assert (
        "q: 6 of 6 answers have an invalid format: the response was cut at the length limit (4); the endpoint refused "
        "the prompt (2)\n"
    ) in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "q: all 6 answers have an invalid format, so every accuracy is 0: the response was cut at the length limit "
        "(4 of 6). Remedy: allow longer responses (--max-response-tokens)"
    )


# ---- the report page


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run: before training no answer is valid, after SFT every label has a number or is a script."""
    puzzles = make_puzzles()
    write_puzzles(tmp_path / "puzzles/test.parquet", puzzles)
    texts = {"base": [lacks_opening(puzzle) for puzzle in puzzles], "sft": [numbered(puzzle) for puzzle in puzzles]}
    texts["sft"][5] = answer_of([SCRIPT, SCRIPT, "a_label_that_nobody_can_break_" * 6, "Cell 4: T cell"])
    for stage, own in texts.items():
        rows = [{"id": puzzle.id, "prediction": text} for puzzle, text in zip(puzzles, own, strict=True)]
        folder = tmp_path / f"eval/{stage}/test"
        write_rows(folder / "predictions.jsonl", rows)
        result = evaluation_of(rows, puzzles, name=stage, run={}, file="test.parquet")
        (folder / "metrics.json").write_text(json.dumps(result))
    return tmp_path


def test_the_page_says_it_near_the_headline(run_dir):
    page = write_report(run_dir).read_text()
    text = html.unescape(page)
    sentence = "before training: 6 of 6 answers have an invalid format: `<think>` occurs 0 times, not once"
    strange = "after SFT: labels that are no candidate: 24 of 24 labels; 21 of them contain one: write the label alone"
    results = html.unescape(read(page, "results"))
    assert f'scope="rowgroup">{sentence}</th>' in results and f'scope="rowgroup">{strange}</th>' in results
    row = next(row for row in re.findall("<tr>.*?</tr>", page) if 'scope="row">&quot;Cell 1: T cell&quot;' in row)
    assert cells_of(row) == ["2", "q0", 'contains the candidate "T cell": write the label alone']
    assert "after SFT: labels that repeat another label of their answer: 1 of 24 labels, in 1 of 6 valid" in results
    warning = 'After SFT, none of 24 labels is a candidate, so every accuracy is 0: the commonest is "'
    assert text.index("<h1>") < text.index(warning) < text.index("<nav")
    assert "<script" not in page.lower() and html.escape(SCRIPT) in read(page, "results")
    for file in run_dir.glob("eval/*/test/metrics.json"):  # as an evaluation of an older version left it
        result = json.loads(file.read_text())
        kept = {key: value for key, value in result.items() if key not in ("invalid_reasons", "label_problems")}
        file.write_text(json.dumps(kept))
    assert write_report(run_dir).read_text() == page


def test_the_console_of_a_report_and_of_a_demo_says_it(run_dir):
    said = succeed("report", "--run", run_dir)
    assert (
        "before training, test:\n  6 of 6 answers have an invalid format: `<think>` occurs 0 times, not once\n" in said
    )
    assert f"{OPENING}\n" in said and "  labels that are no candidate: 24 of 24 labels" in said
    assert said.index("after SFT, test:") > said.index("before training, test:")
    lines = fault_sentences(run_dir).splitlines()
    assert lines[0] == "base test: 6 of 6 answers have an invalid format: `<think>` occurs 0 times, not once"
    assert lines[1].startswith("sft test: labels that are no candidate: 24 of 24 labels; 21 of them contain one")


def test_the_page_says_nothing_when_nothing_is_wrong(run_dir):
    puzzles = make_puzzles()
    for stage in ("base", "sft"):
        rows = [{"id": puzzle.id, "prediction": answer_of(puzzle.answer)} for puzzle in puzzles]
        write_rows(run_dir / f"eval/{stage}/test/predictions.jsonl", rows)
        (run_dir / f"eval/{stage}/test/metrics.json").unlink()
    page = write_report(run_dir).read_text()
    assert "What is wrong with the answers" not in page and 'class="warning"' not in page


@pytest.mark.slow(3)
@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_shows_it_on_a_screen_and_a_phone(run_dir, tmp_path, width):
    page = write_report(run_dir)
    with browser(tmp_path) as b:
        b.open(page, width)
        assert b.js("document.documentElement.scrollWidth") <= width
        for selector in (".warning", ".faults"):
            assert b.js(f"document.querySelector('{selector}').checkVisibility()")
            assert b.js(f"document.querySelector('{selector}').scrollWidth") <= width
        sizes = "[...document.querySelectorAll('.faults th, .faults td')].map((e) => e.getBoundingClientRect().right)"
        assert max(b.js(sizes)) <= width
        fonts = "[...document.querySelectorAll('.warning, .faults tbody *')].map((e) => parseFloat(getComputedStyle(e).fontSize))"
        assert min(b.js(fonts)) >= 12
        assert SCRIPT in b.text(".faults") and b.js("document.querySelectorAll('script').length") == 0
        assert b.problems() == []
        b.screenshot(tmp_path / f"page-{width}.png")


def test_predictions_that_are_null_and_files_with_a_mark(tmp_path):
    puzzles = make_puzzles(2)
    write_puzzles(tmp_path / "q.jsonl", puzzles)
    lines = [json.dumps({"id": puzzle.id, "prediction": answer_of(puzzle.answer)}) for puzzle in puzzles]
    (tmp_path / "marked.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    said = evaluated(
        "--puzzles", tmp_path / "q.jsonl", "--predictions", tmp_path / "marked.jsonl", "--out", tmp_path / "o"
    )
    assert '"batch_accuracy": 1.0' in said
    with pytest.raises(UserError) as error:
        match_rows([{"id": "q0", "prediction": None}], puzzles[:1], "answers.jsonl")
    assert "it is null: write an empty text where a model gave no answer" in str(error.value)
