"""The language model of the policy: attention, loading, merging, sharding, and the cost of a pass."""
