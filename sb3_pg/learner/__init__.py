"""From a batch to new parameters, without env and algorithm."""
