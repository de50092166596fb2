"""Rejection sampling of a drafted block over the vocabulary in one pass."""
