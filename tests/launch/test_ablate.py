"""launch/ablate.py: what is no configuration is refused; a real run of one, continued and drawn."""

import dataclasses
import json
import shutil

import pytest
from click.testing import CliRunner

from data.errors import UserError
from data.files import lock_folder, unlock_folder
from data.puzzles import read_puzzles, write_puzzles
from data.variants import convert
from eval.ablation.compare import refuse_other_puzzles
from eval.ablation.made import Made
from eval.ablation.settings import AblateConfig, record_commands, refuse_other_commands, refuse_test_puzzles
from eval.demo.record import record_settings
from eval.demo.settings import DemoConfig
from eval.evaluation import puzzles_digest
from eval.run_files import held_out_files
from launch.ablate import evaluate_arm, main, refuse_wrong_words, values_of
from launch.demo import recipe_values
from tests.helpers.commands import SMALL_GRPO, run_command, succeed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--arms: name at least one configuration, or give --recipe launch/recipes/fig5.yaml"),
        (
            ("--arms", "A=build --model x"),
            "'A=build --model x': write NAME=COMMAND, with one of grpo, ppo, selfdistill",
        ),
        (("--arms", "A=grpo --model {sft} then"), "write NAME=COMMAND"),
        (("--arms", "A=start then grpo --model {model}"), "write NAME=COMMAND"),
        (("--arms", "A=grpo then selfdistill --model {sft}"), "command 2 would not go on from command 1"),
        (("--arms", "grpo --model x"), "write NAME=COMMAND"),
        (("--arms", "A=grpo --model {sfd}"), "{sfd} is none of {base}, {sft}, {puzzles}, {model}"),
        (("--arms", "A b=grpo", "--arms", "A-b=grpo"), "another configuration has this name"),
        (("--arms", "A=grpo", "--only", "B"), "--only B: no such configuration; there are 'A'"),
        (("--arms", "A=start", "--seeds", 1, "--seeds", 1), "--seeds: 1 is named twice"),
        (
            ("--arms", "A=grpo --model {sft} --puzzles {puzzles} --steps 0"),
            "--arms A: grpo: --steps 0: must be at least 1",
        ),
        (("--arms", "A=grpo --modle {sft}"), "--arms A: grpo: No such option"),
        (
            ("--arms", "A=selfdistill --model {sft} --puzzles p.jsonl --rounds x"),
            "--arms A: selfdistill: Invalid value",
        ),
        (("--arms", "A=grpo 'x"), "No closing quotation"),
        (("--arms", "A=grpo --model {sft} --seed 5"), "--seed is given to every run here; use --seeds and --out"),
        (("--arms", "A=grpo --model {sft} --out=here"), "--out is given to every run here"),
        (("--arms", "A=start", "--eval-puzzles", 0), "--eval-puzzles 0: must be at least 1"),
        (("--arms", "A=start", "--samples", 1), "--samples 1: how many answers differ needs at least 2"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, words, says):
    done = run_command("ablate", "--out", tmp_path / "out", "--start", tmp_path / "start", *words)
    assert done.returncode == 2 and says in done.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.vllm
