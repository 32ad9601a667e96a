"""The index of a split: its samples on disk, memory-mapped, so that no stage or rank holds them in memory of its own.

`build` makes it from a reader's samples; `rows` says what a row holds; `images` keeps the hashes of image files;
`samples` is what the stages see; `lock` keeps two processes from doing the same work.
"""
