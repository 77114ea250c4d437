"""All that can be set, composed, with presets, from files and the command line."""
