"""`rayfuse tune`: search over any dotted path of a run's config."""
