"""One run for the day a GPU is there: is everything right, and how fast is it. See README.md beside this file."""
