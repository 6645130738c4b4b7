"""Inference: embeddings in a stream, features of frozen encoders kept on disk."""
