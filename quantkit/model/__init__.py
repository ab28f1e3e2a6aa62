"""Where tensors come from: folders, GGUF files and the hub, and how an architecture is laid out."""
