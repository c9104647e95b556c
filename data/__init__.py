"""The cohort: raw MIMIC tables to shards to batches. Imports nothing of fusion or ray_jobs."""
