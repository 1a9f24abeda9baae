"""Floor 2: Flax modules. Letters: B batch, T query time, S key time, V vocab, D width, F mlp,
L layers, H query heads, G key/value heads, K head width."""
