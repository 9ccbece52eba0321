"""The ONNX target: `target` is the way in."""
