"""The models being accelerated, each behind the same record of functions."""
