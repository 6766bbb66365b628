"""From annotation files and pictures to batches: index, transforms, data set, collate. Never imports the network."""
