"""From annotation files and images to batches: index, transforms, data set, collate. Never imports the network."""
