"""Before and around runs on Ray: preflight, nodes, capacity, provenance, one run, concurrent runs, ablations."""
