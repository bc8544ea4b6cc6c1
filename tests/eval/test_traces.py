"""Trace analysis: steps read from free prose and from the embedded teacher's lines, numbers of many traces, pictures, command."""

import json
import random
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from data.atlas.markers import read_markers
from data.describe import escape
from data.distill.embedded_teacher import TeacherConfig, marker_table, write_trace
from data.puzzles import Puzzle, read_rows, write_puzzles, write_rows
from eval.traces.reading import analyse
from eval.traces.report import choose_to_draw
from eval.traces.summary import _steps_figure, curriculum_of, steps_png, summarise_traces, summary_png
from tests.helpers.commands import FIXTURES, run_command, succeed

SAMPLE = FIXTURES / "cellpuzzles_sample.jsonl"
B, CD8, MONO, NK, PLASMA = (
    "B cell",
    "CD8-positive, alpha-beta T cell",
    "classical monocyte",
    "natural killer cell",
    "plasma cell",
)
PUZZLE = Puzzle(
    id="p", context="", cells=[["G"]] * 5, candidates=[B, CD8, MONO, NK, PLASMA], answer=[PLASMA, NK, B, MONO, CD8]
)
LONG = [
    "ciliated columnar cell of tracheobronchial tree",
    "kidney loop of Henle thick ascending limb epithelial cell",
    "naive thymus-derived CD4-positive, alpha-beta T cell",
]


def traced(reasoning: str, answer: list[str] | None = None, puzzle: Puzzle = PUZZLE):
    return analyse(f"<think>{reasoning}</think>\n<answer>{' | '.join(answer or puzzle.answer)}</answer>", puzzle)


def claims(reasoning: str, puzzle: Puzzle = PUZZLE) -> list[tuple[int, str]]:
    return [(step.cell, step.label) for step in traced(reasoning, puzzle=puzzle).steps]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("club cell", "Clara cell"),
        ("lung neuroendocrine cell", "pulmonary neuroendocrine cell"),
        ("type EC enteroendocrine cell", "enterochromaffin cell"),
        ("enterocyte of colon", "colonocyte"),
        ("erythroblast", "normoblast"),
        ("pulmonary alveolar type 2 cell", "type II pneumocyte"),
        ("plasma cell", "plasma B cell"),
        ("CD16-positive, CD56-dim natural killer cell, human", "CD56dim NK cell"),
    ],
)
def test_another_name_of_a_candidate_is_no_type_outside_the_list(label, name):
    labels = [label, "mast cell"]
    puzzle = Puzzle(id="c", context="", cells=[["G"]] * 2, candidates=labels, answer=labels)
    found = traced(f"Cell 1 has markers, so it is a {name}. Cell 2 is a mast cell.", puzzle=puzzle)
    assert found.outside == () and [(step.cell, step.label) for step in found.steps] == list(enumerate(labels, start=1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cell 1: JCHAIN, MZB1, so plasma cell", [(1, PLASMA)]),
        ("Cell 1 has JCHAIN and is most consistent with a plasma cell.", [(1, PLASMA)]),
        ("**Cell 1**: JCHAIN \u2192 plasma cell\n**Cell 2**: NKG7 -> NK cell", [(1, PLASMA), (2, NK)]),
        ("- Plasma cell (Cell 1): MZB1.\n- NK cell: Cell 2", [(1, PLASMA), (2, NK)]),
        ("That leaves plasma cell for Cell 1. The B cell must be Cell 3.", [(1, PLASMA), (3, B)]),
        ("So cell 4 = classical monocytes", [(4, MONO)]),
        ("Cell 5 looks like a CD8+ \u03b1\u03b2 T\u2010cell.", [(5, CD8)]),
        ("Cell 5 is a CD8 T cell, Cell 2 is an NK and Cell 3 is a B lymphocyte.", [(5, CD8), (2, NK), (3, B)]),
        ("### Cell 1\n\n- Markers: JCHAIN\n- Assignment: plasma cell\n\n### Cell 3\n\n- B cell", [(1, PLASMA), (3, B)]),
        ("Cell 2 shows NKG7. This suggests a natural killer cell.", [(2, NK)]),
        ("1 \u2192 plasma cell\n2 \u2192 natural killer cell", [(1, PLASMA), (2, NK)]),
        ("| Cell 1 | JCHAIN | plasma cell |", [(1, PLASMA)]),
        ("Cells 2 and 5 are NK cell and CD8 T cell, respectively.", [(2, NK), (5, CD8)]),
        ("Cells 2 and 5 are both natural killer cells.", [(2, NK), (5, NK)]),
        ("Among Cells 1, 3 and 4, one must be the plasma cell.", []),
        ("That leaves B cell and plasma cell for Cells 1 and 3.", []),
        ("Cell 9 is a plasma cell.", []),
        ("Unlike Cell 3, Cell 1 is a plasma cell.", [(1, PLASMA)]),
    ],
)
def test_assignments_are_found_in_prose_and_markdown(text, expected):
    assert claims(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Cell 3 could be a B cell.",
        "Cell 3 is a B cell or a plasma cell.",
        "Cell 3 is either a B cell or a monocyte.",
        "Perhaps cell 3 is a B cell.",
        "Is Cell 3 a B cell?",
        "If Cell 3 is a B cell, then Cell 1 is a plasma cell.",
        "Cell 3 is not a B cell.",
        "Cell 3 is unlikely to be a B cell.",
        "Cell 3 cannot be a plasma cell.",
        "Cell 3 lacks the surface genes of a plasma cell.",
        "For cell 3, a plasma cell can be excluded.",
        "Cell 3 is one of the candidates for B cell.",
        "Cell 3 is neither a B cell nor a plasma cell.",
        "B cells express MS4A1. Plasma cells have MZB1.",
        "Cell 3 vs. Cell 1: B cell vs. plasma cell.",
    ],
)
def test_what_is_tentative_negated_or_general_is_no_assignment(text):
    assert claims(text) == []


