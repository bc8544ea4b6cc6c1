"""The term of --distill-failures by hand and against a plain loop, its estimator, and who teaches whom."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from data.errors import UserError
from data.prompts import showing_an_answer
from data.puzzles import Puzzle
from rollout import Rollout
from trainer.config import GrpoConfig
from trainer.objective import LossTerms, aggregation_weights, grpo_terms
from trainer.packing import ScoredGroup
from trainer.policy import Prompt
from trainer.prompts.failures import lessons_of, untaught, weight_of, with_distillation, with_lesson

F64 = torch.float64
NAN = float("nan")


def t64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


def terms_of(logprobs: torch.Tensor, advantages: list[float], mask: torch.Tensor, beta: float = 0.1) -> LossTerms:
    weight = aggregation_weights(mask, "token-mean", int(mask.any(-1).sum()), int(mask.sum()), dtype=F64)
    return grpo_terms(
        logprobs=logprobs,
        old_logprobs=None,
        ref_logprobs=torch.zeros_like(logprobs) - 1.5,
        sampler_logprobs=logprobs.detach(),
        mask=mask,
        advantages=torch.tensor(advantages, dtype=F64),
        weight=weight,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        beta=beta,
        kl_kind="k3",
        ratio_level="token",
        correction="none",
        correction_cap=2.0,
    )


def micro_of(logprobs: torch.Tensor | None, weight: torch.Tensor | None) -> SimpleNamespace:
    return SimpleNamespace(teacher_logprobs=logprobs, teacher_weight=weight)


# ---- the term


def test_the_term_by_hand_and_only_where_there_is_a_teacher():
    """Row 0 is right, row 1 wrong: two tokens, of which the second is not trained and holds garbage."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = t64([-1.0, -2.0], [-0.5, NAN]).requires_grad_()
    teacher, weight = t64([NAN, NAN], [-3.5, NAN]), t64([0.0, 0.0], [0.25, 0.25])
    plain = terms_of(logprobs, [1.0, -1.0], mask)
    terms = with_distillation(plain, micro_of(teacher, weight))
    assert terms.distillation.tolist() == [[0.0, 0.0], [pytest.approx(0.25 * 3.0**2 / 2), 0.0]]
    assert torch.equal(terms.contribution[0], plain.contribution[0]), "a right response keeps GRPO's loss"
    assert (terms.loss - plain.loss).item() == pytest.approx(0.25 * 4.5 / 3, abs=1e-12)  # three trained tokens
    (gradient,) = torch.autograd.grad(terms.loss - plain.loss, logprobs, retain_graph=True)
    # the teacher finds the token far less likely: descent makes it less likely
    torch.testing.assert_close(gradient, t64([0.0, 0.0], [0.25 * (-0.5 + 3.5) / 3, 0.0]))


