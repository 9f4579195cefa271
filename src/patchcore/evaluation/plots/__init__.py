"""Everything that is drawn; the only package that imports matplotlib."""
