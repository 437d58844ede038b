"""From a graph to onnxruntime: export, parity check, sessions, timing."""
