"""Optional imports, process pool, quiet, progress, formatting."""
