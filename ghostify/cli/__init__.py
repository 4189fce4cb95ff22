"""The `ghostify` command and the demo."""
