"""Direct measurements: what a network costs, and how fast it is on this machine."""
