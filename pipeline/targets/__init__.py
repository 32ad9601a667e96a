"""Soft targets of a teacher, and the store that keeps them by sample_id.

Words, each for one thing:

    soft targets   what is kept of the teacher's distribution at a sample's answer tokens: tensors, from logits
    sketches       what is kept of its hidden states: small random projections
    codec          how soft targets become bytes and back
    store          soft targets, and sketches, of all samples of a data set by one teacher: a folder of files
    folder         where a store's files are: a directory, or a place in an object store
    identity       everything that changes a number in a store; kept in its manifest, compared before any use
    record         one sample's bytes of one kind, `targets` or `sketches`
    shard          the records of some samples: a safetensors file of each kind
    commit         a small JSON file, written last, that makes a shard's file count and says what it must look like
    part           a list of samples and how they are cut into shards; data that come later add a part
    lease          a file that says which worker is at work on a shard

`container/` keeps records and knows no codec: folders, sealed JSON, shards, the manifest with its parts, leases, and a
reader and a writer of all this. `store.py` and `sketches.py` add the codecs.
"""
