"""The prompt of a call: read, its images found, shortened."""
