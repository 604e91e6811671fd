"""Models: where weights come from, how they are loaded, and the multimodal graph."""
