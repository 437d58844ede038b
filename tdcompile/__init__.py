"""tdcompile: a tensor-decomposition compiler."""
