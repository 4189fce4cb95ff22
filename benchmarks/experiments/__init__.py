"""One command for each table or figure."""
