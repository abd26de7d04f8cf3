"""Several members that see the same images: whole networks, or branches on one trunk."""
