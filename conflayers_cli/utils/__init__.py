"""What every room uses and that knows no model: files, notices, progress."""
