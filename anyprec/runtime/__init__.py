"""What every room needs to run: batches, processes, modes, progress, files, tables."""
