"""What pruned models are asked, and how their answers count."""