@pytest.mark.slow(30)
def test_a_configuration_is_trained_evaluated_and_drawn(pipeline, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(pipeline, start)
    shutil.copytree(pipeline / "base", start / "sft/model")
    small = " ".join(map(str, SMALL_GRPO))
    words = ("--out", tmp_path / "out", "--start", start, "--seeds", 3, "--eval-puzzles", 4, "--arms")
    arm = f"A: one step=grpo --model {{sft}} --puzzles {{puzzles}} --steps 1 {small}"
    printed = succeed("ablate", *words, arm)
    run = tmp_path / "out/A-one-step/seed-3"
    assert json.loads((run / "config.json").read_text())["settings"]["seed"] == 3
    found = json.loads((tmp_path / "out/ablation.json").read_text())
    assert set(found) == {"test", "unseen"} and found["test"][0]["seeds"] == [3]
    assert "| A: one step | 1 |" in printed and (tmp_path / "out/ablation.png").is_file()
    again = succeed("ablate", *words, arm)
    assert f"[A: one step, seed 3] found {run / 'finished.json'}" in again
    status = json.loads((tmp_path / "out/status.json").read_text())
    assert (status["state"], status["unit"], status["step"], status["steps"]) == ("finished", "run", 1, 1)
    other = run_command("ablate", *words, arm.replace("--steps 1", "--steps 2"))
    assert other.returncode == 2 and "--arms A: one step: " in other.stderr and "was made with" in other.stderr
    told = ("--notify", f'echo "$RUN_STATE $RUN_EXIT_CODE $RUN_STEP" > {tmp_path / "told"}')
    done = run_command(
        "ablate", *words, arm, "--arms", "B=grpo --model {sft} --puzzles {puzzles} --max-prompt-tokens 1", *told
    )
    assert done.returncode == 2 and (tmp_path / "told").read_text().startswith("failed 2 ")


@pytest.mark.vllm
@pytest.mark.slow(180)
@pytest.mark.timeout(3600)  # a dozen processes, one after the other
def test_commands_run_one_after_another_from_the_model_before(pipeline, tmp_path):
    """The start as it is, which has the format; a step of GRPO, then a round from the merged model."""
    start = tmp_path / "start"
    shutil.copytree(pipeline, start)
    learn = "--lora-rank 0 --batch-size 8"
    cold = (*learn.split(), "--traces", start / "traces.jsonl", "--model", start / "base", "--out", start / "sft")
    succeed("sft", *cold, "--epochs", 25, "--lr", 3e-3, "--holdout", 0)
    small = " ".join(map(str, SMALL_GRPO))
    learn += " --lr 1e-3 --candidates 2 --limit 24 --max-response-tokens 64"
    learn += " --accept reward.cellpuzzles:mixed_reward --accept-at 0.3"
    chain = (
        f"A chain=grpo --model {{sft}} --puzzles {{puzzles}} --steps 1 {small} "
        f"then selfdistill --model {{model}} --puzzles {{puzzles}} --rounds 1 {learn}"
    )
    words = ("--out", tmp_path / "out", "--start", start, "--seeds", 3, "--eval-puzzles", 4, "--samples", 2)
    words = (*words, "--arms", "SFT=start", "--arms", chain)
    printed = succeed("ablate", *words, timeout=3000)
    run = tmp_path / "out/A-chain/seed-3"
    assert f"--model {run}/command-1/merged" in printed, "the round begins at the merged model"
    points = json.loads((run / "points.json").read_text())
    assert [point["name"] for point in points] == ["grpo", "round 1"]
    assert [point["evaluated"] for point in points] == ["models/01", "eval"]
    metrics = [json.loads(line) for line in (run / "command-1/metrics.jsonl").read_text().splitlines()]
    sampled = json.loads((run / "command-2/round-1/traces.report.json").read_text())["tokens"]["completion"]
    assert points[0]["sampled"] == round(metrics[0]["completions/mean_length"] * 12)
    assert sampled > 0 and points[1]["sampled"] == points[0]["sampled"] + sampled
    found = json.loads((tmp_path / "out/ablation.json").read_text())
    assert [row["sampled"] for row in found["test"]] == [0, points[1]["sampled"]]
    assert found["varieties"]["SFT"]["k"] == 2 and "### test: every model" in printed
    assert (tmp_path / "out/ablation.png").is_file()
    again = succeed("ablate", *words)
    for name in ("command-1/finished.json", "command-1/merged/config.json", "command-2/finished.json"):
        assert f"found {run / name}" in again


def test_an_arm_that_trains_on_test_puzzles_is_refused(pipeline, tmp_path):
    test, sft = str(pipeline / "puzzles/test.parquet"), tmp_path
    paths = {"base": sft, "sft": sft, "puzzles": pipeline / "puzzles/train.parquet"}
    files = held_out_files(pipeline)
    (tmp_path / "mine.yaml").write_text(f"puzzles: {test}\n")

    def check(*commands: list[str]) -> None:
        refuse_test_puzzles(refuse_wrong_words({"A": list(commands)}, paths), files)

    plain = ["grpo", "--model", "{sft}", "--puzzles", "{puzzles}"]
    check(plain, ["selfdistill", "--model={model}", "--puzzles", "{puzzles}"])
    for words in (["--puzzles", test], [f"--puzzles={test}"]):
        with pytest.raises(UserError, match=r"--arms A: it would train on puzzle test-\d+ of .*, which is test-"):
            check(plain, ["selfdistill", "--model={model}", *words])
    with pytest.raises(UserError, match=r"--arms A: it would train on puzzle test-\d+ of .*, which is test-"):
        check(["grpo", "--recipe", str(tmp_path / "mine.yaml"), "--model", "{sft}"])
    with pytest.raises(UserError, match="--arms A: .*unseen"):  # under another id too
        renamed = tmp_path / "renamed.jsonl"
        puzzles = read_puzzles(pipeline / "puzzles/unseen.parquet")
        write_puzzles(renamed, [dataclasses.replace(p, id=f"mine-{i}") for i, p in enumerate(puzzles)])
        check(["grpo", "--model", "{sft}", "--puzzles", str(renamed)])
    for variant in ("cell", "open"):  # as single cells, or without the labels
        write_puzzles(renamed, convert(puzzles, variant))
        with pytest.raises(UserError, match="--arms A: .*unseen"):
            check(["grpo", "--model", "{sft}", "--puzzles", str(renamed)])
    # and the other way round: compared on single cells, trained on their batches
    write_puzzles(renamed, convert(puzzles, "cell"))
    with pytest.raises(
        UserError, match=r"--arms A: it would train on puzzle unseen-.* of .*renamed.jsonl or shows cells of it"
    ):
        refuse_test_puzzles({"A": [str(pipeline / "puzzles/unseen.parquet")]}, [str(renamed)])
    refuse_test_puzzles({"A": [str(pipeline / "puzzles/train.parquet")]}, [str(renamed)])


def test_other_commands_under_the_name_of_a_finished_run_are_refused(tmp_path):
    one, other = [["grpo", "--lr", "1e-4"]], [["grpo", "--lr", "1e-3"]]
    record_commands(tmp_path, one)
    refuse_other_commands({tmp_path: ("A", other)})  # nothing has finished: what was mended may be tried
    for done in ("finished.json", "command-1/finished.json", "eval/test/metrics.json"):
        (tmp_path / done).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / done).write_text("{}")
        refuse_other_commands({tmp_path: ("A", one), tmp_path / "new": ("B", one)})
        with pytest.raises(UserError, match="--arms A: .* was made with 'grpo --lr 1e-4'; give that again, or another"):
            refuse_other_commands({tmp_path: ("A", other)})
        (tmp_path / done).unlink()


