"""Tests on a real GPU with real DeepEP; skipped elsewhere, with the reason."""
