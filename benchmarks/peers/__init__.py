"""The other side of comparisons: packages that are installed into environments of their own."""
