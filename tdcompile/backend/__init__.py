"""From a graph to an ONNX model in onnxruntime: export, parity, timing."""