def test_a_recipe_that_was_edited_under_a_finished_run_is_refused(tmp_path):
    recipe = tmp_path / "mine.yaml"
    arms = {"A": [["grpo", "--recipe", str(recipe), "--model", "{sft}"]]}
    recipe.write_text("lr: 1.0e-3\nsave_every: 5\nsteps: 5\n")
    record_commands(tmp_path, arms["A"], values_of(arms)["A"])
    (tmp_path / "finished.json").write_text("{}")
    recipe.write_text("lr: 1.0e-3\nsave_every: 7\nsteps: 5\n")  # which --resume may change
    refuse_other_commands({tmp_path: ("A", arms["A"])}, values_of(arms))
    recipe.write_text("lr: 1.0e-3\nsteps: 7\n")  # and steps too, but of a run that goes on
    with pytest.raises(UserError, match="--arms A: .* was made with steps 5, and now gets 7; give the old value"):
        refuse_other_commands({tmp_path: ("A", arms["A"])}, values_of(arms))
    (tmp_path / "finished.json").unlink()
    refuse_other_commands({tmp_path: ("A", arms["A"])}, values_of(arms))
    (tmp_path / "finished.json").write_text("{}")
    recipe.write_text("lr: 5.0e-2\nsteps: 5\n")
    with pytest.raises(UserError, match="--arms A: .* was made with lr 0.001, and now gets 0.05; give the old value"):
        refuse_other_commands({tmp_path: ("A", arms["A"])}, values_of(arms))


def test_a_run_that_was_evaluated_on_other_puzzles_is_refused_before_the_others_run(pipeline, tmp_path):
    file = str(pipeline / "puzzles/test.parquet")
    digest = puzzles_digest(read_puzzles(file)[:2])
    (tmp_path / "seed-0/eval/test").mkdir(parents=True)
    (tmp_path / "seed-0/eval/test/metrics.json").write_text(json.dumps({"puzzles": {"digest": digest}}))
    refuse_other_puzzles([tmp_path / "seed-0", tmp_path / "seed-1"], [file], 2)
    with pytest.raises(UserError, match="--eval-puzzles 3: .*seed-0/eval was evaluated on other puzzles of"):
        refuse_other_puzzles([tmp_path / "seed-0", tmp_path / "seed-1"], [file], 3)


