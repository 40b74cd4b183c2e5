"""The language model: definition, sharding, log-probs, Hugging Face folders."""
