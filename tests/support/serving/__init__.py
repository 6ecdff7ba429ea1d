"""A real SGLang server on CPU: a checkpoint to serve, processes, a client."""
