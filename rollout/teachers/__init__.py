"""Models that write reasoning traces: an OpenAI-compatible endpoint, or a checkpoint in a vLLM engine."""
