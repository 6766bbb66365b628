"""One HTML page that shows an evaluation."""
