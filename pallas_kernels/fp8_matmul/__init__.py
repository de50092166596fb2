"""Products with matrices in FP8 that have one scale per block."""
