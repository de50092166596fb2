"""The config.json of every published draft format: one table of keys each, read and written."""
