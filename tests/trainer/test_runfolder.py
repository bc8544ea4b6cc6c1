"""Checkpoints: whole, checked, resumable; a damaged one is refused by name."""

import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.errors import UserError
from data.files import append_rows, sealed, unlock_folder
from trainer.config import GrpoConfig
from trainer.model.opening import read_adapter
from trainer.model.shared import with_sampler_dtype
from trainer.ppo.settings import PpoConfig
from trainer.ranks.world import World, load_moments, moments_of
from trainer.record.runfolder import (
    PENDING,
    Checkpoint,
    check_run,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    remove_pruned,
    reward_hash,
    rewind,
    save_checkpoint,
    say_what_changed,
    settings_of_run,
    training_file,
    write_json,
)
from trainer.sft.settings import SftConfig
from trainer.start.parts import refuse_to_replace

ADAPTER = {"m.lora_A.weight": torch.arange(6.0).view(2, 3), "m.lora_B.weight": torch.ones(3, 2)}
MOMENTS = {"exp_avg/m": torch.full((2, 3), 0.5), "step/m": torch.tensor(4.0)}

PPO_FIELDS = {field.name for field in dataclasses.fields(PpoConfig)}


def save(out, step, keep=2):
    saved = Checkpoint(step=step, adapter=ADAPTER, adapter_config={"r": 2}, moments=MOMENTS)
    return save_checkpoint(out, saved, keep)


def test_round_trip_and_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000006"]
    step, adapter, moments = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert step == 6
    torch.testing.assert_close(adapter, ADAPTER, rtol=0, atol=0)
    torch.testing.assert_close(moments, MOMENTS, rtol=0, atol=0)


def test_a_run_is_not_written_over_a_model(tmp_path):
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).mkdir(parents=True)
        folder = tmp_path / name
        (folder / name).write_text('{"model_type": "qwen2"}')
        for config in (SftConfig(traces="t", model=str(folder), out=str(folder)), GrpoConfig(out=str(folder))):
            with pytest.raises(UserError, match="holds a model, or the config.json of another command"):
                check_run(config)
    (tmp_path / "config.json/config.json").write_text('{"settings": {}}')  # of a run that made no step: begins afresh
    check_run(GrpoConfig(out=str(tmp_path / "config.json")))
    unlock_folder(tmp_path / "config.json")


def test_a_new_run_replaces_nothing_that_no_run_made(tmp_path):
    (tmp_path / "model/qwen").mkdir(parents=True)
    refuse_to_replace(tmp_path)
    for name in ("model", "best"):
        (tmp_path / "best").touch()
        with pytest.raises(UserError, match=f"holds {name}, and no run that made it; it would be replaced"):
            refuse_to_replace(tmp_path, name)
    save(tmp_path, 2)
    refuse_to_replace(tmp_path, "model", "best")
    with pytest.raises(UserError, match="would write over --traces"):
        SftConfig(traces=str(tmp_path / "traces.json"), model="m", out=str(tmp_path))


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path, kind):
    """It would drop the rows of all its steps: days of rollouts."""
    made = {"traces": str(tmp_path / "t.jsonl"), "model": "m", "save_every": 0} if kind == "sft" else {"save_every": 2}
    config = (SftConfig if kind == "sft" else GrpoConfig)(**made, out=str(tmp_path), resume=True)
    write_json(tmp_path / "config.json", sealed({"settings": dataclasses.asdict(config)}))

    def rows(*last: int) -> None:
        found = [
            {"step": step, "epoch": (step + 2) // 3} if kind == "sft" else {"step": step} for step in range(1, last[0])
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found) + '{"step": ')

    rows(3)  # died before its first checkpoint, or while it was written
    check_run(config)
    rows(6)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="has made 5 steps and holds no checkpoint of them; put .*checkpoints back"):
        check_run(config)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    # ---- what counts is how often the run saved, not how often it is to save from now on
    every = 100 if kind == "grpo" else 20
    write_json(tmp_path / "config.json", sealed({"settings": dataclasses.asdict(config) | {"save_every": every}}))
    rows(12)  # of SFT in its fourth epoch
    check_run(config)
    rows(every + 2)
    with pytest.raises(UserError, match="holds no checkpoint"):
        check_run(config)
    rows(3)
    (tmp_path / "finished.json").touch()
    with pytest.raises(UserError, match="holds no checkpoint"):
        check_run(config)
    unlock_folder(tmp_path)


