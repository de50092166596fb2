"""Reads and writes the published draft checkpoint formats; arrives with the first of them."""
