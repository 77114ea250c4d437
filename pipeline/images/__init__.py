"""Files to pixels and back, and pictures side by side."""
