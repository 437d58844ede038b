"""Helpers without domain knowledge: optional imports, process pools, captured output, progress, formatting."""
