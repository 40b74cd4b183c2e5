"""Problems, chat templates, tokenizers: from files and generators to prompts."""
