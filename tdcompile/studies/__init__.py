"""The approximation-error study of arXiv 2305.05318: its cells, where they run, what they say."""
