"""Write a detector for other runtimes, and compare what they find with what torch finds."""
