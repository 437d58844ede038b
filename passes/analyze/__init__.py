"""Analysis passes."""
