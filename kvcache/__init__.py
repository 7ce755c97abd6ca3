"""What a cache keeps, and where it lives. Nothing is here yet: caches arrive with version 0.2 (see CHANGELOG.md)."""
