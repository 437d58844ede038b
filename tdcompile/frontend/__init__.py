"""From a network to its graph: symbolic tracing and ``torch.export``, each held against the network itself."""