def test_a_flipped_bit_in_an_adapter_is_refused_by_whoever_answers_with_it_too(tmp_path):
    """evaluate.py and annotate.py open the adapter alone, and not the whole checkpoint."""
    path = save(tmp_path, 2)
    torch.testing.assert_close(read_adapter(path)[0], ADAPTER, rtol=0, atol=0)
    for name, place in (
        ("adapter_model.safetensors", 1),
        ("adapter_model.safetensors", 20),
        ("adapter_config.json", 4),
    ):
        file = path / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-place] + bytes([whole[-place] ^ 1]) + whole[len(whole) - place + 1 :])
        with pytest.raises(UserError, match=f"{file}: missing, damaged or changed; use another checkpoint"):
            read_adapter(path)
        file.write_bytes(whole)
    (path / "training/optimizer.safetensors").unlink()  # of no use to whoever answers
    assert set(read_adapter(path)[0]) == set(ADAPTER)
    (path / "state.json").unlink()  # somebody else's adapter, or an exported one: nobody knows its bits
    assert set(read_adapter(path)[0]) == set(ADAPTER)


def test_a_checkpoint_of_an_older_run_is_read(tmp_path):
    path = save(tmp_path, 2)
    for file in ("optimizer.safetensors", "pending.json"):
        (path / "training" / file).rename(path / file)
    state = json.loads((path / "state.json").read_text())
    state["crc32"] = {Path(name).name: crc for name, crc in state["crc32"].items()}
    del state["checksum"]
    (path / "state.json").write_text(json.dumps(state))
    torch.testing.assert_close(load_checkpoint(path)[2], MOMENTS, rtol=0, atol=0)
    assert training_file(path, PENDING) == path / "pending.json"


def test_a_half_written_checkpoint_is_not_seen_and_a_damaged_one_is_named(tmp_path):
    path = save(tmp_path, 2)
    (tmp_path / "checkpoints/step-000009.partial").mkdir()
    assert list_checkpoints(tmp_path) == [path]
    file = path / "training/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="optimizer.safetensors: missing, damaged or changed"):
        load_checkpoint(path)


def test_a_checkpoint_of_every_weight_on_a_base_that_is_one_itself(tmp_path):
    base = tmp_path / "old/checkpoints/step-000100"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "state.json").write_text('{"step": 100}')
    others = ("pytorch_model.bin", "tf_model.h5", "model.safetensors", "pytorch_model.bin.index.json")
    for name in others:  # a hub's repository often has several formats: none of them is what was trained
        (base / name).write_text("old weights")
    saved = Checkpoint(step=2, adapter=ADAPTER, adapter_config=None, moments=MOMENTS)
    path = save_checkpoint(tmp_path / "new", saved, 2, model_dir=base)
    assert load_checkpoint(path)[0] == 2 and (path / "config.json").read_text() == "{}"
    assert [name for name in others if (path / name).exists()] == ["model.safetensors"]


def test_another_number_of_samplers_is_said(tmp_path, capsys):
    """Sums over other ranks differ in their last digits; a vLLM more draws other responses."""
    config = GrpoConfig(model="m", puzzles="p", out=str(tmp_path), engine="vllm", tensor_parallel=1)
    before = {"world_size": 1, "settings": dataclasses.asdict(config), "reward": reward_hash(config)}
    others = "goes on with other responses than the unbroken one"
    say_what_changed(config, before, SimpleNamespace(size=1))
    assert capsys.readouterr().out == ""
    say_what_changed(config, before, SimpleNamespace(size=2))
    said = capsys.readouterr().out
    assert "had 1 ranks that train and now has 2" in said
    assert f"had 1 vLLM that sampled and now has 2: each draws its own random numbers, so the run {others}" in said
    say_what_changed(dataclasses.replace(config, placement="split", sampler_ranks=3), before, SimpleNamespace(size=1))
    assert "had 1 vLLM that sampled and now has 3" in capsys.readouterr().out
    torch_engine = dataclasses.replace(config, engine="torch")
    before["settings"] = dataclasses.asdict(torch_engine)
    say_what_changed(torch_engine, before, SimpleNamespace(size=2))
    said = capsys.readouterr().out
    assert "had 1 ranks that train and now has 2" in said and others not in said


def test_rewind_drops_later_rows_and_a_torn_last_line(tmp_path, capsys):
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "rew']))
    rows = [
        json.dumps({"step": step, "completion": "\u2028", "parts": {"a": 1}}, ensure_ascii=False) for step in (1, 2, 2)
    ]
    (tmp_path / "rollouts.jsonl").write_bytes(
        "\n".join([*rows, ""]).encode() + '{"step": 3, "completion": "\u2028'.encode()[:-1]
    )
    rewind(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "rollouts.jsonl").read_bytes() == "".join(f"{row}\n" for row in rows).encode()
    said = capsys.readouterr().err
    assert said.count("its last line was cut off, and is left out") == 2 and "no line of" not in said
    before = (tmp_path / "rollouts.jsonl").read_bytes()
    (tmp_path / "rollouts.jsonl").write_bytes(b"{}\n" + before)
    with pytest.raises(ValueError, match="rollouts.jsonl, line 1: is damaged; put a copy"):
        rewind(tmp_path, 2)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == b"{}\n" + before


