"""The gallery: pages in the outbox by which people listen to results, compare and rate them."""