def test_without_a_teacher_the_terms_are_the_very_same():
    terms = terms_of(t64([-1.0]), [1.0], torch.tensor([[True]]))
    assert with_distillation(terms, micro_of(None, None)) is terms and terms.distillation is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_a_plain_loop(seed):
    """Eq. (1) at ratio 1 with k3, and the term, written out for each token; value and gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = 5, 7
    logprobs = -3 * torch.rand(rows, tokens, generator=generator, dtype=F64)
    teacher = -3 * torch.rand(rows, tokens, generator=generator, dtype=F64)
    lengths, wrong, advantages = [7, 3, 1, 5, 6], [1, 2, 4], [0.9, -0.7, -0.7, 1.2, -0.4]
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    weight = torch.zeros(rows, tokens, dtype=F64)
    weight[wrong] = 0.3
    logprobs.requires_grad_()
    terms = with_distillation(terms_of(logprobs, advantages, mask), micro_of(teacher, weight))
    terms.loss.backward()
    loss, gradient = 0.0, torch.zeros(rows, tokens, dtype=F64)
    for row in range(rows):
        for t in range(lengths[row]):
            new, to_ref = logprobs[row, t].item(), -1.5 - logprobs[row, t].item()
            of_token = -advantages[row] + 0.1 * (math.exp(to_ref) - to_ref - 1)
            slope = -advantages[row] + 0.1 * (1 - math.exp(to_ref))
            if row in wrong:
                of_token += 0.3 * 0.5 * (new - teacher[row, t].item()) ** 2
                slope += 0.3 * (new - teacher[row, t].item())
            loss += of_token / sum(lengths)
            gradient[row, t] = slope / sum(lengths)
    assert terms.loss.item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=0, atol=1e-12)
    assert terms.contribution.sum().item() == pytest.approx(loss, abs=1e-12)


def test_on_the_policys_own_samples_its_gradient_is_that_of_the_reverse_kl():
    """The mean over all tokens of a vocabulary, each as often as the policy samples it; the teacher has no gradient."""
    logits = t64(0.3, -1.0, 2.0, 0.1).requires_grad_()
    teacher = t64(1.5, 0.2, -0.7, 0.0).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits, retain_graph=True)
    mean = torch.zeros_like(exact)
    for token in range(4):
        new = logprobs[token].reshape(1, 1)
        plain = terms_of(new, [0.0], torch.tensor([[True]]), beta=0.0)
        terms = with_distillation(plain, micro_of(teacher[token].reshape(1, 1), torch.ones_like(new)))
        (gradient,) = torch.autograd.grad(terms.loss, logits, retain_graph=True)
        mean += logprobs[token].exp().item() * gradient
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-12)
    assert exact.abs().max() > 0.1


# ---- who teaches whom


class Letters:
    """A chat format with a token per letter."""

    def prompt_ids(self, chat: list[dict]) -> list[int]:
        return list(map(ord, "\n".join(turn["content"] for turn in chat)))


def puzzle(name: str = "p") -> Puzzle:
    return Puzzle(id=name, context="", cells=[["A"], ["B"]], candidates=["x", "y"], answer=["x", "y"])


def group(*right: int | None, lengths: list[int] | None = None, parts: bool = True, prompt: int = 1) -> ScoredGroup:
    """right: 1, 0, or None where a response was not scored."""
    lengths = lengths or [2] * len(right)
    rollouts = [
        Rollout(
            puzzle_id="p",
            prompt_ids=[prompt],
            response_ids=[5] * length,
            sampler_logprobs=[-1.0] * length,
            finish_reason="stop",
            adapter_version=0,
            adapter_hash="",
        )
        for length in lengths
    ]
    rows = [
        {
            "response": i,
            "completion": f"<answer>number {i}</answer>\n",
            "reward": None if r is None else float(r),
            "parts": {"batch_accuracy": float(r or 0)} if parts else {},
        }
        for i, r in enumerate(right, start=1)
    ]
    zeros = torch.zeros(len(right))
    return ScoredGroup(rollouts=rollouts, rows=rows, advantages=zeros, trained=zeros.bool())


def lessons(*groups: ScoredGroup, **settings):
    cfg = GrpoConfig(distill_failures=0.1, **{"max_prompt_tokens": 2000, "max_response_tokens": 1000, **settings})
    return lessons_of(list(groups), [Prompt(puzzle=puzzle(), ids=[1])], Letters(), cfg)


def test_the_first_right_response_teaches_all_wrong_ones_of_its_group():
    found, too_long = lessons(group(0, 0), group(0, 1, None, 1, 0), group(1, 1), group(None, 1))
    (lesson,) = found
    assert (lesson.group, lesson.sibling, lesson.wrong, too_long) == (1, 1, [0, 4], 0)
    shown = "".join(map(chr, lesson.prompt_ids))
    asked = "\n".join(turn["content"] for turn in puzzle().chat())
    assert shown == (
        asked + "\n\nA correct answer to this puzzle is:\n<answer>number 2</answer>\n\nNow answer the puzzle yourself."
    )


def test_puzzles_of_two_builds_may_share_an_id():
    cfg = GrpoConfig(distill_failures=0.1, max_prompt_tokens=2000, max_response_tokens=1000)
    other = dataclasses.replace(puzzle(), cells=[["C"], ["D"]])
    prompts = [Prompt(puzzle=puzzle(), ids=[1]), Prompt(puzzle=other, ids=[2])]
    found, _ = lessons_of([group(1, 0, prompt=1), group(1, 0, prompt=2)], prompts, Letters(), cfg)
    for lesson, own in zip(found, (puzzle(), other), strict=True):
        assert "".join(map(chr, lesson.prompt_ids)).startswith("\n".join(turn["content"] for turn in own.chat()))


def test_only_the_prompts_of_the_step_are_looked_at():
    read = []

    class Ids(list):
        def __iter__(self):
            read.append(self[0])
            return super().__iter__()

    others = [Prompt(puzzle=dataclasses.replace(puzzle(), id=f"other-{i}"), ids=Ids([i])) for i in range(10, 100)]
    cfg = GrpoConfig(distill_failures=0.1, max_prompt_tokens=2000, max_response_tokens=1000)
    found, _ = lessons_of([group(1, 0, prompt=1)], [*others, Prompt(puzzle=puzzle(), ids=Ids([1]))], Letters(), cfg)
    assert len(found) == 1 and read == [1]


def test_what_would_be_too_long_is_left_without_a_lesson_and_counted():
    prompt = len(Letters().prompt_ids(showing_an_answer(puzzle().chat(), "<answer>number 1</answer>")))
    taught = group(1, 0, 0, lengths=[1, 10, 11])
    (lesson,), too_long = lessons(taught, max_prompt_tokens=prompt - 90, max_response_tokens=100)
    assert lesson.wrong == [1] and too_long == 1  # prompt + 10 tokens are all that fits
    assert lessons(taught, max_prompt_tokens=prompt - 100, max_response_tokens=100) == ([], 2)


def test_a_reward_that_does_not_say_what_is_right_is_refused():
    with pytest.raises(UserError, match="does not say which responses are right.*a part 'batch_accuracy'"):
        lessons(group(1, 0, parts=False))


def test_numbers_of_the_teacher_stand_at_their_responses():
    found, _ = lessons(group(0, 1, 0, lengths=[1, 2, 3]))
    first = group(0, 1, 0, lengths=[1, 2, 3])
    answers = [t64(-0.5)[:1], t64(-1.0, -2.0, -3.0)]
    taught = with_lesson(ScoredGroup(**{**vars(first), "tokens": untaught(first)}), found[0], answers, weight=0.5)
    assert [x.tolist() for x in taught.tokens["teacher_logprobs"]] == [[-0.5], [0.0, 0.0], [-1.0, -2.0, -3.0]]
    assert [x.tolist() for x in taught.tokens["teacher_weight"]] == [[0.5], [0.0, 0.0], [0.5, 0.5, 0.5]]
    assert [row.get("taught_by") for row in taught.rows] == [2, None, 2]


def test_settings():
    linear = GrpoConfig(distill_failures=0.4, distill_schedule="linear", steps=8)
    assert [weight_of(linear, step) for step in (0, 4, 7)] == pytest.approx([0.4, 0.2, 0.05])
    assert weight_of(GrpoConfig(distill_failures=0.4, steps=8), 7) == 0.4
    with pytest.raises(UserError, match="--distill-failures -0.1: must be at least 0"):
        GrpoConfig(distill_failures=-0.1)
    with pytest.raises(UserError, match="--distill-schedule linear: of what weight"):
        GrpoConfig(distill_schedule="linear")
