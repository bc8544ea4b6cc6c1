"""The language model below a step: attention, loading, merging, sharding, what a pass costs."""
