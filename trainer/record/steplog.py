"""Rank 0's record of a run, step by step: the streams of the run folder, the console, and the loggers of --log.

The run folder is the source of truth. A logger gets copies of its numbers through the library's own client; one that
fails is left out from then on, and never stops a run.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from netrc import netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from tqdm import tqdm

from data.files import append_rows, parse_json, remove_folder, write_whole
from trainer.config import OnlineConfig
from trainer.metrics import Clock
from trainer.objective import CLIPS

LEFT = (
    *("rollouts.jsonl", "timing.jsonl", "steps", "sampler_base", "reward_failure.json"),
    *("loggers.json", "tensorboard", "wandb", "mlflow.db", "metrics.jsonl"),
)
"""What a step leaves in OUT. metrics.jsonl last: while it is there, this is a run, and no other appends to its files."""
PROJECT = "cellpuzzles"
"""Project, or experiment, of a run in a logger, unless the library's own environment variable names another."""
NAMES = "loggers.json"
"""File of OUT with the names under which loggers know the run, so that --resume goes on in the same place."""


class StepLog:
    """Rank 0's record of a run: the three streams of the run folder, and a progress bar or plain lines."""

    def __init__(self, out: Path, cfg: OnlineConfig, first_step: int) -> None:
        self.out, self.cfg, self.notes = out, cfg, []
        self.began = 0.0
        """When the recording of the step before began, by time.perf_counter(); 0: there was none."""
        self.bar = tqdm(total=cfg.steps, initial=first_step, desc=cfg.algorithm, unit="step", disable=None)
        self.loggers = Loggers(out, cfg, first_step)

    def write(
        self, metrics: dict, rows: list[dict], clock: Clock, sampler_seconds: float, figures: dict[str, float]
    ) -> None:
        """Append the step to the run folder and show it. sampler_seconds: spent sampling; figures: of packing_figures."""
        seconds, step = clock.total(), metrics["step"]
        rate = metrics["num_tokens"] / seconds
        sampled = sum(len(row["response_ids"]) for row in rows)
        whole = metrics.get("dynamic_sampling/num_gen_batches", 1) == 1
        times = {
            "step": step,
            **clock.laps,
            # 'record', with a checkpoint where one was due, ends after this line is written: this is the step before's
            "timing_s/record": clock.start - self.began if self.began else 0.0,
            "timing_s/step": seconds,
            "tokens_per_second": rate,
            # not where rollouts came from a checkpoint, or those of groups that were replaced took time too
            **({"sampling/tokens_per_second": sampled / sampler_seconds} if sampler_seconds and whole else {}),
            "sampling/share": clock.laps["timing_s/sample"] / seconds,
            **figures,
        }
        self.began = clock.last
        for name, lines in (("metrics", [metrics]), ("rollouts", rows), ("timing", [times])):
            append_rows(self.out / f"{name}.jsonl", lines, seal=name == "rollouts")  # they are read again
        clock.world.step_made(step, self.cfg.steps, seconds)
        self.loggers.write(step, {**metrics, **times})
        reward = "none" if metrics["reward"] is None else f"{metrics['reward']:+.3f}"
        self.bar.set_postfix_str(f"reward {reward}, {rate:.0f} tok/s")
        self.bar.update()
        if self.bar.disable:  # not a terminal: plain lines
            print(
                f"step {step}/{self.cfg.steps}  reward {reward}  batch accuracy "
                f"{metrics.get('rewards/batch_accuracy', float('nan')):.3f}  kl {metrics['kl']:.4f}  "
                f"length {metrics['completions/mean_length']:.0f}  {rate:.0f} tok/s  "
                f"{(self.cfg.steps - step) * seconds / 60:.1f} min left",
                flush=True,
            )
        if "validation/batch_accuracy" in metrics:
            tqdm.write(
                f"  validation after step {step}: batch accuracy {metrics['validation/batch_accuracy']:.3f}, cell accuracy "
                f"{metrics['validation/cell_accuracy']:.3f}, valid format {metrics['validation/format_validity']:.3f}"
            )
        notes = explain_zeros(metrics, self.cfg)
        if notes != self.notes:  # said once, and again when it changes
            tqdm.write("\n".join(f"  note: {note}" for note in notes) or "  note: no zero to explain any more")
            self.notes = notes

    def close(self) -> None:
        self.bar.close()
        self.loggers.close()


