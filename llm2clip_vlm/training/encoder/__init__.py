"""Stage 2b and its control: vision towers."""
