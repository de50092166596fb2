"""Checkpoints in Hugging Face layout: found, checked, and read into sharded arrays."""
