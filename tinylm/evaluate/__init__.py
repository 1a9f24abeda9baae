"""Floor 4: what a model is worth on text it has not seen, with an interval on every rate."""
