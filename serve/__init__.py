"""Serves a target and its draft over HTTP; arrives with the decoding engine."""
