"""The only package, ``plugin.py`` aside, that imports sglang."""
