"""Floor 8: models that answer over HTTP: an OpenAI-compatible endpoint and a local page."""