def set_first_step_aside(out: Path, is_main: bool) -> Path:
    """Make the folder one in which no step was made, so that any settings may begin there (runfolder.has_steps).

    Returns the folder inside it to which rank 0 moves what the step has left, and a rounded copy of the model.
    """
    aside = out / "refused_step"
    if is_main:
        if os.path.lexists(aside):  # of an earlier try
            remove_folder(aside, must=True)
        aside.mkdir()
        for name in LEFT:  # and nothing else: OUT may hold the user's puzzles and models too
            if os.path.lexists(out / name):
                (out / name).rename(aside / name)
    return aside


def explain_zeros(metrics: dict, cfg: OnlineConfig) -> list[str]:
    """One note per zero in a line of metrics.jsonl: a healthy zero and a broken one look the same otherwise."""
    if metrics["groups/dropped_responses"] == 1:
        return ["loss 0: no response of the step was scored, so no optimizer step was made"]
    notes = []
    on_policy = cfg.updates_per_batch == 1
    if cfg.algorithm == "PPO":  # a critic compares there, not the group
        pass
    elif metrics["groups/mixed"] == 0:
        which = "groups all right or all wrong"
        if metrics.get("groups/all_equal"):
            which = "the rewards of each group are equal"
        elif metrics["groups/all_right"] == 1:
            which = "all groups right"
        elif metrics["groups/all_wrong"] == 1:
            which = "all groups wrong"
        notes.append(f"pg_loss 0: {which}, so every advantage is 0 and the surrogate has no gradient")
    elif metrics.get("sampling/dropped_tokens") == 1:
        notes.append(f"pg_loss 0: --correction {cfg.correction} dropped every token, so the surrogate has no gradient")
    elif on_policy and cfg.aggregation == "seq-mean-token-mean" and abs(metrics["pg_loss"]) < 1e-5:
        notes.append(
            # each response's mean loss is -A here. With token means long responses weigh more, and the sum is not 0
            "pg_loss 0: fresh samples, so every ratio is 1 and the advantages of a group cancel; the gradient does not"
        )
    if not any(metrics[f"clip_ratio/{name}_mean"] for name in CLIPS if name):
        reason = "no ratio went past the bound on its advantage's side"
        notes.append(f"no clip: {'one update per batch, so every ratio is exactly 1' if on_policy else reason}")
    if metrics["kl"] == 0:
        at_start = "the adapter starts at zero, so policy and reference are the same"
        if not cfg.lora_rank:
            at_start = "the policy is still its reference, since no step has changed a weight yet"
        notes.append(f"kl 0: {at_start if cfg.beta else 'beta is 0: no reference'}")
    return notes


