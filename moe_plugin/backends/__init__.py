"""The built-in batched backends, one file each: what they carry, and in which modes."""
