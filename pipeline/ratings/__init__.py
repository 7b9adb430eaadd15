"""What people think of results: read from a file, compared with the scores, and the kept ones copied."""