class Loggers:
    """The loggers of --log. None of their failures reaches the run."""

    def __init__(self, out: Path, cfg: OnlineConfig, first_step: int) -> None:
        """first_step: steps that the run has made already."""
        self.out, self.open = out, {}
        self.of_run = names_of_run(out) if cfg.loggers else {}
        # a command for the end of the run may hold an address; the rest is what config.json has
        settings = {name: value for name, value in asdict(cfg).items() if name != "notify"}
        for name in cfg.loggers:
            with self.surviving(name):
                self.open[name] = LOGGERS[name](out, settings, first_step, self.of_run)

    @contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """A context in which whatever a logger raises is said once; it is then left out."""
        try:
            yield
        except (Exception, SystemExit) as error:  # of another project's client: no network, no key, a full disk, a bug
            self.open.pop(name, None)
            said = " ".join(str(error).split())[:300]
            tqdm.write(
                f"note: --log {name} failed and gets no more numbers of this run, which goes on "
                f"({type(error).__name__}: {said}); all are in {self.out}/metrics.jsonl"
            )

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Give every logger the numbers of a step (from 1); what is no number is left out."""
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float) and name != "step"}
        for name, (log, _) in list(self.open.items()):
            with self.surviving(name):
                log(step, numbers)

    def close(self) -> None:
        """Let every logger send or write what it still has."""
        for name, (_, close) in list(self.open.items()):
            with self.surviving(name):
                close()


Logger = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]
"""(takes the numbers of a step, ends)"""


def names_of_run(out: Path) -> dict[str, str]:
    """{logger: what it calls this run}, from OUT/loggers.json; new names where there is none."""
    path, found = out / NAMES, None
    if path.is_file():
        with suppress(ValueError):
            found = parse_json(path.read_bytes())
        if not isinstance(found, dict):
            print(f"note: {path} is damaged: the loggers get new names for this run", file=sys.stderr, flush=True)
    if not isinstance(found, dict):
        found = {"wandb": uuid4().hex[:12], "mlflow": uuid4().hex[:12]}
        write_whole(path, json.dumps(found) + "\n")
    return found


def open_tensorboard(out: Path, settings: dict[str, Any], first_step: int, names: dict[str, str]) -> Logger:
    """Event files in OUT/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)  # drops what runs again

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            board.add_scalar(name, value, step)

    return log, board.close


def open_wandb(out: Path, settings: dict[str, Any], first_step: int, names: dict[str, str]) -> Logger:
    """Weights & Biases. Without a key, and with WANDB_MODE=offline, the run is in OUT/wandb until `wandb sync`."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=str(out),
        id=names["wandb"],
        resume="allow",
        dir=str(out),
        config=settings,
        mode=None if has_wandb_account() else "offline",  # else it would ask on the terminal
        settings=wandb.Settings(console="off", silent=True),
    )
    return (lambda step, numbers: run.log(numbers, step=step)), run.finish


def has_wandb_account() -> bool:
    """Has the user said with what key, or in what mode, wandb is to run?"""
    if any(os.environ.get(f"WANDB_{name}") for name in ("MODE", "API_KEY", "IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()  # where `wandb login` writes the key
    return path.is_file() and netrc(path).authenticators(str(host)) is not None


def open_trackio(out: Path, settings: dict[str, Any], first_step: int, names: dict[str, str]) -> Logger:
    """Trackio: a local database (TRACKIO_DIR), which `trackio show` draws."""
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=str(out),
        resume="allow" if first_step else "never",
        config=settings,
        embed=False,
    )
    return (lambda step, numbers: run.log(numbers, step=step)), run.finish


def open_mlflow(out: Path, settings: dict[str, Any], first_step: int, names: dict[str, str]) -> Logger:
    """MLflow: at MLFLOW_TRACKING_URI, or in the database OUT/mlflow.db."""
    # its client tries for minutes by default, and the run would wait
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve() / 'mlflow.db'}"
    client, experiment = MlflowClient(where), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    known = client.get_experiment_by_name(experiment)
    number = known.experiment_id if known else client.create_experiment(experiment)
    mine = client.search_runs([number], f"tags.cellpuzzles = '{names['mlflow']}'")
    run = mine[0] if mine else client.create_run(number, run_name=str(out), tags={"cellpuzzles": names["mlflow"]})
    name = run.info.run_id
    if not mine:
        client.log_batch(name, params=[Param(key, str(value)) for key, value in settings.items()])
    client.update_run(name, status="RUNNING")

    def log(step: int, numbers: dict[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(name, [Metric(key, value, now, step) for key, value in numbers.items()])

    return log, lambda: client.set_terminated(name)


LOGGERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "trackio": open_trackio,
    "mlflow": open_mlflow,
}
