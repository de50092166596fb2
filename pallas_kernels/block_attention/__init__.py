"""Attention of a drafted block over the paged context and itself."""
