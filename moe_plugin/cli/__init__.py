"""The `moe-plugin` command."""
