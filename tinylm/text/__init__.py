"""Text and tokens: corpora, the tokenizer, token files and the chat template; no JAX here."""
