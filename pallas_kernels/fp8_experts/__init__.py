"""The same for rows sorted by expert: only experts that were chosen are read."""