LETTERS = {"p": PLASMA, "n": NK, "b": B, "m": MONO, "t": CD8}


def traces_read_by_hand() -> list[tuple[str, list[tuple[int, str]], tuple[str, ...]]]:
    """[(trace, steps, types outside the list)] of the fixture."""
    blocks = ("\n" + (FIXTURES / "traces_read_by_hand.txt").read_text(encoding="utf-8")).split("\n== ")[1:]
    found = []
    for head, text in (block.split("\n", 1) for block in blocks):
        steps, _, outside = head.partition("OUTSIDE ")
        found.append(
            (text, [(int(s[0]), LETTERS[s[1]]) for s in steps.split()], tuple(filter(None, outside.split(", "))))
        )
    return found


@pytest.mark.parametrize(("text", "steps", "outside"), traces_read_by_hand())
def test_traces_of_many_styles_are_read_as_a_reader_reads_them(text, steps, outside):
    found = traced(text)
    assert [(step.cell, step.label) for step in found.steps] == steps and found.outside == outside
    assert len(found.reflections) == len(steps) - len({cell for cell, _ in steps})


OUTSIDE = """Kupffer cell, astrocyte, podocyte, hepatic stellate cell, Paneth cell, oligodendrocyte, neutrophil, basophil,
    eosinophil, keratinocyte, melanocyte, erythrocyte, megakaryocyte, microglial cell, Schwann cell, cardiac muscle
    cell, goblet cell, enterocyte, hematopoietic stem cell, adipocyte, mesothelial cell, pericyte, fibroblast,
    epithelial cell, innate lymphoid cell, chondrocyte, osteoblast, neuron, platelet, tumor cell, Bergmann glial
    cell, cap mesenchyme cell, wibblocyte"""


@pytest.mark.parametrize("label", [" ".join(label.split()) for label in OUTSIDE.split(",")])
def test_types_outside_the_list_are_known_by_name_or_by_how_they_are_said(label):
    said = f"Cell 1 is {'an' if label[0] in 'aeiou' else 'a'} {label}."
    assert traced(said).outside and traced(f"{said} No, Cell 1 is a plasma cell.").last == {1: PLASMA}
    assert traced(f"Cell 1 is not a {label}.").steps == ()


def test_what_is_no_type_and_what_is_a_class_of_types_is_no_step():
    for what in (
        "marker",
        "good candidate",
        "single cell",
        "different cell",
        "CD3+ cell",
        "dying cell",
        "clearly distinct cell",
    ):
        assert traced(f"Cell 1 is a {what}.").outside == traced(f"Cell 1 is a {what}.").steps == ()
    coarse = traced("Cell 1 is a lymphoid cell. JCHAIN, so it is a plasma cell. Cell 4 is a myeloid cell.")
    assert coarse.last == {1: PLASMA} and coarse.outside == ("myeloid cell",) and coarse.contradictions == []
    alike = Puzzle(
        id="a",
        context="",
        cells=[["G"]] * 2,
        candidates=["ciliated columnar cell of trachea", "club cell"],
        answer=["ciliated columnar cell of trachea", "club cell"],
    )
    assert traced("Cell 1 is a ciliated cell. Cell 2 is a ciliated epithelial cell.", puzzle=alike).last == {
        1: "ciliated columnar cell of trachea"
    }


