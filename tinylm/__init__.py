"""A scaling-law laboratory in JAX. The map, floor by floor; a module imports from lower floors.

0  config, files, machine   frozen configs and ids; atomic, verified files; what is pinned
1  laws/, text/             parameters, FLOPs, fits, forecasts; corpora, tokenizer, tasks, shards
2  model/                   Flax modules, heads, n-gram tables, sampling
3  train/                   batches, losses, rewards, optimiser, one step, its loop, run folders
4  evaluate/                held-out loss, baselines, samples, rates with intervals
5  stages/                  pretrain, sft: one readable function each
6  sweep/                   many runs over workers
7  look/, bench             what a person sees; the machine and ourselves, timed
8  verbs/                   the command line's verbs
9  __main__                 argv, signals, exit codes

Letters: B batch, T query time, S key time, V vocabulary, D width, F mlp width, L layers, H query
heads, G key/value heads, K head width, P members of a population, R responses to a prompt.
"""
