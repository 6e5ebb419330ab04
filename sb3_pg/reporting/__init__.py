"""From logs to learning curves, scores, figures and reports."""
