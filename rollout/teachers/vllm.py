"""A Teacher (data/distill/distill.py) that is a checkpoint, sampled by a vLLM engine in this process."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from data.distill.distill import Completion, Request
from data.distill.meter import Meter
from data.prompts import ChatFormat
from rollout import LocalEngine, Rollout, Sampling, stable_seed


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
        self.holding: dict[str, list[int]] = {}
        """{character: the tokens whose text holds it}"""

    def sample(self, requests: list[Request]) -> Iterator[Completion]:
        """See Teacher."""
        for stop in dict.fromkeys(request.stop for request in requests):  # requests of one kind are sampled together
            yield from self._sample([request for request in requests if request.stop == stop], stop)

    def _sample(self, requests: list[Request], stop: str) -> Iterator[Completion]:
        for start in range(0, len(requests), self.batch):
            if self.ended:
                return
            some = requests[start : start + self.batch]
            ids = [self.chat.prompt_ids(request.chat()) for request in some]
            # a seed for each batch: the same seed would draw the same random numbers for every batch
            seeded = replace(self.sampling, seed=stable_seed(self.sampling.seed, [request.key for request in some]))
            try:
                self.sampling_now = True  # from here on a signal raises _StoppedError; a signal before is seen below
                if self.ended:
                    return
                groups = self._generate([request.puzzle.id for request in some], ids, seeded, stop)
            except _StoppedError:
                return
            finally:
                self.sampling_now = False
            for request, rollout in zip(some, groups, strict=True):
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

    def _generate(self, names: list[str], prompts: list[list[int]], sampling: Sampling, stop: str) -> list[Rollout]:
        """A response to each prompt, which ends after the text `stop` where it occurs ("": nowhere).

        The engine knows tokens and no text. So it stops at every token that may complete the text, and goes on where it
        was another one. The last token may hold text beyond it.
        """
        if not stop:
            return [rollout for (rollout,) in self.engine.generate(names, prompts, sampling)]
        maybe = tuple(sorted({*sampling.stop_ids, *self.tokens_with(stop[-1])}))
        found: dict[int, Rollout] = {}
        going = list(range(len(prompts)))
        while going:
            said = {i: found[i].response_ids if i in found else [] for i in going}
            # one length for all: the shortest rest, so that no response can grow beyond max_tokens
            rest = min(sampling.max_tokens - len(said[i]) for i in going)
            seed = stable_seed(sampling.seed, *map(len, said.values())) if any(said.values()) else sampling.seed
            parts = self.engine.generate(
                [names[i] for i in going],
                [prompts[i] + said[i] for i in going],
                replace(sampling, stop_ids=maybe, max_tokens=rest, seed=seed),
            )
            for i, (part,) in zip(going, parts, strict=True):
                ids = said[i] + part.response_ids
                ended = ids[-1] in sampling.stop_ids or stop in self.chat.response_text(ids)
                # the model's own limit can come before max_tokens
                full = len(ids) >= sampling.max_tokens or (
                    part.finish_reason == "length" and len(part.response_ids) < rest
                )
                found[i] = replace(
                    part,
                    prompt_ids=prompts[i],
                    response_ids=ids,
                    sampler_logprobs=[*(found[i].sampler_logprobs if i in found else []), *part.sampler_logprobs],
                    finish_reason="stop" if ended else "length" if full else "",
                )
            going = [i for i in going if not found[i].finish_reason]
        return [found[i] for i in range(len(prompts))]

    def tokens_with(self, character: str) -> list[int]:
        """The tokens whose text holds the character, of those that the model has (Gemma 3's image token is none)."""
        if character not in self.holding:
            tokenizer = self.chat.tokenizer
            tokens = [token for token in tokenizer.get_vocab().values() if token < self.chat.vocabulary]
            self.holding[character] = [token for token in tokens if character in tokenizer.decode([token])]
        return self.holding[character]

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
