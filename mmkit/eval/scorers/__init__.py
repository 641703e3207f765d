"""Scorers that reproduce the official evaluators: captions (BLEU, ROUGE-L, CIDEr-D), VQAv2 and TextVQA.

Standard library and numpy only. Nothing here reads a model; ``mmkit.eval.score`` puts the pieces together.
"""
