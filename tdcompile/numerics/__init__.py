"""Linear algebra that knows no layers."""
