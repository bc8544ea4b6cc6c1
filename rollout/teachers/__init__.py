"""Models that write reasoning traces: OpenAI-compatible endpoints and vLLM in this process."""
