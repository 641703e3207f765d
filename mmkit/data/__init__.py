"""Data: sources, decoding, order, conversations, and the demo world."""
