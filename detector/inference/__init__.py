"""From anything that shows an image to detections in its pixels, in torch or on an exported network."""
