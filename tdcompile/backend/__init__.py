"""From a graph to onnxruntime: export, parity, sessions, timing."""
