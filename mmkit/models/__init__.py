"""Models: mappers, ClipCap, LLaVA from parts, language models and tokenizers."""
