"""The learning rate of a training run, here and on a device."""

import math


def learning_rate(step: int, steps: int, rate: float, warmup: int) -> float:
    """Of step 0 .. steps - 1: a linear warm-up, then a cosine down to a twentieth of `rate`."""
    cosine = 0.525 + 0.475 * math.cos(math.pi * step / steps)
    return rate * cosine * min(1.0, (step + 1) / max(1, warmup))
