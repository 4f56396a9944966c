"""Data: seqio tasks, the token store, the order of rows as arithmetic, and loaders."""
