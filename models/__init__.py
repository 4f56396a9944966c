"""Model definitions: configurations, layers and the decoder."""
