"""Latency of a bundle: what is measured, how it is recorded, and what the records say."""
