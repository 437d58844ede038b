"""Training and repair passes: each changes weights or statistics."""
