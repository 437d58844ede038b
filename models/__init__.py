"""Reference networks, one file an architecture, and the code that trains the checkpoint of the quick start."""
