"""Reports as terminal tables, HTML pages and pictures."""
