"""Floor 5: each stage is one function that reads top to bottom; stages never import each other."""
