"""Before and around runs on Ray: checks, nodes, capacity, provenance, one run, many runs, ablations."""
