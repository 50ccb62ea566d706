"""One reader for each form in which captioned images come."""