def test_an_answer_spelled_otherwise_does_not_contradict_the_reasoning():
    found = traced("Cell 4 is a Bergmann glial cell.", [PLASMA, NK, B, "Bergmann Glial  Cell", CD8])
    assert found.last == {4: "bergmann glial cell"} and found.contradictions == []
    assert found.outside == ("bergmann glial cell",) and summarise_traces([found]).contradicted_cells == 0


def test_a_comparison_keeps_the_label_that_it_prefers():
    assert claims("Cell 3 is a B cell rather than a plasma cell.") == [(3, B)]
    assert claims("Cell 3 could be a plasma cell, but MS4A1 makes it a B cell.") == [(3, B)]
    assert claims("Cell 3 is not a T cell; it is a B cell.") == [(3, B)]


def test_a_label_inside_a_longer_one_is_not_named():
    puzzle = Puzzle(
        id="n", context="", cells=[["G"]] * 3, candidates=["B cell", CD8, "T cell"], answer=["T cell", CD8, "B cell"]
    )
    assert claims("Cell 2 is a CD8-positive, alpha-beta T cell. Cell 1 is a T cell.", puzzle) == [
        (2, CD8),
        (1, "T cell"),
    ]
    assert traced("Cell 1 is a regulatory T cell.", puzzle=puzzle).steps[0].label == "regulatory T cell"
    assert claims("Cell 3 is a memory B cell.", puzzle) == [(3, "memory B cell")]
    short = Puzzle(
        id="s",
        context="",
        cells=[["G"]] * 2,
        candidates=["alveolar macrophage", "elicited macrophage"],
        answer=["alveolar macrophage", "elicited macrophage"],
    )
    assert claims("Cell 1 is a macrophage. Cell 2 is an elicited macrophage.", short) == [(2, "elicited macrophage")]


def test_a_numbered_list_of_labels_is_an_assignment_but_the_candidates_in_their_order_are_not():
    listed = "\n".join(f"{i}) {label}" for i, label in enumerate(PUZZLE.answer, start=1))
    assert claims("In order:\n" + listed) == list(enumerate(PUZZLE.answer, start=1))
    candidates = "\n".join(f"{i}) {label}" for i, label in enumerate(PUZZLE.candidates, start=1))
    assert claims("The types are:\n" + candidates) == []
    assert (
        claims("1. **Plasma cell**: JCHAIN, MZB1\n2. **NK cell**: NKG7") == []
    )  # what types look like, not which cells
    assert claims("So: " + " | ".join(PUZZLE.answer)) == list(enumerate(PUZZLE.answer, start=1))


def test_a_change_of_mind_is_a_step_and_a_restatement_is_not():
    text = "Cell 1 is a B cell. Cell 3 is also a B cell. Wait, so Cell 1 is actually a plasma cell.\nCell 3: B cell"
    found = traced(text)
    first, second, third = found.steps
    assert (first.cell, first.label, first.right, first.reassigned, first.taken) == (1, B, False, False, False)
    assert (second.cell, second.label, second.right, second.reassigned, second.taken) == (3, B, True, False, True)
    assert (third.cell, third.label, third.right, third.reassigned, third.taken) == (1, PLASMA, True, True, False)
    assert found.reflections == [(first, third)] and found.first == [first, second] and found.restated == 1
    assert [len("<think>") + text.index(word) for word in ("B cell", "plasma")] == [first.position, third.position]


def test_evidence_before_a_verdict_is_no_change_of_mind():
    assert claims("Cell 1 has B-cell genes such as CD79A. Its MZB1 suggests a plasma cell.") == [(1, PLASMA)]
    assert claims("Cell 1 has B-cell genes such as CD79A.") == [(1, B)]


