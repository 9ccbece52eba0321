"""The export stage: capture -> quantize the base -> lower -> verify -> bundle."""
