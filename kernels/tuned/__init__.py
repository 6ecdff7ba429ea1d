"""Launch tables measured on named devices (package data)."""
