"""The language model of the policy: attention, loading, the cost of a pass, merging, sharding."""
