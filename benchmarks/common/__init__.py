"""Images, weights, records and pages that several benchmarks share."""
