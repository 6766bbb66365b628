"""From a trained network to one that runs fast, here or elsewhere."""
