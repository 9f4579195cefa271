"""A comparison as one HTML page that needs neither network nor server."""
