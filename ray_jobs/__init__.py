"""The jobs: what a user submits. The only package that imports ray.train, ray.tune and Ray Jobs."""
