"""Advantages, objective, log-probs, packing, policy, checkpoints, and the loops that use them."""