def test_a_start_recipe_with_other_values_than_the_start_was_made_with_is_refused(tmp_path):
    config = DemoConfig(out=str(tmp_path / "start"), noise=0.4)
    (tmp_path / "start").mkdir()
    record_settings(config, recipe_values(config))
    (tmp_path / "start/atlas.h5ad").touch()
    (tmp_path / "other.yaml").write_text("noise: 0.9\n")
    words = ("--out", tmp_path / "out", "--start", tmp_path / "start", "--arms", "A=start")
    done = run_command("ablate", *words, "--start-recipe", tmp_path / "other.yaml")
    assert done.returncode == 2 and "--noise: " in done.stderr and "begun with 0.4, and now gets 0.9" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_cannot_be_written_is_no_success(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("no table")

    monkeypatch.setattr("launch.ablate.prepare", lambda demo: (tmp_path / "start").mkdir(exist_ok=True))
    monkeypatch.setattr("launch.ablate.write_results", refuse)
    monkeypatch.setattr("launch.ablate.evaluate_arm", lambda *_: None)
    (tmp_path / "start").mkdir()
    words = ["--out", str(tmp_path / "out"), "--start", str(tmp_path / "start"), "--arms", "A=start"]
    done = CliRunner().invoke(main, words)
    status = json.loads((tmp_path / "out/status.json").read_text())
    assert done.exit_code == 2 and (status["state"], status["exit_code"], status["error"]) == ("failed", 2, "no table")


def test_samples_and_the_curve_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("launch.ablate.run_stage", lambda *words, **flags: asked.append("--resume" in words) or {})
    for name in ("evaluate_files", "write_points"):
        monkeypatch.setattr(f"launch.ablate.{name}", lambda *words, **flags: None)
    checkpoint = tmp_path / "checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    config = AblateConfig(out=str(tmp_path), samples=2, curve_puzzles=4)
    made = [Made(name="grpo", model=checkpoint, sampled=1, longest=8)]
    evaluate_arm(config, tmp_path, "A", made, ["test.parquet"], 8)
    for folder in ("samples", "curve/step-000001"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "predictions.partial.jsonl").touch()
    evaluate_arm(config, tmp_path, "A", made, ["test.parquet"], 8)
    assert asked == [False, False, True, True]


def test_a_start_that_was_made_from_other_files_needs_its_recipe(tmp_path):
    """Without one the default demo's base model would be made inside a run of SmolLM2, and its labels replaced."""
    made = DemoConfig(out=str(tmp_path / "start"), model="m")
    (tmp_path / "start").mkdir()
    record_settings(made, recipe_values(made))
    done = run_command("ablate", "--out", tmp_path / "out", "--start", tmp_path / "start", "--arms", "A=start")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "start: was made with model m, not the default; name its recipe with --start-recipe" in done.stderr


def test_a_start_is_made_with_one_set_of_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.ablate.prepare", lambda demo: (tmp_path / "start/atlas.h5ad").touch())
    monkeypatch.setattr("launch.ablate.write_results", lambda *_: "")
    monkeypatch.setattr("launch.ablate.evaluate_arm", lambda *_: None)
    monkeypatch.setattr("launch.ablate.read_arm", lambda *_: None)
    words = ["--out", str(tmp_path / "out"), "--start", str(tmp_path / "start"), "--arms", "A=start"]
    recipe = tmp_path / "mine.yaml"
    for noise in (0.3, 0.3, 0.5):
        recipe.write_text(f"noise: {noise}")
        done = CliRunner().invoke(main, [*words, "--start-recipe", str(recipe)])
    assert done.exit_code == 2 and "--start-recipe: --noise: " in done.output and "begun with 0.3" in done.output
    # ---- a recipe that is not named changes nothing of the record
    before = (tmp_path / "start/demo.json").read_bytes()
    assert CliRunner().invoke(main, words).exit_code == 0
    assert (tmp_path / "start/demo.json").read_bytes() == before


def test_a_second_comparison_is_refused_without_touching_the_status_of_the_first(tmp_path):
    given = ("--out", tmp_path / "out", "--start", tmp_path / "start", "--arms", "A=start")
    lock_folder(tmp_path / "start")
    done = run_command("ablate", *given)
    unlock_folder(tmp_path / "start")
    assert done.returncode == 2 and "is writing there" in done.stderr and not (tmp_path / "out/status.json").exists()
