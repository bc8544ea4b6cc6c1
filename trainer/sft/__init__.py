"""The supervised cold start before GRPO."""
