"""A draft's context keys and values, projected from target states and written to pages."""
