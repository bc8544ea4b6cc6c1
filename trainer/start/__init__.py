"""Before the first step: the parts of a run, ranks that only sample, and whether it all fits."""
