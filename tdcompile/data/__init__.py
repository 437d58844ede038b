"""Samples, and how they are loaded."""
