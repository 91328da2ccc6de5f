"""For tests of what is built on avmm, and of avmm itself."""
