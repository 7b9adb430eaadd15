"""Publication of results: verified files, written whole or not at all, and their manifest."""
