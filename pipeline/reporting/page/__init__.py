"""One HTML page that needs nothing but itself: what it can hold, how that is laid out, its style and its script."""
