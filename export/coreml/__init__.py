"""The Core ML target: `target` is the way in; `delegate` is Core ML inside an ExecuTorch program."""
