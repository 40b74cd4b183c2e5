"""The generation engine: paged KV cache, sampling, continuous batching."""
