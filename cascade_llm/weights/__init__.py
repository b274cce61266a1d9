"""What a matrix is stored as, and how it multiplies."""
