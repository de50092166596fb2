"""Reads, writes and explains the published draft checkpoint formats."""
