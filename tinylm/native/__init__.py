"""Functions in C that XLA's CPU calls: oneDNN's product, attention, a narrow model's loss."""
