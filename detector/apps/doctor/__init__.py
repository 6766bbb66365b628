"""What is wrong or odd about a data set, before a run is spent on it."""