def test_contradictions_unassigned_cells_duplicates_and_labels_outside_the_list():
    found = traced(
        "Cell 1 is a plasma cell. Cell 2 is a plasma cell. Cell 4 is a mast cell.", [B, PLASMA, NK, "mast cell", CD8]
    )
    assert found.contradictions == [1] and found.unassigned == [3, 5] and found.duplicated == [PLASMA]
    assert found.outside == ("mast cell",) and [step.listed for step in found.steps] == [True, True, False]
    assert found.cells_right == 1 and found.answer[3] == "mast cell"
    assert traced("", [PLASMA, NK, B, MONO, "Sertoli cell"]).outside == ("Sertoli cell",)
    assert traced("", [x.upper() for x in PUZZLE.answer]).answer == tuple(PUZZLE.answer)


def test_an_invalid_answer_contradicts_nothing_and_nothing_at_all_is_still_a_result():
    found = analyse("<think>Cell 1 is a B cell.</think>\n<answer>B cell", PUZZLE)
    assert found.answer == () and found.contradictions == [] and found.cells_right == 0 and len(found.steps) == 1
    assert analyse("Cell 1 is a plasma cell.\n<answer>B cell</answer>", PUZZLE).last == {1: PLASMA}  # no <think>
    empty = analyse("", PUZZLE)
    assert empty.steps == () and empty.unassigned == [1, 2, 3, 4, 5]
    assert json.loads(json.dumps(empty.to_dict()))["reflections"] == 0


def test_cell_level_and_open_ended_puzzles():
    cell = Puzzle(id="c", context="", cells=[["G"]], candidates=[B, NK, PLASMA], answer=[PLASMA])
    assert claims("1. B cell\n2. plasma cell\nNot a B cell: MZB1 is high, so it is a plasma cell.", cell) == [
        (1, PLASMA)
    ]
    opened = Puzzle(id="o", context="", cells=[["G"], ["H"]], candidates=[], answer=["mast cell", B])
    found = traced("Cell 1 is a mast cell. Cell 2 is a plasma cell.", puzzle=opened)
    assert [(step.label, step.right, step.listed) for step in found.steps] == [
        ("mast cell", True, True),
        (PLASMA, False, True),
    ]


def test_the_embedded_teacher_is_read_exactly():
    """Its steps are its per-cell labels, in order, at their places, whatever the types of the marker table."""
    markers, rng = read_markers(), random.Random(7)
    for number in range(200):
        types = rng.sample(list(markers), rng.randint(2, 15))
        cells = [
            [*rng.sample(markers[label].markers, min(3, len(markers[label].markers))), "MALAT1"] for label in types
        ]
        puzzle = Puzzle(id=str(number), context="", cells=cells, candidates=sorted(types), answer=types)
        trace = write_trace(
            puzzle, marker_table([puzzle]), rng, TeacherConfig(noise=2.0, glance=0.5, bad_format=0.2, slip=0.2)
        )
        lines = trace[: trace.index("</think>")].split("\n")[1:]
        said = [line.split(": ", 1)[1].rsplit(", so ", 1)[-1] for line in lines]
        found = analyse(trace, puzzle)
        assert [(step.cell, step.label) for step in found.steps] == list(enumerate(said, start=1))
        assert all(trace[step.position :].startswith(step.label) for step in found.steps)
        assert found.restated == 0 and found.outside == () and found.reflections == []


REAL = {
    5: [1, 3, 5, 6, 8, 10, 4, 9, 2, 7],
    6: [1, 2, 3, 7, 4, 5, 6, 8, 9, 10],  # cell 7 is named in the argument about cell 3, before its own turn
    7: [1, 7, 8, 2, 3, 9, 5, 6, 4, 10],
}
"""Row of the sample -> order in which its reasoning settles the cells, read by hand. All three are right throughout."""


@pytest.mark.parametrize("row", REAL)
def test_published_o1_traces_are_read_as_a_reader_reads_them(row):
    puzzle = Puzzle.from_row(read_rows(SAMPLE)[row])
    found = analyse(puzzle.meta["assistant_msg"], puzzle)
    assert [step.cell for step in found.steps] == REAL[row]
    assert [step.label for step in found.steps] == [puzzle.answer[cell - 1] for cell in REAL[row]]
    assert found.reflections == [] and found.contradictions == [] and found.outside == () and found.duplicated == []
    assert found.restated >= 10  # the list at the end says it all again


