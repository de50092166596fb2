"""`python -m dspark_jax.plan`: what a decode step costs on a machine that is not there."""
