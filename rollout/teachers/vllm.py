"""A Teacher (data/distill/distill.py) that is a checkpoint, sampled by a vLLM engine in this process."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from data.distill.distill import Completion, Request
from data.distill.meter import Meter
from data.prompts import ChatFormat
from rollout import LocalEngine, Sampling, stable_seed


class VLLMTeacher:
    """A checkpoint in an engine in this process. `batch` requests are sampled together.

    A response depends on the other requests of its batch,
    so a run that was stopped and resumed draws other responses than an uninterrupted one.
    """

    def __init__(
        self,
        engine: LocalEngine,
        chat: ChatFormat,
        sampling: Sampling,
        batch: int,
        model: str,
        meter: Meter,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        """sampling: with the run's seed. model: name for the raw file. leave() is called when the engine is closed."""
        self.engine, self.chat, self.sampling = engine, chat, sampling
        self.batch, self.model, self.meter, self.leave = batch, model, meter, leave
        self.ended, self.sampling_now = "", False

    def sample(self, requests: list[Request]) -> Iterator[Completion]:
        """See Teacher."""
        for start in range(0, len(requests), self.batch):
            some = requests[start : start + self.batch]
            ids = [self.chat.prompt_ids(request.chat()) for request in some]
            # a seed for each batch: the same seed would draw the same random numbers for every batch
            seeded = replace(self.sampling, seed=stable_seed(self.sampling.seed, [request.key for request in some]))
            try:
                self.sampling_now = True  # from here on a signal raises _StoppedError; a signal before is seen below
                if self.ended:
                    return
                groups = self.engine.generate([request.puzzle.id for request in some], ids, seeded)
            except _StoppedError:
                return
            finally:
                self.sampling_now = False
            for request, (rollout,) in zip(some, groups, strict=True):
                self.meter.count(len(rollout.prompt_ids), len(rollout.response_ids), 0.0)
                yield Completion(
                    puzzle_id=request.puzzle.id,
                    attempt=request.attempt,
                    hinted=request.hinted,
                    text=self.chat.response_text(rollout.response_ids),
                    finish_reason=rollout.finish_reason,
                    model=self.model,
                    prompt_tokens=len(rollout.prompt_ids),
                    completion_tokens=len(rollout.response_ids),
                )

    def stop(self) -> None:
        """See Teacher. The current batch is given up: it costs only time."""
        self.ended = self.ended or "stopped"
        if self.sampling_now:
            raise _StoppedError

    def close(self) -> None:
        """See Teacher."""
        self.engine.close()
        self.leave()


class _StoppedError(BaseException):
    """Raised in a signal handler. A BaseException, so that vLLM does not catch it."""
