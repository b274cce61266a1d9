"""What the developers of the project measure: score tables against other engines, growth, planning."""