def test_the_rank_correlation_by_hand():
    """Ease 1, 1/2, 1/2, 0 in reading order: rho 4.5 / sqrt(5 * 4.5), tau-b 5 / sqrt(6 * 5)."""
    found = traced("Cell 2: NK cell\nCell 3: B cell\nCell 1: plasma cell\nCell 4: classical monocyte")
    assert curriculum_of(found, {NK: 1.0, B: 0.5, PLASMA: 0.5, MONO: 0.0}) == pytest.approx(
        (0.948683, 0.912871), abs=1e-6
    )
    assert curriculum_of(found, {NK: 0.0, B: 0.5, PLASMA: 0.5, MONO: 1.0}) == pytest.approx(
        (-0.948683, -0.912871), abs=1e-6
    )
    assert curriculum_of(found, dict.fromkeys(PUZZLE.answer, 1.0)) is None  # no type is easier than another
    assert curriculum_of(found, {NK: 1.0, B: 0.5}) is None  # two cells are no order


def test_the_numbers_of_a_set_by_hand():
    in_order = "\n".join(f"Cell {i}: {label}" for i, label in enumerate(PUZZLE.answer, start=1))
    changing = (
        "Cell 2 is a B cell. Cell 2 is an NK cell. Cell 3 is a B cell. Cell 3 is a plasma cell. "
        "Cell 1 is a monocyte. Cell 1 is a B cell."
    )
    analyses = [
        traced(in_order),
        traced(changing, [PLASMA, NK, B, CD8, MONO]),  # reasoning: 1 B, 2 NK, 3 plasma
        analyse(f"<think>{in_order} Cell 5: mast cell", PUZZLE),  # cut off
        traced("", [NK, PLASMA, B, MONO, CD8]),
    ]
    found = summarise_traces(analyses)
    assert found.n_responses == 4 and found.n_cells == 20 and found.mean_steps == (5 + 6 + 6 + 0) / 4
    assert found.self_reflection == 2 / 4 and found.reflections == 4
    assert (found.towards_right, found.away_from_right, found.wrong_to_wrong) == (1 / 4, 2 / 4, 1 / 4)
    assert found.in_cell_order == 2 / 4
    assert found.contradiction == 1 / 3 and found.contradicted_cells == 2 / 8  # cells 1 and 3 of the second
    assert (found.reasoning_was_right, found.answer_was_right) == (0.0, 1.0)
    assert found.unassigned == (2 + 5) / 20 and found.duplicated == 0.0
    assert found.outside == found.outside_assigned == 1 / 4 and found.outside_labels == {"mast cell": 1}
    assert found.type_accuracy == {B: 1.0, CD8: 2 / 3, MONO: 2 / 3, NK: 2 / 3, PLASMA: 2 / 3}
    # first assignments: 1..5 right twice; then of cells 2 (wrong), 3 (right), 1 (wrong)
    assert found.first_third == (4 + 0) / (4 + 1) and found.last_third == (4 + 0) / (4 + 1)
    # the third of three steps each lies in the parts by how much of it is there: 0.6, 0.4 and 0.2, 0.6, 0.2 and 0.4, 0.6
    assert [row["steps"] for row in found.by_position] == pytest.approx([2.6] * 5)
    right = [2, 2.2, 2.6, 2.2, 2]
    assert [row["accuracy"] for row in found.by_position] == pytest.approx([n / 2.6 for n in right])
    # ease 2/3 2/3 1 2/3 2/3 has rho 0 with the order; 2/3 1 2/3 as well
    assert found.curriculum["spearman"] == pytest.approx(0, abs=1e-12) and found.curriculum["puzzles"] == 1
    easy = {PLASMA: 1.0, NK: 0.8, B: 0.6, MONO: 0.4, CD8: 0.2}
    assert summarise_traces(analyses[:1], easy).curriculum["spearman"] == pytest.approx(1)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["n_cells"] == 20
    with pytest.raises(ValueError, match="no trace to summarise"):
        summarise_traces([])