def test_rewind_copies_nothing_and_tells_the_watch_of_each_row(tmp_path):
    """Rollouts of a long run are larger than what is free on the disk, and take longer to read than a rank may be silent."""
    path, told = tmp_path / "rollouts.jsonl", []
    text = "".join(f'{{"step": {step}}}\n' for step in (1, 1, 2, 3))
    path.write_text(text)
    file = path.stat().st_ino
    for step, left in ((3, text), (2, text[:36]), (0, "")):
        rewind(tmp_path, step, lambda: told.append(1))
        assert path.read_text() == left and path.stat().st_ino == file
    assert len(told) == 4 + 4 + 3
    told.clear()
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n{}')  # two runs, put together by hand
    rewind(tmp_path, 2, lambda: told.append(1))
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and len(told) == 2 * 3
    os.link(path, tmp_path / "backup")
    rewind(tmp_path, 1)
    assert path.read_text() == '{"step": 1}\n' and (tmp_path / "backup").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_node_that_does_not_see_the_run_is_named(tmp_path, monkeypatch):
    config = GrpoConfig(out=str(tmp_path), resume=True)
    with pytest.raises(UserError, match="holds no run; leave --resume out to start one$"):
        check_run(config)
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match="holds no run on .*, and all nodes must see one folder; put it on a shared disk, or"
    ):
        check_run(config)


def test_a_run_that_is_resumed_keeps_its_samplers_dtype(tmp_path):
    """A version that had no such setting sampled in --dtype."""
    config = GrpoConfig(model="m", puzzles="p", out=str(tmp_path), dtype="float32", autocast=True)

    def begun(**changes: str) -> None:
        settings = {k: v for k, v in {**dataclasses.asdict(config), **changes}.items() if v != "none at all"}
        (tmp_path / "config.json").write_text(json.dumps(sealed({"settings": settings, "data": {}})))
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')

    again = dataclasses.replace(config, resume=True)
    for recorded, found in (("none at all", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        begun(sampler_dtype=recorded)
        check_run(again)
        check_run(dataclasses.replace(again, sampler_dtype=found))
        assert with_sampler_dtype(again, False, settings_of_run(again)).sampler_dtype == found
        other = {"float32": "bfloat16", "bfloat16": "float32"}[found]
        with pytest.raises(
            UserError, match=f"sampler_dtype was '{found}' in .*, now '{other}'; give the old value again"
        ):
            check_run(dataclasses.replace(again, sampler_dtype=other))


def test_rewind_says_which_steps_a_file_lacks_or_holds_twice(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 3, 3, 5, 6)))
    (tmp_path / "rollouts.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 1, 2, 2, 3, 4)))
    rewind(tmp_path, 5)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"note: {tmp_path / 'metrics.jsonl'} has no line of 2 steps, the first is 2; the run itself lacks nothing",
        f"note: {tmp_path / 'metrics.jsonl'} has more than one line of step 3; the run itself lacks nothing",
        f"note: {tmp_path / 'rollouts.jsonl'} has no line of step 5; the run itself lacks nothing",
    ]


ALONE = SimpleNamespace(is_main=True, gather_in_rank_order=lambda item: [item])


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("adapter_model.safetensors", lambda text: text[:-1], "missing, damaged or changed"),
        (
            "training/optimizer.safetensors",
            lambda text: text[:-1] + bytes([text[-1] ^ 1]),
            "missing, damaged or changed",
        ),
        (
            "state.json",
            lambda text: text.replace(b'"step": 6', b'"step": 7'),
            "was changed or damaged after it was written",
        ),
        ("state.json", lambda text: text[:40], "damaged, not JSON"),
        ("state.json", lambda text: b"{}", "is no record of a checkpoint"),
        ("state.json", lambda text: b"[]", "holds no JSON object"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, file, change, says, capsys):
    for step in (4, 6):
        save(tmp_path, step)
    place = tmp_path / "checkpoints/step-000006" / file
    place.write_bytes(change(place.read_bytes()))
    path, (step, adapter, _) = load_newest(tmp_path, ALONE)
    assert (path.name, step) == ("step-000004", 4)
    torch.testing.assert_close(adapter, ADAPTER, rtol=0, atol=0)
    said = capsys.readouterr().err
    assert said.startswith(f"note: {place}: {says}") and said.endswith("; --resume goes on from step-000004\n")
    assert list_checkpoints(tmp_path) == [path] and (tmp_path / "checkpoints/step-000006.damaged").is_dir()
    save(tmp_path, 6)  # made again
    assert load_newest(tmp_path, ALONE)[1][0] == 6 and capsys.readouterr().err == ""


