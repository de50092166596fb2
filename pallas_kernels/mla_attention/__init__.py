"""Attention of rows to verify over the compressed latents of their sequence."""
