"""Small blocks with flat keyword arguments."""
