"""Teachers on real vLLM: a server on loopback, and the engine in the command's own process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from data.distill.distill import Request
from data.distill.meter import Meter
from data.errors import RunError
from data.prompts import PROBE_RESPONSE
from data.puzzles import read_puzzles, read_rows
from rollout.teachers.openai import Endpoint, OpenAITeacher
from tests.helpers.commands import free_port, succeed
from tests.helpers.endpoints import here, puzzle, raw_rows, report
from trainer.model.loading import load_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow(10)]


@pytest.fixture(scope="module")
def checkpoint(pipeline, tmp_path_factory) -> Path:
    """The pipeline's random model. Every sixth token ends the turn: responses are short, and some are complete."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(pipeline / "base", folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    written = load_tokenizer(str(folder)).encode(PROBE_RESPONSE)  # an end within ordinary answers is refused
    settings["eos_token_id"] = [settings["eos_token_id"], *sorted(set(range(3, size, 6)) - set(written))]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def vllm_server(checkpoint, tmp_path_factory):
    """Base URL of a real vLLM server that serves the checkpoint as "tiny"."""
    port = free_port()
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    with open(log, "w") as handle:
        # the console script needs a distribution named vllm; the CPU build has another name
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                str(checkpoint),
                "--port",
                str(port),
                "--served-model-name",
                "tiny",
                "--host",
                "127.0.0.1",
                "--enforce-eager",
                "--dtype",
                "float32",
                "--max-model-len",
                "1024",
                # 16 requests of full length: none is cut in two. vLLM 0.32 sets the random generator of a cut request that
                # has a seed back by an offset, and generators of a CPU have none: the server ended now and then
                "--max-num-batched-tokens",
                "16384",
                "--disable-log-stats",
            ],
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=checkpoint,
            start_new_session=True,
        )
    # http_proxy may be set, and know no such place
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        # vLLM removes its shared memory (some 420 MB in /dev/shm) only where it ends by itself, so it must
        process.terminate()
        try:
            process.wait(timeout=600)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of its session
            process.wait()


ODD = "def fn(completion, puzzle):\n    return float(len(completion) % 2)\n"


def check_files(out: Path, puzzles: Path, model: str, plain: int) -> None:
    """Two runs of random responses, of which the reward accepts about half: files and numbers agree."""
    rows, found = raw_rows(out), report(out)
    assert len(rows) == found["traces_drawn"] == len({(r["puzzle_id"], r["attempt"]) for r in rows})
    assert {row["model"] for row in rows} == {model} and all(row["prompt_tokens"] > 50 for row in rows)
    assert all(
        (row["completion_tokens"] == 12) if row["finish_reason"] == "length" else row["completion_tokens"] <= 12
        for row in rows
    )
    assert found["tokens"]["completion"] == sum(row["completion_tokens"] for row in rows)
    kept = read_rows(out / "t.jsonl")
    assert 0 < len(kept) == found["puzzles_accepted"] < plain + 1
    texts = {(row["puzzle_id"], row["attempt"]): row["text"].strip() for row in rows}
    assert all(row["assistant_msg"] == texts[row["puzzle_id"], row["attempt"]] for row in kept)
    assert {row["user_msg"] for row in kept} <= {of.user_message for of in read_puzzles(puzzles)}


def test_a_real_vllm_server_is_a_teacher(vllm_server, pipeline, tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    puzzles = pipeline / "puzzles/train.parquet"
    given = (
        "--puzzles",
        puzzles,
        "--out",
        tmp_path / "t.jsonl",
        "--teacher",
        "openai",
        "--base-url",
        vllm_server,
        "--max-response-tokens",
        12,
        "--candidates",
        3,
        "--accept",
        f"{tmp_path}/odd.py:fn",
        "--model",
        "tiny",
    )
    here(*given, "--limit", 20, "--stop-at", 2, "--keep", "all", "--concurrency", 4)
    drawn = len(raw_rows(tmp_path))
    here(*given, "--limit", 30, "--resume")
    assert len(raw_rows(tmp_path)) > drawn
    check_files(tmp_path, puzzles, "tiny", 30)
    with pytest.raises(RunError, match="does not know the model.*large"):
        endpoint = Endpoint(model="large", base_url=vllm_server, key="none")
        list(OpenAITeacher(endpoint, Meter(), print, print).sample([Request(puzzle=puzzle(0), attempt=0)]))


def test_a_checkpoint_in_the_process_is_a_teacher(checkpoint, pipeline, tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    puzzles = pipeline / "puzzles/train.parquet"
    given = (
        "--puzzles",
        puzzles,
        "--out",
        tmp_path / "t.jsonl",
        "--teacher",
        "vllm",
        "--model",
        checkpoint,
        "--candidates",
        3,
        "--accept",
        f"{tmp_path}/odd.py:fn",
        "--limit",
        30,
    )
    refused = here(*given, "--max-response-tokens", 5000, exit_code=2)
    assert "--max-response-tokens 5000: with the longest prompt" in refused
    last = json.loads(succeed("distill", *given, "--max-response-tokens", 12).splitlines()[-1])
    assert last["puzzles"] == 30
    check_files(tmp_path, puzzles, str(checkpoint), 30)
