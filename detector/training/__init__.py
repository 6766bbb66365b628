"""Training and distributed evaluation: the only package that imports Lightning."""
