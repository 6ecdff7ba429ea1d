"""SGLang integration: the only package that imports sglang."""
