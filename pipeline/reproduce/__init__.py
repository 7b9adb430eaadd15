"""Makes published takes again from what is recorded of them, and compares them with what was published."""
