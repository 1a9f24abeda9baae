"""Floor 3: batches, losses, the optimiser, one step for every stage, its loop and its folder."""
