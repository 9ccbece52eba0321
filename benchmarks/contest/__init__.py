"""The kernel benchmark's parts: native C side, baselines, measuring, report, plot."""
