"""What commands write and draw: files, progress, the environment, plots."""