def test_no_text_of_a_step_diagram_overlaps_another_or_is_cut():
    puzzle = Puzzle(
        id="long", context="", cells=[["G"]] * 4, candidates=[*LONG, B], answer=[LONG[0], LONG[1], LONG[2], B]
    )
    texts = [
        f"Cell 1 is a {LONG[1]}. Cell 1 is a {LONG[0]}. Cell 1 is a {LONG[2]}. Cell 3 is a {LONG[1]}. Cell 4 is a {LONG[0]}.",
        " ".join(f"Cell {i % 4 + 1} is a {LONG[i % 3]}." for i in range(40)) + " Cell 2 is a regulatory T cell.",
        "Nothing.",
    ]
    for text in texts:
        figure = _steps_figure(traced(text, [LONG[2], LONG[1], LONG[0], B], puzzle), "A title")
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in figure.findobj(Text) if t.get_text().strip()]
        for name, box in boxes:
            assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1, (
                f"{name!r} is cut"
            )
        for (one, a), (other, b) in combinations(boxes, 2):
            apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
            assert apart, f"{one!r} lies on {other!r}"


def test_pictures_are_png_files_whose_bytes_do_not_change():
    found = traced("Cell 1 is a B cell. Cell 1 is a plasma cell.")
    for picture in (lambda: steps_png(found), lambda: summary_png(summarise_traces([found]))):
        assert picture().startswith(b"\x89PNG") and picture() == picture()
    texts = [text.get_text() for text in _steps_figure(found, "").findobj(Text)]
    assert sum("plasma cell" in text for text in texts) >= 3  # true type, step, answer


def test_what_is_drawn_are_changes_of_mind_then_the_worst_then_the_best():
    puzzles = [Puzzle(**{**vars(PUZZLE), "id": name}) for name in "abcd"]
    analyses = [
        traced("", puzzle=puzzles[0]),
        traced("", [NK, PLASMA, MONO, B, CD8], puzzles[1]),
        traced("Cell 1 is a B cell. Cell 1 is a plasma cell.", puzzle=puzzles[2]),
        traced("", [NK, PLASMA, B, MONO, CD8], puzzles[3]),
    ]
    assert choose_to_draw(analyses, 3) == [(2, "changes its mind"), (1, "among the worst"), (0, "among the best")]
    assert choose_to_draw(analyses, 0) == [] and len(choose_to_draw(analyses, 9)) == 4


def test_command_on_published_reasoning_rows(tmp_path):
    said = succeed("traces", "--puzzles", SAMPLE, "--out", tmp_path / "out", "--show", 2)
    assert "3 responses, 10.0 steps each, 0 % change their mind" in said
    content = json.loads((tmp_path / "out/traces.json").read_text())
    assert content["summary"]["n_cells"] == 30 and [len(row["steps"]) for row in content["responses"]] == [10, 10, 10]
    report = (tmp_path / "out/traces.md").read_text()
    assert "**Responses that change their mind: 0 %**" in report and "Cell 7: respiratory basal cell, right" in report
    names = {path.name for path in (tmp_path / "out").iterdir()}
    drawn = {f"steps-{row['name']}.png" for row in content["responses"]} & names
    assert len(drawn) == 2 and names == {"traces.json", "traces.md", "traces.png", *drawn}
    assert all(f"({name})" in report for name in drawn)


def test_command_draws_labels_that_look_like_mathematics(tmp_path):
    write_puzzles(tmp_path / "puzzles.jsonl", [PUZZLE])
    odd = r"$\text{B cell}$ and $\ce{CD4}$"
    text = f"<think>Cell 1 is a B cell.</think>\n<answer>{' | '.join([odd, NK, B, MONO, CD8])}</answer>"
    write_rows(tmp_path / "a$_$b.jsonl", [{"id": "p", "prediction": text}])
    succeed(
        "traces",
        "--puzzles",
        tmp_path / "puzzles.jsonl",
        "--predictions",
        tmp_path / "a$_$b.jsonl",
        "--out",
        tmp_path / "out",
    )
    assert json.loads((tmp_path / "out/traces.json").read_text())["responses"][0]["answer"][0] == odd
    report = (tmp_path / "out/traces.md").read_text()
    assert f"The answer gives cell 1 another label: {escape(odd)}." in report and "A lower bound" in report
    assert (tmp_path / "out/steps-p.png").is_file() and (tmp_path / "out/traces.png").is_file()


