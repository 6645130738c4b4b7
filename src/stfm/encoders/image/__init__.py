"""Image encoders: tiles in, one vector a tile out."""
