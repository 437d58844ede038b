"""From a network to its graph: loading, tracing, checks against the network, layers as modules."""
