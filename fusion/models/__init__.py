"""One paper's model per file; the file name is the registry name."""
