"""Floor 6: cells become configs, and a list of runs becomes work for the cores at hand."""