@pytest.mark.slow(1)
def test_command_on_predictions_and_on_rollouts(tmp_path):
    asked = Puzzle(
        **{**vars(PUZZLE), "id": "q/2", "meta": {"system_msg": "Begin with the cell that is simplest to determine."}}
    )
    write_puzzles(tmp_path / "puzzles.jsonl", [PUZZLE, asked])
    wrong, right = "<think>Cell 1: B cell\nCell 1: plasma cell", "<think>Cell 1: plasma cell"
    end = f"</think>\n<answer>{' | '.join(PUZZLE.answer)}</answer>"
    write_rows(tmp_path / "predictions.jsonl", [{"id": "q/2", "prediction": wrong + end}])
    succeed(
        "traces",
        "--puzzles",
        tmp_path / "puzzles.jsonl",
        "--predictions",
        tmp_path / "predictions.jsonl",
        "--out",
        tmp_path / "eval",
    )
    assert (tmp_path / "eval/steps-q_2.png").is_file()
    assert "1 prompt asked for the simplest cell first" in (tmp_path / "eval/traces.md").read_text()
    rollouts = [
        {"step": step, "puzzle_id": "p", "response": i, "completion": (right if step == 1 else wrong) + end}
        for step in (1, 2)
        for i in (1, 2)
    ]
    write_rows(tmp_path / "rollouts.jsonl", rollouts)
    said = succeed(
        "traces",
        "--puzzles",
        tmp_path / "puzzles.jsonl",
        "--predictions",
        tmp_path / "rollouts.jsonl",
        "--step",
        2,
        "--accuracy-from",
        tmp_path / "eval/traces.json",
        "--out",
        tmp_path / "rl",
    )
    assert "2 responses, 2.0 steps each, 100 % change their mind" in said
    write_rows(tmp_path / "odd.jsonl", [{"id": "p", "user_msg": "Hello", "prediction": right + end}])
    given = ("--puzzles", tmp_path / "puzzles.jsonl", "--predictions", tmp_path / "odd.jsonl", "--out", tmp_path / "no")
    refused = run_command("traces", *given)
    assert (
        refused.returncode == 2
        and f"{tmp_path / 'odd.jsonl'}, row 0: a puzzle row needs the text column" in refused.stderr
    )
    names = [row["name"] for row in json.loads((tmp_path / "rl/traces.json").read_text())["responses"]]
    assert names == ["p-step2-1", "p-step2-2"]


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    ("rows", "extra", "problem"),
    [
        (None, (), "puzzles.jsonl: holds no response with reasoning; name the responses with --predictions"),
        ([{"id": "x", "prediction": ""}], (), "row 0: its puzzle x is not in --puzzles"),
        (
            [{"id": "p", "text": ""}],
            (),
            "row 0: has no response; it needs a text column prediction, completion or assistant_msg",
        ),
        ([{"prediction": ""}] * 2, (), "2 responses without an id for 1 puzzles; add a column id"),
        ([{"id": "p", "prediction": "", "step": 1}], ("--step", 3), "holds no row of step 3; name another --step"),
        ([{"id": "p", "prediction": ""}], ("--accuracy-from", "none.json"), "--accuracy-from none.json: no such file"),
        ([{"id": "p", "prediction": ""}], ("--show", -1), "--show -1: give 0 or more"),
    ],
)
def test_mistakes_are_named_in_a_sentence(tmp_path, rows, extra, problem):
    write_puzzles(tmp_path / "puzzles.jsonl", [PUZZLE])
    if rows is not None:
        write_rows(tmp_path / "predictions.jsonl", rows)
        extra = ("--predictions", tmp_path / "predictions.jsonl", *extra)
    done = run_command("traces", "--puzzles", tmp_path / "puzzles.jsonl", "--out", tmp_path / "out", *extra)
    assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr


def test_answers_of_several_sizes_make_no_order_where_there_is_none():
    """As many answers of 3 cells, all right, as of 4 cells, right at two of four places whichever."""
    three = Puzzle(id="3", context="", cells=[["G"]] * 3, candidates=[B, CD8, MONO], answer=[B, CD8, MONO])
    four = Puzzle(id="4", context="", cells=[["G"]] * 4, candidates=[B, CD8, MONO, NK], answer=[B, CD8, MONO, NK])

    def said(puzzle: Puzzle, labels: list[str]):
        return traced(" ".join(f"Cell {i}: {label}." for i, label in enumerate(labels, start=1)), labels, puzzle)

    found = summarise_traces(
        [said(three, [B, CD8, MONO])] * 2 + [said(four, [CD8, B, MONO, NK]), said(four, [B, CD8, NK, MONO])]
    )
    assert [row["accuracy"] for row in found.by_position] == pytest.approx([5 / 7] * 5)
    assert sum(row["steps"] for row in found.by_position) == pytest.approx(14)
