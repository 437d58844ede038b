"""Cost models: each prices one layer."""
