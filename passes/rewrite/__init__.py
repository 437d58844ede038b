"""Rewrite passes: each changes the graph."""
