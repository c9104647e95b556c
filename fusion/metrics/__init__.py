"""Metrics on numpy arrays; nothing of torch or of the rest of fusion."""
