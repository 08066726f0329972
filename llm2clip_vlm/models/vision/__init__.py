"""Vision towers: the contract, and those that transformers does not have."""
