"""Gene encoders: log-normalised counts in, one vector a spot out."""
