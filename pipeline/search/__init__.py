"""Search by sound: the vectors of all sources and variations, and what is nearest among them."""
