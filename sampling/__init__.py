"""Tokens out of the prior, images out of tokens, the best of many on top."""

from sampling.pipeline import Pipeline as Pipeline
