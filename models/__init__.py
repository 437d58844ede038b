"""Reference networks, one file per architecture, and the code that trains the quick start's checkpoint."""
