"""PPO: a critic beside the policy. The loop is in ppo.py; what it shares with GRPO is in trainer/grpo.py."""
