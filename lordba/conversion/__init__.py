"""From low-rank factors to signs and scales."""
