"""From a network to its graph."""
