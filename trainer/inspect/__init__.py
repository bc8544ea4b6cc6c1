"""Looking at a step afterwards: replay, ledger, explanation, another reward."""
