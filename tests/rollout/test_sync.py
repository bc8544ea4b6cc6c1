"""The hand-over to real vLLM: LoRA ranks, tied and untied heads, tensor parallel, every weight, DoRA, many times in a row."""

import json
import socket
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.errors import UserError
from rollout import LocalEngine, Rollout, Sampling, crc, split
from rollout.crc import checksums, device_checksums, host_checksums, sum_of_words
from rollout.link import join_store, open_store, post_notice, put_signed, read_notice, take_signed
from rollout.split import (
    REFUSED,
    Load,
    SamplerEnd,
    SamplerProcess,
    Session,
    SplitEngine,
    over_key,
    rollouts_key,
)
from rollout.sync import Canary, Parcel, SyncError, broadcast_adapter, manifest_hash
from tests.helpers.commands import ROOT, run_command, succeed
from trainer.ranks.world import World, guarded

SMALL = (
    "--prompts-per-step",
    4,
    "--group-size",
    3,
    "--max-prompt-tokens",
    400,
    "--max-response-tokens",
    16,
    "--steps",
    3,
    "--reward-workers",
    0,
    "--insist",
)


@pytest.fixture(scope="module")
def untied(pipeline, tmp_path_factory) -> Path:
    """The base checkpoint with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "base"
    model = AutoModelForCausalLM.from_pretrained(pipeline / "base", dtype=torch.float32)
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (pipeline / "base" / name).is_file():
            (folder / name).write_bytes((pipeline / "base" / name).read_bytes())
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    return folder


def check(what: str, checkpoint: Path, ranks: int = 1) -> list[dict]:
    # vLLM removes the shared memory between two processes at the very end of the interpreter, which a forked command skips
    said = succeed(ROOT / "tests/helpers/sync_checks.py", what, checkpoint, ranks=ranks, fresh=ranks > 1)
    results = sorted(line.split(" ", 2)[1:] for line in said.splitlines() if line.startswith("RESULT"))
    return [json.loads(text) for _, text in results]


@pytest.mark.vllm
@pytest.mark.slow(9)
def test_every_lora_rank_arrives_and_many_hand_overs_leak_nothing(pipeline):
    (result,) = check("ranks", pipeline / "base")
    assert set(result["distances"]) == {"8", "16", "64", "256"} and all(d < 1e-5 for d in result["distances"].values())
    assert result["bound"] == [2 * 7, 2 * 4]  # two layers: q, k, v, o, gate, up, down -> qkv, o, gate_up, down
    assert result["threads gained"] == 1, (
        "vLLM's CPU worker leaves torch.set_num_threads doing nothing; the engine mends it"
    )
    assert "slot of model.layers.0.mlp.down_proj does not hold the lora_B" in result["damaged slot"]
    assert "answers the canary text exactly as without an adapter" in result["unused"]
    assert result["hashes"]
    assert result["grown_bytes"] < 32 << 20
    assert result["files"][0] == result["files"][1]


@pytest.mark.vllm
@pytest.mark.slow(9)
def test_later_hand_overs_round_as_the_first(pipeline):
    (result,) = check("rounded", pipeline / "base")
    assert result == {"plans": [True, True, True], "same": [False, True], "dtypes": ["torch.bfloat16"]}


@pytest.mark.vllm
@pytest.mark.slow(9)
@pytest.mark.parametrize(
    ("what", "dtype", "distance"), [("merged", "float32", 1e-5), ("merged, bfloat16", "bfloat16", 0.05)]
)
def test_an_adapter_merged_into_the_samplers_weights_leaves_nothing_behind(pipeline, what, dtype, distance):
    (result,) = check(what, pipeline / "base")
    assert result["merges"] and result["bound"] == [2 * 7, 2 * 7] and result["dtype"] == f"torch.{dtype}"
    assert result["distance"] < distance < result["away from the base"] / 4
    # bit for bit: the base is read again, never subtracted from
    assert result["off again"] and result["on again"] and result["base after 80 adapters"]
    assert result["hashes"] and result["grown_bytes"] < 32 << 20 and result["files"][0] == result["files"][1]
    assert "the base has no model.layers.7.mlp.down_proj.weight for the adapter" in result["unknown layer"]


@pytest.mark.vllm
@pytest.mark.slow(9)
@pytest.mark.parametrize("how", ["parallel", "parallel, merged"])
def test_one_sampler_over_two_processes_with_an_untied_head(untied, how):
    first, second = check(how, untied, ranks=2)
    assert first["ids"] == ["a", "c"] and second["ids"] == ["b", "d"]
    for result in (first, second):
        assert result["difference"] < 1e-4 and result["canary"] < 1e-5


@pytest.mark.vllm
@pytest.mark.slow(4)
def test_every_weight_can_be_trained_and_shipped(pipeline, tmp_path):
    """--lora-rank 0, with a tied head: the canary compares the sampler with the trainer after each step."""
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completion, puzzle):\n    return -len(completion) / 20\n")
    base, out = pipeline / "base", tmp_path / "run"
    succeed(
        "grpo",
        "--model",
        base,
        "--puzzles",
        pipeline / "puzzles/train.parquet",
        "--out",
        out,
        *SMALL,
        "--lora-rank",
        0,
        "--lr",
        1e-3,
        "--reward",
        f"{reward}:length",
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len({row["adapter_hash"] for row in rows}) == 3
    assert all(row["sampling/logp_difference/max"] < 1e-4 for row in rows) and rows[-1]["kl"] > 0
    trained = load_file(out / "checkpoints/step-000003/model.safetensors")  # a whole checkpoint, and another one
    before = load_file(base / "model.safetensors")
    assert set(trained) == set(before) and all(
        not torch.equal(trained[name], before[name]) for name in before if "norm" not in name
    )
    AutoModelForCausalLM.from_pretrained(out / "checkpoints/step-000003")


def test_dora_is_refused_with_a_sentence(pipeline, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    config = {
        "use_dora": True,
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(pipeline / "base"),
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    done = run_command(
        "evaluate", "--puzzles", pipeline / "puzzles/test.parquet", "--model", tmp_path, "--out", tmp_path / "eval"
    )
    assert done.returncode == 2 and "a DoRA adapter (use_dora), which vLLM cannot serve" in done.stderr
    from rollout.vllm_engine import VLLMEngine

    with pytest.raises(ValueError, match="the adapter is DoRA"):
        VLLMEngine(str(pipeline / "base"), lora=config, max_model_len=64)


def test_a_parcel_holds_tensors_of_any_shape_and_dtype():
    tensors = {
        "b": torch.arange(5, dtype=torch.float32),
        "a": torch.ones(3, 1, dtype=torch.bfloat16) * 0.1,
        "c": torch.tensor([[1.0, 2.0]], dtype=torch.float64),
        "e": torch.zeros(0, 4),
    }
    parcel = Parcel.of(tensors)
    manifest = parcel.manifest()
    assert [row[0] for row in manifest] == ["a", "b", "c", "e"] and manifest[0][2] == "bfloat16"
    assert manifest[1] == ("b", (5,), "float32", zlib.crc32(struct.pack("<5f", 0, 1, 2, 3, 4)))
    assert parcel.spans == [(0, 6), (16, 36), (48, 64), (64, 64)] and len(parcel.buffer) == 64
    assert all(torch.equal(parcel.tensors[name], tensor) for name, tensor in tensors.items())
    before = manifest_hash(manifest)
    tensors["b"][4] = 5
    assert Parcel.of(tensors, parcel) is parcel and parcel.tensors["b"][4] == 5
    assert manifest_hash(parcel.manifest()) != before
    assert Parcel.of({"b": tensors["b"]}, parcel) is not parcel


def test_checksums_where_the_bytes_are_equal_zlibs(monkeypatch):
    """On a GPU the adapter is not copied for its checksums; other tensors' sizes, odd ones and none."""
    sizes, spans, at = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 100, 1003, 4096, 65_537, 4, 4, 1003, 1003], [], 0
    for size in sizes:
        spans.append((at, at + size))
        at = -(-(at + size) // 16) * 16
    buffer = torch.randint(0, 256, (at,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [zlib.crc32(memoryview(buffer.numpy())[first:end]) for first, end in spans]
    assert device_checksums(buffer, spans) == expected
    monkeypatch.setattr(crc, "BATCH_WORDS", 300)  # more batches than one of the tensors of 1,003 bytes
    assert device_checksums(buffer, spans) == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 7, 1020, 1021, 4096, 5000])
def test_the_sum_of_words_sees_every_change_and_every_other_order(monkeypatch, n, dtype):
    monkeypatch.setattr(crc, "AT_ONCE", 2 * crc.COLUMNS)  # in several parts
    whole = torch.randint(-(1 << 7), 1 << 7, (n + 1,), generator=torch.Generator().manual_seed(0)).to(dtype)
    for first in (0, 1):  # where words of 8 bytes begin, and where they do not
        tensor = whole[first : first + n]
        before = sum_of_words(tensor)
        for place in {0, n // 2, n - 1}:
            changed = tensor.clone() if first == 0 else whole.clone()[1:]
            crc.words_of(changed)[place] ^= 1
            assert sum_of_words(changed[:n]) != before
        if n > 1:
            orders = [tensor.flip(0), tensor.roll(1)]
            if n == 4096:
                orders += [tensor.view(-1, 8, 64).transpose(0, 1).flatten(), tensor.view(64, 64).T.flatten()]
            for other in orders:
                again = whole.clone()
                again[first : first + n] = other
                assert sum_of_words(again[first : first + n]) != before


def test_checksums_of_a_large_adapter_are_made_by_two_threads():
    sizes = [700_001, 1, 900_003, 64, 1_200_000, 5]
    ends = list(accumulate(sizes))
    spans = list(zip([0, *ends], ends, strict=False))
    buffer = torch.randint(0, 256, (ends[-1],), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [zlib.crc32(buffer.numpy()[first:end].tobytes()) for first, end in spans]
    assert host_checksums(buffer, spans) == expected == checksums(buffer, spans) and len(set(expected)) == 6


@pytest.mark.parametrize("how", ["in place", "past autograd"])
def test_a_parcel_that_changes_in_its_own_process_is_named(monkeypatch, how):
    """There is one process, so its checksums are made once; verify() looks for writes and at the sum."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    made, checksums = [], Parcel.manifest
    monkeypatch.setattr(Parcel, "manifest", lambda parcel: made.append(parcel) or checksums(parcel))
    tensors = {"a": torch.ones(2, 3), "b": torch.arange(7.0)}
    parcel, manifest = broadcast_adapter(tensors)
    parcel.verify(manifest)
    assert len(made) == 1 and manifest[0][-1] == zlib.crc32(struct.pack("<6f", *[1.0] * 6))
    if how == "in place":  # a word of column 0 and one of column 1, so that the checksum stays
        keep_the_sum(parcel.buffer.view(torch.int64), 4, 5)
    else:
        version = parcel.buffer._version
        parcel.tensors["b"].data.view(torch.int32)[3] ^= 1
        assert parcel.buffer._version == version
    with pytest.raises(SyncError, match="b arrived as"):
        parcel.verify(manifest)
    # filled again, it is another version; the manifest of the one before is not accepted
    tensors["a"][0, 0] = 2
    again, later = broadcast_adapter(tensors, parcel)
    again.verify(later)
    assert again is parcel and len(made) == 3
    with pytest.raises(SyncError, match="a arrived as"):
        again.verify(manifest)


def keep_the_sum(words: torch.Tensor, i: int, j: int) -> None:
    """Change two words so that sum_of_words() stays: their columns count 2 i + 1 and 2 j + 1 times."""
    before = sum_of_words(words)
    place_i, place_j = (place % len(words) for place in (i, j))
    words[i] += 2 * place_j + 1
    words[j] -= 2 * place_i + 1
    assert sum_of_words(words) == before


def test_a_parcel_that_travelled_has_all_its_checksums_made_again(monkeypatch):
    """Damage on the way is named, also where it leaves the sum, and in a parcel that once stayed in its process."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    parcel, _ = broadcast_adapter({"a": torch.ones(2, 3), "b": torch.arange(8.0)})

    def damaging(tensor: torch.Tensor, src: int) -> None:
        if tensor.dtype == torch.uint8:
            keep_the_sum(tensor.data.view(torch.int64), -2, -1)  # no write that autograd counts

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", damaging)
    parcel, manifest = broadcast_adapter({"a": torch.ones(2, 3), "b": torch.arange(8.0)}, parcel)
    with pytest.raises(SyncError, match="b arrived as"):
        parcel.verify(manifest)


def test_the_canary_judges_by_distance_and_by_equality():
    policy, reference = [-1.0, -2.0], [-1.5, -2.0]
    canary = Canary(ids=[1, 2, 3], policy=policy, reference=reference, tolerance=1e-4)
    assert canary.check([-1.00001, -2.0], [-1.5, -2.0]) == pytest.approx(5e-6)
    with pytest.raises(
        SyncError, match="differ by 0.25 nats on average, more than 0.0001 .0 from the reference.; it is nearer"
    ):
        canary.check(reference, reference)
    with pytest.raises(SyncError, match="differ by nan nats"):
        canary.check([float("nan"), -2.0], reference)
    close = Canary(
        ids=[1, 2, 3], policy=policy, reference=[-1.00002, -2.0], tolerance=1e-4
    )  # an effect below the tolerance
    with pytest.raises(
        SyncError, match="exactly as without an adapter, though the policy's moves its log-probs by 1e-05"
    ):
        close.check([-1.00002, -2.0], [-1.00002, -2.0])
    assert (
        Canary(ids=[1], policy=[float("nan")], reference=[0.0], tolerance=1).check([0.0], None) != 0
    )  # nan: named later


def test_in_16_bits_rounding_may_grow_with_what_the_adapter_does():
    """As in a run of SmolLM2 at step 57: 0.184 nats, of the adapter's 0.956. A sampler with half of it, or none, is found."""
    policy, reference = [-4.0, -6.0], [-4.956, -6.956]
    canary = Canary(ids=[1, 2, 3], policy=policy, reference=reference, tolerance=0.05)
    off = [value - 0.06 for value in reference]
    assert canary.check([-4.184, -6.184], off) == pytest.approx(0.184)
    for share in (0.5, 1.0, -1.0):  # of the adapter: half of it, or none, or twice as much
        with pytest.raises(SyncError, match="the sampler is not the policy"):
            canary.check([value - 0.956 * share for value in policy], off)
    with pytest.raises(SyncError, match="more than 0.5 "):
        replace(canary, reference=[-14.0, -16.0]).check([-4.6, -6.6], None)
    with pytest.raises(SyncError, match=r"more than 0\.0001 "):
        replace(canary, tolerance=1e-4).check([-4.01, -6.01], reference)


def test_a_sampler_that_is_not_the_policy_is_found_by_the_difference_of_its_base():
    """Rounding widens the limit only so far: here the base itself differs by 1 nat."""
    canary = Canary(ids=[1, 2], policy=[-1.0], reference=[-1.0], tolerance=1e-4)
    with pytest.raises(SyncError, match="differ by 2 nats on average, more than 0.001 "):
        canary.check([-3.0], [-2.0])
    assert canary.check([-1.0009], [-1.0009 - 1e-9]) == pytest.approx(9e-4)  # up to ten times the tolerance
    assert canary.check([-1.00059], [-1.0002]) == pytest.approx(5.9e-4)  # three times what the bases differ by
    with pytest.raises(SyncError, match="differ by 0.00061 nats on average, more than 0.0006 "):
        canary.check([-1.00061], [-1.0002])


class Deaf(LocalEngine):
    """It takes an adapter and goes on with the one before."""

    def generate(self, puzzle_ids, prompts, sampling, repeats=(), finished=None):
        raise NotImplementedError

    def load_adapter(self, parcel, manifest, version):
        self.version = version

    def prompt_logprobs(self, ids, adapter=True):
        return [-9.0]


def test_a_hand_over_ends_with_the_canary(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    with pytest.raises(SyncError, match="the sampler is not the policy"):
        Deaf().deliver({"a": torch.ones(2)}, 0, CANARY)
    Deaf().deliver({"a": torch.ones(2)}, 0, replace(CANARY, policy=[-9.0]))


def test_a_hand_over_to_another_process_ends_with_the_canary():
    store, address = open_store("127.0.0.1", 0)
    life = threading.Thread(target=sampler_life, args=(address, 0))
    life.start()
    session = Session(store, 0, 0, split_engine(address, store, samplers=0))
    load = load_order()
    session.load(load)
    with pytest.raises(SyncError, match="the sampler is not the policy"):  # it answers as CANARY's policy
        session.load(replace(load, canary=replace(CANARY, policy=[-9.0])))
    session.stop()
    life.join()


def test_the_store_listens_on_one_address_and_takes_signed_values_only(capsys):
    store, address = open_store("127.0.0.1", 0)
    socket.create_connection(("127.0.0.1", address.port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", address.port), timeout=5)
    assert address.token not in repr(address)
    value = {"ids": [1, 2], "logprobs": [-0.1, -1e-7], "text": "x" * (9 << 20)}  # more than a store's value may hold
    other = join_store(address, "a test")
    put_signed(other, "k", value, address.token)
    assert other.check(["k"])  # a set is not answered; what the same client asks next is, in order
    assert take_signed(store, "k", address.token) == value and take_signed(store, "k", address.token) is None
    put_signed(other, "k", value, "another token")
    assert other.check(["k"])
    assert (
        take_signed(store, "k", address.token) is None
        and "refused k: its writer does not know" in capsys.readouterr().err
    )
    assert not store.check(["k/0"])
    with pytest.raises(ValueError, match="--sync-host nowhere.invalid: not an interface or address of this machine"):
        open_store("nowhere.invalid", 0)
    with pytest.raises(ValueError, match="another run .its token is not this run's. already answers"):
        open_store("127.0.0.1", address.port)


@pytest.mark.parametrize(
    "foreign",
    [
        b"\xff",
        b"",
        b"1",
        b"x y",
        b"one two three",
        b"-1 " + b"a" * 64,
        b"9999 " + b"a" * 64,
        b"9" * 99 + b" " + b"a" * 64,
    ]
    + ["2 é".encode(), b"1 " + b"a" * 64],
    ids=lambda value: repr(value[:9]),
)
def test_a_value_of_any_other_form_is_refused_at_once(foreign, capsys):
    store, address = open_store("127.0.0.1", 0)
    keys = store.num_keys()
    put_signed(store, "k", {"text": "x" * (5 << 20)}, address.token)  # whose two parts are removed too
    store.set("k", foreign)
    assert take_signed(store, "k", address.token) is None  # and waits for no part that the value promises
    assert "refused k: its writer does not know this run's token" in capsys.readouterr().err
    assert store.num_keys() == keys
    put_signed(store, "k", [1], address.token)
    assert take_signed(store, "k", address.token) == [1]
    # a notice stays, so that every reader finds it, and a foreign one does not hide the true one that follows
    store.set("failure", foreign)
    assert read_notice(store, "failure", address.token) is None
    assert read_notice(store, "failure", address.token) is None
    post_notice(store, "failure", "sampler 0: died", "another token")
    assert read_notice(store, "failure", address.token) is None
    post_notice(store, "failure", "sampler 0: died", address.token)
    assert [read_notice(store, "failure", address.token) for _ in range(2)] == ["sampler 0: died"] * 2


CANARY = Canary(ids=[1, 2], policy=[-1.0], reference=None, tolerance=1e-4)
SAMPLING = Sampling(n=1, max_tokens=4, temperature=1.0, top_p=1.0, seed=0, stop_ids=(2,))


def split_engine(address, store, **more) -> SplitEngine:
    """The trainers' side of one sampler that may be started again once."""
    settings = {"rank": 0, "size": 1, "samplers": 1, "members": 1, "lora": None, "restarts": 1, **more}
    return SplitEngine(address, store, device=torch.device("cpu"), **settings)


def load_order(version: int = 0) -> Load:
    """The order to load an adapter of one tensor."""
    parcel = Parcel.of({"w": torch.ones(3)})
    return Load(version=version, manifest=parcel.manifest(), parcel=parcel, canary=CANARY, lora=None)


def sampler_life(address, generation: int, idle: bool = False, dies: threading.Event | None = None) -> None:
    """One life of a sampler: it answers orders. It dies after the adapter (idle), or after the rollouts (dies)."""
    me = SamplerProcess(engine=0, member=0, members=1, generation=generation)
    end = SamplerEnd(address, me, torch.device("cpu"))
    end.hello()
    while (order := end.next_order())["do"] != "stop":
        if order["do"] == "load":
            end.receive([(name, tuple(shape), dtype, crc) for name, shape, dtype, crc in order["manifest"]])
            end.answer(on=CANARY.policy, off=None)
            if idle:
                post_notice(end.store, f"{me.prefix}/lost", "sampler 0 was killed", address.token)
                return
            continue
        groups = [
            [
                Rollout(
                    puzzle_id=name,
                    prompt_ids=prompt,
                    response_ids=[5],
                    sampler_logprobs=[-0.5],
                    finish_reason="stop",
                    adapter_version=0,
                    adapter_hash="h",
                )
            ]
            for name, prompt in zip(order["puzzle_ids"], order["prompts"], strict=True)
        ]
        for place, group in zip(order["places"], groups, strict=True):
            end.deliver_group(order["step"], place, group, 0.1)
        if dies is not None:
            dies.wait()
            post_notice(end.store, f"{me.prefix}/lost", "sampler 0 was killed", address.token)
            return
        end.answer()
    end.answer()


def test_a_rank_waits_from_its_first_look_to_its_last():
    """The watch may ask at any moment: a rank that looks into the store waits, too."""
    store, address = open_store("127.0.0.1", 0)
    now, seen = [], []

    @contextmanager
    def waiting(what):
        now.append(what)
        yield
        now.pop()

    class Looked:
        def check(self, keys):
            seen.append(list(now))
            return store.check(keys)

        def __getattr__(self, name):
            return getattr(store, name)

    engine = split_engine(address, Looked(), rank=1, size=2, waiting=waiting)
    engine.version, engine.hash = 0, "h"
    engine.ask(0, ["a", "b"], [[1, 2], [3]], SAMPLING)
    sampled = {"version": 0, "hash": "h", "responses": [([5], [-0.5], "stop")]}
    other = store.clone()

    def put():
        while len(seen) < 6:
            time.sleep(0.01)
        put_signed(other, rollouts_key(0, "", 1), sampled, address.token)

    writer = threading.Thread(target=put)
    writer.start()
    assert engine.collect(0)[0][0].response_ids == [5]
    writer.join()
    assert len(seen) >= 6 and all(at == ["the rollouts of step 1"] for at in seen) and not now


def test_an_order_that_is_repeated_while_its_rollouts_are_read_puts_the_same_bytes():
    """The first reader's signature, the second writer's parts: if they differed, the rollouts would be refused and lost."""
    store, address = open_store("127.0.0.1", 0)
    end = SamplerEnd(address, SamplerProcess(engine=0, member=0, members=1, generation=0), torch.device("cpu"))
    rollout = Rollout(
        puzzle_id="p",
        prompt_ids=[1],
        response_ids=[5],
        sampler_logprobs=[-0.5],
        finish_reason="stop",
        adapter_version=0,
        adapter_hash="h",
    )
    end.deliver_group(0, 0, [rollout], 1.0)

    class Meets:
        """A store in which the repeated order puts its parts between the reader's look at the head and at the parts."""

        def get(self, key):
            found = store.get(key)
            if key == "rollouts/0/0":
                end.deliver_group(0, 0, [rollout], 2.0)
            return found

        def __getattr__(self, name):
            return getattr(store, name)

    engine = split_engine(address, Meets(), samplers=0)
    engine.hash = "h"
    engine.ask(0, ["p"], [[1]], SAMPLING)
    assert engine.collect(0)[0][0].response_ids == [5] and engine.seconds == 2.0


def takes_the_adapter(address) -> tuple[SamplerProcess, SamplerEnd]:
    """A sampler process that has carried out its first order, to load the adapter."""
    me = SamplerProcess(engine=0, member=0, members=1, generation=0)
    end = SamplerEnd(address, me, torch.device("cpu"))
    end.hello()
    order = end.next_order()
    end.receive([(name, tuple(shape), dtype, crc) for name, shape, dtype, crc in order["manifest"]])
    end.answer(on=CANARY.policy, off=None)
    return me, end


def test_a_sampler_that_dies_after_its_last_order_is_no_failure(capsys):
    store, address = open_store("127.0.0.1", 0)
    engine = split_engine(address, store)

    def dies_when_told_to_stop() -> None:
        me, end = takes_the_adapter(address)
        assert end.next_order()["do"] == "stop" and read_notice(end.store, over_key(0), address.token)
        post_notice(end.store, f"{me.prefix}/lost", "sampler 0 was killed", address.token)

    life = threading.Thread(target=dies_when_told_to_stop)
    life.start()
    engine.queues[0].put(load_order())
    engine.close()
    life.join()
    assert "sampler 0 was killed, after its last order: nothing is lost" in capsys.readouterr().err


def test_a_sampler_that_begins_late_is_told_to_stop(monkeypatch):
    """One that was restarted loads its model after the trainers have made their last step, in its own time."""
    monkeypatch.setattr("rollout.split.JOIN_SECONDS", 0.1, raising=False)  # a limit that the wait had
    store, address = open_store("127.0.0.1", 0)
    engine, told = split_engine(address, store), []

    def begins_late() -> None:
        time.sleep(1)
        _, end = takes_the_adapter(address)
        told.append(end.next_order()["do"])
        end.answer()

    threads = [threading.Thread(target=work, daemon=True) for work in (begins_late, engine.close)]
    engine.queues[0].put(load_order())
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert told == ["stop"] and read_notice(store, over_key(0), address.token)


def test_a_sampler_that_is_refused_is_refused_for_all_ranks():
    store, address = open_store("127.0.0.1", 0)
    engine = split_engine(address, store)
    engine.queues[0].put(load_order())
    engine.ask(0, ["a"], [[1]], SAMPLING)
    post_notice(store, REFUSED, "sampler 0: --model m: vLLM does not start", address.token)  # before it said hello
    with pytest.raises(UserError, match="^sampler 0: --model m: vLLM does not start$"):
        engine.collect(0)
    engine.threads[0].join(timeout=60)
    assert not engine.threads[0].is_alive() and read_notice(store, "failure", address.token) is None


def test_groups_are_told_of_as_they_come(tmp_path):
    """Places 5, 1 and 3 of a rank that collects 1, 3 and 5: it does not wait for the first before it looks at the others."""
    store, address = open_store("127.0.0.1", 0)
    engine = split_engine(address, store, rank=1, size=2)
    engine.version, engine.hash = 0, "h"
    engine.ask(0, list("abcdef"), [[n] for n in range(6)], SAMPLING)
    told, other = [], store.clone()

    def put(place: int) -> None:
        sampled = {"version": 0, "hash": "h", "responses": [([place], [-0.5], "stop")]}
        put_signed(other, f"{rollouts_key(0, '', place)}/seconds", float(place), address.token)
        put_signed(other, rollouts_key(0, "", place), sampled, address.token)

    def tell(place: int, group: list[Rollout]) -> None:
        told.append((place, group[0].puzzle_id, group[0].response_ids))
        for after in {5: [1], 1: [3]}.get(group[0].response_ids[0], []):
            put(after)

    put(5)
    groups = engine.collect(0, finished=tell)
    assert told == [(2, "f", [5]), (0, "b", [1]), (1, "d", [3])]
    assert [group[0].puzzle_id for group in groups] == ["b", "d", "f"] and engine.seconds == 5.0


@pytest.mark.parametrize(("rank", "size", "team"), [(0, 1, 1), (1, 2, 1), (1, 2, 2), (2, 4, 2), (3, 4, 4)])
def test_a_rank_is_told_of_its_own_groups_by_their_places_among_them(rank, size, team):
    """With tensor parallelism it samples the prompts of all ranks of its sampler, whose groups are not its own."""

    class Backwards(Deaf):
        def generate(self, puzzle_ids, prompts, sampling, repeats=(), finished=None):
            groups = [[name] for name in puzzle_ids]
            for place in reversed(range(len(groups))):
                finished(place, groups[place])
            return groups

    engine, told, names = Backwards(rank, size, team), [], [f"p{n}" for n in range(8)]
    engine.ask(0, names, [[n] for n in range(8)], SAMPLING)
    groups = engine.collect(0, finished=lambda place, group: told.append((place, group)))
    assert groups == [[name] for name in names[rank::size]]
    assert told == list(reversed(list(enumerate(groups))))


class NeverDone:
    """A group whose broadcast does not end."""

    def broadcast(self, buffer, source):
        return SimpleNamespace(is_completed=lambda: False)


@pytest.mark.parametrize("waits", ["for hello", "in the broadcast", ""])
def test_a_rank_that_fails_leaves_no_thread_in_the_store(waits, monkeypatch):
    """C++ aborts a process that ends while a thread of it is in a call of the store."""
    store, address = open_store("127.0.0.1", 0)
    engine, world = split_engine(address, store), World(rank=0, size=1, device=torch.device("cpu"))
    world.at_failure.append(engine.abandon)
    if waits == "in the broadcast":
        put_signed(store, "e0/g0/hello/0", {"pid": 1}, address.token)
        monkeypatch.setattr("rollout.split.make_group", lambda *arguments: NeverDone())
    if waits:
        engine.queues[0].put(load_order())
    with pytest.raises(UserError, match="a reward failed"), guarded(world):
        while waits == "in the broadcast" and not store.check(["e0/g0/order/1/0"]):
            time.sleep(0.01)
        raise UserError("a reward failed")
    assert not engine.threads[0].is_alive()
    assert read_notice(store, "failure", address.token) is None, "its sampler is not the one to blame"
    assert read_notice(store, over_key(0), address.token) is None


def test_a_sampler_that_dies_between_hello_and_its_group_is_started_again(capsys, monkeypatch):
    """gloo then fails to connect; the keeper reports the death."""
    store, address = open_store("127.0.0.1", 0)
    engine, groups = split_engine(address, store), []

    def fails_once(*arguments):
        groups.append(arguments)
        if len(groups) == 1:
            post_notice(store, "e0/g0/lost", "sampler 0 was killed", address.token)
            raise RuntimeError("Connection closed by peer")
        return made(*arguments)

    made = split.make_group
    monkeypatch.setattr(split, "make_group", fails_once)
    put_signed(store, "e0/g0/hello/0", {"pid": 1}, address.token)
    second = threading.Thread(target=sampler_life, args=(address, 1))
    second.start()
    engine.queues[0].put(load_order())
    engine.close()
    second.join()
    assert "sampler 0 was killed; it is started again (attempt 2)" in capsys.readouterr().err


@pytest.mark.parametrize("idle", [True, False])
def test_a_restarted_sampler_leaves_nothing_in_the_store(idle, capsys):
    """Its order is repeated whole, also for prompts whose rollouts a rank has taken; the next adapter ends that step."""
    store, address = open_store("127.0.0.1", 0)
    engine = split_engine(address, store)
    loads = [load_order(version) for version in (0, 1)]
    dies = threading.Event()
    first = threading.Thread(target=sampler_life, args=(address, 0, idle, dies))
    first.start()
    engine.version, engine.hash = 0, "h"
    engine.queues[0].put(loads[0])
    engine.ask(0, ["a", "b"], [[1, 2], [3]], SAMPLING)
    second = threading.Thread(target=sampler_life, args=(address, 1))
    if idle:
        second.start()
    assert [group[0].puzzle_id for group in engine.collect(0)] == ["a", "b"]
    dies.set()
    first.join()
    if not idle:
        second.start()
    engine.queues[0].put(loads[1])
    engine.close()
    second.join()
    assert "sampler 0 was killed; it is started again (attempt 2)" in capsys.readouterr().err
    rollouts = [f"rollouts/0/{place}" + part for place in (0, 1) for part in ("", "/0", "/seconds", "/seconds/0")]
    orders = [f"e0/g0/order/{number}/0" + part for number in (1, 2) for part in ("", "/0")]
    assert [key for key in rollouts + orders if store.check([key])] == []
