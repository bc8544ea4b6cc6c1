"""Mutation check: change each sign and each bound of the objective once. A test must fail every time.

    python -m tests.bench.mutants          # about 4 minutes; exit code 1 if a mutant survives

Each mutant is one replacement in a copy of the repository, and the files of TESTS run against it. A mutant that survives
(all tests pass) shows that a test is missing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = (
    *("tests/trainer/test_objective.py", "tests/trainer/test_parity.py", "tests/trainer/ppo/test_terms.py"),
    *("tests/trainer/prompts/test_distillation.py", "tests/trainer/test_metrics.py"),
)
OBJECTIVE, ADVANTAGES = "trainer/objective.py", "trainer/advantages.py"
METRICS = "trainer/metrics.py"
PPO, CRITIC = "trainer/ppo/ppo.py", "trainer/ppo/critic.py"
FAILURES = "trainer/prompts/failures.py"
SHARE = "self.surrogate * self.correction + self.beta * self.kl"
MUTANTS = [
    # (file, original text, text of the mutant)
    (OBJECTIVE, "torch.where(mask, logprobs - old_logprobs,", "torch.where(mask, old_logprobs - logprobs,"),
    (OBJECTIVE, "log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()", "log_ratio.exp()"),
    (OBJECTIVE, "(own - own.detach() + mean)", "(own - own.detach() - mean)"),
    (OBJECTIVE, "(own - own.detach() + mean)", "(own.detach() - own + mean)"),
    (OBJECTIVE, ".clamp(max=10.0).exp()", ".clamp(max=0.01).exp()"),
    (OBJECTIVE, ".clamp(max=10.0).exp()", ".exp()"),
    (ADVANTAGES, "torch.where(lowest == highest, torch.zeros_like(rewards), rewards - mean)", "rewards - mean"),
    (OBJECTIVE, "(ratio < 1 - clip_low) & (advantages < 0)", "(ratio <= 1 - clip_low) & (advantages < 0)"),
    (OBJECTIVE, "(ratio > 1 + clip_high) & (advantages > 0)", "(ratio >= 1 + clip_high) & (advantages > 0)"),
    (OBJECTIVE, "(ratio > dual_clip) & (advantages < 0)", "(ratio >= dual_clip) & (advantages < 0)"),
    (METRICS, "(difference.exp() - difference - 1)", "((-difference).exp() + difference - 1)"),
    (METRICS, '"mismatch_max": difference.abs().max()', '"mismatch_max": difference.max()'),
    (METRICS, "(terms.mask & (terms.clip == code))", "(terms.mask & (terms.clip != 0))"),
    (METRICS, "(terms.mask & (terms.clip == code))", "(terms.clip == code)"),
    (METRICS, "(terms.mask & (terms.correction == 0))", "(terms.mask & (terms.correction != 0))"),
    (METRICS, 'totals["kl"] / tokens', 'totals["kl"]'),
    (METRICS, 'totals["loss"] / cfg.updates_per_batch', 'totals["loss"]'),
    (METRICS, 'totals["pg_loss"] / cfg.updates_per_batch', 'totals["pg_loss"]'),
    (METRICS, 'max(totals["is_weight_squared"], 1e-30) / tokens', 'max(totals["is_weight_squared"], 1e-30)'),
    (METRICS, "for row in rows) // cfg.group_size", "for row in rows)"),
    (METRICS, 'row["finish_reason"] == "length"', 'row["finish_reason"] != "length"'),
    (METRICS, "dtype=torch.float64).std().item()", "dtype=torch.float64).std(correction=0).item()"),
    (METRICS, "self.mismatch_max = max(self.mismatch_max, found", "self.mismatch_max = max(0.0, found"),
    (OBJECTIVE, "unclipped = -ratio * advantages", "unclipped = ratio * advantages"),
    (
        OBJECTIVE,
        "clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages",
        "clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages",
    ),
    (OBJECTIVE, "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 + clip_low, 1 + clip_high)"),
    (OBJECTIVE, "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_low, 1 - clip_high)"),
    (OBJECTIVE, "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)"),
    (OBJECTIVE, "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(max=1 + clip_high)"),
    (OBJECTIVE, "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(min=1 - clip_low)"),
    (OBJECTIVE, "loss = torch.maximum(unclipped, clipped)", "loss = torch.minimum(unclipped, clipped)"),
    (OBJECTIVE, "torch.where(advantages < 0, torch.minimum(loss,", "torch.where(advantages > 0, torch.minimum(loss,"),
    (OBJECTIVE, "torch.minimum(loss, -dual_clip * advantages)", "torch.minimum(loss, dual_clip * advantages)"),
    (OBJECTIVE, "torch.minimum(loss, -dual_clip * advantages)", "torch.maximum(loss, -dual_clip * advantages)"),
    (OBJECTIVE, "return -ratio.detach().clamp(1 - clip_low", "return ratio.detach().clamp(1 - clip_low"),
    (OBJECTIVE, "-ratio.detach().clamp(1 - clip_low, 1 + clip_high)", "-ratio.clamp(1 - clip_low, 1 + clip_high)"),
    (OBJECTIVE, "-ratio.detach().clamp(1 - clip_low, 1 + clip_high)", "-ratio.detach().clamp(max=1 + clip_high)"),
    (OBJECTIVE, "-ratio.detach().clamp(1 - clip_low, 1 + clip_high)", "-ratio.detach().clamp(min=1 - clip_low)"),
    (OBJECTIVE, "side = (ratio.detach() - 1).sign()", "side = (1 - ratio.detach()).sign()"),
    (ADVANTAGES, "(longest - buffer - length) / buffer", "(longest - length) / buffer"),
    (ADVANTAGES, "min(0.0, (longest", "max(0.0, (longest"),
    (OBJECTIVE, "(ratio < 1 - clip_low) & (advantages < 0)", "(ratio < 1 - clip_low) & (advantages > 0)"),
    (OBJECTIVE, "(ratio < 1 - clip_low) & (advantages < 0)", "(ratio > 1 - clip_low) & (advantages < 0)"),
    (OBJECTIVE, "(ratio > 1 + clip_high) & (advantages > 0)", "(ratio > 1 + clip_high) & (advantages < 0)"),
    (OBJECTIVE, "(ratio > 1 + clip_high) & (advantages > 0)", "(ratio > 1 - clip_high) & (advantages > 0)"),
    (OBJECTIVE, "(ratio > dual_clip) & (advantages < 0)", "(ratio > dual_clip) & (advantages > 0)"),
    (OBJECTIVE, "log_ratio = ref_logprobs - logprobs\n", "log_ratio = logprobs - ref_logprobs\n"),
    (OBJECTIVE, "return -log_ratio\n", "return log_ratio\n"),
    (OBJECTIVE, "return 0.5 * log_ratio.square()", "return -0.5 * log_ratio.square()"),
    (
        OBJECTIVE,
        'if kind == "k3":\n        return log_ratio.exp() - log_ratio - 1',
        'if kind == "k3":\n        return log_ratio.exp() + log_ratio - 1',
    ),
    (OBJECTIVE, "(log_ratio.exp() - log_ratio - 1).clamp", "(log_ratio.exp() - log_ratio + 1).clamp"),
    (OBJECTIVE, ".clamp(-10.0, 10.0)", ""),
    (OBJECTIVE, "(log_ratio.exp() - log_ratio - 1).clamp", "(log_ratio.exp() + log_ratio - 1).clamp"),
    (OBJECTIVE, "log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)", "pass"),
    (OBJECTIVE, "log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()", "log_weight.exp()"),
    (OBJECTIVE, "(ratio < 1 - clip_low) & (advantages < 0)", "(ratio < 1 + clip_low) & (advantages < 0)"),
    (ADVANTAGES, "rewards[:, t] + gamma * next_value", "rewards[:, t] - gamma * next_value"),
    (
        OBJECTIVE,
        "log_weight = torch.where(mask, old_logprobs - sampler_logprobs,",
        "log_weight = torch.where(mask, sampler_logprobs - old_logprobs,",
    ),
    (OBJECTIVE, "weight = weight.clamp(max=cap)", "weight = weight.clamp(min=cap)"),
    (OBJECTIVE, "(weight >= floor) & (weight <= cap)", "(weight >= floor)"),
    (OBJECTIVE, "(weight >= floor) & (weight <= cap)", "(weight <= cap)"),
    (OBJECTIVE, "log_weight.sum(-1, keepdim=True)", "log_weight.mean(-1, keepdim=True)"),
    (OBJECTIVE, "return weights / max(n_tokens, 1)", "return weights / max(n_rows, 1)"),
    (OBJECTIVE, "weights / mask.sum(-1, keepdim=True).clamp(min=1) / max(n_rows, 1)", "weights / max(n_rows, 1)"),
    (OBJECTIVE, "(mask.shape[-1] if norm is None else norm)", "mask.shape[-1]"),
    (OBJECTIVE, "int(mask.any(-1).sum()), int(mask.sum())", "len(mask), int(mask.sum())"),
    (OBJECTIVE, "return 0.5 * torch.maximum((values", "return 0.5 * torch.minimum((values"),
    (
        OBJECTIVE,
        "torch.maximum(values, old_values - clip), old_values + clip",
        "torch.maximum(values, old_values + clip), old_values + clip",
    ),
    (
        OBJECTIVE,
        "torch.maximum(values, old_values - clip), old_values + clip",
        "torch.maximum(values, old_values - clip), old_values - clip",
    ),
    (OBJECTIVE, "return 0.5 * torch.maximum((values", "return torch.maximum((values"),
    (OBJECTIVE, SHARE, "self.surrogate * self.correction - self.beta * self.kl"),
    (OBJECTIVE, SHARE, "self.surrogate + self.beta * self.kl"),
    (OBJECTIVE, SHARE, "(self.surrogate + self.beta * self.kl) * self.correction"),
    (OBJECTIVE, "else of_token + self.distillation", "else of_token - self.distillation"),
    (OBJECTIVE, "else of_token + self.distillation", "else of_token"),
    (FAILURES, 'terms.logprobs, teacher, "k2")', 'terms.logprobs, teacher, "k1")'),
    (FAILURES, 'terms.logprobs, teacher, "k2")', 'terms.logprobs, teacher, "k3")'),
    (FAILURES, 'terms.logprobs, teacher, "k2")', 'terms.logprobs.detach(), teacher, "k2")'),
    (FAILURES, "distillation=weight * kl_estimate", "distillation=kl_estimate"),
    (FAILURES, "taught = terms.mask & (micro", "taught = (micro"),
    (FAILURES, "taught = terms.mask & (micro.teacher_weight > 0)", "taught = terms.mask"),
    (FAILURES, "torch.where(taught, micro.teacher_logprobs, terms.logprobs.detach())", "micro.teacher_logprobs"),
    (FAILURES, "left = 1 - step / cfg.steps", "left = 1 - (step + 1) / cfg.steps"),
    (FAILURES, 'return row["parts"][PART] == 1', 'return row["parts"][PART] != 1'),
    (FAILURES, "if not right or not wrong:", "if not wrong:"),
    (FAILURES, 'if row["reward"] is not None]', "]"),
    (FAILURES, "group.rows[right[0]]", "group.rows[right[-1]]"),
    (FAILURES, "<= room]", "< room]"),
    (FAILURES, "cfg.max_prompt_tokens + cfg.max_response_tokens - len(shown)", "cfg.max_prompt_tokens - len(shown)"),
    (FAILURES, "weights[i] = own, torch.full_like(own, weight)", "weights[i] = own, torch.ones_like(own)"),
    (OBJECTIVE, "old = logprobs.detach() if old_logprobs is None", "old = logprobs if old_logprobs is None"),
    (ADVANTAGES, "rewards - mean)", "mean - rewards)"),
    (ADVANTAGES, "torch.where(lowest == highest,", "torch.where(lowest != highest,"),
    (ADVANTAGES, "others = (size - 1).clamp(min=1)", "others = size"),
    (ADVANTAGES, "centred * size / others", "centred"),
    (ADVANTAGES, "(variance.sqrt() + eps)", "(variance.sqrt() + 100 * eps)"),
    (ADVANTAGES, "gamma * next_value - values[:, t]", "gamma * next_value + values[:, t]"),
    (ADVANTAGES, "delta + gamma * lam * running", "delta - gamma * lam * running"),
    (ADVANTAGES, "advantages_NT + values, zero", "advantages_NT - values, zero"),
    (ADVANTAGES, "unbiased=True", "unbiased=False"),
    (ADVANTAGES, "scaled = (x - kept.mean())", "scaled = (x + kept.mean())"),
    (PPO, 'padded["old_logprobs"] - padded["ref_logprobs"]', 'padded["ref_logprobs"] - padded["old_logprobs"]'),
    (PPO, "zero) - torch.where(mask, beta * kl, zero)", "zero) + torch.where(mask, beta * kl, zero)"),
    (PPO, "torch.where(mask, beta * kl, zero)", "beta * kl"),
    (PPO, "place == mask.sum(1, keepdim=True) - 1", "place == mask.sum(1, keepdim=True)"),
    (PPO, "torch.where(last, scores[:, None], zero)", "torch.where(mask, scores[:, None], zero)"),
    (PPO, "lengths[:, None]) & trained[:, None]", "lengths[:, None])"),
    (PPO, "advantages = whiten(advantages, mask)", "pass"),
    (PPO, "left = (returns - values)[mask]", "left = (returns + values)[mask]"),
    (PPO, "gae(rewards, values, mask, cfg.gamma, cfg.lam)", "gae(rewards, values, mask, cfg.lam, cfg.gamma)"),
    (PPO, "gae(rewards, values, mask, cfg.gamma, cfg.lam)", "gae(rewards, values, mask, cfg.gamma, 1.0)"),
    (PPO, "range(cfg.epochs)", "range(1)"),
    (PPO, '"minibatches", step, epoch', '"minibatches", step'),
    (CRITIC, "kl / self.target - 1", "1 - kl / self.target"),
    (CRITIC, "-0.2), 0.2)", "-0.2), 0.5)"),
    (CRITIC, "-0.2), 0.2)", "-0.5), 0.2)"),
    (CRITIC, "1 + error * responses / self.horizon", "1 + error / self.horizon"),
    (CRITIC, "return self.weight * self.error", "return self.error"),
    (CRITIC, "(error > 0.5 *", "(error < 0.5 *"),
    (CRITIC, "torch.where(mask, x, zero) for x", "x for x"),
    (CRITIC, 'mask, "token-mean", denominators', 'mask, "seq-mean-token-mean", denominators'),
]


def main() -> int:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for room in ("data", "reward", "rollout", "trainer", "launch", "tests"):
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.cfg", copy / "setup.cfg")
        assert (found := run_tests(copy)) == "all pass", f"without a mutant: {found}"
        for file, there, mutated in MUTANTS:
            original = (ROOT / file).read_text()
            assert original.count(there) == 1, f"{file}: {original.count(there)} times {there!r}"
            (copy / file).write_text(original.replace(there, mutated))
            failed = run_tests(copy)
            (copy / file).write_text(original)
            assert not failed.startswith("broken"), f"{file}: {there!r} -> {mutated!r}: {failed}"  # no test has looked
            survivors += failed == "all pass"
            change = f"{there.strip()} -> {mutated.strip() or '(nothing)'}".replace("\n", " ")
            print(f"{'SURVIVES' if failed == 'all pass' else 'killed  '} {change}\n         {failed}", flush=True)
    print(f"{len(MUTANTS)} mutants, {survivors} survive")
    return int(survivors > 0)


def run_tests(copy: Path) -> str:
    """The names of the tests that fail in the copy, or "all pass"."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=no", "-p", "no:warnings", *TESTS],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    names = re.findall(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1):
        return f"broken: {done.stdout[-300:]}{done.stderr[-300:]}"
    return f"{len(names)} fail: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "all pass"


if __name__ == "__main__":
    sys.exit(main())
