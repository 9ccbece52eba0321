"""The ExecuTorch target: `target` is the way in."""
