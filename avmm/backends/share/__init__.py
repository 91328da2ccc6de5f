"""A folder of the host for a guest: FUSE (:mod:`fuse`, :mod:`server`) over a folder nothing leaves (:mod:`folder`)."""
