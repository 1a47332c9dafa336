"""What pruners keep of images, stage by stage, and one page that shows it."""
