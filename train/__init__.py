"""Trains a draft model against its target: `python -m dspark_jax.train`."""
