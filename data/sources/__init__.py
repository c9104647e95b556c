"""Raw layouts to typed tables, release detected."""
