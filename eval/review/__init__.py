"""Blind review by experts: the page of anonymous pairs of answers, and the summary of the verdicts."""