def test_what_only_another_rank_cannot_read_is_said_too(tmp_path, capsys):
    """The disk of one node may show it otherwise: then hours are trained again, and it is said whose node that was."""
    for step in (4, 6):
        save(tmp_path, step)
    for theirs, says in (
        ([4, ["step-000006/x: missing"]], "step-000006/x: missing"),
        ([4, []], "rank 1 does not see the"),
    ):
        world = SimpleNamespace(is_main=True, gather_in_rank_order=lambda item, theirs=theirs: [item, theirs])
        assert load_newest(tmp_path, world)[1][0] == 4
        assert capsys.readouterr().err.startswith(f"note: {says}")
        (tmp_path / "checkpoints/step-000006.damaged").rename(tmp_path / "checkpoints/step-000006")
    (tmp_path / "checkpoints/step-000006").rename(tmp_path / "elsewhere")
    world = SimpleNamespace(is_main=True, gather_in_rank_order=lambda item: [item, [6, []]])
    assert load_newest(tmp_path, world)[1][0] == 4
    assert capsys.readouterr().err == (
        "note: rank 0 does not see the checkpoint of step 6; --resume goes on from step-000004\n"
    )


def test_a_run_that_went_on_keeps_no_file_of_its_checkpoint_mapped(tmp_path):
    """On NFS a file that is mapped cannot be removed, and the save that prunes the checkpoint would fail."""
    p = torch.nn.Parameter(torch.ones(300))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.ones(300)
    optimizer.step()
    world = World(rank=0, size=1, device=torch.device("cpu"))
    moments = moments_of(optimizer, ["p"], world)
    save_checkpoint(tmp_path, Checkpoint(step=2, adapter={"p": p.data}, adapter_config={"r": 2}, moments=moments), 2)
    path, (_, adapter, moments) = load_newest(tmp_path, ALONE)
    load_moments(optimizer, {"p": p}, moments)
    del adapter, moments
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    save(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a file of it is open on NFS: its folder stays
    for step in (4, 6):
        save(tmp_path, step)
    there = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert there == [".step-000002.old", "step-000004", "step-000006"]
    monkeypatch.undo()
    remove_pruned(tmp_path)  # as when the run goes on
    assert not (tmp_path / "checkpoints/.step-000002.old").exists()
    save(tmp_path, 8)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken_for_it(tmp_path):
    path = save(tmp_path, 4)
    path.rename(path.with_name("step-000006"))
    with pytest.raises(ValueError, match="step-000006/state.json: is of step 4, and so not of this folder"):
        load_newest(tmp_path, ALONE)
    assert (tmp_path / "checkpoints/step-000006").is_dir()  # the only one is left as it is


def test_checkpoints_are_ordered_by_their_number(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_full_disk_leaves_no_checkpoint_behind_and_the_old_one_whole(tmp_path):
    """RLIMIT_FSIZE stands for the full disk; safetensors reports it with an error of its own."""
    save(tmp_path, 2)
    large = Checkpoint(step=4, adapter={"m": torch.zeros(1000)}, adapter_config={"r": 2}, moments=MOMENTS)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(
            ValueError, match=r"checkpoints/step-000004: cannot be written \(File too large\); make room"
        ):
            save_checkpoint(tmp_path, large, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert load_newest(tmp_path, ALONE)[1][0] == 2


def test_the_command_of_another_algorithm_does_not_go_on_with_a_run(tmp_path):
    """Their shared settings are the same; the first checkpoint would have lost what only the other keeps."""
    shared = {"model": "m", "puzzles": "p", "out": str(tmp_path), "dtype": "float32", "aggregation": "token-mean"}
    grpo = GrpoConfig(**shared)
    ppo = PpoConfig(**{name: value for name, value in dataclasses.asdict(grpo).items() if name in PPO_FIELDS} | shared)
    for ours, other, said in ((grpo, ppo, "a run of GRPO, not of PPO"), (ppo, grpo, "a run of PPO, not of GRPO")):
        record = json.dumps(sealed({"settings": dataclasses.asdict(ours), "data": {}}))
        (tmp_path / "config.json").write_text(record)
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        check_run(dataclasses.replace(ours, resume=True))
        with pytest.raises(UserError, match=f"--resume: {tmp_path} holds {said}; use "):
            check_run(dataclasses.replace(other, resume=True))
        assert (tmp_path / "config.json").read_text() == record


def test_rewind_parses_no_line_that_begins_with_its_step(tmp_path, monkeypatch):
    """Checksums of the rollouts of a long run take an hour, in which all ranks would wait."""
    path = tmp_path / "rollouts.jsonl"
    append_rows(path, [{"step": step, "completion": "a"} for step in (1, 2, 3)], seal=True)
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:2])
    monkeypatch.setattr("data.files.parse_json", lambda text: pytest.fail("parsed"))
    rewind(tmp_path, 2)
    assert path.read_bytes() == kept
