"""Training through signs: the PEFT tuner, its arithmetic, the loop, its data, and packing."""
