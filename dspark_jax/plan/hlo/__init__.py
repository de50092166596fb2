"""Optimised HLO, read as text: what a compiled program moves, computes and sends."""
