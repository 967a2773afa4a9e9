"""Task scheduling: which peers a request goes through. Standard library only; imports in milliseconds."""
