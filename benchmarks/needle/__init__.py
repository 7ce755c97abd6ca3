"""Needle-in-a-haystack test for any transformers model, with the small retrieval model it runs by default."""
