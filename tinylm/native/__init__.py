"""Functions in C that XLA's CPU calls: products, attention, norms, gates, a narrow model's loss."""
