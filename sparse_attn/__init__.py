"""What attention reads, and how it is computed: block-sparse attention for transformers models."""

__version__ = "0.1.0"
