"""MLA and grouped-query attention over paged caches, rotation and the writes to the caches."""
