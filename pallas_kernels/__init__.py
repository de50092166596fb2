"""Hot loops as Pallas kernels, each beside its reference; imports jax and nothing of ours."""
