"""The study of approximation errors."""
