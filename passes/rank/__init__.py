"""Rank selectors."""
