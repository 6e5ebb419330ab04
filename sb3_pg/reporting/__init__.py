"""Learning curves, scores, figures and reports from the logs of training runs."""
